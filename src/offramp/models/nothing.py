"""A segment that hands on what it reads: what stands at a fork, and at an exit between two
segments.
"""

from __future__ import annotations

from torch import nn

__all__ = ["nothing"]


def nothing() -> nn.Identity:
    """What computes nothing."""
    return nn.Identity()
