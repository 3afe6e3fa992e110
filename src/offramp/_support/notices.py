"""Notices: a line about something that a reader left out, or read in one of several ways. They are
not errors.
"""

from __future__ import annotations

import warnings

from offramp.errors import Notice


def say(sentence: str) -> None:
    """Warn with a Notice. Python shows it once; the command line prints it on standard error."""
    warnings.warn(sentence, Notice, stacklevel=3)
