"""Drawing pictures for the command line: batches, seeds, files.

Request    what the user asks; checked, nothing loaded yet
Settings   what was decided for it, once the model is known
Picture    one image with the text that draws it again
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import __version__
from .errors import InputError, NumericsError, OutOfMemoryError, SizeError, is_out_of_memory
from .infotext import Infotext, save_png
from .prompts import LoraTag, Prompt, parse, parse_negative

if TYPE_CHECKING:
    from PIL.Image import Image

    from .prompts import Encoded

Task = Literal["text2img", "img2img", "inpaint"]
OnStep = Callable[[int, float], None]
Shot = tuple[str, int]
"""A prompt and a seed."""

SIZE_MULTIPLE, MIN_SIZE, MAX_SIZE = 8, 64, 2048
MAX_SEED = 2**32
# For checkpoints that do not say what suits them.
STEPS, GUIDANCE_SCALE = 25, 7.5


@dataclass(frozen=True)
class Request:
    """What to draw.  None leaves the choice to the model.

    prompts      in A1111's syntax, as the negative prompt is (allaprima.prompts); they share their LoRA tags
    size         (width, height) in pixels, multiples of 8 from 64 to 2048
    seed         of the first image; image i of all that are asked has seed + i
    count        images of each prompt        batch    images drawn at once
    init_image   a picture to start from; with a mask, only its white part is drawn anew
    strength     0 keeps the init image, 1 draws it anew
    adapters     (name, weight) of LoRAs beside those of the prompts' tags
    clip_skip    as A1111 counts: 1 takes the text encoder's last layer, 2 the one before
    raises       InputError, SizeError
    """

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    count: int = 1
    batch: int = 4
    init_image: Path | None = None
    mask: Path | None = None
    strength: float = 0.75
    clip_skip: int = 1
    adapters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("No prompt is given.")
        for prompt in (*self.prompts, self.negative_prompt):
            _check_text(prompt)
        if self.size:
            check_size(*self.size)
        for name, low in (("steps", 1), ("count", 1), ("batch", 1), ("clip_skip", 1)):
            _check_range(name, getattr(self, name), low)
        _check_range("guidance_scale", self.guidance_scale, 0, 100)
        _check_range("seed", self.seed, 0, 2**63)
        _check_range("strength", self.strength, 0, 1)
        if self.mask and not self.init_image:
            raise InputError("A mask needs the picture it belongs to: give it with --init-image.")
        _check_tags(self.prompts)

    @property
    def task(self) -> Task:
        if self.mask:
            return "inpaint"
        return "img2img" if self.init_image else "text2img"

    @property
    def num_images(self) -> int:
        return len(self.prompts) * self.count

    @property
    def loras(self) -> tuple[LoraTag, ...]:
        """The given LoRAs and those of the prompts' tags; one that is named twice has the sum of its weights."""
        given = [LoraTag(name, weight, weight) for name, weight in self.adapters]
        found: dict[str, LoraTag] = {}
        for name, te, unet in (*given, *parse(self.prompts[0]).loras):
            before = found.get(name, LoraTag(name, 0.0, 0.0))
            found[name] = LoraTag(name, before.te + te, before.unet + unet)
        return tuple(found.values())


@dataclass(frozen=True)
class Settings:
    """What was decided for one request and one model; nothing is left open."""

    model: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    seed: int


@dataclass(frozen=True)
class Picture:
    """One image.

    seconds   its share of the time of its batch
    notes     what the user should know of it
    """

    image: Image
    seed: int
    seconds: float
    info: Infotext
    notes: tuple[str, ...] = ()


def check_size(width: int, height: int) -> None:
    """Multiples of 8 from 64 to 2048 can be drawn.

    raises   SizeError, naming the nearest size that can
    """
    near = (_nearest(width), _nearest(height))
    if (width, height) != near:
        raise SizeError(
            f"size {width}x{height} cannot be drawn: width and height are multiples of {SIZE_MULTIPLE} "
            f"from {MIN_SIZE} to {MAX_SIZE}. The nearest is {near[0]}x{near[1]}."
        )


