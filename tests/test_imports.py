"""Imports go one way, in the order of the data; importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import allaprima

PACKAGE = Path(allaprima.__file__).parent

# A module imports only from lines below its own; modules of one line do not know each other.
ORDER = (
    ("cli", "server"),
    ("demo", "models_command"),
    ("bench", "doctor"),
    ("verification",),
    ("generation", "hires"),
    ("explanation",),
    ("switching",),
    ("merging",),
    ("pipelines",),
    ("profiles",),
    ("prompts",),
    ("engine",),
    ("runner",),
    ("weights",),
    ("backends",),
    ("stage",),
    ("rewrite",),
    ("capture",),
    ("record",),
    ("graph",),
    ("ops",),
    ("fingerprint", "alt_diffusion", "ip_adapter"),
    (
        "environment",
        "infotext",
        "models",
        "notices",
        "config",
        "numerics",
        "schedulers",
        "tuners",
    ),
    ("errors",),
)
LAYER = {name: i for i, names in enumerate(ORDER) for name in names}


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(module: tuple[str, ...]) -> str:
    """The entry of ORDER that a module belongs to: ("backends", "aten") -> "backends"."""
    dotted = ".".join(module[:2])
    return dotted if dotted in LAYER else module[0]


def module_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports, wherever in the file; `from . import x` counts as x."""
    package = ("allaprima", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names] if module == ("allaprima",) else [module]
        else:
            continue
        yield from (name[1:] for name in names if name[0] == "allaprima" and len(name) > 1)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = part_of(module_of(path))
    assert part in LAYER, f"{part} is new: give it its place in ORDER"
    for first, *rest in imported(path):
        # `from . import optimize` means the module behind the public name
        other = part_of((allaprima._LAZY.get(first, first), *rest))
        if other != part and not other.startswith("__"):
            assert LAYER[other] > LAYER[part], f"{part} must not import {other}"


def test_the_reader_of_imports_sees_all_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    path = tmp_path / "ops" / "norm.py"
    path.write_text(
        "import allaprima.a, torch\nfrom allaprima import b\nfrom allaprima.c.d import e\nfrom .. import f\n"
        "from ..g import h\nfrom . import attention\ndef late():\n    from ..i.j import k\n"
    )
    assert [".".join(module) for module in imported(path)] == ["a", "b", "c.d", "f", "g", "ops", "i.j"]


def test_the_public_names_are_all_there_is() -> None:
    assert set(dir(allaprima)) - {"__version__"} == set(allaprima.__all__)
    assert list(allaprima.__all__) == sorted(allaprima.__all__, key=lambda name: (name.islower(), name))


@pytest.mark.parametrize("name", allaprima.__all__)
def test_public_names_resolve_and_say_what_they_do(name: str) -> None:
    assert getattr(allaprima, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="optimise"):
        allaprima.optimise  # noqa: B018


def test_importing_loads_nothing_heavy() -> None:
    program = (
        "import sys, allaprima\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'openvino', 'typer', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
