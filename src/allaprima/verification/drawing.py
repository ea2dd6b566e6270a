"""What is drawn: one request to a pipeline, the prompts and the pictures for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from ..models import EMBEDDED, vocabulary

Task = Literal["text2img", "img2img", "inpaint"]
TASKS: tuple[Task, ...] = ("text2img", "img2img", "inpaint")

# For checkpoints that do not come with a list of what they can draw.
THINGS = """red apple, cat, dog, tree, house, car, sun, moon, star, flower, fish, bird, rocket, guitar, umbrella,
pizza, banana, strawberry, mushroom, cactus, butterfly, elephant, penguin, octopus, bicycle, train, airplane, sailboat,
clock, key, book, pencil, soccer ball, trophy, crown, hat, cup of coffee, birthday cake, snowman, rainbow"""


@dataclass(frozen=True)
class Drawing:
    """One request to a pipeline; image i is drawn with seed + i.

    image, mask_image   PIL images for img2img and inpaint; resized to the size that is drawn.
                        None takes `test_card` and `test_mask`.
    raises              InputError
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    seed: int = 0
    task: Task = "text2img"
    image: Image.Image | None = None
    mask_image: Image.Image | None = None
    strength: float = 0.8
    count: int = 1

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"task is {self.task!r}; allowed: {', '.join(TASKS)}.")

    def arguments(self, native: int) -> dict[str, Any]:
        """Keyword arguments for the pipeline of this task; fresh generators every time.

        native   height and width where none is given
        """
        size = (self.width or native, self.height or native)
        given: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "num_images_per_prompt": self.count,
            "generator": [torch.Generator().manual_seed(self.seed + i) for i in range(self.count)],
        }
        if self.task != "img2img":
            given |= {"width": size[0], "height": size[1]}
        if self.task != "text2img":
            given |= {"image": (self.image or test_card(*size)).resize(size), "strength": self.strength}
        if self.task == "inpaint":
            given["mask_image"] = (self.mask_image or test_mask(*size)).resize(size)
        return given

    def as_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in self.__dict__.items() if k not in ("image", "mask_image")}
        if self.task == "text2img":
            del plain["strength"]
        return plain


def prompts_for(model: str, count: int) -> list[str]:
    """Things that the model can draw, in its language, spread evenly over all that it knows."""
    names = vocabulary(model) if model in EMBEDDED else [name.strip() for name in THINGS.split(",")]
    chosen = min(count, len(names))
    return [names[i % chosen * len(names) // chosen] for i in range(count)]


def test_card(width: int, height: int) -> Image.Image:
    """A picture to start from: a gradient of three colours with a disc in the middle."""
    y, x = np.mgrid[0:height, 0:width] / np.array([[[height]], [[width]]])
    inside = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.09)[..., None]
    pixels = np.where(inside, [0.9, 0.3, 0.2], np.stack([x, y, 1 - x], axis=-1))
    return Image.fromarray((pixels * 255).astype(np.uint8))


def test_mask(width: int, height: int) -> Image.Image:
    """The right half is to be drawn anew."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


test_card.__test__ = test_mask.__test__ = False  # type: ignore[attr-defined]  # pytest, these are not tests
