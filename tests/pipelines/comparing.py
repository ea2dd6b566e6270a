"""Draw with an optimized pipeline and with the same one eager, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

import allaprima as ap
from allaprima.pipelines import eager

TOLERANCE = 2e-4
"""Of pictures of order one in float32, as in tests/test_pipelines.py."""

SIZES = ((64, 64, 1), (72, 88, 2), (104, 64, 1))
"""(height, width, batch); the second is off the UNet's grid."""
MORE_SIZES = (*SIZES, (24, 200, 3), (136, 120, 1))

PICTURES = ("image", "control_image", "mask_image")
"""Arguments of which pipelines want one for each prompt."""

Cases = Iterable[tuple[int, int, int]]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def mask(height: int, width: int) -> Image.Image:
    """White, and so to be drawn anew, on the right."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def draw(pipe: Any, prompt: Any = "a red apple", **options: Any) -> np.ndarray:
    options = {"num_inference_steps": 2, "output_type": "np"} | options
    found = pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images
    return np.asarray(found)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    return float(np.abs(a.astype(np.float64) - b).max())


def same_as_eager(
    pipe: Any, prompt: Any = "a red apple", drawing: Callable[..., np.ndarray] = draw, **options: Any
) -> Any:
    """The optimized picture, after it was compared with eager's.  The picture must be one."""
    ours = drawing(pipe, prompt, **options)
    with eager(pipe):
        theirs = drawing(pipe, prompt, **options)
    assert difference(ours, theirs) < TOLERANCE
    assert ours.std() > 1e-2
    return ours


def captures(pipe: Any) -> int:
    found = ap.explain(pipe)
    return found.captures + found.loaded + found.discharged


def same_at_all_sizes(
    pipe: Any, options: Callable[[int, int], dict[str, Any]], cases: Cases = SIZES, prompt: str = "a red apple"
) -> None:
    """Pictures as eager's at every size, nothing captured after the first, nothing run eagerly."""
    counts = []
    for height, width, batch in cases:
        given = options(height, width)
        given |= {name: [given[name]] * batch for name in PICTURES if isinstance(given.get(name), Image.Image)}
        same_as_eager(pipe, [prompt] * batch, **given)
        counts.append(captures(pipe))
    assert len(set(counts)) == 1, counts
    no_fallbacks(pipe)


def no_fallbacks(pipe: Any) -> None:
    assert ap.explain(pipe).fallbacks == {}


def size(height: int, width: int) -> dict[str, Any]:
    """The options of text-to-image."""
    return {"height": height, "width": width}


def start(height: int, width: int) -> dict[str, Any]:
    """The options of image-to-image."""
    return {"image": picture(height, width), "strength": 0.7}
