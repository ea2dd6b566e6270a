"""What the choice costs beside the best that was measured: sum(time of the chosen) / sum(time of the best) over calls.

python -m tests.backends.cuda.calibration [FILE]                    the table for a file of measurements
python -m tests.backends.cuda.calibration FILE --into SAMPLE [OPERATOR …]   its calls take their place in a sample

FILE is what `allaprima.bench.operators` wrote (a line for each candidate) or a sample (a line for each call).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allaprima.backends.cuda.choose import OPERATORS
from allaprima.backends.cuda.device import KNOWN, Device
from allaprima.graph import target_name

MEASURED = Path(__file__).parents[3] / "benchmarks" / "h100-operators.jsonl"
H100 = next(d for d in KNOWN if d.name == "H100")
NAMES = {target_name(t).removeprefix("allaprima.ops.").removeprefix("aten."): t for t in OPERATORS}
GROUPS, EPSILON = 32, 1e-5


@dataclass(frozen=True)
class Call:
    """One call of an operator and the measured time of each candidate, µs.

    sizes   shapes of its tensors, as the operator takes them: "2x4096x320 960x320"
    count   how often the case makes it;  stride: of a convolution
    """

    case: str
    operator: str
    sizes: str
    dtype: str
    count: int
    stride: int
    us: dict[str, float]

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.case, self.operator, self.sizes, self.dtype, self.stride

    def arguments(self) -> tuple[Any, ...]:
        """The operator's arguments on the meta device: images channels-last, all else contiguous."""
        tensors = [_tensor(size, getattr(torch, self.dtype)) for size in self.sizes.split()]
        images = [t.contiguous(memory_format=torch.channels_last) for t in tensors if t.dim() == 4]
        flat = [t for t in tensors if t.dim() == 1]
        bias = flat[0] if flat else None
        match self.operator:
            case "linear.default" | "linear_add" | "geglu_linear":
                matrices = [t for t in tensors if t.dim() > 1]
                return (*matrices[:2], bias, *matrices[2:])
            case "conv2d.default":
                return (*images, bias, *self._window(images[1]), 1)
            case "conv2d_add":
                return (*images[:2], bias, images[2], *self._window(images[1]), 1)
            case "conv2d_cat":
                return (images[:-1], images[-1], bias, *self._window(images[-1]))
            case "upsample_conv" | "upsample_conv_folded":
                return (*images[:2], images[2] if len(images) > 2 else None, bias, None, None)
            case "group_norm.default" | "group_norm_silu":
                return ((images or tensors)[0], GROUPS, *flat, EPSILON)
            case "group_norm_silu_cat":
                return (images, GROUPS, *flat, EPSILON)
            case "layer_norm.default":
                return (tensors[0], tensors[0].shape[-1:], *flat, EPSILON)
            case "add_layer_norm":
                return (*tensors[:2], *flat, EPSILON)
            case "attention":
                return (*tensors, *(None,) * (4 - len(tensors)), None, False)
            case _:
                raise NotImplementedError(self.operator)

    def _window(self, weight: torch.Tensor) -> tuple[tuple[int, int], ...]:
        return (self.stride,) * 2, (weight.shape[2] // 2, weight.shape[3] // 2), (1, 1)

    def chosen(self, device: Device = H100) -> str | None:
        """The candidate that the model likes best among those that were measured."""
        operator = OPERATORS[NAMES[self.operator]]
        given = self.arguments()[: operator.num_arguments]
        found = [c for c in operator.candidates(given, device) if c.name in self.us]
        return min(found, key=lambda c: c.estimate_us).name if found else None

    @property
    def best(self) -> str:
        return min(self.us, key=lambda name: self.us[name])


def _tensor(size: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty([int(n) for n in size.split("x")], dtype=dtype, device="meta")


def read(path: Path) -> list[Call]:
    """The calls of a file of either kind; what failed or was wrong is left out."""
    found: dict[tuple[str, str, str, str, int], Call] = {}
    for line in path.read_text().splitlines():
        r = json.loads(line)
        about = r["case"], r["operator"], r["sizes"], r["dtype"]
        stride = _stride(r) if r.get("kind") == "candidate" else r.get("stride", 1)
        key = *about, stride
        if r.get("kind") != "candidate":
            found[key] = Call(*about, r["count"], stride, r["us"])
        elif r["us"] is not None and not r["note"]:
            call = found.setdefault(key, Call(*about, r["count"], stride, {}))
            call.us[r["candidate"]] = round(r["us"], 2)
    return list(found.values())


def _stride(record: dict[str, Any]) -> int:
    """Of a convolution, from its operations: 2·M·N·K has fewer rows than there are pixels."""
    if record["operator"] != "conv2d.default":
        return 1
    x, weight = ([int(n) for n in size.split("x")] for size in record["sizes"].split()[:2])
    rows = record["gflops"] * 1e9 / (2 * math.prod(weight))
    return round(math.sqrt(x[0] * x[2] * x[3] / rows))


def write(calls: Iterable[Call], path: Path) -> None:
    with path.open("w") as file:
        for c in calls:
            stride = {"stride": c.stride} if c.stride > 1 else {}
            about = {"case": c.case, "operator": c.operator, "sizes": c.sizes, "dtype": c.dtype, "count": c.count}
            file.write(json.dumps(about | stride | {"us": c.us}, separators=(",", ":")) + "\n")


@dataclass(frozen=True)
class Regret:
    """Times of the chosen and of the best candidates, counted as often as the calls are made, µs; the worst calls."""

    chosen_us: float
    best_us: float
    worst: list[str]

    @property
    def ratio(self) -> float:
        return self.chosen_us / self.best_us


def regrets(calls: Sequence[Call], device: Device = H100) -> dict[str, Regret]:
    """For each operator, over the calls for which something measured is still a candidate."""
    lost: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for call in calls:
        name = call.chosen(device)
        if name is not None:
            chosen, best = call.us[name], call.us[call.best]
            text = f"{chosen / best:.2f} {call.case} {call.sizes}: {name} {chosen} -> {call.best} {best}"
            lost[call.operator].append((call.count * chosen, call.count * best, text))
    return {
        operator: Regret(
            sum(c for c, _, _ in found),
            sum(b for _, b, _ in found),
            [text for c, b, text in sorted(found, key=lambda f: f[1] - f[0]) if c > 1.03 * b],
        )
        for operator, found in lost.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=MEASURED)
    parser.add_argument("operators", nargs="*", help="only these")
    parser.add_argument("--into", type=Path, help="a sample, in which these calls are replaced")
    given = parser.parse_args()
    calls = [c for c in read(given.file) if not given.operators or c.operator in given.operators]
    if given.into:
        replaced = {c.key for c in calls}
        kept = [c for c in read(given.into) if c.key not in replaced] if given.into.exists() else []
        write(sorted([*kept, *calls], key=lambda c: c.operator), given.into)
        return
    found = regrets(calls)
    for operator, regret in found.items():
        print(f"{operator:<22}{regret.chosen_us:9.0f}{regret.best_us:9.0f} us  {regret.ratio:.3f}")
        print("".join(f"    {text}\n" for text in regret.worst[:8]), end="")
    total, best = (sum(getattr(r, key) for r in found.values()) for key in ("chosen_us", "best_us"))
    print(f"{'all':<22}{total:9.0f}{best:9.0f} us  {total / best:.3f}")


if __name__ == "__main__":
    main()