def parse_size(text: str) -> tuple[int, int]:
    """ "256x192" -> (256, 192), width first; "256" is square.

    raises   SizeError
    """
    found = re.fullmatch(r"\s*(\d{1,6})(?:\s*[x×*,]\s*(\d{1,6}))?\s*", text, re.IGNORECASE)
    if not found:
        raise SizeError(f"size {text!r} is not understood: give WIDTHxHEIGHT in pixels, for example 256x192.")
    width, height = int(found[1]), int(found[2] or found[1])
    check_size(width, height)
    return width, height


def settle(request: Request, pipe: Any, model: str) -> Settings:
    """Fill what the request leaves open with what suits the model."""
    native_size, steps, guidance_scale = defaults(pipe, model)
    width, height = request.size or _size_of(request.init_image) or native_size
    return Settings(
        model=Path(model).stem or model,
        width=width,
        height=height,
        steps=request.steps or steps,
        guidance_scale=guidance_scale if request.guidance_scale is None else request.guidance_scale,
        sampler=sampler_name(pipe.scheduler),
        seed=secrets.randbelow(MAX_SEED) if request.seed is None else request.seed,
    )


def defaults(pipe: Any, model: str) -> tuple[tuple[int, int], int, float]:
    """(native width and height in pixels, steps, guidance scale) of a model."""
    from .models import EMBEDDED

    if known := EMBEDDED.get(model):
        height, width = known.native_size
        return (width, height), known.steps, known.guidance_scale
    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return (native, native), STEPS, GUIDANCE_SCALE


def sampler_name(scheduler: Any) -> str:
    """A1111's name of a diffusers scheduler, or its class where A1111 has none."""
    from .schedulers import SCHEDULERS

    kind = type(scheduler).__name__
    fitting = [
        (len(settings), name)
        for name, (class_name, settings) in SCHEDULERS.items()
        if class_name == kind and all(scheduler.config.get(key) == value for key, value in settings.items())
    ]
    return max(fitting)[1] if fitting else kind.removesuffix("Scheduler")


def draw(
    pipe: Any, request: Request, settings: Settings, *, optimized: bool = True, on_step: OnStep | None = None
) -> Iterator[Picture]:
    """Draw all images of the request, batch by batch, each with a generator of its own.

    optimized   whether `pipe` is; a batch whose numbers go bad is then drawn again without the optimizer
    on_step     called as on_step(images of earlier batches, images' worth of this batch done so far)
    raises      InputError, NumericsError, OutOfMemoryError
    """
    from .pipelines import as_task

    task_pipe, inputs = as_task(pipe, request.task), _task_inputs(request, settings)
    shots = [(prompt, settings.seed + i) for i, prompt in enumerate(_repeat(request.prompts, request.count))]
    start = 0
    for batch in _batches(pipe, shots, settings, request.batch):
        arguments = _arguments(request, settings, batch, inputs)
        begun = time.perf_counter()
        with _memory_errors(settings, len(batch)):
            encode, report = partial(_encoded, pipe, request, settings, batch), _reporter(on_step, start, len(batch))
            images, note = _call(task_pipe, optimized, arguments, encode, report)
        seconds = (time.perf_counter() - begun) / len(batch)
        start += len(batch)
        for image, (prompt, seed) in zip(images, batch, strict=True):
            notes = tuple(filter(None, (note, *_notes(pipe, parse(prompt)))))
            yield Picture(image, seed, seconds, infotext(request, settings, prompt, seed), notes)


def infotext(request: Request, settings: Settings, prompt: str, seed: int) -> Infotext:
    """The text that draws this picture again, in A1111's order of keys."""
    sampler, karras, _ = settings.sampler.partition(" Karras")
    pairs = {
        "Steps": settings.steps,
        "Sampler": sampler,
        "Schedule type": "Karras" if karras else None,
        "CFG scale": settings.guidance_scale,
        "Seed": seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": settings.model,
        "Denoising strength": request.strength if request.init_image else None,
        "Clip skip": request.clip_skip if request.clip_skip > 1 else None,
        "Lora": ", ".join(f"{name}:{weight:g}" for name, weight in request.adapters) or None,
        "RNG": "CPU",
        "Version": f"allaprima {__version__}",
    }
    return Infotext(
        prompt, request.negative_prompt, {key: str(value) for key, value in pairs.items() if value is not None}
    )


