"""`python -m allaprima.verification`"""

import typer

from .command import command

if __name__ == "__main__":
    typer.run(command)
