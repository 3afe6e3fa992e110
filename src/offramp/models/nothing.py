"""A segment that returns its input, for a fork, or for an exit between two segments."""

from __future__ import annotations

from torch import nn

__all__ = ["nothing"]


def nothing() -> nn.Identity:
    """A segment that computes nothing."""
    return nn.Identity()
