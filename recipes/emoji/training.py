"""What all trainings share: the optimizer, the captured step, the schedule, checkpoints, curves and sheets."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.emoji.prepare import DATA

RUNS = DATA / "runs"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that every training has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="prepared folder (default recipes/data/emoji)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where checkpoints, curves and sheets go")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the run")
    parser.add_argument("--steps", type=int, default=10**9, help="at most so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see every line run on a CPU")
    return parser


def setup(args: argparse.Namespace) -> torch.device:
    """Seed everything, fill in defaults, and choose the device."""
    args.data = args.data or DATA / ("emoji-tiny" if args.tiny else "emoji")
    args.runs.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class FlatAdamW:
    """AdamW on one flat float32 copy of the parameters, which themselves are bfloat16 on CUDA; keeps a moving average.

    One flat buffer makes the whole update a handful of kernels; float32 masters keep small updates from rounding away.
    After construction the modules' parameters are views of the flat working copy.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        dtype: torch.dtype,
        decay: float = 0.9995,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.master = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.work, self.average, self.decay = self.master.to(dtype), self.master.clone(), decay
        self.grad = torch.zeros_like(self.work)
        for p, work, grad in zip(self.parameters, self.views(self.work), self.views(self.grad), strict=True):
            p.data, p.grad = work, grad
        self.lr = torch.zeros((), device=self.master.device)
        self.weight = torch.ones((), device=self.master.device)
        capturable = self.master.is_cuda
        self.adam = torch.optim.AdamW(
            [self.master], lr=self.lr, betas=betas, weight_decay=1e-3, capturable=capturable, fused=capturable or None
        )

    def views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def step(self) -> None:
        grad = self.grad.float()
        self.master.grad = grad * (1.0 / grad.norm().clamp(min=1.0))
        self.adam.step()
        self.work.copy_(self.master)
        self.average.lerp_(self.master, self.weight)
        self.grad.zero_()

    def schedule(self, step: int, lr: float) -> None:
        """Set this step's learning rate, and let the moving average forget its beginning quickly."""
        self.lr.fill_(lr)
        self.weight.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    def save(self, path: Path, step: int) -> None:
        torch.save({"step": step, "master": self.master, "average": self.average, "adam": self.adam.state_dict()}, path)

    def load(self, path: Path) -> int:
        """Carry on from a saved state; returns its step."""
        state = torch.load(path, map_location=self.master.device, weights_only=True)
        self.master.copy_(state["master"])
        self.average.copy_(state["average"])
        self.adam.load_state_dict(state["adam"])
        self.lr = self.adam.param_groups[0]["lr"] = self.lr
        self.use_master()
        return int(state["step"])

    def use_average(self) -> None:
        self.work.copy_(self.average)

    def use_master(self) -> None:
        self.work.copy_(self.master)


class Step:
    """A training step as a replayed CUDA graph; on a CPU, or with `eager`, simply the function.

    The function draws its own random batch, adds its loss to a static tensor, and updates the parameters.
    """

    pool: Any = None

    def __init__(self, function: Callable[[], None], device: torch.device, eager: bool = False) -> None:
        self.run = function
        if device.type == "cuda" and not eager:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=Step.pool):
                function()
            Step.pool = Step.pool or graph.pool()
            self.run = graph.replay


class Clock:
    """Where a training stands, by time: its share done, its learning rate, whether it is over."""

    def __init__(self, args: argparse.Namespace, lr: float, step: int = 0, floor: float = 0.0) -> None:
        self.seconds, self.steps, self.peak, self.floor = args.minutes * 60, args.steps, lr, floor
        self.start, self.step = time.perf_counter(), step

    @property
    def share(self) -> float:
        return min(1.0, max((time.perf_counter() - self.start) / self.seconds, self.step / self.steps))

    @property
    def lr(self) -> float:
        """Linear warm-up, then cosine to the floor's share of the peak."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.share))
        return self.peak * min(1.0, (self.step + 1) / 200) * (self.floor + (1 - self.floor) * cosine)


class Curve:
    """Collects losses with few synchronisations, prints progress, and draws the curve."""

    def __init__(self, name: str, runs: Path, device: torch.device, names: tuple[str, ...] = ("loss",)) -> None:
        self.name, self.runs, self.names = name, runs, names
        self.total = torch.zeros(len(names), device=device)
        self.since, self.last = 0, 0.0
        self.rows: list[list[float]] = []

    def log(self, clock: Clock, images_per_step: float, every: int = 100) -> None:
        self.since += 1
        if self.since < every and clock.share < 1:
            return
        means = (self.total / self.since).tolist()
        now, self.last = time.perf_counter(), self.last or clock.start
        self.rows.append([clock.step, now - clock.start, *means])
        values = "  ".join(f"{n} {v:.4f}" for n, v in zip(self.names, means, strict=True))
        speed = self.since / (now - self.last)
        print(
            f"{self.name} {100 * clock.share:3.0f} %  step {clock.step}  {values}  {speed:.1f} steps/s  {speed * images_per_step:.0f} images/s",
            flush=True,
        )
        self.total.zero_()
        self.since, self.last = 0, now

    def save(self) -> None:
        import json

        (self.runs / f"{self.name}.json").write_text(json.dumps({"names": self.names, "rows": self.rows}))
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
        for k, name in enumerate(self.names):
            axes.plot([r[0] for r in self.rows], [r[2 + k] for r in self.rows], label=name)
        axes.set(xlabel="step", yscale="log", title=self.name)
        axes.legend()
        figure.savefig(self.runs / f"{self.name}.png", dpi=110)


def sheet(images: Tensor, path: Path, columns: int = 10) -> None:
    """Save images [N, 3, H, W] in [-1, 1] as one PNG."""
    from PIL import Image

    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    rows = math.ceil(len(pixels) / columns)
    page = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), (230, 230, 230))
    for n, picture in enumerate(pixels):
        page.paste(Image.fromarray(picture), ((n % columns) * (width + 4) + 2, (n // columns) * (height + 4) + 2))
    page.save(path)
