"""The command line. One file per command; what is slow to import is imported when a command runs.

Exit codes: 0 all well, 1 something failed (a check, a request, the engine), 2 wrong usage or a bad request, 3 the model
or the backend cannot be had, 130 interrupted. An error is one line on standard error.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cortexstream import __version__
from cortexstream.cli.chat import chat
from cortexstream.cli.doctor import doctor
from cortexstream.cli.generate import generate
from cortexstream.cli.parity import parity
from cortexstream.cli.warmup import warmup
from cortexstream.errors import (
    BackendUnavailableError,
    CortexStreamError,
    InvalidRequestError,
    ModelLoadError,
    OutOfMemoryBudgetError,
)

FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 1, 2, 3, 130
WHERE_TO_RUN = ("backend", "CORTEXSTREAM_BACKEND")


def exit_code(error: CortexStreamError) -> int:
    """What a command that ended with this error exits with."""
    if isinstance(error, InvalidRequestError):
        return UNAVAILABLE if error.field in WHERE_TO_RUN else USAGE
    if isinstance(error, (ModelLoadError, BackendUnavailableError, OutOfMemoryBudgetError)):
        return UNAVAILABLE
    return FAILED


class Commands(TyperGroup):
    """Turns what a command raises into a line on standard error and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # its own Context moved between releases
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except CortexStreamError as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    name="cortexstream",
    cls=Commands,
    help="Serve language models with the same tokens on Apple Silicon (MLX) and elsewhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an error that is not ours is a fault to report: its plain traceback is wanted
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, warmup, doctor, parity):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cortexstream {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Runs before every command."""


def main() -> None:
    """Run the command line with the arguments of this process; ends it with SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a model may write what the terminal's encoding has no code for
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="cortexstream")
