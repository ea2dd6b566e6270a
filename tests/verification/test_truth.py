from __future__ import annotations

import torch

from allaprima.verification.truth import NoiseIn, exact_float32


def test_a_wider_run_starts_from_the_same_noise() -> None:
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    narrow = torch.randn(1, 4, 8, 8, generator=seeded(), dtype=torch.bfloat16)
    with NoiseIn(torch.bfloat16):
        wide = torch.randn(1, 4, 8, 8, generator=seeded(), dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(narrow.float(), wide)


def test_float32_means_float32() -> None:
    """cuDNN takes TF32 for it where nobody forbids that; it is no nearer the truth than half precision is."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with exact_float32():
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
