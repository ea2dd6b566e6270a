"""What the repository promises about itself: sizes, commands in the documents, numbers with a source."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from allaprima import __version__
from allaprima.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MAX_FILE_BYTES = 16 * 2**20
MAX_REPOSITORY_BYTES = 54 * 2**20
VAGUE_NAMES = {"utils", "helpers", "common", "manager", "misc"}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git working tree")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def blocks(document: Path) -> Iterator[str]:
    """The fenced blocks of a document that hold commands."""
    yield from re.findall(r"```(?:sh|bash|console)\n(.*?)```", document.read_text(), re.DOTALL)


def command_lines(document: Path) -> Iterator[list[str]]:
    for block in blocks(document):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words[words[0] == "$" :]


# ---- sizes and names


def test_no_file_is_large_and_neither_is_the_whole() -> None:
    sizes = {path: path.stat().st_size for path in tracked()}
    assert not [path for path, size in sizes.items() if size > MAX_FILE_BYTES]
    assert sum(sizes.values()) < MAX_REPOSITORY_BYTES


def test_every_source_file_says_what_it_holds() -> None:
    files = [path for path in (ROOT / "src").rglob("*.py") if path.read_text().strip()]
    assert not [path for path in files if not ast.get_docstring(ast.parse(path.read_text()))]


def test_the_readme_has_a_line_for_every_part() -> None:
    text = (ROOT / "README.md").read_text()
    parts = [path for path in (ROOT / "src" / "allaprima").iterdir() if path.suffix == ".py" or path.is_dir()]
    names = {f"{path.name}/" if path.is_dir() else path.name for path in parts if path.name != "__pycache__"}
    assert not [name for name in names if f"\n  {name} " not in text]


def test_files_are_named_for_what_they_hold() -> None:
    assert not [path for path in (ROOT / "src").rglob("*.py") if path.stem in VAGUE_NAMES]


# ---- commands


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def options_of(command: str) -> set[str]:
    group: Any = typer.main.get_command(app)
    assert command in group.commands, f"there is no command {command!r}"
    found: Any = group.commands[command]
    if command == "bench":
        from allaprima.bench.command import bench

        program = typer.Typer()
        program.command()(bench)
        found = typer.main.get_command(program)
    parts = [found, *getattr(found, "commands", {}).values()]
    return {n for part in parts for option in part.params for n in (*option.opts, *option.secondary_opts)} | {
        "--help",
        "-h",
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_the_documents_exists(document: Path) -> None:
    for words in command_lines(document):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= make_targets(), words
        elif words[0] == "allaprima" and not words[1].startswith("-"):
            given = {word.split("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
            assert given <= options_of(words[1]), words


def test_prove_runs_every_proof_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    def planned() -> str:
        command = ["make", "--dry-run", "prove", f"PROVED={tmp_path}"]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=plain).stdout

    proofs = ["-m pytest", "verification.captures", "--model emoji-zh-3d", "bench --arch sd15 --dtype bfloat16"]
    assert [proof for proof in proofs if proof not in planned()] == []
    for name in ("tests", "captures"):
        (tmp_path / name).touch()
    assert [proof for proof in proofs if proof in planned()] == proofs[2:]


def test_the_readme_has_its_two_commands() -> None:
    lines = [" ".join(words) for words in command_lines(ROOT / "README.md")]
    assert {"make demo", "make test"} <= set(lines)


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"


# ---- numbers


def tables(text: str) -> Iterator[tuple[str, str]]:
    """(the section's text, a table in it)"""
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            yield section, table


def measured() -> set[float]:
    """Every number that a command wrote under benchmarks/, and bytes as the GB that people read."""
    files = [path for path in (ROOT / "benchmarks").rglob("*") if path.suffix in (".json", ".jsonl", ".md", ".csv")]
    texts = (path.read_text() for path in files)
    found = {float(number) for text in texts for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)}
    return found | {number / 1e9 for number in found if number > 1e8}


def test_measured_numbers_of_the_readme_come_from_benchmarks() -> None:
    known = measured()
    for section, table in tables((ROOT / "README.md").read_text()):
        numbers = re.findall(r"\d+\.\d+", table)
        assert not numbers or "benchmarks/" in section, f"no source is named for the table\n{table}"
        for number in numbers:
            digits = len(number.partition(".")[2])
            assert any(round(value, digits) == float(number) for value in known), f"{number} is in no file"


def test_the_changelog_tells_of_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
