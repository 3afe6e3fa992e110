"""What is read out of bytecode."""

from __future__ import annotations

from typing import Any

import pytest

from offramp.networks.bytecode import global_names, imported, names_in, operations, stored_by

CACHE: dict[Any, Any] = {}
LOG: list[Any] = []


def doubled(x: int) -> int:
    """A docstring."""
    return 2 * x


def doubled_again(number: int) -> int:
    return 2 * number


def halved(x: int) -> int:
    return x // 2


def test_operations_leave_out_names_of_local_variables_and_docstrings():
    assert operations(doubled.__code__) == operations(doubled_again.__code__)
    assert operations(doubled.__code__) != operations(halved.__code__)


def reading(self: Any, x: Any) -> Any:
    import json

    return json.dumps([doubled(one) for one in getattr(self, "parts")]) + str(CACHE)  # noqa: B009


def test_names_of_inner_functions_and_texts_are_read():
    assert {"doubled", "parts", "dumps", "CACHE"} <= set(names_in(reading.__code__))
    assert {"doubled", "CACHE", "str"} <= set(global_names(reading.__code__))
    assert imported(reading.__code__) == ("json",)


def sets_attribute(self: Any, other: Any) -> None:
    self.calls = 1
    other.uses = 2


def adds_to_attribute(self: Any, other: Any) -> None:
    self.calls += 1
    other.uses -= 2


def sets_entries(self: Any, key: Any) -> None:
    self.calls[key, 0] = len(CACHE)
    CACHE["n"] += 1
    del LOG[0]


def calls_methods(self: Any, key: Any) -> None:
    self.calls.append(key)
    LOG.extend([key, key])
    CACHE.setdefault(key, 1)


def by_another_name(self: Any, key: Any) -> None:
    cache = self.calls
    log = LOG
    cache[key] = 1
    CACHE[key] = log.append(key)


STORED = {
    sets_attribute: {("calls", True), ("uses", False)},
    adds_to_attribute: {("calls", True), ("uses", False)},
    sets_entries: {("calls", True), ("CACHE", False), ("LOG", False)},
    calls_methods: {("calls", True), ("LOG", False), ("CACHE", False)},
}


@pytest.mark.parametrize("function", STORED, ids=lambda function: function.__name__)
def test_what_a_function_sets(function):
    assert set(stored_by(function.__code__)) == STORED[function]


def test_a_container_that_is_set_under_a_local_name():
    def alone(self: Any, key: Any) -> None:
        cache = self.calls
        cache[key] = 1

    assert ("calls", True) in stored_by(alone.__code__)
    assert ("CACHE", False) in stored_by(by_another_name.__code__)


def test_what_is_only_read_is_not_set():
    assert stored_by(reading.__code__) == ()
