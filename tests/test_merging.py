"""LoRAs from files straight into the parameters, against what the formats' own libraries compute."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import allaprima as ap
from allaprima.verification.metrics import psnr
from tests.lora_files import lycoris_file, peft_file, set_multiplier
from tests.test_pipelines import draw
from tests.tiny import tiny_bert_pipeline, tiny_pipeline

SAME_DB = 60.0
NEARER_DB = 30.0
"""A picture with a LoRA comes so much nearer to the reference's than one without: or the LoRA would show nothing."""


def digest(pipe: Any) -> str:
    """Of all bits of the weights that LoRAs change."""
    found = hashlib.sha256()
    for part in (pipe.unet, pipe.text_encoder):
        for name, tensor in part.state_dict().items():
            found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def alike(a: Any, b: Any) -> float:
    return psnr(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))


def assert_same(drawn: Any, wanted: Any, without: Any) -> None:
    assert alike(drawn, wanted) > max(SAME_DB, alike(without, wanted) + NEARER_DB)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files for the tiny pipeline that change pictures; they have layers in common."""
    folder = tmp_path_factory.mktemp("two")
    lycoris_file(tiny_pipeline(), folder / "ink.safetensors", "locon")
    lycoris_file(tiny_pipeline(), folder / "水墨.v1.5.safetensors", "lokr")
    return folder / "ink.safetensors", folder / "水墨.v1.5.safetensors"


# ---- formats


FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "kohya": ("locon", {}),
    "rank 1": ("locon", {"lora_dim": 1}),
    "rank above the layer's": ("locon", {"lora_dim": 70}),
    "rs-lora": ("locon", {"rs_lora": True}),
    "locon with a core": ("locon", {"use_tucker": True}),
    "loha": ("loha", {}),
    "loha with cores": ("loha", {"use_tucker": True}),
    "lokr": ("lokr", {"factor": 4}),
    "lokr, both factored": ("lokr", {"decompose_both": True, "lora_dim": 1, "factor": 4}),
    "lokr with a core": ("lokr", {"use_tucker": True, "factor": 4, "lora_dim": 2}),
    "lokr, whole": ("lokr", {"full_matrix": True}),
    "full": ("full", {}),
    "norm": ("norm", {}),
    "ia3": ("ia3", {}),
    "ia3 on inputs": ("ia3", {"train_on_input": True}),
}


PIPELINES = {"clip": (tiny_pipeline, "a red apple"), "bert": (tiny_bert_pipeline, "红色的苹果")}


def quick(pipe: Any, prompt: str = "a red apple") -> Any:
    return draw(pipe, prompt, num_inference_steps=1)


@pytest.fixture(scope="module")
def untouched() -> dict[str, Any]:
    return {kind: quick(build(), prompt) for kind, (build, prompt) in PIPELINES.items()}


@pytest.mark.parametrize(
    ("form", "kind"), [*((form, "clip") for form in FORMATS), ("kohya", "bert"), ("lokr", "bert"), ("full", "bert")]
)
def test_each_format_draws_what_its_library_draws(
    form: str, kind: str, untouched: dict[str, Any], tmp_path: Path
) -> None:
    algorithm, options = FORMATS[form]
    build, prompt = PIPELINES[kind]
    reference, pipe, path = build(), build(), tmp_path / "ink.safetensors"
    modules = lycoris_file(reference, path, algorithm, **options)
    strength = 1.0 if algorithm == "full" else 0.7  # a full fine-tune of LyCORIS' has no strength
    set_multiplier(modules, strength)
    wanted = quick(reference, prompt)
    found = ap.loras(pipe, {str(path): strength})[str(path)]
    assert_same(quick(pipe, prompt), wanted, without=untouched[kind])
    assert not found.unused
    assert sorted(found.applied) == sorted(load_file(path))


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr"])
@pytest.mark.parametrize("by_row", [True, False])
def test_decomposed_weights_of_kohya_and_lycoris(
    algorithm: str, by_row: bool, untouched: dict[str, Any], tmp_path: Path
) -> None:
    reference, pipe, path = tiny_pipeline(), tiny_pipeline(), tmp_path / "ink.safetensors"
    lycoris_file(reference, path, algorithm, weight_decompose=True, wd_on_out=by_row)
    wanted = quick(reference)
    ap.loras(pipe, {str(path): 1.0})
    assert_same(quick(pipe), wanted, without=untouched["clip"])


PEFT: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 7},
    "rank-stabilised": {"lora_alpha": 2, "use_rslora": True},
    "patterns": {"rank_pattern": {"attn2.to_k": 5}, "alpha_pattern": {"attn2.to_k": 1.5}, "lora_alpha": 4},
    "dora": {"use_dora": True},
    "biased": {"lora_bias": True},
}


@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor")  # PEFT takes biases for torn matrices
@pytest.mark.parametrize("form", PEFT)
def test_files_of_diffusers_and_peft(form: str, untouched: dict[str, Any], tmp_path: Path) -> None:
    reference, pipe = tiny_pipeline(), tiny_pipeline()
    targets = ["to_out.0", "conv1", "proj_in"] + (["to_q", "to_k"] if form != "biased" else [])
    path = peft_file(reference, tmp_path, targets, **PEFT[form])
    strength = 1.0 if form == "dora" else 0.6  # elsewhere PEFT scales before it normalises
    reference.set_adapters(["made"], [strength])
    wanted = quick(reference)
    found = ap.loras(pipe, {str(tmp_path): strength})[str(tmp_path)]
    assert_same(quick(pipe), wanted, without=untouched["clip"])
    assert found.path == path
    assert not found.unused
