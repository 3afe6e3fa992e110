"""What this computer is."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor() -> str:
    """The name of the processor. Only Linux has /proc, and `platform` knows less there."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if match:
        return match[1]
    return platform.processor() or platform.machine()
