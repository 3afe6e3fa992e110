"""The name of the processor, on systems with and without /proc."""

from __future__ import annotations

import platform
from pathlib import Path

from offramp._support.machine import processor


def test_the_name_is_that_of_proc_or_what_python_knows(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "x: 1\nmodel name\t: A Chip 3\n")
    assert processor() == "A Chip 3"

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert processor() == platform.machine()
