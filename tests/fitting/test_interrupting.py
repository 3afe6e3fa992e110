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


def three_steps(steps: list[int]) -> None:
    """A loop that is interrupted in its second step."""
    with interruptible() as interrupted:
        for step in range(3):
            if step == 1:
                signal.raise_signal(signal.SIGINT)
            steps.append(step)
            if interrupted.is_set():
                raise KeyboardInterrupt


def interrupted_after_the_last_look() -> None:
    with interruptible() as interrupted:
        assert not interrupted.is_set()
        signal.raise_signal(signal.SIGINT)


def interrupted_and_failing() -> None:
    with interruptible():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError


def interrupted_twice(steps: list[str]) -> None:
    with interruptible():
        signal.raise_signal(signal.SIGINT)
        steps.append("after the first")
        signal.raise_signal(signal.SIGINT)
        steps.append("after the second")


def test_the_first_one_waits_for_the_end_of_the_step():
    steps = []
    with pytest.raises(KeyboardInterrupt):
        three_steps(steps)
    assert steps == [0, 1]


def test_one_after_the_last_look_is_not_lost():
    with pytest.raises(KeyboardInterrupt):
        interrupted_after_the_last_look()


def test_an_error_goes_before_it():
    with pytest.raises(ZeroDivisionError):
        interrupted_and_failing()


def test_the_second_one_ends_at_once():
    steps = []
    with pytest.raises(KeyboardInterrupt):
        interrupted_twice(steps)
    assert steps == ["after the first"]


def test_without_one_nothing_happens():
    with interruptible() as interrupted:
        pass
    assert not interrupted.is_set()