def check_output(output: Path, num_images: int) -> None:
    """Whether the pictures can go there: a folder, or one .png file for one image.

    raises   InputError
    """
    suffix = "" if output.is_dir() else output.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise InputError(f"{output}: pictures are written as PNG; give a name that ends in .png, or a folder.")
    if suffix == ".png" and num_images > 1:
        raise InputError(f"{output} is one file, but {num_images} images are asked: give a folder.")
    folder = output.parent if suffix == ".png" else output
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{output} cannot be written: {there} is no folder that you may write to.")


def save(picture: Picture, output: Path) -> Path:
    """Write one picture to `output` (a .png file, or a folder where files count up as 00001-seed.png)."""
    path = output
    if output.suffix.lower() != ".png" or output.is_dir():
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{_next_number(output):05d}-{picture.seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(picture.image, path, picture.info)
    return path


def _call(
    pipe: Any,
    optimized: bool,
    arguments: Callable[[], dict[str, Any]],
    encode: Callable[[], Encoded | None],
    report: Callable[[Any, int], None],
) -> tuple[list[Image], str]:
    """Run the pipeline; where the optimizer's numbers go bad, run it again without."""
    from .pipelines import eager

    def run() -> list[Image]:
        given, encoded = arguments(), encode()

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            report(pipe, step)
            return encoded.on_step_end(pipe, step, timestep, tensors) if encoded else tensors

        if encoded:
            given = {k: v for k, v in given.items() if k not in ("prompt", "negative_prompt")} | encoded.arguments()
        with encoded.composing(pipe) if encoded else nullcontext():
            return _to_pil(pipe, pipe(**given | {"callback_on_step_end": after_step}, output_type="np").images)

    try:
        return run(), ""
    except NumericsError as error:
        if not optimized:
            raise
        with eager(pipe):
            return run(), f"drawn without the optimizer: {error}"


def _arguments(
    request: Request, settings: Settings, batch: list[Shot], inputs: dict[str, Any]
) -> Callable[[], dict[str, Any]]:
    """What the pipeline is called with, made anew at each try: generators are spent by use."""
    import torch

    each = {name: [value] * len(batch) for name, value in inputs.items() if name in ("image", "mask_image")}
    return lambda: dict(
        prompt=[prompt for prompt, _ in batch],
        negative_prompt=[request.negative_prompt] * len(batch),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        # One generator an image, on the CPU: the same noise alone, in any batch and on any device.
        generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
        **{**inputs, **each},
    )


def _encoded(pipe: Any, request: Request, settings: Settings, batch: list[Shot]) -> Encoded | None:
    """The prompts of a batch, or None where diffusers reads the same in them: no syntax, and no more than one chunk."""
    from .prompts import can_encode, encode, num_chunks

    prompts = [prompt for prompt, _ in batch]
    texts = [*map(parse, dict.fromkeys(prompts)), parse_negative(request.negative_prompt)]
    plain = request.clip_skip == 1 and all(text.is_plain for text in texts)
    if plain and (not can_encode(pipe) or all(num_chunks(pipe, text, 1) == 1 for text in texts)):
        return None
    return encode(
        pipe,
        prompts,
        request.negative_prompt,
        steps=_num_calls(pipe, settings),
        clip_skip=request.clip_skip,
        guidance=settings.guidance_scale > 1,
    )


def _num_calls(pipe: Any, settings: Settings) -> int:
    """How often the UNet is asked: by schedulers of second order twice a step."""
    return int(settings.steps * getattr(pipe.scheduler, "order", 1))


def _batches(pipe: Any, shots: list[Shot], settings: Settings, size: int) -> Iterator[list[Shot]]:
    """Pictures that are drawn at once: neighbours whose prompts have one length, since a longer prompt beside it
    would change what a shorter one draws."""
    from .prompts import can_encode, num_chunks

    calls = _num_calls(pipe, settings)
    lengths = {prompt: num_chunks(pipe, parse(prompt), calls) if can_encode(pipe) else 1 for prompt, _ in shots}
    for _, group in groupby(shots, key=lambda shot: lengths[shot[0]]):
        alike = list(group)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def _reporter(on_step: OnStep | None, start: int, batch: int) -> Callable[[Any, int], None]:
    """Tells `on_step` how far the batch is."""

    def report(pipe: Any, step: int) -> None:
        if on_step:
            on_step(start, batch * (step + 1) / pipe.num_timesteps)

    return report


def _repeat(prompts: tuple[str, ...], count: int) -> Iterator[str]:
    return (prompt for prompt in prompts for _ in range(count))


def _notes(pipe: Any, prompt: Prompt) -> Iterator[str]:
    """What the user should know of a prompt."""
    yield _unknown(pipe, prompt.words)
    yield from (f"nothing reads the tag {tag}: it is left out" for tag in prompt.unknown)
    if len(prompt.parts) == 1 and (weight := prompt.parts[0].weight) != 1:
        yield f"the prompt ends in a weight, as A1111 reads it: its guidance is multiplied by {weight:g}"


def _unknown(pipe: Any, prompt: str) -> str:
    """A note on what the tokenizer has no token for.  (CLIP's knows every byte, and so everything.)"""
    tokenizer = pipe.tokenizer
    if tokenizer.unk_token_id in (None, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return ""
    tokens = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True)
    pairs = zip(tokens.input_ids, tokens.offset_mapping, strict=True)
    unknown = dict.fromkeys(prompt[start:end] for token, (start, end) in pairs if token == tokenizer.unk_token_id)
    return f"the model does not know {' '.join(unknown)}" if unknown else ""


def _to_pil(pipe: Any, images: Any) -> list[Image]:
    """[B, H, W, 3] in 0..1 -> pictures; NaN would silently become black."""
    import numpy as np

    if not np.isfinite(images).all():
        raise NumericsError("the picture holds NaN or Inf. Draw it in another dtype: --dtype float32.")
    pictures: list[Image] = pipe.numpy_to_pil(images)
    return pictures


def _task_inputs(request: Request, settings: Settings) -> dict[str, Any]:
    size = (settings.width, settings.height)
    if request.init_image is None:
        return {"width": settings.width, "height": settings.height}
    inputs: dict[str, Any] = {"image": _open_image(request.init_image, "RGB", size), "strength": request.strength}
    if int(settings.steps * request.strength) < 1:
        raise InputError(
            f"strength {request.strength} of {settings.steps} steps leaves no step to draw: raise one of them."
        )
    if request.mask:
        inputs["mask_image"] = _open_image(request.mask, "L", size)
        inputs |= {"width": settings.width, "height": settings.height}
    return inputs


def _open_image(path: Path, mode: str, size: tuple[int, int] | None = None) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert(mode)
    except FileNotFoundError:
        raise InputError(f"There is no picture {path}.") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from error
    return image if size is None or image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _size_of(path: Path | None) -> tuple[int, int] | None:
    """The size of an init image, rounded to what can be drawn."""
    if path is None:
        return None
    width, height = _open_image(path, "RGB").size
    if max(width, height) > MAX_SIZE or min(width, height) < MIN_SIZE:
        raise SizeError(f"{path} is {width}x{height}; choose a size from {MIN_SIZE} to {MAX_SIZE} with --size.")
    return _nearest(width), _nearest(height)


def _nearest(pixels: int) -> int:
    return min(max(round(pixels / SIZE_MULTIPLE) * SIZE_MULTIPLE, MIN_SIZE), MAX_SIZE)


def _next_number(folder: Path) -> int:
    numbers = [int(found[1]) for path in folder.glob("*.png") if (found := re.match(r"(\d{5,})-", path.name))]
    return max(numbers, default=0) + 1


def _check_tags(prompts: tuple[str, ...]) -> None:
    """LoRAs are in the weights, and so the same for all pictures of a request."""
    first, *others = (parse(prompt).loras for prompt in prompts)
    if any(sorted(other) != sorted(first) for other in others):
        raise InputError("The prompts have different LoRA tags: give them in requests of their own.")


def _check_text(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise InputError(f"A prompt is text, not {type(prompt).__name__}.")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(f"The prompt {prompt!r} is not valid UTF-8.") from None


def _check_range(name: str, value: float | None, low: float, high: float = float("inf")) -> None:
    if value is not None and not low <= value <= high:
        allowed = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise InputError(f"{name} is {value}; allowed is {allowed}.")


@contextmanager
def _memory_errors(settings: Settings, batch: int) -> Iterator[None]:
    """Turn the many ways in which memory runs out into one error that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"memory ran out at {settings.width}x{settings.height} with {batch} images at once: "
            "draw fewer at once (--batch 1) or smaller (--size)."
        ) from error
