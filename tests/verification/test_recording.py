from __future__ import annotations

import numpy as np
import torch

from allaprima.verification.drawing import Drawing
from allaprima.verification.recording import record
from tests.tiny import tiny_pipeline
from tests.verification.sabotage import SMALL


def test_given_latents_are_handed_on() -> None:
    pipe = tiny_pipeline()
    free = record(pipe, Drawing("a red apple", **SMALL))
    other = record(pipe, Drawing("two cats", seed=1, **SMALL), latents=free.latents)
    assert np.array_equal(free.pixels, other.pixels)  # decoded from the same last latents
    assert not torch.equal(free.predictions[1], other.predictions[1])
