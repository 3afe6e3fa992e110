"""The command line. Its commands are in `offramp.cli.commands`, which is imported when the first
command is called.

This import takes a moment, in which Ctrl-C must also end with one sentence. So nothing else is
imported here.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as in typing, which would take a moment to import
if TYPE_CHECKING:
    from typing import Any, NoReturn

INTERRUPTED = 130  # the exit code after Ctrl-C


def main() -> None:
    """The entry point. The user's modules may be in the current folder. It is the last entry of
    the path, so that it shadows nothing.
    """
    try:
        from offramp.cli.commands import app

        sys.path.append("")
        app()
    # Ctrl-C before a command has begun. Later the command handles it.
    except KeyboardInterrupt:
        sys.stderr.write("offramp: interrupted; nothing was written\n")
        _end()
    except SystemExit as problem:
        if problem.code == INTERRUPTED:
            _end()
        raise


def _end() -> NoReturn:
    """End the process with the exit code of an interruption.

    Otherwise Python would end it by the signal, if the interruption came in code that is compiled
    from a text, such as that of dataclasses during an import.
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
