"""Settings: checked when they are made, never changed after."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from allaprima.config import BACKENDS, Config, default_cache_dir
from allaprima.errors import ConfigError


@pytest.mark.parametrize(
    "settings",
    [
        {"quality": "fast"},
        {"backend": "tensorrt"},
        {"memory_limit": 0},
        {"memory_limit": -1},
        {"memory_limit": 1.5},
        {"memory_limit": True},
        {"max_plans": 0},
        {"max_plans": None},
        {"threads": 0},
        {"threads": "four"},
    ],
    ids=str,
)
def test_a_setting_that_is_not_allowed_is_named(settings: dict[str, Any]) -> None:
    (name, value) = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=rf"Config\.{name} is {value!r}"):
        Config(**settings)


@pytest.mark.parametrize(
    "settings", [{"backend": b} for b in BACKENDS] + [{"memory_limit": 1}, {"threads": 3}], ids=str
)
def test_what_is_allowed_is_kept(settings: dict[str, Any]) -> None:
    assert settings.items() <= dataclasses.asdict(Config(**settings)).items()


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().backend = "aten"  # type: ignore[misc]


def test_a_cache_dir_may_be_a_text() -> None:
    assert Config(cache_dir="somewhere").cache_dir == Path("somewhere")  # type: ignore[arg-type]
    assert Config(cache_dir=None).cache_dir is None


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLAPRIMA_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert Config().cache_dir == default_cache_dir() == Path("/a")
    monkeypatch.delenv("ALLAPRIMA_CACHE")
    assert default_cache_dir() == Path("/x/allaprima")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache_dir() == Path("/home/somebody/.cache/allaprima")
