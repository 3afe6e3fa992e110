"""Ctrl-C that comes again if it was lost."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

WAIT = 0.5  # seconds after which a Ctrl-C that nobody handles counts as lost

WATCHER = "offramp-ctrl-c"  # the name of the thread that looks


@contextlib.contextmanager
def insisting(wait: float = WAIT) -> Iterator[None]:
    """While it is open, a Ctrl-C that got lost is raised again.

    Python raises KeyboardInterrupt in the code that the main thread happens to run. Some code drops
    every error: callbacks of weak references, `__del__`, and C code that asks for an attribute.
    While torch exports a network, it runs much of that. So a thread looks whether the main thread
    is still dealing with the interruption, and otherwise interrupts it once more.

    Args:
        wait: seconds between two looks.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    main = threading.get_ident()
    pressed = threading.Event()
    ended = threading.Event()

    def handle(*_: object) -> None:
        pressed.set()
        raise KeyboardInterrupt

    def insist() -> None:
        pressed.wait()
        while not ended.wait(wait):
            if not _interrupted(main):
                _thread.interrupt_main()

    signal.signal(signal.SIGINT, handle)
    threading.Thread(target=insist, name=WATCHER, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        pressed.set()  # so that the thread ends
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(thread: int) -> bool:
    """Whether a thread is in an `except` or `finally` that follows from a KeyboardInterrupt.

    Args:
        thread: the identifier of the thread.
    """
    active = sys._current_exceptions().get(thread)
    problem: BaseException | None
    problem = active[1] if isinstance(active, tuple) else active  # a tuple until Python 3.11
    while problem is not None:
        if isinstance(problem, KeyboardInterrupt):
            return True
        problem = problem.__context__
    return False
