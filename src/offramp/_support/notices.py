"""What a reader left out, or read in one of several ways: said in a line, and no error."""

from __future__ import annotations

import warnings

from offramp.errors import Notice


def say(sentence: str) -> None:
    """Say a sentence as a Notice; Python shows it once, the command line prints it on standard
    error.
    """
    warnings.warn(sentence, Notice, stacklevel=3)
