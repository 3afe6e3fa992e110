"""Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interruptible(echo: float = 0.0) -> Iterator[threading.Event]:
    """Delay Ctrl-C to the end of a step: the first one only sets the event, a second one stops at
    once.

    Args:
        echo: a second Ctrl-C within this many seconds counts as the first, because launchers
            forward the signal that their workers already received. 0 if there is no launcher.

    Yields:
        The event. It is never set outside the main thread, where Python delivers no signals.

    Raises:
        KeyboardInterrupt: Ctrl-C came, and the block ended without looking at the event.
    """
    interrupted = threading.Event()
    echo_end = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handle(number: int, frame: Any) -> None:
        nonlocal echo_end
        now = time.monotonic()
        if not echo:
            # Without a launcher Python's own handler takes the next Ctrl-C.
            signal.signal(signal.SIGINT, before)
        elif not interrupted.is_set():
            echo_end = now + echo
        elif now > echo_end:
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
    # It came after the last look at the event.
    if interrupted.is_set():
        raise KeyboardInterrupt
