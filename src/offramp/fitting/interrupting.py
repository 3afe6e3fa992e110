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
    """While it lasts, the first Ctrl-C only sets the event, so that a step is never left half done;
    a second stops.

    echo: seconds in which another one is still the first: launchers of processes pass on what the
    terminal told them.
    """
    asked = threading.Event()
    until = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def heard(number: int, frame: Any) -> None:
        nonlocal until
        now = time.monotonic()
        if not echo:
            signal.signal(signal.SIGINT, before)
        elif not asked.is_set():
            until = now + echo
        elif now > until:
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
