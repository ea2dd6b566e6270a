"""LoRAs from files straight into the parameters, against what the formats' own libraries compute."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import allaprima as ap
from allaprima.config import Config
from allaprima.errors import AdapterError, CheckpointError
from allaprima.merging import reapply
from allaprima.models import LORAS
from allaprima.pipelines import as_task, eager
from allaprima.verification.metrics import psnr
from allaprima.weights import lora_files
from allaprima.weights.deltas import LowRank
from allaprima.weights.lora_names import ldm_names
from allaprima.weights.loras import merged
from tests.lora_files import BLOCK, flat, lycoris_file, peft_file, set_multiplier
from tests.test_pipelines import difference, draw
from tests.tiny import tiny_bert_pipeline, tiny_pipeline, tiny_sd3_pipeline, tiny_xl_pipeline

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


def test_factors_of_several_dtypes_in_one_file(two: tuple[Path, Path], tmp_path: Path) -> None:
    tensors, kinds = load_file(two[0]), (torch.float16, torch.bfloat16, torch.float32)
    mixed = {key: value.to(kinds[i % 3]) for i, (key, value) in enumerate(tensors.items())}
    save_file(mixed, tmp_path / "mixed.safetensors")
    save_file({key: value.float() for key, value in mixed.items()}, tmp_path / "float.safetensors")
    digests = []
    for name in ("mixed", "float"):
        pipe = tiny_pipeline()
        ap.loras(pipe, {name: 0.5}, lora_dir=tmp_path)
        digests.append(digest(pipe))
    assert digests[0] == digests[1]


def test_half_precision_is_rounded_once(two: tuple[Path, Path]) -> None:
    pipe = tiny_pipeline(dtype=torch.bfloat16)
    layer = pipe.unet.get_submodule(f"{BLOCK}.attn1.to_q")
    base = layer.weight.detach().clone()
    ap.loras(pipe, {str(two[0]): -0.3})
    tensors, name = load_file(two[0]), f"lora_unet_{flat(BLOCK)}_attn1_to_q"
    up, down = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.lora_down.weight"].double()
    exact = base.double() - 0.3 * float(tensors[f"{name}.alpha"]) / down.shape[0] * up @ down
    step = torch.finfo(torch.bfloat16).eps * exact.abs()
    error = (layer.weight.double() - exact).abs()
    assert (error <= step * (0.5 + 2**-10)).all(), "half a step of bfloat16, and what float32 rounds"


def test_embedded_loras_draw_what_diffusers_draws() -> None:
    pipe, name = ap.load("emoji", dtype="float32"), "sketch"
    pipe.set_progress_bar_config(disable=True)
    before = quick(pipe)
    pipe.load_lora_weights(str(LORAS[name].path), adapter_name="reference")
    pipe.set_adapters(["reference"], [0.8])
    wanted = quick(pipe)
    pipe.unload_lora_weights()
    for asked in (name, str(LORAS[name].kohya_path)):
        ap.loras(pipe, {asked: 0.8})
        assert_same(quick(pipe), wanted, without=before)
    ap.loras(pipe, {})
    assert np.array_equal(quick(pipe), before)


# ---- bits


def test_after_a_hundred_changes_the_bits_are_the_first_ones(two: tuple[Path, Path]) -> None:
    pipe, numbers = tiny_pipeline(), random.Random(0)
    names = [str(path) for path in two]
    before, places = digest(pipe), [parameter.data_ptr() for parameter in pipe.unet.parameters()]
    for _ in range(100):
        chosen = numbers.sample(names, numbers.randrange(3))
        ap.loras(pipe, {name: numbers.uniform(-2, 2) for name in chosen})
    ap.loras(pipe, {names[0]: 0.5, names[1]: -0.2})
    merged_digest = digest(pipe)
    assert digest(pipe) != before
    assert not ap.loras(pipe, {})
    assert digest(pipe) == before
    assert [parameter.data_ptr() for parameter in pipe.unet.parameters()] == places
    ap.loras(pipe, {names[0]: 0.5, names[1]: -0.2})
    assert digest(pipe) == merged_digest, "the same LoRAs are the same bits, whatever was there before"


def test_what_no_adapter_touches_any_more_is_forgotten(two: tuple[Path, Path]) -> None:
    pipe = tiny_pipeline()
    ap.loras(pipe, {str(two[0]): 1.0})
    assert merged(pipe.unet).base_bytes > 0
    ap.loras(pipe, {str(two[0]): {"unet": 0.0, "text_encoder": 1.0}})
    assert merged(pipe.unet).base_bytes == 0
    assert merged(pipe.text_encoder).base_bytes > 0


def test_a_change_of_weight_reads_no_file(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    ap.loras(pipe, {str(two[0]): 1.0})
    monkeypatch.setattr(lora_files, "understand", lambda *_: pytest.fail("the file was read again"))
    ap.loras(pipe, {str(two[0]): 0.5})


def test_a_file_that_changed_is_read_again(two: tuple[Path, Path], tmp_path: Path) -> None:
    pipe, path = tiny_pipeline(), tmp_path / "ink.safetensors"
    save_file(load_file(two[0]), path)
    ap.loras(pipe, {str(path): 1.0})
    first = digest(pipe)
    save_file({key: value * 2 for key, value in load_file(two[0]).items()}, path)
    os.utime(path, ns=(1, 1))  # clocks may be coarse
    ap.loras(pipe, {str(path): 1.0})
    assert digest(pipe) != first


def test_weights_written_by_others_are_the_new_base(two: tuple[Path, Path]) -> None:
    pipe, other = tiny_pipeline(), tiny_pipeline(seed=1)
    ap.loras(pipe, {str(two[0]): 1.0})
    pipe.unet.load_state_dict(other.unet.state_dict())
    lost = ap.loras(pipe).overwritten
    assert f"unet.{BLOCK}.attn1.to_q.weight" in lost
    assert not any(name.startswith("text_encoder") for name in lost)
    reapply(pipe)
    other.text_encoder.load_state_dict(tiny_pipeline().text_encoder.state_dict())
    ap.loras(other, {str(two[0]): 1.0})
    assert digest(pipe) == digest(other)
    assert not ap.loras(pipe).overwritten
    ap.loras(pipe, {})
    ap.loras(other, {})
    assert digest(pipe) == digest(other)


def test_a_cast_after_merging_keeps_what_is_underneath(two: tuple[Path, Path]) -> None:
    pipe, plain = tiny_pipeline(), tiny_pipeline()
    ap.loras(pipe, {str(two[0]): 1.0})
    pipe.unet.to(torch.float16)
    plain.unet.to(torch.float16)
    ap.loras(plain, {str(two[0]): 1.0})
    ap.loras(pipe, {str(two[0]): 1.0})
    assert digest(pipe) == digest(plain)
    ap.loras(pipe, {})
    ap.loras(plain, {})
    assert digest(pipe) == digest(plain)


def test_another_layout_and_another_place_are_no_other_numbers(two: tuple[Path, Path]) -> None:
    pipe, name = tiny_pipeline(dtype=torch.float16), str(two[0])
    ap.loras(pipe, {name: 1.0})
    pipe.unet.to(memory_format=torch.channels_last)
    for parameter in pipe.unet.parameters():  # as the engine does it, here off the grid of 8 bytes
        place = torch.empty(parameter.numel() + 1, dtype=parameter.dtype)[1:].view(parameter.shape)
        parameter.data = place.copy_(parameter.data)
    assert not ap.loras(pipe).overwritten
    ap.loras(pipe, {})
    assert digest(pipe) == digest(tiny_pipeline(dtype=torch.float16))


class Pieces(SimpleNamespace):
    """What a pipeline is to `loras`: its components."""


def test_parameters_that_cannot_be_changed_are_told(two: tuple[Path, Path]) -> None:
    layer = "transformer_blocks.0.attn.to_q"
    module = nn.ModuleDict({"transformer_blocks": nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict()})])})
    attention = module.get_submodule("transformer_blocks.0.attn")
    path = two[0].with_name("flux.safetensors")
    save_file({f"transformer.{layer}.{key}": value for key, value in kohya().items()}, path)
    linear = nn.Linear(32, 32, bias=False)
    attention.to_q = linear
    pipe = Pieces(components={"transformer": module})
    assert ap.loras(pipe, {str(path): {"unet": 2.0}})[str(path)].weights == {"transformer": 2.0}
    ap.loras(pipe, {})
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"quantized.*int8"):
        ap.loras(pipe, {str(path): 1.0})
    attention.to_q = nn.Linear(32, 32, bias=False, device="meta")
    with pytest.raises(AdapterError, match="no memory"):
        ap.loras(pipe, {str(path): 1.0})


@pytest.mark.gpu
def test_on_a_gpu_recorded_graphs_go_on(two: tuple[Path, Path]) -> None:
    pipe, plain, name = tiny_pipeline().to("cuda"), tiny_pipeline().to("cuda"), str(two[0])
    ap.optimize(pipe, Config())
    before = quick(pipe)
    captures = ap.explain(pipe).captures
    for weight in (0.8, -0.4):
        ap.loras(pipe, {name: weight})
        ap.loras(plain, {name: weight})
        assert alike(quick(pipe), quick(plain)) > SAME_DB
    assert ap.explain(pipe).captures == captures
    ap.loras(pipe, {})
    assert np.array_equal(quick(pipe), before)
    assert digest(pipe.to("cpu")) == digest(tiny_pipeline())


def test_a_failure_on_the_way_is_taken_back(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    ap.loras(pipe, {str(two[1]): 0.5})
    before, calls = digest(pipe), iter(range(100))
    original = LowRank.add_to

    def failing(self: LowRank, *args: Any) -> None:
        if next(calls) == 5:
            raise MemoryError("no more")
        original(self, *args)

    monkeypatch.setattr(LowRank, "add_to", failing)
    with pytest.raises(MemoryError):
        ap.loras(pipe, {str(two[0]): 1.0})
    assert digest(pipe) == before
    assert list(ap.loras(pipe)) == [str(two[1])]
    ap.loras(pipe, {})
    assert digest(pipe) == digest(tiny_pipeline())


def test_tensors_of_inference_mode(two: tuple[Path, Path]) -> None:
    with torch.inference_mode():
        pipe = tiny_pipeline()
    before = digest(pipe)
    ap.loras(pipe, {str(two[0]): 1.0})
    ap.loras(pipe, {str(two[0]): -1.0})
    assert digest(pipe) != before
    ap.loras(pipe, {})
    assert digest(pipe) == before


def test_calls_from_within_inference_mode(two: tuple[Path, Path], tmp_path: Path) -> None:
    pipe, plain, path = tiny_pipeline(), tiny_pipeline(), tmp_path / "ink.safetensors"
    save_file(load_file(two[0]), path)  # read for the first time within
    version = pipe.unet.get_submodule(f"{BLOCK}.attn1.to_q").weight._version
    with torch.inference_mode():
        ap.loras(pipe, {str(path): 1.0})
    assert pipe.unet.get_submodule(f"{BLOCK}.attn1.to_q").weight._version > version, "or engines would not notice"
    ap.loras(pipe, {str(path): -0.5})
    ap.loras(plain, {str(path): -0.5})
    assert digest(pipe) == digest(plain)
    ap.loras(pipe, {})
    assert digest(pipe) == digest(tiny_pipeline())


# ---- engines


@pytest.fixture
def optimized() -> Any:
    return ap.optimize(tiny_pipeline(), Config(backend="aten"))


def test_an_optimized_pipeline_draws_with_them_and_captures_nothing(optimized: Any, two: tuple[Path, Path]) -> None:
    names, plain = [str(path) for path in two], tiny_pipeline()
    before = quick(optimized)
    captures = ap.explain(optimized).captures
    for i in range(20):
        chosen = {names[i % 2]: i / 10 - 0.5} | ({names[0]: 0.4} if i % 3 == 0 else {})
        ap.loras(optimized, chosen)
        if i % 5 == 4:
            ap.loras(plain, chosen)
            assert difference(quick(optimized), quick(plain)) < 2e-4
        elif i % 2:
            quick(optimized)
    assert ap.explain(optimized).captures == captures
    ap.loras(optimized, {})
    assert np.array_equal(quick(optimized), before)


def test_they_survive_optimize_and_restore(two: tuple[Path, Path]) -> None:
    pipe, name = tiny_pipeline(), str(two[0])
    before = digest(pipe)
    ap.loras(pipe, {name: 0.7})
    drawn = quick(pipe)
    ap.optimize(pipe, Config(backend="aten"))
    assert difference(quick(pipe), drawn) < 2e-4
    assert ap.loras(pipe)[name].weights == {"text_encoder": 0.7, "unet": 0.7}
    ap.restore(pipe)
    assert np.array_equal(quick(pipe), drawn)
    ap.loras(pipe, {})
    assert digest(pipe) == before


def test_pipelines_that_share_modules_share_loras(optimized: Any, two: tuple[Path, Path]) -> None:
    twin = as_task(optimized, "img2img")
    ap.loras(optimized, {str(two[0]): 0.7})
    assert ap.loras(twin).keys() == {str(two[0])}
    ap.loras(twin, {})
    assert digest(optimized) == digest(tiny_pipeline())


def test_openvino_builds_again_for_a_change_and_draws_the_same(two: tuple[Path, Path]) -> None:
    pytest.importorskip("openvino")
    pipe, plain, name = tiny_pipeline(), tiny_pipeline(), str(two[0])
    ap.optimize(pipe, Config(backend="openvino"))
    quick(pipe)
    before = ap.explain(pipe)
    for weights in (0.8, {"unet": -0.4, "text_encoder": 0.8}):
        ap.loras(pipe, {name: weights})
        ap.loras(plain, {name: weights})
        assert difference(quick(pipe), quick(plain)) < 1e-3
    after = ap.explain(pipe)
    assert after.captures == before.captures
    assert after.rebuilds == before.rebuilds + 3, "UNet and text encoder, then only the UNet"


# ---- what does not fit


def kohya(shape: tuple[int, int] = (32, 32), rank: int = 2) -> dict[str, torch.Tensor]:
    return {"lora_down.weight": torch.ones(rank, shape[1]), "lora_up.weight": torch.ones(shape[0], rank)}


def test_ten_unknown_keys_are_named_and_the_rest_is_applied(two: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(two[0])
    unknown = {
        **{f"lora_unet_{flat(BLOCK)}_attn3_to_q.{key}": value for key, value in kohya().items()},
        **{f"lora_unet_down_blocks_7_resnets_0_conv1.{key}": value for key, value in kohya().items()},
        **{f"lora_te2_text_model_encoder_layers_0_mlp_fc1.{key}": value for key, value in kohya().items()},
        f"lora_unet_{flat(BLOCK)}_attn1_to_q.lora_sideways.weight": torch.ones(2),
        f"lora_unet_{flat(BLOCK)}_attn1_to_k.lora_up.weight": torch.ones(32, 2),
        f"lora_unet_{flat(BLOCK)}_attn1_to_v.diff_b": torch.ones(32),
        "bundle_emb.ink.string_to_param.*": torch.ones(1, 32),
    }
    assert len(unknown) == 10
    save_file(tensors | unknown, tmp_path / "odd.safetensors")
    pipe, plain = tiny_pipeline(), tiny_pipeline()
    with pytest.warns(UserWarning, match="10 of") as told:
        found = ap.loras(pipe, {"odd": 0.5}, lora_dir=tmp_path)["odd"]
    assert found.unused.keys() == unknown.keys()
    assert all(key in str(told[0].message) for key in unknown)
    assert sorted(found.applied) == sorted(tensors)
    assert found.unused[f"lora_unet_{flat(BLOCK)}_attn3_to_q.lora_up.weight"] == f"nearest is unet.{BLOCK}.attn2.to_q"
    assert "text_encoder_2" in found.unused["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"]
    assert found.unused[f"lora_unet_{flat(BLOCK)}_attn1_to_v.diff_b"] == f"unet.{BLOCK}.attn1.to_v has no bias"
    ap.loras(plain, {str(two[0]): 0.5})
    assert digest(pipe) == digest(plain)
    ap.loras(pipe, {"odd": 0.6}, lora_dir=tmp_path)  # told once: another warning would be an error here


def test_a_file_of_which_nothing_fits(tmp_path: Path) -> None:
    save_file(
        {f"lora_unet_nowhere_to_be_seen.{key}": value for key, value in kohya().items()}, tmp_path / "a.safetensors"
    )
    save_file({"single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8)}, tmp_path / "b.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 8)}, tmp_path / "c.safetensors")
    pipe = tiny_pipeline()
    for name, said in (("a", "nowhere_to_be_seen"), ("b", "Flux"), ("c", "none of its 1 keys")):
        with pytest.raises(AdapterError, match=said):
            ap.loras(pipe, {name: 1.0}, lora_dir=tmp_path)


def test_a_lora_of_another_architecture_names_both_shapes(two: tuple[Path, Path], tmp_path: Path) -> None:
    name = f"lora_unet_{flat(BLOCK)}_attn2_to_k"
    tensors = load_file(two[0]) | {f"{name}.{key}": value for key, value in kohya((32, 2048), rank=3).items()}
    save_file(tensors, tmp_path / "xl.safetensors")
    pipe = tiny_pipeline()
    with pytest.raises(AdapterError, match=r"\[32, 2048\].*\[32, 32\].*SDXL") as error:
        ap.loras(pipe, {"xl": 1.0}, lora_dir=tmp_path)
    assert f"{name}.lora_down.weight" in str(error.value)
    assert digest(pipe) == digest(tiny_pipeline()), "nothing is written before all is known to fit"


def test_two_names_for_one_module_do_not_count_twice(two: tuple[Path, Path], tmp_path: Path) -> None:
    again = {
        f"unet.{BLOCK}.attn1.to_q.lora_A.weight": torch.ones(2, 32),
        f"unet.{BLOCK}.attn1.to_q.lora_B.weight": torch.ones(32, 2),
    }
    save_file(load_file(two[0]) | again, tmp_path / "twice.safetensors")
    pipe = tiny_pipeline()
    with pytest.warns(UserWarning, match="same module"):
        found = ap.loras(pipe, {"twice": 1.0}, lora_dir=tmp_path)["twice"]
    assert len(found.unused) == 2


def test_broken_files(two: tuple[Path, Path], tmp_path: Path) -> None:
    pipe, tensors = tiny_pipeline(), load_file(two[0])
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, tmp_path / "nan.safetensors")
    save_file(tensors | {key: tensors[key][:, :1].clone()}, tmp_path / "torn.safetensors")
    (tmp_path / "short.safetensors").write_bytes(two[0].read_bytes()[:-10])
    for name, kind, said in (
        ("nan", AdapterError, "NaN"),
        ("torn", AdapterError, "do not belong together"),
        ("short", CheckpointError, "short"),
    ):
        with pytest.raises(kind, match=said):
            ap.loras(pipe, {name: 1.0}, lora_dir=tmp_path)
    assert digest(pipe) == digest(tiny_pipeline())


@pytest.mark.parametrize(
    "weight", [float("nan"), float("inf"), "0.8", True, None, {"unet": float("nan")}, {"vae": 1.0}]
)
def test_what_is_no_weight_is_refused(weight: Any, two: tuple[Path, Path]) -> None:
    with pytest.raises(AdapterError, match=r"weight|vae"):
        ap.loras(tiny_pipeline(), {str(two[0]): weight})


def test_a_weight_for_each_component(two: tuple[Path, Path]) -> None:
    name, pipe, plain = str(two[0]), tiny_pipeline(), tiny_pipeline()
    ap.loras(pipe, {name: {"unet": 0.4}})
    assert ap.loras(pipe)[name].weights == {"text_encoder": 1.0, "unet": 0.4}, (
        "what is not named has 1, as in diffusers"
    )
    ap.loras(pipe, {name: {"unet": 0.4, "text_encoder": 0}})
    ap.loras(plain, {name: 0.4})
    for one, other, same in ((pipe.unet, plain.unet, True), (pipe.text_encoder, plain.text_encoder, False)):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is same


@pytest.mark.parametrize("weights", ["sketch", ["sketch"], 0.8])
def test_what_is_no_table_of_weights_is_refused(weights: Any) -> None:
    with pytest.raises(AdapterError, match="names and their weights"):
        ap.loras(tiny_pipeline(), weights)


def test_only_pipelines_have_loras() -> None:
    with pytest.raises(AdapterError, match="Linear"):
        ap.loras(torch.nn.Linear(1, 1), {})


# ---- beside diffusers' own


def test_beside_an_adapter_of_diffusers(two: tuple[Path, Path], tmp_path: Path) -> None:
    """PEFT wraps the layers; the parameters inside are the same ones."""
    peft_file(tiny_pipeline(), tmp_path, ["to_q", "to_k"])
    pipe, reference, name = tiny_pipeline(), tiny_pipeline(), str(two[0])
    for one in (pipe, reference):
        one.load_lora_weights(tmp_path, adapter_name="theirs")
    lycoris = lycoris_file(tiny_pipeline(), tmp_path / "copy.safetensors", "locon")
    assert lycoris
    ap.loras(pipe, {name: 0.7})
    ap.loras(reference, {str(tmp_path): 1.0, name: 0.7})
    reference.unload_lora_weights()
    assert difference(quick(pipe), quick(reference)) < 2e-4
    pipe.unload_lora_weights()
    ap.loras(pipe, {})
    assert digest(pipe) == digest(tiny_pipeline())


@pytest.mark.filterwarnings("ignore:No LoRA keys")
def test_an_optimized_pipeline_with_adapters_of_both_kinds(
    optimized: Any, two: tuple[Path, Path], tmp_path: Path
) -> None:
    peft_file(tiny_pipeline(), tmp_path, ["to_q", "to_k"])
    name = str(two[0])
    quick(optimized)
    captures = ap.explain(optimized).captures
    optimized.load_lora_weights(tmp_path, adapter_name="theirs")
    for weight in (0.7, -0.2):
        ap.loras(optimized, {name: weight})
        ours = quick(optimized)
        with eager(optimized):
            assert difference(ours, quick(optimized)) < 2e-4
    assert ap.explain(optimized).captures == captures
    assert not ap.explain(optimized).fallbacks


@pytest.mark.filterwarnings("ignore:No LoRA keys")
def test_fused_adapters_of_diffusers_are_refused_and_told(two: tuple[Path, Path], tmp_path: Path) -> None:
    peft_file(tiny_pipeline(), tmp_path, ["to_q", "to_k"])
    pipe, name = tiny_pipeline(), str(two[0])
    ap.loras(pipe, {name: 0.7})
    pipe.load_lora_weights(tmp_path, adapter_name="theirs")
    pipe.fuse_lora()
    with pytest.raises(AdapterError, match=r"theirs.*unfuse_lora"):
        ap.loras(pipe, {name: 0.1})
    pipe.unload_lora_weights()
    fused = pipe.unet.get_submodule(f"{BLOCK}.attn1.to_q").weight.detach().clone()
    with pytest.warns(UserWarning, match=r"\.data"):
        ap.loras(pipe, {})
    assert torch.equal(pipe.unet.get_submodule(f"{BLOCK}.attn1.to_q").weight, fused)


def test_fused_projections_are_refused(two: tuple[Path, Path]) -> None:
    pipe = tiny_pipeline()
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(AdapterError, match="unfuse_qkv_projections"):
        ap.loras(pipe, {str(two[0]): 1.0})


# ---- other architectures


def kohya_xl(pipe: Any) -> dict[str, torch.Tensor]:
    """A file of kohya's for SDXL: the UNet's blocks by LDM's names, two text encoders."""
    numbers, tensors = torch.Generator().manual_seed(0), {}
    table = {own: ldm for ldm, own in ldm_names(pipe.unet).items()}
    layers = {}
    for path, layer in pipe.unet.named_modules():
        if path.endswith(("attn1.to_q", "attn2.to_k", "ff.net.2")):
            block, inner = path.split(".transformer_blocks.")
            layers[f"lora_unet_{flat(f'{table[block]}.transformer_blocks.{inner}')}"] = layer
    for prefix, encoder in (("lora_te1_", pipe.text_encoder), ("lora_te2_", pipe.text_encoder_2)):
        for path, layer in encoder.named_modules():
            if path.endswith(("q_proj", "out_proj", "fc1")):  # without out_proj diffusers overlooks q_proj
                layers[f"{prefix}text_model_{flat(path.removeprefix('text_model.'))}"] = layer
    for name, layer in layers.items():
        rows, columns = layer.weight.shape
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=numbers)
        tensors[f"{name}.lora_up.weight"] = 0.3 * torch.randn(rows, 2, generator=numbers)
        tensors[f"{name}.alpha"] = torch.tensor(1.5)
    return tensors


