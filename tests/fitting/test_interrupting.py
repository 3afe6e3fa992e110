"""Ctrl-C at a step, after the last step, and twice."""

from __future__ import annotations

import signal

import pytest

from offramp.fitting.interrupting import interruptible


@pytest.fixture(autouse=True)
def handler():
    """Python's own, before and afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_the_first_one_waits_for_the_end_of_the_step():
    steps = []
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupted:
        for step in range(3):
            if step == 1:
                signal.raise_signal(signal.SIGINT)
            steps.append(step)
            if interrupted.is_set():
                raise KeyboardInterrupt
    assert steps == [0, 1]


def test_one_after_the_last_look_is_not_lost():
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupted:
        assert not interrupted.is_set()
        signal.raise_signal(signal.SIGINT)


def test_an_error_goes_before_it():
    with pytest.raises(ZeroDivisionError), interruptible():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError


def test_the_second_one_ends_at_once():
    steps = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
        steps.append("after the first")
        signal.raise_signal(signal.SIGINT)
        steps.append("after the second")
    assert steps == ["after the first"]


def test_without_one_nothing_happens():
    with interruptible() as interrupted:
        pass
    assert not interrupted.is_set()
