"""From the start of a process to its pictures, and the memory that each size takes.

python -m allaprima.bench.first --variant ours --arch sd15 --dtype float16 --sizes 512x512,768x768,1024x1024 --steps 50

One JSON line: seconds until torch and diffusers are imported, the weights are there, the pipeline is prepared; then for
each size the first three pictures and the peak of memory since the size before.  Sizes should grow: what the allocator
once took for one size it may use for the next.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

PICTURES = 3


def measured(variant: str, arch: str | None, model: str, dtype: str, device: str, sizes: str, steps: int) -> Any:
    """Everything in this process, in the order a user meets it."""
    started = time.perf_counter()
    from ..pipelines import optimize  # noqa: F401  imports torch and diffusers

    imported = time.perf_counter()
    from ..generation import parse_size
    from .memory import held_bytes, peak_bytes, reset_peak
    from .timing import seconds
    from .variants import VARIANTS
    from .workloads import COMPONENTS, WORKLOADS, Case, subject

    pipe = subject(arch, model, dtype, device)
    loaded = time.perf_counter()
    reset_peak(pipe.device)
    result: dict[str, Any] = {
        "kind": "first",
        "variant": variant,
        "import_s": imported - started,
        "load_s": loaded - imported,
        "loaded_bytes": held_bytes(pipe.device),
        "prepare_s": seconds(lambda: VARIANTS[variant](pipe, COMPONENTS), pipe.device),
        "sizes": [],
    }
    for size in sizes.split(","):
        width, height = parse_size(size)
        reset_peak(pipe.device)
        call = WORKLOADS["e2e"].cycle(pipe, Case("e2e", width, height, 1, steps))
        pictures = [seconds(call, pipe.device) for _ in range(PICTURES)]
        result["sizes"].append({"size": size, "pictures_s": pictures, "peak_bytes": peak_bytes(pipe.device)})
        result.setdefault("first_picture_s", time.perf_counter() - started - sum(pictures[1:]))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="ours")
    parser.add_argument("--arch", default=None, help="an architecture with random weights: sd15")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", default="512x512", help="WIDTHxHEIGHT,…")
    parser.add_argument("--steps", type=int, default=50)
    given = vars(parser.parse_args(arguments))
    print(json.dumps(measured(**given)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
