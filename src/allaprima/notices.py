"""What libraries and this package warn of, for the user of a command: one line each, once, and only what concerns them.

Importing this module loads nothing heavy.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LIBRARIES = ("diffusers", "transformers")

# Diffusers imports two image processors by names that transformers comments on wherever torchvision is not installed:
# nobody but diffusers can act on it.
IMPORT_CHATTER = "requires torchvision (not installed)"
CHATTER = (
    IMPORT_CHATTER,
    "Token indices sequence length is longer than",  # these two: `generation` tells of long prompts, and of both kinds
    "part of your input was truncated because CLIP",
    "that should be kept in float32: []",  # no modules: about none
    "No LoRA keys associated to",  # a LoRA may be for the UNet alone; one that fits nothing raises
)


class Notices(logging.Handler):
    """Collects Python warnings and the libraries' log; each text once, without chatter."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        line = " ".join(text.split())
        if line not in self.texts and not any(words in line for words in CHATTER):
            self.texts.append(line)

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def show_warning(self, message: Warning | str, *where: Any, **others: Any) -> None:
        """In the place of `warnings.showwarning`."""
        self.add(str(message))

    def print(self) -> None:
        """Write the lines to stderr."""
        from rich.console import Console
        from rich.markup import escape

        console = Console(stderr=True)
        for text in self.texts:
            console.print(f"[yellow]Warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


@contextmanager
def one_line_warnings() -> Iterator[Notices]:
    """Within this context warnings are collected; at its end they are printed, even where it ends with an error.

    Not earlier, because a progress bar may stand on the terminal until then.
    """
    notices = Notices()
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for logger in loggers:
        logger.addHandler(notices)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = notices.show_warning
            yield notices
    finally:
        for logger in loggers:
            logger.removeHandler(notices)
        if notices.texts:
            notices.print()


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and log lines off the terminal; `one_line_warnings` shows what matters."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    for log in (diffusers_log, transformers_log):
        log.disable_default_handler()
        log.disable_progress_bar()


@contextmanager
def quiet_import() -> Iterator[None]:
    """For our import of diffusers: transformers' comment on diffusers' code is left out, all else is logged."""
    logger = logging.getLogger("transformers.utils.import_utils")
    logger.addFilter(_no_import_chatter)
    try:
        yield
    finally:
        logger.removeFilter(_no_import_chatter)


def _no_import_chatter(record: logging.LogRecord) -> bool:
    return IMPORT_CHATTER not in record.getMessage()
