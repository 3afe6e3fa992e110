"""What a reader left out, or read in one of several ways: said in a line, and no error."""

from __future__ import annotations

import warnings


class Notice(UserWarning):
    """Something in data or weights that a user should know. The command line prints its sentence."""


def say(sentence: str) -> None:
    """Say a sentence as a Notice; Python shows it once, the command line prints it on standard error."""
    warnings.warn(sentence, Notice, stacklevel=3)
