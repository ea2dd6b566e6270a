from __future__ import annotations

from typing import Any

import pytest
import torch

from allaprima.bench import workloads
from allaprima.bench.workloads import WORKLOADS, Case, aliased, cases, component, components_of, subject
from allaprima.errors import AllaprimaError, InputError


def test_every_combination_once() -> None:
    found = cases(["step", "text"], [(64, 64), (72, 64)], [1, 2], 4)
    assert [str(case) for case in found] == [
        "step 64x64 batch 1", "step 64x64 batch 2", "step 72x64 batch 1", "step 72x64 batch 2",
        "text batch 1", "text batch 2",
    ]  # fmt: skip
    with pytest.raises(InputError, match="allowed: step, text, vae, e2e, img2img, inpaint"):
        cases(["unet"], [(64, 64)], [1], 4)


def test_components() -> None:
    assert components_of(["vae", "step"]) == ("unet", "vae.decoder")
    assert components_of(["text", "e2e"]) == ("text_encoder", "unet", "vae.decoder")
    assert components_of(["step", "inpaint"]) == ("text_encoder", "unet", "vae.decoder", "vae.encoder")


@pytest.mark.parametrize(
    ("what", "shape"),
    [("step", (4, 4, 8, 9)), ("text", (2, 77, 32)), ("vae", (2, 3, 64, 72)), ("e2e", (2, 64, 72, 3)),
     ("img2img", (2, 64, 72, 3)), ("inpaint", (2, 64, 72, 3))],
)  # fmt: skip
def test_shapes(tiny_pipe: Any, what: str, shape: tuple[int, ...]) -> None:
    case = Case(what, 72, 64, 2, steps=2)
    outputs = WORKLOADS[what].outputs(tiny_pipe, case)
    assert {tuple(output.shape) for output in outputs} == {shape}
    assert WORKLOADS[what].cycle(tiny_pipe, case)().shape == shape


def test_calls_differ_from_one_another(tiny_pipe: Any) -> None:
    """Or a variant could answer from memory."""
    for what in ("step", "text", "vae"):
        run = WORKLOADS[what].cycle(tiny_pipe, Case(what, 64, 64, 1))
        assert not torch.equal(run(), run())


def test_the_prompt_of_a_step_stays_and_its_timestep_changes(tiny_pipe: Any) -> None:
    arguments = WORKLOADS["step"].arguments(tiny_pipe, Case("step", 64, 64, 1))
    assert len({id(prompt) for _, _, prompt in arguments}) == 1
    assert len({int(timestep) for _, timestep, _ in arguments}) == 4
    assert all(timestep in tiny_pipe.scheduler.timesteps for _, timestep, _ in arguments)


@pytest.mark.parametrize("what", ["img2img", "inpaint"])
def test_from_a_picture_there_are_as_many_calls_as_from_a_prompt(tiny_pipe: Any, what: str) -> None:
    calls: list[str] = []
    tiny_pipe.unet.register_forward_hook(lambda *_: calls.append(name))
    for name in (what, "e2e"):
        WORKLOADS[name].outputs(tiny_pipe, Case(name, 64, 64, 1, steps=3))
    assert calls.count(what) == calls.count("e2e") > 0


def test_noise_is_the_same_in_every_dtype() -> None:
    """torch draws other noise in another dtype."""
    from diffusers.models.autoencoders import vae
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img

    before = img2img.randn_tensor
    for module in (img2img, vae):
        with workloads._noise_of_float32():
            precise, rounded = (
                module.randn_tensor((5000,), generator=torch.Generator().manual_seed(0), dtype=dtype)
                for dtype in (torch.float32, torch.bfloat16)
            )
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(precise.bfloat16(), rounded)
        assert module.randn_tensor is before


def test_an_aliased_pipeline_reads_the_same_weights_and_is_another(tiny_pipe: Any) -> None:
    other = aliased(tiny_pipe)
    for path in ("unet", "text_encoder", "vae.decoder"):
        mine, its = component(tiny_pipe, path), component(other, path)
        assert its is not mine
        for p, q in zip(mine.parameters(), its.parameters(), strict=True):
            assert p.data_ptr() == q.data_ptr()
            assert p is not q
    weight = next(other.unet.parameters())
    before = next(tiny_pipe.unet.parameters())._version
    weight.mul_(1)
    assert weight._version > 0
    assert next(tiny_pipe.unet.parameters())._version == before
    other.unet.forward = None
    assert callable(tiny_pipe.unet.forward)


def test_unknown_subjects() -> None:
    with pytest.raises(InputError, match="allowed: sd15"):
        subject("sd9", "emoji", "float32", "cpu")
    with pytest.raises(AllaprimaError):
        subject(None, "no-such-model", "float32", "cpu")
    with pytest.raises(AllaprimaError):
        subject("sd15", "emoji", "int8", "cpu")


@pytest.mark.slow
def test_sd15_has_its_real_shapes() -> None:
    pipe = subject("sd15", "", "bfloat16", "cpu")
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(pipe.unet) == 859_520_964
    assert count(pipe.vae.decoder) == 49_490_179
    assert count(pipe.text_encoder) == 123_060_480
    outputs = WORKLOADS["step"].outputs(pipe, Case("step", 64, 64, 1))
    assert all(bool(output.isfinite().all()) for output in outputs)
