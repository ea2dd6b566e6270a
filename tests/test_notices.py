"""Warnings reach the user of a command as one line each; what others talk about among themselves does not."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from allaprima import notices
from allaprima.notices import CHATTER, one_line_warnings, quiet_import

TORCHVISION = f"`CLIPImageProcessor` {notices.IMPORT_CHATTER}; falling back"


@pytest.mark.filterwarnings("always")
def test_warnings_are_lines_once(capsys: pytest.CaptureFixture[str]) -> None:
    with one_line_warnings():
        for _ in range(2):
            warnings.warn("the [VAE]\n overflowed", RuntimeWarning, stacklevel=1)
        assert not capsys.readouterr().err
    assert capsys.readouterr().err == "Warning: the [VAE] overflowed\n"


def test_the_log_of_a_library_is_lines_too_but_for_chatter(capsys: pytest.CaptureFixture[str]) -> None:
    with one_line_warnings():
        log = logging.getLogger("transformers.modeling_utils")
        log.warning("Some weights of %s were not initialized", "CLIPTextModel")
        log.info("loading")
        for words in CHATTER:
            log.warning("before %s after", words)
    assert capsys.readouterr().err == "Warning: Some weights of CLIPTextModel were not initialized\n"


@pytest.mark.filterwarnings("always")
def test_they_are_shown_where_the_command_fails(capsys: pytest.CaptureFixture[str]) -> None:
    show, handlers = warnings.showwarning, list(logging.getLogger("diffusers").handlers)

    @one_line_warnings()
    def command() -> None:
        warnings.warn("old file", UserWarning, stacklevel=1)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        command()
    assert capsys.readouterr().err == "Warning: old file\n"
    assert warnings.showwarning is show
    assert logging.getLogger("diffusers").handlers == handlers


def test_only_our_own_import_is_quiet() -> None:
    log = logging.getLogger("transformers.utils.import_utils")
    seen = notices.Notices()
    seen.add = seen.texts.append  # type: ignore[method-assign]  # chatter too
    log.addHandler(seen)
    try:
        with quiet_import():
            log.warning(TORCHVISION)
            log.warning("a real warning")
        log.warning(TORCHVISION)
    finally:
        log.removeHandler(seen)
    assert seen.texts == ["a real warning", TORCHVISION]


@pytest.mark.parametrize("module", ["explanation", "weights.checkpoints"])
def test_importing_is_quiet(module: str) -> None:
    """Each may be the first to import diffusers."""
    program = [sys.executable, "-c", f"import allaprima.{module}"]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    assert done.stderr == ""
