"""The exception tree: one base, and the built-in errors that a caller would expect."""

from __future__ import annotations

import inspect
import pickle

import pytest

from allaprima import errors
from allaprima.errors import AllaprimaError, UnknownModelError

ALL = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, Exception)]


def test_every_error_has_the_one_base() -> None:
    assert len(ALL) >= 13
    assert all(issubclass(error, AllaprimaError) for error in ALL)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        ("ConfigError", ValueError),
        ("UnknownModelError", LookupError),
        ("SizeError", ValueError),
        ("SchedulerError", ValueError),
        ("NumericsError", ArithmeticError),
        ("OutOfMemoryError", MemoryError),
    ],
)
def test_an_error_is_also_what_python_calls_it(error: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, error), builtin)


def test_the_tree_is_the_one_that_the_module_draws() -> None:
    drawn = str(errors.__doc__)
    assert all(error.__name__ in drawn for error in ALL)
    assert all(error.__doc__ for error in ALL)


@pytest.mark.parametrize(
    ("name", "nearest"), [("emojy", ("emoji",)), ("emoji-zh3d", ("emoji-zh-3d", "emoji-zh", "emoji")), ("EMOJI", None)]
)
def test_an_unknown_model_names_its_neighbours(name: str, nearest: tuple[str, ...] | None) -> None:
    error = UnknownModelError(name, ["emoji-zh-3d", "emoji", "emoji-zh"])
    if nearest:
        assert error.nearest[: len(nearest)] == nearest
    assert name in str(error)
    assert all(n in str(error) for n in error.nearest)


def test_a_name_like_nothing_lists_all_models() -> None:
    assert UnknownModelError("xyz", ["b", "a"]).nearest == ("a", "b")


def test_errors_cross_a_process_border() -> None:
    for error in ALL:
        made = error("x", ["y"]) if error is UnknownModelError else error("words")
        again = pickle.loads(pickle.dumps(made))
        assert type(again) is error
        assert str(again) == str(made)
