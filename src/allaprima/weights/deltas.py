"""The algebra of adapters: what each kind of factors adds to a weight.

Every kind defines one change ΔW, its change at strength 1; merged is W + Σ sᵢ·ΔWᵢ, in float32.  Factors stay in the
dtype and the memory they were read into; they go to the weight's device when they are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, eq=False)
class Delta:
    """A change of one weight.  Compared by identity: factors are never changed once they are read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the change.  Trailing ones may differ from the weight's: a 1×1 convolution is a linear layer."""
        raise NotImplementedError

    def fits(self, weight: torch.Size) -> bool:
        """Whether the change can be laid out as a weight of this shape."""
        own, other = _without_ones(self.shape), _without_ones(weight)
        return own == other or self.shape == (weight[0], math.prod(weight[1:]))

    def of(self, base: torch.Tensor) -> torch.Tensor:
        """ΔW, `[shape]` or a view of it, in the dtype of `base` and on its device.

        base  the untouched weight, in the dtype that is computed in
        """
        raise NotImplementedError

    def add_to(self, total: torch.Tensor, base: torch.Tensor, strength: float) -> None:
        """total += strength · ΔW.  `total` is contiguous and of the shape of `base`."""
        total.add_(self.of(base).reshape(total.shape), alpha=strength)

    def tensors(self) -> list[torch.Tensor]:
        values = (getattr(self, entry.name) for entry in fields(self))
        own = [value for value in values if isinstance(value, torch.Tensor)]
        inner = [value.tensors() for value in values if isinstance(value, Delta)]
        return own + [tensor for found in inner for tensor in found]


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """LoRA and LoCon: scale · up · down, with a core between them scale · core ×₁ up ×₂ down.

    down     [R, I, *kernel], or [R, I] where there is a core
    up       [O, R], trailing ones allowed
    core     [R, R, *kernel] | None
    source   Hu et al. 2021, arXiv:2106.09685; Yeh et al. 2023 (LyCORIS), arXiv:2309.14859, §3.2
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    core: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        kernel = self.down.shape[2:] if self.core is None else self.core.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def of(self, base: torch.Tensor) -> torch.Tensor:
        down, up = _matrix(self.down, base), _matrix(self.up, base)
        if self.core is None:
            return (up @ down).mul_(self.scale).reshape(self.shape)
        return _tucker(_beside(self.core, base), up.T, down).mul_(self.scale)

    def add_to(self, total: torch.Tensor, base: torch.Tensor, strength: float) -> None:
        if self.core is not None:
            return super().add_to(total, base, strength)
        flat = total.view(total.shape[0], -1)
        flat.addmm_(_matrix(self.up, base), _matrix(self.down, base), alpha=strength * self.scale)
        return None


@dataclass(frozen=True, eq=False)
class Hadamard(Delta):
    """LoHa: scale · (A₁B₁) ⊙ (A₂B₂); with cores each side is core ×₁ A ×₂ B.

    a1, a2   [O, R], with cores [R, O]
    b1, b2   [R, I·kernel], with cores [R, I]
    source   Hyeon-Woo et al. 2021 (FedPara), arXiv:2108.06098; arXiv:2309.14859, §3.3
    """

    a1: torch.Tensor
    b1: torch.Tensor
    a2: torch.Tensor
    b2: torch.Tensor
    scale: float
    core1: torch.Tensor | None = None
    core2: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.core1 is not None:
            return (self.a1.shape[1], self.b1.shape[1], *self.core1.shape[2:])
        return (self.a1.shape[0], math.prod(self.b1.shape[1:]))

    def of(self, base: torch.Tensor) -> torch.Tensor:
        left = self._side(self.core1, self.a1, self.b1, base)
        return left.mul_(self._side(self.core2, self.a2, self.b2, base)).mul_(self.scale)

    @staticmethod
    def _side(core: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        if core is None:
            return _matrix(a, base) @ _matrix(b, base)
        return _tucker(_beside(core, base), _matrix(a, base), _matrix(b, base))


@dataclass(frozen=True, eq=False)
class Kronecker(Delta):
    """LoKr: scale · left ⊗ right, where either is whole or a product.

    left     [O₁, I₁] | ([O₁, R], [R, I₁])
    right    [O₂, I₂, *kernel] | ([O₂, R], [R, I₂, *kernel]), with a core [R, R, *kernel] ([R, O₂], [R, I₂])
    source   Edalati et al. 2022 (KronA), arXiv:2212.10650; arXiv:2309.14859, §3.4
    """

    left: tuple[torch.Tensor, ...]
    right: tuple[torch.Tensor, ...]
    scale: float
    core: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.left[0].shape[0], self.left[-1].shape[1]
        if self.core is not None:
            low = (self.right[0].shape[1], self.right[1].shape[1], *self.core.shape[2:])
        else:
            low = (self.right[0].shape[0], *self.right[-1].shape[1:])
        return (rows * low[0], columns * low[1], *low[2:])

    def of(self, base: torch.Tensor) -> torch.Tensor:
        left = _product([_matrix(part, base) for part in self.left])
        if self.core is not None:
            right = _tucker(_beside(self.core, base), *(_matrix(part, base) for part in self.right))
        elif len(self.right) == 1:
            right = _beside(self.right[0], base)
        else:
            right = _product([_matrix(part, base) for part in self.right]).reshape(-1, *self.right[1].shape[1:])
        left = left.reshape(*left.shape, *[1] * (right.dim() - 2))
        return torch.kron(left, right.contiguous()).mul_(self.scale)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.left, *self.right] + ([] if self.core is None else [self.core])


@dataclass(frozen=True, eq=False)
class Full(Delta):
    """The change as it is: full fine-tuning, norms and biases."""

    change: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.change.shape)

    def of(self, base: torch.Tensor) -> torch.Tensor:
        return _beside(self.change, base)


@dataclass(frozen=True, eq=False)
class Scaled(Delta):
    """(IA)³: each row of the weight, or each column, times a learned number: ΔW = W · factor.

    factor   [O] or [I], other axes 1
    source   Liu et al. 2022, arXiv:2205.05638
    """

    factor: torch.Tensor
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,) * self.axis + (self.factor.numel(),)

    def fits(self, weight: torch.Size) -> bool:
        return len(weight) > self.axis and weight[self.axis] == self.factor.numel()

    def of(self, base: torch.Tensor) -> torch.Tensor:
        return base * _along(self.axis, self.factor, base)


@dataclass(frozen=True, eq=False)
class Decomposed(Delta):
    """DoRA around another change: ΔW = magnitude · V/‖V‖ − W with V = W + inner, norms by row or by column.

    At strengths other than 1 this goes straight from W to the trained weight, as web UIs do.
    magnitude  one number a row (axis 0) or a column (axis 1)
    source     Liu et al. 2024, arXiv:2402.09353
    """

    inner: Delta
    magnitude: torch.Tensor
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def fits(self, weight: torch.Size) -> bool:
        return self.inner.fits(weight) and weight[self.axis] == self.magnitude.numel()

    def of(self, base: torch.Tensor) -> torch.Tensor:
        moved = base.clone(memory_format=torch.contiguous_format)
        self.inner.add_to(moved, base, 1.0)
        others = [axis for axis in range(base.dim()) if axis != self.axis]
        norm = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)  # a row of zeros stays one
        return moved.div_(norm).mul_(_along(self.axis, self.magnitude, base)).sub_(base)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.inner.tensors(), self.magnitude]


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Without the ones at its end."""
    size = len(shape)
    while size and shape[size - 1] == 1:
        size -= 1
    return tuple(shape[:size])


def _beside(factor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """A factor on the weight's device, in the dtype that is computed in.  First moved: fewer bytes travel."""
    return factor.to(base.device, non_blocking=True).to(base.dtype)


def _matrix(factor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return _beside(factor, base).reshape(factor.shape[0], -1)


def _along(axis: int, factor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    sizes = [1] * base.dim()
    sizes[axis] = factor.numel()
    return _beside(factor, base).reshape(sizes)


def _tucker(core: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """core [R, S, *kernel], rows [R, O], columns [S, I] -> [O, I, *kernel]."""
    return torch.einsum("rs...,ro,si->oi...", core, rows, columns)


def _product(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]
