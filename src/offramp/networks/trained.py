"""Which rows trained the weights of a module, as long as this process lives.

`fit` notes the rows twice for every parameter that it changed. Nothing is stored on modules.

- By the parameter itself, for as long as it lives: the model may be cut anew, put into a ladder,
  taken apart, moved, cast, or trained on by other code. One that gets its values from before `fit`
  back counts as untrained again.
- By a digest of its values: a deep copy, or a model into which the state dict was loaded, holds the
  same values.

docs/concepts/promises.md says what cannot be seen.
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

SAMPLE = 4096  # values of a parameter that are looked at, evenly spread
# different values that one must hold to be told from others: zeros and ones stand everywhere
DISTINCT = 4
CASTS = (torch.float16, torch.bfloat16)  # a copy that is cast is the same model


@dataclass(frozen=True)
class _Trained:
    """What is known of a living parameter: the digest of its values before `fit`, and the rows."""

    before: bytes | None
    rows: tuple[SeenRows, ...]


_LIVING: MutableMapping[Tensor, _Trained] = WeakIdKeyDictionary()  # by identity, and weakly
_VALUES: dict[bytes, tuple[SeenRows, ...]] = {}  # digest of values -> rows


def snapshot(module: nn.Module) -> dict[int, bytes]:
    """Digests of the values of all parameters, by the identity of the parameter."""
    return {
        id(value): _digest(_sample(value), value.numel())
        for value in module.parameters()
        if _is_known(value)
    }


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
        for mark in {now, *(_digest(sample.to(kind), value.numel()) for kind in CASTS)}:
            _VALUES[mark] = _with(_VALUES.get(mark, ()), rows)


def rows_behind(module: nn.Module) -> SeenRows | None:
    """The rows that trained any parameter of a module; None where none is known."""
    found: dict[int, SeenRows] = {}
    if not _LIVING and not _VALUES:
        return None
    for value in module.parameters():
        if not _is_known(value):
            continue
        now = _digest(_sample(value), value.numel())
        living = _LIVING.get(value)
        own = () if living is None or living.before == now else living.rows
        for rows in (*own, *_VALUES.get(now, ())):
            found[id(rows)] = rows
    return union(found.values())


def _with(known: tuple[SeenRows, ...], rows: SeenRows) -> tuple[SeenRows, ...]:
    return known if any(one is rows for one in known) else (*known, rows)


def _is_known(value: Tensor) -> bool:
    """Whether a parameter has values to read: not a quantised, sparse, meta, lazy or fake one."""
    if isinstance(value, FakeTensor) or nn.parameter.is_lazy(value):
        return False
    return value.is_floating_point() and value.layout == torch.strided and not value.is_meta


def _sample(value: Tensor) -> Tensor:
    """Up to `SAMPLE` values as float32 [S], evenly spread."""
    flat = value.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].to("cpu", torch.float32)


def _digest(sample: Tensor, count: int) -> bytes:
    values = sample.float().contiguous().numpy().tobytes()
    return hashlib.blake2b(f"{count}:".encode() + values, digest_size=16).digest()