def test_sdxl_with_two_text_encoders(tmp_path: Path) -> None:
    pipe, reference = tiny_xl_pipeline(), tiny_xl_pipeline()
    save_file(kohya_xl(pipe), tmp_path / "xl.safetensors")
    before = quick(pipe)
    reference.load_lora_weights(tmp_path / "xl.safetensors", adapter_name="theirs")
    reference.set_adapters(["theirs"], [0.7])
    found = ap.loras(pipe, {"xl": 0.7}, lora_dir=tmp_path)["xl"]
    assert not found.unused
    assert found.weights == {"text_encoder": 0.7, "text_encoder_2": 0.7, "unet": 0.7}
    assert_same(quick(pipe), quick(reference), without=before)
    ap.loras(pipe, {"xl": {"unet": 0.5, "text_encoder": 0.2}}, lora_dir=tmp_path)
    assert ap.loras(pipe)["xl"].weights == {"text_encoder": 0.2, "text_encoder_2": 0.2, "unet": 0.5}
    ap.loras(pipe, {})
    assert np.array_equal(quick(pipe), before)


def test_the_transformer_of_sd3(tmp_path: Path) -> None:
    pipe, reference = tiny_sd3_pipeline(), tiny_sd3_pipeline()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False)
    reference.transformer.add_adapter(config, "theirs")
    layers = get_peft_model_state_dict(reference.transformer, adapter_name="theirs")
    reference.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    before = draw(pipe, width=64)
    reference.set_adapters(["theirs"], [0.7])
    ap.loras(pipe, {str(tmp_path): 0.7})
    assert_same(draw(pipe, width=64), draw(reference, width=64), without=before)
    ap.loras(pipe, {})
    assert np.array_equal(draw(pipe, width=64), before)
