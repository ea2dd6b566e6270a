"""What is timed: the parts of a picture, each called the way the pipeline calls it.

step   one UNet call with guidance: batch 2·B; the timestep changes from call to call, the prompt does not,
       as within one picture
text   one call of the text encoder: batch B, the longest prompt it takes
vae    decoding of B latents
e2e    prompt to PIL pictures: text encoder, scheduler, UNet steps, VAE, conversion
img2img, inpaint   the same with a picture, and with a picture and a mask, at full strength: as many UNet calls as e2e
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from ..errors import InputError

PROMPT = "a red apple"
GUIDANCE_SCALE = 7.5
NUM_ARGUMENTS = 4  # a call cycles through that many different arguments


@dataclass(frozen=True)
class Case:
    """One point of the measurement: pixels and pictures (for a step with guidance the UNet's batch is twice that)."""

    what: str
    width: int
    height: int
    batch: int
    steps: int = 20

    def __str__(self) -> str:
        size = "" if self.what == "text" else f" {self.width}x{self.height}"
        return f"{self.what}{size} batch {self.batch}"


@dataclass(frozen=True)
class Workload:
    """One component of a pipeline and how it is called.

    component   path in the pipeline; None is the whole of it
    arguments   (pipe, case) -> arguments of several calls, different from one another
    call        (pipe, arguments) -> tensor to compare
    """

    component: str | None
    arguments: Callable[[Any, Case], list[tuple[Any, ...]]]
    call: Callable[[Any, tuple[Any, ...]], torch.Tensor]

    def cycle(self, pipe: Any, case: Case) -> Callable[[], torch.Tensor]:
        """A call without arguments for the stopwatch; each call takes the next arguments."""
        turns = itertools.cycle(self.arguments(pipe, case))

        def run() -> torch.Tensor:
            with torch.no_grad():
                return self.call(pipe, next(turns))

        return run

    def outputs(self, pipe: Any, case: Case) -> list[torch.Tensor]:
        """What the first and the last arguments give, in float64 on the CPU."""
        arguments = self.arguments(pipe, case)
        chosen = arguments if len(arguments) == 1 else [arguments[0], arguments[-1]]
        with torch.no_grad():
            return [self.call(pipe, a).detach().to("cpu", torch.float64, copy=True) for a in chosen]


# ---- the parts -----------------------------------------------------------------------------------------------------


def _noise(pipe: Any, case: Case, batch: int, seed: int = 0) -> torch.Tensor:
    """Latents from float32 numbers, so that every dtype gets the same ones.  [batch, 4, height/8, width/8]"""
    factor = pipe.vae_scale_factor
    shape = (batch, pipe.vae.config.latent_channels, case.height // factor, case.width // factor)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(pipe.device, pipe.unet.dtype)


def _step_arguments(pipe: Any, case: Case) -> list[tuple[Any, ...]]:
    batch, length = 2 * case.batch, pipe.tokenizer.model_max_length
    prompt = torch.randn(
        batch, length, pipe.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1)
    ).to(pipe.device, pipe.unet.dtype)
    pipe.scheduler.set_timesteps(case.steps, device=pipe.device)
    chosen = pipe.scheduler.timesteps[:: max(1, case.steps // NUM_ARGUMENTS)][:NUM_ARGUMENTS]
    return [(_noise(pipe, case, batch, seed), t, prompt) for seed, t in enumerate(chosen)]


def _step(pipe: Any, arguments: tuple[Any, ...]) -> torch.Tensor:
    sample, timestep, prompt = arguments
    return pipe.unet(sample, timestep, encoder_hidden_states=prompt, **STEP_OPTIONS)[0]  # type: ignore[no-any-return]


# What the pipeline passes beside the tensors.
STEP_OPTIONS = {
    "timestep_cond": None,
    "cross_attention_kwargs": None,
    "added_cond_kwargs": None,
    "return_dict": False,
}


def _text_arguments(pipe: Any, case: Case) -> list[tuple[Any, ...]]:
    shape = (case.batch, pipe.tokenizer.model_max_length)
    vocabulary = pipe.text_encoder.config.vocab_size
    generators = [torch.Generator().manual_seed(seed) for seed in range(NUM_ARGUMENTS)]
    return [(torch.randint(0, vocabulary, shape, generator=g).to(pipe.device),) for g in generators]


def _text(pipe: Any, arguments: tuple[Any, ...]) -> torch.Tensor:
    return pipe.text_encoder(arguments[0], attention_mask=None)[0]  # type: ignore[no-any-return]


def _vae_arguments(pipe: Any, case: Case) -> list[tuple[Any, ...]]:
    return [(_noise(pipe, case, case.batch, seed),) for seed in range(NUM_ARGUMENTS)]


def _vae(pipe: Any, arguments: tuple[Any, ...]) -> torch.Tensor:
    return pipe.vae.decode(arguments[0], return_dict=False)[0]  # type: ignore[no-any-return]


def _e2e_arguments(pipe: Any, case: Case) -> list[tuple[Any, ...]]:
    return [(case,)]


def _e2e(pipe: Any, arguments: tuple[Any, ...]) -> torch.Tensor:
    case: Case = arguments[0]
    images = pipe(
        [PROMPT] * case.batch,
        width=case.width,
        height=case.height,
        num_inference_steps=case.steps,
        guidance_scale=GUIDANCE_SCALE,
        latents=_noise(pipe, case, case.batch),  # torch draws other noise in another dtype
    ).images
    return _pixels(images)


def _pixels(images: Sequence[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255)


def _image_arguments(task: str, pipe: Any, case: Case) -> list[tuple[Any, ...]]:
    from ..pipelines import as_task
    from ..verification import test_card, test_mask

    given: dict[str, Any] = {"image": test_card(case.width, case.height)}
    if task == "inpaint":
        given |= {"mask_image": test_mask(case.width, case.height), "width": case.width, "height": case.height}
    return [(as_task(pipe, task), case, given)]  # type: ignore[arg-type]


def _image(_pipe: Any, arguments: tuple[Any, ...]) -> torch.Tensor:
    twin, case, given = arguments
    with _noise_of_float32():
        return _pixels(
            twin(
                [PROMPT] * case.batch,
                **{k: [v] * case.batch if k.endswith("image") else v for k, v in given.items()},
                strength=1.0,
                num_inference_steps=case.steps,
                guidance_scale=GUIDANCE_SCALE,
                generator=torch.Generator().manual_seed(0),
            ).images
        )


@contextmanager
def _noise_of_float32() -> Iterator[None]:
    """diffusers draws its noise in float32 and rounds it, so that every dtype gets the same one."""
    from diffusers.utils import torch_utils

    draw: Callable[..., torch.Tensor] = torch_utils.randn_tensor

    def rounded(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return draw(*args, dtype=torch.float32, **kwargs).to(dtype or torch.float32)

    drawing = [
        m for name, m in list(sys.modules.items()) if name.startswith("diffusers.") and vars(m).get(_DRAW) is draw
    ]
    for module in drawing:
        setattr(module, _DRAW, rounded)
    try:
        yield
    finally:
        for module in drawing:
            setattr(module, _DRAW, draw)


_DRAW = "randn_tensor"

WORKLOADS: dict[str, Workload] = {
    "step": Workload("unet", _step_arguments, _step),
    "text": Workload("text_encoder", _text_arguments, _text),
    "vae": Workload("vae.decoder", _vae_arguments, _vae),
    "e2e": Workload(None, _e2e_arguments, _e2e),
    "img2img": Workload(None, functools.partial(_image_arguments, "img2img"), _image),
    "inpaint": Workload(None, functools.partial(_image_arguments, "inpaint"), _image),
}
COMPONENTS = ("text_encoder", "unet", "vae.decoder")
FROM_IMAGE = ("img2img", "inpaint")


def components_of(what: Sequence[str]) -> tuple[str, ...]:
    """The parts of the pipeline that these workloads run."""
    named = [WORKLOADS[name].component for name in what]
    if any(name in FROM_IMAGE for name in what):
        return (*COMPONENTS, "vae.encoder")
    return COMPONENTS if None in named else tuple(path for path in COMPONENTS if path in named)


def component(pipe: Any, path: str) -> torch.nn.Module:
    found: torch.nn.Module = attrgetter(path)(pipe)
    return found


def cases(what: Sequence[str], sizes: Sequence[tuple[int, int]], batches: Sequence[int], steps: int) -> list[Case]:
    """Every combination; the text encoder knows no size.

    raises   InputError
    """
    for name in what:
        if name not in WORKLOADS:
            raise InputError(f"--what {name!r} is unknown; allowed: {', '.join(WORKLOADS)}.")
    points = [Case(name, *size, batch, steps) for name in what for size in sizes for batch in batches]
    return list(dict.fromkeys(replace(p, width=0, height=0) if p.what == "text" else p for p in points))


# ---- the subject ---------------------------------------------------------------------------------------------------


def sd15(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """Stable Diffusion v1.5 in its real shapes with seeded random weights: right for speed, no picture.

    The tokenizer is a stand-in: one token a byte, the same length of 77.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    place = torch.device(device)
    # Made where it will be: a billion random numbers take a CPU half a minute.
    with torch.random.fork_rng(devices=[place.index or 0] if place.type == "cuda" else []), place:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
        ).to(dtype)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ).to(dtype)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ).to(dtype)
    for module in (unet, text_encoder, vae):
        module.eval().requires_grad_(False)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_byte_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(device)


def _byte_tokenizer() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


ARCHITECTURES = {"sd15": sd15}


def subject(arch: str | None, model: str, dtype: str, device: str) -> Any:
    """The pipeline to measure: an architecture with random weights, or any model that `allaprima.load` takes.

    dtype, device   as of `allaprima.load`
    raises          InputError, ConfigError, ModelError
    """
    from ..weights.checkpoints import choose_device, choose_dtype, load

    if arch is None:
        pipe = load(model, dtype=dtype, device=device)
    elif arch in ARCHITECTURES:
        place = choose_device(device)
        pipe = ARCHITECTURES[arch](choose_dtype(dtype, place), place)
    else:
        raise InputError(f"--arch {arch!r} is unknown; allowed: {', '.join(ARCHITECTURES)}.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def aliased(pipe: Any) -> Any:
    """A pipeline of its own that reads the same weights: what is done to its modules does not reach the other's.

    The tensors share storage, not version counters, so each variant notices only its own changes.
    """
    parts = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            memo: dict[int, Any] = {id(b): b.data for b in part.buffers()}
            memo |= {id(p): torch.nn.Parameter(p.data, requires_grad=False) for p in part.parameters()}
            parts[name] = copy.deepcopy(part, memo)
        else:
            parts[name] = copy.deepcopy(part)
    options = {k: pipe.config[k] for k in ("requires_safety_checker",) if k in pipe.config}
    other = type(pipe)(**parts, **options)
    other.set_progress_bar_config(disable=True)
    return other
