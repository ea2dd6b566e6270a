from __future__ import annotations

import torch

from allaprima.verification.truth import NoiseIn


def test_a_wider_run_starts_from_the_same_noise() -> None:
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    narrow = torch.randn(1, 4, 8, 8, generator=seeded(), dtype=torch.bfloat16)
    with NoiseIn(torch.bfloat16):
        wide = torch.randn(1, 4, 8, 8, generator=seeded(), dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(narrow.float(), wide)
