"""Remembers which rows trained the weights of a module, while this process lives.

`fit` notes the rows twice for every parameter that it changed. Nothing is stored on modules.

- By the parameter itself, while it lives. The model may be cut again, put into a ladder, taken
  apart, moved, cast, or trained further by other code. If a parameter gets its values from before
  `fit` back, it counts as untrained again.
- By a digest of its values. A deep copy, or a model into which the state dict was loaded, has the
  same values.

docs/concepts/promises.md lists what cannot be noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from offramp.plans.provenance import SeenRows, union

SAMPLE = 4096  # values of a parameter that are compared, evenly spread
# A parameter with fewer different values, such as zeros and ones, is not unique.
DISTINCT = 4
CASTS = (torch.float16, torch.bfloat16)  # a copy that is cast is the same model


@dataclass(frozen=True)
class _Trained:
    """A parameter that was trained: the digest of its values before `fit`, and the rows."""

    before: bytes | None
    rows: tuple[SeenRows, ...]


_LIVING: MutableMapping[Tensor, _Trained] = WeakIdKeyDictionary()  # by identity, and weakly
_VALUES: dict[bytes, tuple[SeenRows, ...]] = {}  # digest of values -> rows


def snapshot(module: nn.Module) -> dict[int, bytes]:
    """Digests of the values of all parameters, by the identity of the parameter."""
    digests = dict[int, bytes]()
    for value in module.parameters():
        if _is_known(value):
            digests[id(value)] = _digest(_sample(value), value.numel())
    return digests


def remember(module: nn.Module, rows: SeenRows, before: Mapping[int, bytes] | None = None) -> None:
    """Note that rows trained a module.

    Args:
        module: the module after training.
        rows: those that trained it.
        before: its `snapshot` before training; parameters that still hold the same values were not
            trained. Without it all of them were.
    """
    for value in module.parameters():
        if not _is_known(value):
            continue
        was = None if before is None else before.get(id(value))
        sample = _sample(value)
        now = _digest(sample, value.numel())
        if was == now:
            continue
        known = _LIVING.get(value)
        if known is None:
            _LIVING[value] = _Trained(was, (rows,))
        else:
            _LIVING[value] = _Trained(known.before, _with(known.rows, rows))
        if len(set(sample[:64].tolist())) < DISTINCT:
            continue
        digests = {now}
        for kind in CASTS:
            digests.add(_digest(sample.to(kind), value.numel()))
        for digest in digests:
            _VALUES[digest] = _with(_VALUES.get(digest, ()), rows)


def rows_behind(module: nn.Module) -> SeenRows | None:
    """The rows that trained any parameter of a module; None where none is known."""
    if not _LIVING and not _VALUES:
        return None
    seen: dict[int, SeenRows] = {}  # by identity, each once
    for value in module.parameters():
        if not _is_known(value):
            continue
        now = _digest(_sample(value), value.numel())
        living = _LIVING.get(value)
        by_identity: tuple[SeenRows, ...] = ()
        if living is not None and living.before != now:
            by_identity = living.rows
        for rows in (*by_identity, *_VALUES.get(now, ())):
            seen[id(rows)] = rows
    return union(seen.values())


def _with(known: tuple[SeenRows, ...], rows: SeenRows) -> tuple[SeenRows, ...]:
    for other in known:
        if other is rows:
            return known
    return (*known, rows)


def _is_known(value: Tensor) -> bool:
    """Whether a parameter has values to read: not a quantised, sparse, meta, lazy or fake one."""
    if isinstance(value, FakeTensor) or nn.parameter.is_lazy(value):
        return False
    return value.is_floating_point() and value.layout == torch.strided and not value.is_meta


def _sample(value: Tensor) -> Tensor:
    """Up to `SAMPLE` values as float32 [S], evenly spread."""
    flat = value.detach().reshape(-1)  # [...] -> [numel]
    return flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].to("cpu", torch.float32)


def _digest(sample: Tensor, count: int) -> bytes:
    values = sample.float().contiguous().numpy().tobytes()
    return hashlib.blake2b(f"{count}:".encode() + values, digest_size=16).digest()
