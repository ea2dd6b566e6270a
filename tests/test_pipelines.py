"""Pipelines: every way of drawing gives eager's picture, and everything that changes reaches the engines."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

import allaprima as ap
from allaprima.config import Config
from allaprima.engine import Engine
from allaprima.errors import ConfigError, InputError, SchedulerError, SizeError
from allaprima.pipelines import SCHEDULERS, as_task, eager, engines, set_scheduler, state
from tests.tiny import tiny_bert_pipeline, tiny_pipeline, tiny_unet

FAST = {"height": 64, "width": 72, "num_inference_steps": 2, "output_type": "np"}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 64, 3), np.uint8))
MASK = Image.fromarray(np.repeat([[0] * 32 + [255] * 32], 80, axis=0).astype(np.uint8))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session's captured graphs are: each signature is captured once."""
    return tmp_path_factory.getbasetemp() / "cache"


def fresh(cache: Path, backend: str = "auto", **settings: Any) -> StableDiffusionPipeline:
    return ap.optimize(tiny_pipeline(), Config(backend=backend, cache_dir=cache, **settings))


@pytest.fixture(scope="module", params=["auto", "aten"])
def shared(request: pytest.FixtureRequest, shared_cache: Path) -> StableDiffusionPipeline:
    """One optimized pipeline for all tests that leave it as it was."""
    return fresh(shared_cache, request.param)


@pytest.fixture
def pipe(shared: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    scheduler = shared.scheduler
    yield shared
    shared.scheduler = scheduler


@pytest.fixture
def own(shared_cache: Path) -> StableDiffusionPipeline:
    """An optimized pipeline that the test may break."""
    return fresh(shared_cache, "aten")


def draw(pipe: Any, prompt: Any = "a red apple", **options: Any) -> Any:
    options = {**FAST, **options}
    if "generator" not in options:
        options["generator"] = torch.Generator().manual_seed(0)
    elif isinstance(options["generator"], list):
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in options["generator"]]
    if options.get("height") is None:
        del options["height"], options["width"]
    return pipe(prompt, **options).images


def difference(a: Any, b: Any) -> float:
    a, b = (torch.as_tensor(np.asarray(x)).double() for x in (a, b))
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    return float((a - b).abs().max())


def same_as_eager(pipe: Any, tolerance: float = 2e-4, **options: Any) -> Any:
    """Draw optimized and eager and compare.  A tiny UNet with random weights gives pictures of order one."""
    ours = draw(pipe, **options)
    with eager(pipe):
        theirs = draw(pipe, **options)
    assert difference(ours, theirs) < tolerance
    return ours


def no_fallbacks(pipe: Any) -> bool:
    return not ap.explain(pipe).fallbacks


def captures(pipe: Any) -> int:
    found = ap.explain(pipe)
    return found.captures + found.loaded


# ---- every way of drawing


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(pipe: Any, name: str) -> None:
    set_scheduler(pipe, name)
    same_as_eager(pipe, num_inference_steps=3)
    assert no_fallbacks(pipe)


