"""The command line. Its commands are in `offramp.cli.commands`, which is imported when the first of
them is called.

Importing them takes a moment, in which Ctrl-C must end in a sentence too: so nothing is imported
here.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # that of typing, which takes a moment to import
if TYPE_CHECKING:
    from typing import Any, NoReturn

INTERRUPTED = 130  # the exit code of what Ctrl-C ended


def main() -> None:
    """The entry point. The current folder may hold the user's modules; it comes last, so that it
    shadows nothing.
    """
    try:
        from offramp.cli.commands import app

        sys.path.append("")
        app()
    # before a command has begun; from then on the command answers for itself
    except KeyboardInterrupt:
        sys.stderr.write("offramp: interrupted; nothing was written\n")
        _end()
    except SystemExit as problem:
        if problem.code == INTERRUPTED:
            _end()
        raise


def _end() -> NoReturn:
    """End the process with the exit code of an interruption.

    Python would end it by the signal where the interruption came within code that was compiled from
    a text, as dataclasses do while they are imported.
    """
    import contextlib

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(INTERRUPTED)


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'offramp.cli' has no attribute {name!r}")
    from offramp.cli.commands import app

    return app
