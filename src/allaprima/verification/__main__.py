"""`python -m allaprima.verification`"""

import typer

from ..notices import one_line_warnings
from .command import command

if __name__ == "__main__":
    with one_line_warnings():
        typer.run(command)