OPTIONS: dict[str, dict[str, Any]] = {
    "another size": {"height": 128, "width": 64},
    "off the grid": {"height": 88, "width": 104},
    "the native size": {"height": None},
    "no guidance": {"guidance_scale": 1.0},
    "guidance rescale": {"guidance_rescale": 0.7},
    "more steps": {"num_inference_steps": 5},
    "one step": {"num_inference_steps": 1},
    "a negative prompt": {"negative_prompt": "blue"},
    "three of one prompt": {"num_images_per_prompt": 3},
    "a batch of prompts": {"prompt": ["a red apple", "a tree", ""]},
    "a generator for each": {"prompt": ["a", "b"], "generator": [1, 2]},
    "a long prompt": {"prompt": "an apple on a table " * 20},
    "Chinese": {"prompt": "红色的苹果"},
    "clip_skip": {"clip_skip": 1},
    "latents": {"output_type": "latent"},
    "tensors": {"output_type": "pt"},
    "pictures": {"output_type": "pil"},
    "eta": {"eta": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_option(pipe: Any, options: dict[str, Any]) -> None:
    tolerance = 1.01 if options.get("output_type") == "pil" else 2e-3 if "output_type" in options else 2e-4
    same_as_eager(pipe, tolerance, **options)
    assert no_fallbacks(pipe)


def test_timesteps_stay_on_the_host(own: Any) -> None:
    """Schedulers look at them one by one, and each look at a number on a GPU makes the host wait."""
    first = own.scheduler
    draw(own)
    set_scheduler(own, "euler a")
    draw(own)
    for scheduler in (first, own.scheduler):
        scheduler.set_timesteps(4, device="cuda")  # there need not be one
        assert scheduler.timesteps.device.type == "cpu"
        assert len(scheduler.timesteps) >= 4
    ap.restore(own)
    assert "set_timesteps" not in first.__dict__
    assert "set_timesteps" not in own.scheduler.__dict__


def test_pictures_are_pictures(pipe: Any) -> None:
    (image,) = draw(pipe, output_type="pil")
    assert isinstance(image, Image.Image)
    assert image.size == (72, 64)
    assert np.asarray(image).std() > 1


def test_embeddings_may_be_given(pipe: Any) -> None:
    prompt, negative = pipe.encode_prompt("a tree", "cpu", 1, True, negative_prompt="blue")
    same_as_eager(pipe, prompt=None, prompt_embeds=prompt, negative_prompt_embeds=negative)
    assert difference(
        draw(pipe, prompt=None, prompt_embeds=prompt, negative_prompt_embeds=negative),
        draw(pipe, prompt="a tree", negative_prompt="blue"),
    ) < 1e-5  # fmt: skip


def test_twice_the_text_length(pipe: Any) -> None:
    embeddings = torch.randn(1, 154, 32, generator=torch.Generator().manual_seed(3))
    same_as_eager(pipe, prompt=None, prompt_embeds=embeddings, negative_prompt_embeds=-embeddings)


def test_a_bert_encoder(shared_cache: Path) -> None:
    pipe = ap.optimize(tiny_bert_pipeline(), Config(cache_dir=shared_cache))
    same_as_eager(pipe, prompt="红色的苹果", negative_prompt="绿树")
    same_as_eager(pipe, prompt=["一个女孩", "猫"], clip_skip=1)
    assert no_fallbacks(pipe)


def test_clip_skip_takes_another_layer(pipe: Any) -> None:
    assert difference(draw(pipe), draw(pipe, clip_skip=1)) > 1e-3


# ---- callbacks


def test_a_callback_sees_every_step_and_changes_the_latents(pipe: Any) -> None:
    def halve(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append((step, int(timestep)))
        return {"latents": values["latents"] * 0.5}

    steps: list[tuple[int, int]] = []
    ours = same_as_eager(pipe, num_inference_steps=3, callback_on_step_end=halve)
    assert len(steps) == 2 * len(set(steps))
    assert difference(ours, draw(pipe, num_inference_steps=3)) > 1e-3


@pytest.mark.parametrize("how", ["another tensor", "in place", "inference mode"])
def test_a_callback_changes_the_prompt_on_the_way(pipe: Any, how: str) -> None:
    def change(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        text = values["prompt_embeds"]
        if how == "in place":
            return {"prompt_embeds": text.mul_(-1) if step == 1 else text}
        with torch.inference_mode(how == "inference mode"):
            return {"prompt_embeds": -text if step == 1 else text.clone()}

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    ours = same_as_eager(pipe, num_inference_steps=4, **options)
    assert difference(ours, draw(pipe, num_inference_steps=4)) > 1e-4


def test_an_interrupted_run_stops_and_the_next_one_is_whole(pipe: Any) -> None:
    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return {}

    before = ap.explain(pipe).calls["unet"]
    draw(pipe, num_inference_steps=6, callback_on_step_end=stop)
    assert ap.explain(pipe).calls["unet"] - before == 2
    same_as_eager(pipe)


def test_an_error_in_a_callback_leaves_the_pipe_usable(pipe: Any) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        draw(pipe, callback_on_step_end=fail)
    same_as_eager(pipe)


# ---- other tasks


def redraw(pipe: Any, **options: Any) -> Any:
    return draw(pipe, image=PICTURE, strength=0.7, num_inference_steps=4, height=None, **options)


def both_tasks(pipe: Any, **options: Any) -> None:
    ours = redraw(pipe, **options)
    with eager(pipe):
        theirs = redraw(pipe, **options)
    assert difference(ours, theirs) < 5e-4


@pytest.mark.parametrize("scheduler", ["PNDM", "DDIM", "Euler a", "DPM++ 2M Karras", "Heun"])
def test_img2img(pipe: Any, scheduler: str) -> None:
    set_scheduler(pipe, scheduler)
    both_tasks(as_task(pipe, "img2img"))
    assert no_fallbacks(pipe)


def test_inpaint(pipe: Any) -> None:
    set_scheduler(pipe, "DDIM")
    task = as_task(pipe, "inpaint")
    both_tasks(task, mask_image=MASK)
    assert no_fallbacks(task)


def test_a_task_shares_engines_and_knows_itself(pipe: Any) -> None:
    task = as_task(pipe, "img2img")
    assert isinstance(task, StableDiffusionImg2ImgPipeline)
    assert engines(task) == engines(pipe)
    assert as_task(task, "img2img") is task
    with pytest.raises(InputError, match="video"):
        as_task(pipe, "video")  # type: ignore[arg-type]


def test_diffusers_own_from_pipe(pipe: Any) -> None:
    set_scheduler(pipe, "DDIM")
    task = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    task.set_progress_bar_config(disable=True)
    before = ap.explain(pipe).calls["unet"]
    ours = redraw(task)
    assert ap.explain(pipe).calls["unet"] > before
    with eager(pipe):
        assert difference(ours, redraw(task)) < 5e-4


# ---- what changes between two pictures


def test_sizes_batches_guidance_and_schedulers_capture_nothing_more(pipe: Any) -> None:
    draw(pipe)
    before = captures(pipe)
    for height, width in ((64, 64), (72, 136), (128, 80)):
        for count, guidance in ((1, 7.5), (2, 1.0), (4, 7.5)):
            draw(pipe, height=height, width=width, num_images_per_prompt=count, guidance_scale=guidance)
    for name in ("DDIM", "Euler a", "UniPC"):
        set_scheduler(pipe, name)
        draw(pipe)
    assert captures(pipe) == before
    assert ap.explain(pipe).discharged == 0


def free_u(pipe: Any) -> None:
    pipe.enable_freeu(0.9, 0.2, 1.4, 1.6)


def edit(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)


def edit_data(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data.mul_(1.5)
    ap.rebind(pipe)


def edit_text(pipe: Any) -> None:
    with torch.no_grad():
        for weight in pipe.text_encoder.parameters():
            weight.mul_(1.2)


def edit_decoder(pipe: Any) -> None:
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.mul_(0.5)


def load(pipe: Any) -> None:
    pipe.unet.load_state_dict(tiny_unet(seed=5).state_dict())


def load_assigned(pipe: Any) -> None:
    pipe.unet.load_state_dict(tiny_unet(seed=5).state_dict(), assign=True)


def another_unet(pipe: Any) -> None:
    pipe.unet = tiny_unet(seed=5)


def hook_inside(pipe: Any) -> None:
    pipe.unet.conv_in.register_forward_hook(lambda module, args, result: result * 1.5)


def hook_outside(pipe: Any) -> None:
    pipe.unet.register_forward_hook(lambda module, args, result: (result[0] * 0.5,))


def replaced_forward(pipe: Any) -> None:
    inner = pipe.unet.conv_in.forward
    pipe.unet.conv_in.forward = lambda x: inner(x) * 1.5


def bigger_output(pipe: Any) -> None:
    pipe.unet.mid_block.resnets[0].output_scale_factor = 3.0


MUTATIONS: dict[str, Callable[[Any], None]] = {
    "FreeU": free_u,
    "a weight edited in place": edit,
    "a weight edited behind our back, and rebind": edit_data,
    "the text encoder edited": edit_text,
    "the decoder edited": edit_decoder,
    "load_state_dict": load,
    "load_state_dict(assign=True)": load_assigned,
    "another UNet": another_unet,
    "a hook inside": hook_inside,
    "a hook on the UNet": hook_outside,
    "a forward replaced inside": replaced_forward,
    "a setting": bigger_output,
    "other scheduler": lambda pipe: set_scheduler(pipe, "Euler a"),
}
EAGER = {"a hook inside": "hook inside", "a forward replaced inside": "was replaced"}


SAMPLE = ("a weight edited in place", "load_state_dict", "a hook inside")
"""Enough to see that the default backend is told; it compiles anew for each."""

LONG = ("FreeU",)
"""It writes in place, so that torch.export traces twice: most of a minute."""


@pytest.mark.parametrize(
    ("mutation", "backend"),
    [pytest.param(name, "aten", marks=pytest.mark.slow if name in LONG else ()) for name in MUTATIONS]
    + [pytest.param(name, "auto", marks=() if name in SAMPLE else pytest.mark.slow) for name in MUTATIONS],
)
def test_is_noticed(shared_cache: Path, mutation: str, backend: str) -> None:
    pipe = fresh(shared_cache, backend)
    before = draw(pipe)
    MUTATIONS[mutation](pipe)
    after = same_as_eager(pipe)
    assert difference(before, after) > 1e-4
    assert all(engine.events.calls > 0 for name, engine in engines(pipe).items() if name != "vae.encoder")
    assert engines(pipe)["unet"].module is pipe.unet
    reasons = " ".join(ap.explain(pipe).fallbacks)
    assert EAGER[mutation] in reasons if mutation in EAGER else not reasons


def test_what_is_undone_costs_no_second_capture(own: Any) -> None:
    block = own.unet.mid_block.resnets[0]
    before, scale = draw(own), block.output_scale_factor
    bigger_output(own)
    changed = draw(own)
    count = captures(own)
    block.output_scale_factor = scale
    assert difference(before, draw(own)) == 0
    bigger_output(own)
    assert difference(changed, draw(own)) == 0
    assert captures(own) == count


def test_another_attention_processor_is_noticed(own: Any) -> None:
    draw(own)
    before = captures(own)
    own.unet.set_attn_processor(AttnProcessor())
    same_as_eager(own)
    assert captures(own) == before + 1


def test_train_mode_runs_eagerly_and_eval_mode_does_not(own: Any) -> None:
    before = draw(own)
    own.unet.train()
    draw(own)
    assert "train mode" in " ".join(ap.explain(own).fallbacks)
    count = sum(ap.explain(own).fallbacks.values())
    own.unet.eval()
    assert difference(before, draw(own)) == 0
    assert sum(ap.explain(own).fallbacks.values()) == count


def test_another_dtype_and_back(own: Any) -> None:
    before = draw(own)
    own.to(torch.float64)
    same_as_eager(own, 1e-9)
    own.to(torch.float32)
    assert difference(before, draw(own)) == 0


def test_autocast_is_listed_and_right(own: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        ours = draw(own)
        with eager(own):
            theirs = draw(own)
    assert difference(ours, theirs) == 0
    assert "autocast" in " ".join(ap.explain(own).fallbacks)
    same_as_eager(own)


def test_cpu_bfloat16_is_no_worse_than_eager(shared_cache: Path) -> None:
    pipe = ap.optimize(tiny_pipeline(dtype=torch.bfloat16), Config(cache_dir=shared_cache))
    truth_pipe = tiny_pipeline(dtype=torch.bfloat16).to(torch.float32)
    ours, theirs = [], []
    for seed in range(5):
        options = {"generator": [seed], "num_inference_steps": 3, "output_type": "latent"}
        truth = draw(truth_pipe, **options)
        ours.append(float((draw(pipe, **options).float() - truth).square().mean()))
        with eager(pipe):
            theirs.append(float((draw(pipe, **options).float() - truth).square().mean()))
    assert np.median(ours) <= 1.1**2 * np.median(theirs)
    assert no_fallbacks(pipe)


# ---- a second process


def test_another_checkpoint_in_another_process_captures_nothing(own: Any, shared_cache: Path) -> None:
    draw(own)
    redraw(as_task(own, "img2img"))
    other = ap.optimize(tiny_pipeline(seed=7), Config(backend="aten", cache_dir=shared_cache))
    same_as_eager(other, height=96, width=80, num_images_per_prompt=2)
    redraw(as_task(other, "img2img"))
    assert ap.explain(other).captures == 0
    assert ap.explain(other).loaded == 4


# ---- optimize, restore, copies


def snapshot(pipe: Any) -> dict[str, dict[str, Any]]:
    owners = {"pipe": pipe, "image_processor": pipe.image_processor, "vae.decoder": pipe.vae.decoder,
              "vae.encoder": pipe.vae.encoder, **pipe.components}  # fmt: skip
    return {name: dict(vars(owner)) for name, owner in owners.items() if hasattr(owner, "__dict__")}


def test_restore_leaves_everything_exactly_as_before(shared_cache: Path) -> None:
    pipe = tiny_pipeline()
    draw(pipe)
    before = snapshot(pipe)
    ap.optimize(pipe, Config(backend="aten", cache_dir=shared_cache))
    draw(pipe, clip_skip=1)
    assert ap.restore(pipe) is pipe
    after = snapshot(pipe)
    moves = {"scheduler", "tokenizer", "feature_extractor"}  # they change while they work, optimized or not
    for name in before.keys() - moves:
        ignored = {"_output_capturing_hooks_installed"} | {
            k for k in before[name] if k.startswith(("_guidance", "_clip"))
        }
        assert after[name].keys() - ignored == before[name].keys() - ignored, name
        assert all(after[name][k] is v for k, v in before[name].items() if k not in ignored), name


def test_restored_is_eager_and_restoring_twice_is_nothing(own: Any) -> None:
    ap.restore(ap.restore(own))
    assert engines(own) == {}
    assert state(own) is None
    assert difference(draw(own), draw(tiny_pipeline())) == 0
    with pytest.raises(ConfigError, match="not optimized"):
        ap.explain(own)


def test_optimizing_twice_is_optimizing_once(own: Any) -> None:
    ap.optimize(own, Config(backend="aten", cache_dir=None))
    ap.restore(own)
    assert not any(isinstance(m.__dict__.get("forward"), Engine) for m in own.unet.modules())
    assert "check_inputs" not in own.__dict__


def test_only_pipelines_and_modules_can_be_optimized() -> None:
    with pytest.raises(ConfigError, match="not a dict"):
        ap.optimize({})


def test_the_pipeline_keeps_its_class_and_its_call(own: Any) -> None:
    assert type(own) is StableDiffusionPipeline
    assert own.unet.dtype == torch.float32
    assert own.device.type == "cpu"
    assert own.components.keys() == tiny_pipeline().components.keys()


def test_eager_is_eager_inside_only(own: Any) -> None:
    with eager(own):
        assert difference(draw(own), draw(tiny_pipeline())) == 0
        with eager(own):
            pass
        calls = ap.explain(own).calls["unet"]
        draw(own)
        assert ap.explain(own).calls["unet"] == calls
    draw(own)
    assert ap.explain(own).calls["unet"] > calls


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_optimized_pipeline_is_a_plain_one(own: Any, copied: Callable[[Any], Any]) -> None:
    before = draw(own)
    twin = copied(own)
    assert state(twin) is None
    assert difference(draw(twin), draw(tiny_pipeline())) == 0
    with torch.no_grad():
        twin.unet.conv_in.weight.zero_()
    assert difference(draw(own), before) == 0
    ap.optimize(twin, Config(backend="aten", cache_dir=None))
    ap.restore(twin)
    assert state(own) is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_optimized_module_is_a_plain_one(own: Any, copied: Callable[[Any], Any]) -> None:
    draw(own)
    twin = copied(own.unet)
    assert twin is not own.unet
    assert engines(twin) == {}
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 32)
    with torch.no_grad(), eager(own):
        assert torch.equal(twin(x, 3, text)[0], own.unet(x, 3, text)[0])
        twin.conv_in.weight.zero_()
        assert not torch.equal(twin(x, 3, text)[0], own.unet(x, 3, text)[0])


def test_an_optimized_pipeline_is_saved_like_any_other(own: Any, tmp_path: Path) -> None:
    draw(own)
    own.save_pretrained(tmp_path)
    plain = ap.load(tmp_path, dtype="float32", device="cpu")
    plain.set_progress_bar_config(disable=True)
    with eager(own):
        assert difference(draw(own), draw(plain)) == 0


def test_two_pipelines_that_share_components(own: Any, shared_cache: Path) -> None:
    other = ap.optimize(StableDiffusionPipeline.from_pipe(own), Config(backend="aten", cache_dir=shared_cache))
    other.set_progress_bar_config(disable=True)
    ap.restore(own)
    assert isinstance(own.unet.__dict__.get("forward"), Engine), "restoring one took the other's engine"
    same_as_eager(other)
    ap.restore(other)
    assert "forward" not in own.unet.__dict__


def test_a_component_taken_out_and_put_back(own: Any) -> None:
    before, unet = draw(own), own.unet
    another_unet(own)
    same_as_eager(own)
    other, own.unet = own.unet, unet
    assert difference(draw(own), before) == 0
    assert no_fallbacks(own)
    ap.restore(own)
    assert "forward" not in unet.__dict__
    assert "forward" not in other.__dict__


def test_a_component_taken_out_can_be_freed(own: Any) -> None:
    draw(own)
    gone = weakref.ref(own.unet)
    another_unet(own)
    draw(own)
    gc.collect()
    assert gone() is None


# ---- what cannot be drawn


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a height of 100": ({"height": 100}, SizeError, "nearest is 96"),
    "a width of 4": ({"width": 4}, SizeError, "nearest is 8"),
    "a width with a fraction": ({"width": 66.5}, SizeError, "nearest is 64"),
    "a negative width": ({"width": -64}, SizeError, "multiple of 8"),
    "a width that is a text": ({"width": "64"}, SizeError, "'64'"),
    "a prompt that is a number": ({"prompt": 3}, InputError, "int"),
    "no prompt": ({"prompt": None}, InputError, "prompt"),
    "cross_attention_kwargs": ({"cross_attention_kwargs": {"gligen": 1}}, InputError, "cross_attention_kwargs"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(pipe: Any, what: str) -> None:
    options, kind, words = BAD[what]
    with pytest.raises(kind, match=words) as caught:
        draw(pipe, **options)
    assert isinstance(caught.value, ap.AllaprimaError)
    same_as_eager(pipe)


def test_numpys_whole_numbers_are_sizes(pipe: Any) -> None:
    assert draw(pipe, height=np.int64(64)).shape == (1, 64, 72, 3)


def test_a_scheduler_that_does_not_fit(pipe: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(SchedulerError, match="FlowMatch"):
        draw(pipe)
    set_scheduler(pipe, "DDIM")
    same_as_eager(pipe)


def test_a_memory_limit_that_is_too_small(shared_cache: Path) -> None:
    pipe = fresh(shared_cache, "aten", memory_limit=14 * 2**20)
    draw(pipe, height=64, width=64)
    with pytest.raises(SizeError, match="memory_limit"):
        draw(pipe, height=512, width=512)
    draw(pipe, height=64, width=64)


def test_out_of_memory_is_our_error_and_passes(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(pipe)
    (runner,) = [r for r in engines(pipe)["unet"].runners() if r.bound]
    step = runner._stages[-1].executable

    def full(*_: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(step, "run", full)
        with pytest.raises(ap.errors.OutOfMemoryError, match="smaller"):
            draw(pipe)
    same_as_eager(pipe)


def test_a_twin_with_a_scheduler_of_its_own_computes_its_schedule_once(own: StableDiffusionPipeline) -> None:
    twin = as_task(own, "img2img")
    set_scheduler(twin, "Euler")
    assert twin.scheduler is not own.scheduler
    runs = engines(own)["unet"].events.stage_runs
    before = runs["SCHEDULE"]
    twin("a cat", image=PICTURE, strength=1.0, num_inference_steps=4, output_type="np")
    assert runs["SCHEDULE"] - before == 1
