"""Ctrl-C that some code drops comes again."""

from __future__ import annotations

import signal
import threading
import time
import weakref
from pathlib import Path

import pytest

from offramp.cli.interrupting import WATCHER, insisting
from typed import contents, offramp

SOON = 30  # seconds: against hanging


class Thing:
    """An object that weak references can name."""


def lose_one() -> None:
    """Press Ctrl-C in the callback of a weak reference, which drops all errors."""

    def callback(_):
        signal.raise_signal(signal.SIGINT)

    thing = Thing()
    reference = weakref.ref(thing, callback)
    del thing
    assert reference() is None


@pytest.fixture(autouse=True)
def handler():
    """Python's own, before and afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def work() -> None:
    """Go on for a while."""
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_was_lost_comes_again():
    def lost():
        with insisting(wait=0.05):
            lose_one()
            work()

    with pytest.raises(KeyboardInterrupt):
        lost()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_comes_as_often_as_it_is_lost():
    dropped = []

    def lost_three_times():
        with insisting(wait=0.05):
            lose_one()
            for number in range(2):
                try:
                    work()
                except KeyboardInterrupt:
                    dropped.append(number)
            work()

    with pytest.raises(KeyboardInterrupt):
        lost_three_times()
    assert dropped == [0, 1]


def test_one_that_is_being_handled_is_left_alone():
    steps = []

    def cleaned_up():
        with insisting(wait=0.02):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                for step in range(20):
                    time.sleep(0.01)
                    try:
                        raise OSError
                    except OSError:
                        steps.append(step)

    with pytest.raises(KeyboardInterrupt):
        cleaned_up()
    assert steps == [*range(20)]


def watchers() -> int:
    """How many threads look after Ctrl-C."""
    return sum(thread.name == WATCHER for thread in threading.enumerate())


def all_ended() -> bool:
    """Whether all such threads end soon."""
    end = time.monotonic() + SOON
    while watchers() and time.monotonic() < end:
        time.sleep(0.01)
    return not watchers()


def test_without_one_nothing_happens_and_its_thread_ends():
    assert all_ended()  # those of other tests have ended
    with insisting(wait=0.01):
        assert watchers() == 1
        time.sleep(0.1)
    assert all_ended()


def test_in_another_thread_it_does_nothing():
    handlers = []

    def inside():
        with insisting():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


LOSING = """
import signal, time, weakref
import numpy as np

class Thing:
    pass

def rows():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing  # the callback drops the interruption
    while True:
        time.sleep(0.01)
        yield np.zeros((4, 1, 8, 8), np.uint8)
"""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_command_ends_although_the_first_one_was_lost(workdir):
    Path("losing.py").write_text(LOSING)
    before = contents(workdir)
    done = offramp("record", "network", "losing:rows", "-o", "new.npz")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "offramp: interrupted; nothing was written"
    assert contents(workdir) == before
