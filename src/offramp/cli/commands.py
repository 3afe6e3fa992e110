"""All commands: parse, call, print. Each group of commands has a file, and imports nothing heavy
before it is needed.
"""

from __future__ import annotations

import inspect as inspecting
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from offramp._support.find import failure
from offramp.cli.comparing import compare
from offramp.cli.converting import convert
from offramp.cli.cuts import adopt, cut, inspect
from offramp.cli.deploying import export
from offramp.cli.home import demo, doctor
from offramp.cli.interrupting import insisting
from offramp.cli.networks import ladder
from offramp.cli.pages import report
from offramp.cli.paths import resolutions, route, unrolled
from offramp.cli.plans import calibrate, check
from offramp.cli.printing import note
from offramp.cli.searching import search
from offramp.cli.serving import bench, run
from offramp.cli.traces import record
from offramp.cli.training import FitCommand, fit
from offramp.errors import OfframpError, OfframpWarning

UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
    """The group of all commands. An expected error becomes one sentence and an exit code."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the command line."""
        try:
            return super().make_context(*args, **kwargs)
        # Ctrl-C while modules are imported.
        except KeyboardInterrupt as problem:
            raise _ended("interrupted; nothing was written", 130) from problem

    def invoke(self, ctx: Any) -> Any:
        """Call the command.

        An exception that is neither an OfframpError nor a bad option is a bug, and keeps its
        traceback.
        """
        try:
            with insisting(), warnings.catch_warnings():
                warnings.simplefilter("always", OfframpWarning)
                warnings.showwarning = _shown(warnings.showwarning)
                return super().invoke(ctx)
        except OfframpError as problem:
            raise _ended(str(problem), 2) from problem
        except UsageError as problem:
            # In the form of our own errors: one sentence, without typer's box.
            if getattr(problem, "ctx", None):
                where = problem.ctx.command_path
            else:
                where = "offramp"
            message = problem.format_message().replace(". Did you", "; did you").rstrip(".?")
            raise _ended(f"{message}; see {where} --help", 2) from problem
        except KeyboardInterrupt as problem:
            raise _ended("interrupted; nothing was written", 130) from problem
        except SystemExit as problem:  # a command ends with typer.Exit, so this is the user's code
            text = f"your own code must not end the program, got {failure(problem)}"
            raise _ended(text, 2) from problem


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100, "help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    """Print the version, if it is asked for."""
    if asked:
        from offramp import __version__

        typer.echo(f"offramp {__version__}")
        raise typer.Exit


@app.callback()
def offramp(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Make trained networks spend less on easy inputs, under a certified promise.

    From left to right: ladder, or cut and fit (for forks route, resolutions or unrolled); then
    record, calibrate, run. Each step is a file: work can stop and go on elsewhere.
    To see it all on data that needs no download: offramp demo
    """


def _ended(sentence: str, code: int) -> typer.Exit:
    """Print the last line of a command that fails, and return the exit to raise."""
    one_line = " ".join(sentence.split())
    typer.echo(f"offramp: {one_line}", err=True)
    return typer.Exit(code)


def _shown(others: Callable[..., None]) -> Callable[..., None]:
    """A function that prints each of our warnings once, and other warnings as `others` does."""
    printed: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, OfframpWarning):
            others(message, category, *where, **more)
        elif str(message) not in printed:
            printed.add(str(message))
            note(f"offramp: {message}")

    return show


def _help(command: Callable[..., None]) -> str:
    """The docstring, with the mark that keeps the lines of its example as they are."""
    return inspecting.cleandoc(command.__doc__ or "").replace("Example:\n", "\b\nExample:\n")


for _command in (
    ladder,
    inspect,
    convert,
    search,
    cut,
    adopt,
    route,
    resolutions,
    unrolled,
    fit,
    record,
    calibrate,
    check,
    run,
    bench,
    export,
    report,
    compare,
    demo,
    doctor,
):
    _class = None
    if _command is fit:  # its help also lists a recipe's arguments
        _class = FitCommand
    app.command(help=_help(_command), cls=_class)(_command)
