"""What a change between two pictures costs: LoRAs, their weights, checkpoints; and what they cost each step (nothing).

python -m allaprima.bench.changes --arch sd15 --dtype float16

The files are made here: LoRAs of rank 64 on every linear layer of the UNet's attention, and a checkpoint, with random
weights, so that they are in the page cache.  Each change is timed from its call to the end of the next step, less a
plain step.  diffusers' own calls are timed on an eager pipeline beside ours.  One JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

NUM_LORAS, RANK, CHANGES = 5, 64, 7
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class Clock:
    """Seconds that a change takes, up to the end of the next step, beyond a plain step."""

    def __init__(self, pipe: Any, size: str) -> None:
        from ..generation import parse_size
        from .workloads import WORKLOADS, Case

        width, height = parse_size(size)
        self.pipe, self._step = pipe, WORKLOADS["step"].cycle(pipe, Case("step", width, height, 1))
        for _ in range(4):  # captured, planned, recorded
            self._step()

    def step_ms(self) -> float:
        from .timing import alternate

        least_ms = 100.0 if self.pipe.device.type == "cuda" else 0.0
        return alternate({"step": self._step}, repeats=7, device=self.pipe.device, least_ms=least_ms)["step"].median_ms

    def change_s(self, change: Callable[[], object]) -> float:
        from .timing import seconds

        def both() -> None:
            change()
            self._step()

        return max(0.0, seconds(both, self.pipe.device) - seconds(self._step, self.pipe.device))


def lora_file(unet: torch.nn.Module, path: Path, seed: int, rank: int = RANK) -> Path:
    """A LoRA as diffusers writes it, on the linear layers of all attention."""
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, part in unet.named_modules():
        if isinstance(part, torch.nn.Linear) and name.endswith(PROJECTIONS):
            for key, shape in (("lora_A", (rank, part.in_features)), ("lora_B", (part.out_features, rank))):
                value = torch.randn(shape, generator=generator) * 0.02
                tensors[f"unet.{name}.{key}.weight"] = value.to(part.weight.dtype)
    save_file(tensors, path)
    return path


def measured(arch: str | None, model: str, dtype: str, device: str, size: str) -> dict[str, Any]:
    from ..pipelines import optimize
    from .workloads import aliased, subject

    with tempfile.TemporaryDirectory() as folder:
        pipe = subject(arch, model, dtype, device)
        files = [lora_file(pipe.unet, Path(folder) / f"lora{i}.safetensors", i) for i in range(NUM_LORAS)]
        eager = _with_diffusers(Clock(aliased(pipe), size), files)
        clock = Clock(optimize(pipe), size)
        before = _captures(pipe)
        found = {"kind": "changes", "size": size, "loras": _with_loras(clock, files)}
        found["diffusers"] = {"eager": eager, "ours": _with_diffusers(clock, files)}
        found["switch"] = _with_checkpoints(clock, Path(folder))
    return found | {"captures": _captures(pipe) - before, "device": _device(pipe)}


def _with_loras(clock: Clock, files: Sequence[Path]) -> dict[str, Any]:
    """`ap.loras`."""
    from ..merging import loras

    names = [str(path) for path in files]
    found: dict[str, Any] = {"step_ms": {"0": clock.step_ms()}}
    found["first_s"] = clock.change_s(lambda: loras(clock.pipe, {names[0]: 0.8}))
    found["step_ms"]["1"] = clock.step_ms()
    found["another_s"] = clock.change_s(lambda: loras(clock.pipe, {names[1]: 0.8}))
    weights = [clock.change_s(lambda w=w: loras(clock.pipe, {names[1]: w / 10})) for w in range(CHANGES)]  # type: ignore[misc]
    found["weight_s"] = statistics.median(weights)
    found["all_s"] = clock.change_s(lambda: loras(clock.pipe, dict.fromkeys(names, 0.2)))
    found["step_ms"][str(len(names))] = clock.step_ms()
    found["none_s"] = clock.change_s(lambda: loras(clock.pipe, {}))
    return found


def _with_diffusers(clock: Clock, files: Sequence[Path]) -> dict[str, Any]:
    """diffusers' own calls."""
    pipe, first, *_ = clock.pipe, *files
    load = lambda: pipe.load_lora_weights(str(first.parent), weight_name=first.name, adapter_name="first")  # noqa: E731
    found: dict[str, Any] = {"load_s": clock.change_s(load), "step_ms": clock.step_ms()}
    weights = [clock.change_s(lambda w=w: pipe.set_adapters("first", w / 10)) for w in range(1, CHANGES)]  # type: ignore[misc]
    found["weight_s"] = statistics.median(weights)
    found["unload_s"] = clock.change_s(pipe.unload_lora_weights)
    return found


def _with_checkpoints(clock: Clock, folder: Path) -> dict[str, Any]:
    """`ap.switch` between two checkpoints of one architecture, from the page cache and from a pool."""
    from ..switching import switch
    from ..weights.pool import Pool

    places = [folder / name for name in ("one", "other")]
    for place in places:
        clock.pipe.save_pretrained(place)
        with torch.no_grad():  # the next one holds other numbers, in the UNet and the text encoder
            for part in (clock.pipe.unet, clock.pipe.text_encoder):
                for parameter in part.parameters():
                    parameter.mul_(1.001)
    turns = [places[i % 2] for i in range(4)]
    found: dict[str, Any] = {"page_cache_s": [clock.change_s(lambda p=p: switch(clock.pipe, p)) for p in turns]}  # type: ignore[misc]
    pool = Pool(16 << 30)
    for place in places:
        pool.prefetch(place).result()
    found["pool_s"] = [clock.change_s(lambda p=p: switch(clock.pipe, p, pool=pool)) for p in turns]  # type: ignore[misc]
    found["step_ms"] = clock.step_ms()
    pool.close()
    return found


def _captures(pipe: Any) -> int:
    from ..explanation import explain

    return explain(pipe).captures


def _device(pipe: Any) -> str:
    return torch.cuda.get_device_name() if pipe.device.type == "cuda" else "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=None, help="an architecture with random weights: sd15")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", default="512x512", help="WIDTHxHEIGHT")
    given = vars(parser.parse_args(arguments))
    print(json.dumps(measured(**given)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
