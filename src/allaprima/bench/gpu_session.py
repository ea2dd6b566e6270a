"""Everything that is to be known of a GPU, in one go: tests, timings, tables, profile.

python -m allaprima.bench.gpu_session                          all sections, in the order of their list
python -m allaprima.bench.gpu_session --only compile,tests     some of them, for machines that are lent by the minute

Each section is a process of its own with its own time limit; one that fails or takes too long ends itself alone.  What
they print goes to the terminal and to log.txt; session.json says how each went; the numbers are in JSON lines beside
it.  The folder is --output, else $OUT, else build/gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

THREE, ODD = "512x512,768x768,1024x1024", "704x448,840x600"


@dataclass(frozen=True)
class Section:
    """One process, or several one after another.

    limit_s   seconds for all of them together
    commands  words behind "python -m"; FOLDER stands for the folder of results, PARTS for one that is thrown away,
              ARCH for the options that say what is measured
    fresh     whether it starts with empty caches of kernels and captures of its own
    """

    name: str
    about: str
    limit_s: float
    commands: tuple[str, ...]
    fresh: bool = False


def _bench(what: str, sizes: str, variants: str, more: str = "") -> str:
    return (
        f"allaprima.bench.command ARCH --what {what} --sizes {sizes} --variants {variants} --no-memory "
        f"--no-costs --output PARTS/NUMBER {more}"
    )


_OF_BENCH = "tests/bench/test_operators.py tests/bench/test_profiling.py tests/bench/test_variants.py"
_QUIETLY = "-W default -p no:cacheprovider"
_FIRST = "allaprima.bench.first ARCH --steps 50"

SECTIONS = (
    Section("compile", "all kernels, with nothing cached", 240, ("allaprima.backends.cuda.warming --dtype float16",)),
    Section(
        "kernels",
        "the kernels' tests, compiled, and those that need a GPU",
        420,
        (
            f"pytest -q --maxfail=25 --durations=10 tests/backends/cuda {_OF_BENCH} "
            f"--ignore=tests/backends/cuda/test_compile.py {_QUIETLY} XDIST",
        ),
    ),
    Section(
        "graphs",
        "the tests of recording and replaying alone",
        180,
        (f"pytest -q tests/backends/cuda/test_executable.py {_OF_BENCH} {_QUIETLY}",),
    ),
    Section(
        "operators",
        "every candidate of every operator",
        420,
        (
            "allaprima.bench.operators ARCH --what step,vae,text --sizes 512x512,1024x1024 --seconds 330 "
            "--output FOLDER/operators.jsonl",
        ),
    ),
    Section(
        "bench",
        "one step, text encoder and decoder at three sizes beside eager and eager in a CUDA graph",
        300,
        (_bench("step,text,vae", THREE, "eager,cuda-graph,ours", "--repeats 10"),),
    ),
    Section(
        "batches",
        "other sizes and batches",
        240,
        (_bench("step", f"512x512,{ODD}", "eager,ours", "--batches 1,2,4,8 --repeats 3"),),
    ),
    Section(
        "pictures",
        "prompt to picture, 50 steps; from a picture, and with a mask",
        420,
        (
            _bench("e2e,img2img,inpaint", "512x512", "eager,ours", "--steps 50 --repeats 3"),
            _bench("e2e", "768x768,1024x1024", "eager,ours", "--steps 50 --repeats 3"),
        ),
    ),
    Section(
        "first",
        "the first pictures of a process and memory: nothing cached, then with caches, then eager",
        300,
        (
            f"{_FIRST} --variant ours --sizes {THREE},{ODD}",
            f"{_FIRST} --variant ours --sizes {THREE},{ODD}",
            f"{_FIRST} --variant eager --sizes {THREE}",
        ),
        fresh=True,
    ),
    Section("changes", "LoRAs and checkpoints exchanged", 240, ("allaprima.bench.changes ARCH --size 512x512",)),
    Section(
        "profile",
        "each operator's time beside its floor",
        180,
        ("allaprima.bench.profiling ARCH --what step,vae --sizes 512x512,1024x1024 --output FOLDER/profile.json",),
    ),
    Section(
        "rivals",
        "torch.compile in a CUDA graph, and xformers",
        360,
        (_bench("step", "512x512", "eager,xformers,compile-graph,ours", "--repeats 10 --compile-limit 240"),),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """How a section went: the last exit status, or -1 where its time was over."""

    name: str
    about: str
    seconds: float
    status: int
    commands: tuple[str, ...]

    def __str__(self) -> str:
        said = {0: "done", -1: "its time was over"}.get(self.status, f"failed with {self.status}")
        return f"{self.name:<12}{self.seconds:>7.0f} s  {said}"


def run(sections: Sequence[Section], folder: Path, subject: str) -> list[Outcome]:
    """The sections in turn; everything is on disk after each, whatever happens to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as parts, (folder / "log.txt").open("w", encoding="utf-8") as log:
        words = {"FOLDER": str(folder), "PARTS": parts, "ARCH": subject, "XDIST": "-n 8" if _has("xdist") else ""}
        for section in sections:
            _say(f"\n==== {section.name}: {section.about}", log)
            outcomes.append(_run(section, words, log))
            _say(f"==== {outcomes[-1]}", log)
            _gather(folder, Path(parts), section.name)
            about = {"sections": [asdict(o) for o in outcomes], "summary": summary(folder)}
            (folder / "session.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        _say("\n" + "\n".join([*map(str, outcomes), "", *summary(folder)]), log)
    return outcomes


def _run(section: Section, words: dict[str, str], log: TextIO) -> Outcome:
    start, status, commands = time.monotonic(), 0, []
    environment = dict(os.environ, PYTHONUNBUFFERED="1", COLUMNS="160")
    if section.fresh:
        caches = Path(words["PARTS"]) / "caches"
        environment |= {"TRITON_CACHE_DIR": str(caches / "triton"), "ALLAPRIMA_CACHE": str(caches / "allaprima")}
    for number, text in enumerate(section.commands):
        commands.append(_filled(text, {**words, "NUMBER": f"{section.name}-{number}"}))
        left = section.limit_s - (time.monotonic() - start)
        ended = _ended([sys.executable, "-m", *commands[-1].split()], environment, left, log)
        status = ended or status
        if ended == -1:
            break
    return Outcome(section.name, section.about, time.monotonic() - start, status, section.commands)


def _filled(text: str, words: dict[str, str]) -> str:
    for name, value in words.items():
        text = text.replace(name, value)
    return text


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _ended(command: Sequence[str], environment: dict[str, str], limit_s: float, log: TextIO) -> int:
    """Run one process and pass on what it prints.  returns its exit status, or -1 where it was ended"""
    over = threading.Event()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:

        def end() -> None:
            over.set()
            os.killpg(process.pid, signal.SIGKILL)  # its children too: it leads a group of its own

        timer = threading.Timer(max(0.1, limit_s), end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                _say(line.rstrip("\n"), log)
            status = process.wait()
        finally:
            timer.cancel()
    return -1 if over.is_set() else status


def _say(line: str, log: TextIO) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)


def _gather(folder: Path, parts: Path, section: str) -> None:
    """The JSON lines of a section's benchmarks into one file, each with the section's name: few files come back."""
    with (folder / "bench.jsonl").open("a", encoding="utf-8") as file:
        for path in sorted(parts.glob(f"{section}-*/*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                file.write(json.dumps({"section": section, **json.loads(line)}, ensure_ascii=False) + "\n")
            path.unlink()


# ---- the summary ---------------------------------------------------------------------------------------------------


def summary(folder: Path) -> list[str]:
    """What the issue asks for, in lines: times beside eager's, errors beside eager's, first pictures, memory."""
    lines = [json.loads(x) for x in _lines(folder / "bench.jsonl")]
    found = [*_times(lines), *_errors(lines), *_per_gflop(lines)]
    log = _lines(folder / "log.txt")
    for kind, told in (("first", _first), ("changes", _changes)):
        found += [text for x in log if x.startswith(f'{{"kind": "{kind}"') for text in told(json.loads(x))]
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _case(line: dict[str, Any]) -> str:
    return f"{line['what']} {line['width']}x{line['height']} batch {line['batch']}"


def _times(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    outcomes = [x for x in lines if x["kind"] == "outcome"]
    for case in dict.fromkeys(map(_case, outcomes)):
        shown = []
        for x in (x for x in outcomes if _case(x) == case):
            time_ms = f"{x['median_ms']:.2f} ms" if "median_ms" in x else x.get("note", "")
            extra = (
                f", new size +{x['extra_s']:.2f} s" if x["variant"] == "ours" and x.get("extra_s") is not None else ""
            )
            wrong = "" if x["status"] in ("ok", "failed", "unfinished") else f" {x['status']}"
            shown.append(f"{x['variant']} {time_ms}{wrong}{extra}")
        yield f"{case}: " + "; ".join(shown)


def _errors(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Ours over eager's, both against float32."""
    errors: dict[str, dict[str, float]] = {}
    for x in lines:
        if x["kind"] == "outcome" and isinstance(x.get("error"), float):
            errors.setdefault(_case(x), {})[x["variant"]] = x["error"]
    ratios = {c: e["ours"] / e["eager"] for c, e in errors.items() if e.get("eager") and "ours" in e}
    if ratios:
        worst = max(ratios, key=lambda c: ratios[c])
        middle = statistics.median(ratios.values())
        yield f"error against float32, ours over eager's: median {middle:.3f}, worst {ratios[worst]:.3f} ({worst})"


def _per_gflop(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    for x in lines:
        if x["kind"] == "outcome" and x["variant"] == "ours" and x.get("flops") and "median_ms" in x:
            rate = x["median_ms"] * 1e12 / x["flops"]
            yield f"{_case(x)}: {rate:.3f} ms per TFLOP, floor share {x['floor_share']:.0%}"


def _first(x: dict[str, Any]) -> Iterator[str]:
    parts = ", ".join(f"{name} {x[name + '_s']:.1f}" for name in ("import", "load", "prepare", "first_picture"))
    yield f"{x['variant']}, seconds from the start of the process: {parts}"
    for size in x["sizes"]:
        one, two, three = size["pictures_s"]
        more = one + two - 2 * three
        yield (
            f"{x['variant']} {size['size']}: pictures {one:.2f} {two:.2f} {three:.2f} s, new size +{more:.2f} s, "
            f"peak {size['peak_bytes'] / 1e9:.2f} GB"
        )


def _changes(x: dict[str, Any]) -> Iterator[str]:
    loras, switch = x["loras"], x["switch"]
    steps = ", ".join(f"{count} LoRAs {step_ms:.2f}" for count, step_ms in loras["step_ms"].items())
    theirs = x["diffusers"]["ours"]["step_ms"]
    yield f"changes at {x['size']}: {x['captures']} captures; step in ms: {steps}, diffusers' LoRA {theirs:.2f}"
    yield "ap.loras, ms: " + ", ".join(
        f"{name} {loras[name + '_s'] * 1e3:.0f}" for name in ("first", "another", "weight", "all", "none")
    )
    for who, calls in x["diffusers"].items():
        shown = ", ".join(f"{name} {calls[name + '_s'] * 1e3:.0f}" for name in ("load", "weight", "unload"))
        yield f"diffusers' calls, {who}, ms: {shown}"
    for name in ("page_cache", "pool"):
        yield f"switch from {name}, s: " + ", ".join(f"{seconds:.2f}" for seconds in switch[f"{name}_s"])


def chosen(names: str | None) -> list[Section]:
    """raises SystemExit for a name that there is not"""
    if not names:
        return list(SECTIONS)
    known = {s.name: s for s in SECTIONS}
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"--only {', '.join(unknown)}: there are {', '.join(known)}")
    return [known[name] for name in wanted]


def main(arguments: Sequence[str] | None = None, start: Callable[..., list[Outcome]] = run) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {', '.join(s.name for s in SECTIONS)}")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--arch", default="sd15", help="an architecture with random weights")
    parser.add_argument("--dtype", default="float16")
    given = parser.parse_args(arguments)
    folder = given.output or Path(os.environ.get("OUT", "build/gpu"))
    outcomes = start(chosen(given.only), folder.resolve(), f"--arch {given.arch} --dtype {given.dtype}")
    return 1 if any(o.status for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
