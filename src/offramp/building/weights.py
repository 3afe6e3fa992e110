"""Weights from a file into a model, as people save them.

A file may hold a plain state dict, one under a key (`state_dict`, `model_state_dict`, `net`,
`model_ema`, ...), and names with a prefix: `module.` (DataParallel, AveragedModel), `_orig_mod.`
(torch.compile), `model.` (Lightning). A key and a prefix are taken only where what is left fits the
model exactly, name by name and shape by shape. Where two different sets fit, such as weights and
their moving average, the user says which: `FILE?key=model_ema`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from offramp._support.files import read_state_dicts
from offramp._support.notices import say
from offramp.errors import BadFile

KEY = "?key="
# what DataParallel, torch.compile, FSDP and activation checkpointing put before the names of a part
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
COUNTER = "num_batches_tracked"  # of batch norms: absent in old files, and then torch fills it in
SHOWN = 6

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Candidate:
    """Weights that fit a model: where they are in the file, the prefix of their names, and what is
    left over.
    """

    where: str
    prefix: str
    tensors: Mapping[str, Tensor]
    unused: tuple[str, ...]
    unwrapped: bool

    @property
    def name(self) -> str:
        """How a user asks for it."""
        return "/".join(part for part in (self.where, self.prefix) if part) or "the file itself"

    @property
    def plain(self) -> bool:
        """Whether the file is a plain state dict of the model, and nothing was to be resolved."""
        return not (self.where or self.prefix or self.unused or self.unwrapped)


def load_weights(model: nn.Module, path: str | Path, *, key: str | None = None) -> None:
    """Load weights into a model; all of its names must be there, and what is not a plain state dict
    is said.

    Args:
        model: the model; its weights are changed in place.
        path: a `.safetensors` file or a checkpoint (`.pt`, `.pth`, `.th`, `.bin`, `.ckpt`), which
            is read with `weights_only=True`. `FILE?key=NAME` is the same as `key`.
        key: which weights, where several in the file fit: a key such as `state_dict_ema`, a prefix
            such as `teacher.`, or both as `state_dict/teacher.`.

    Raises:
        BadFile: missing, damaged, would run code, fits in no way (the differences and the keys
            found are listed) or in several.
    """
    file, asked = _taken_apart(path, key)
    found = read_state_dicts(file)
    candidates = list(_candidates(model, found))
    if asked is not None:
        named = [each for each in candidates if asked in (each.where, each.prefix, each.name)]
        if not named:
            raise BadFile(
                f"{file} has no {asked!r} that fits {type(model).__name__}; "
                f"{_listed(candidates, found)}"
            )
        candidates = named
    candidates = _different(candidates)
    if len(candidates) > 1:
        names = ", ".join(each.name for each in candidates)
        raise BadFile(
            f"{file} holds {len(candidates)} different sets of weights that fit "
            f"{type(model).__name__}: {names}; say "
            f"which, as {file}{KEY}{candidates[-1].name}"
        )
    if not candidates:
        _load_as_it_is(model, found, file)
        return
    _say(candidates[0], file)
    model.load_state_dict(dict(candidates[0].tensors), strict=True)


def _taken_apart(path: str | Path, key: str | None) -> tuple[Path, str | None]:
    """The file and the key of `FILE?key=NAME`."""
    file, mark, behind = str(path).partition(KEY)
    if not mark or Path(path).exists():
        return Path(path), key
    return Path(file), behind or key


def _candidates(model: nn.Module, found: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Candidate]:
    """All ways in which a part of the file fits the model exactly."""
    expected = _shapes(model.state_dict())
    for where, tensors in found.items():
        fitting = list(_prefixed(where, tensors, expected, unwrapped=False))
        if not fitting:  # a part of the model was wrapped: features.module.0.weight
            fitting = list(_prefixed(where, _unwrapped(tensors), expected, unwrapped=True))
        yield from fitting


def _prefixed(
    where: str, tensors: Mapping[str, Tensor], expected: Shapes, *, unwrapped: bool
) -> Iterator[Candidate]:
    """The prefixes without which some of the names are exactly those of the model."""
    if not expected:
        return
    first = next((name for name in expected if not name.endswith(COUNTER)), next(iter(expected)))
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    for prefix in prefixes:
        if prefix and not prefix.endswith("."):
            continue
        part = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        if _fits(_shapes(part), expected):
            unused = tuple(name for name in tensors if not name.startswith(prefix))
            yield Candidate(where, prefix, part, unused, unwrapped)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under names without the wrappers' parts; empty where two names would become one."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parts = [part for part in name.split(".") if f"{part}." not in WRAPPERS]
        renamed[".".join(parts)] = value
    return renamed if len(renamed) == len(tensors) else {}


def _fits(its: Shapes, expected: Shapes) -> bool:
    """Whether names and shapes are those of the model; the counters of batch norms may be
    absent.
    """
    missing = expected.keys() - its.keys()
    return (
        its.keys() <= expected.keys()
        and all(name.endswith(COUNTER) for name in missing)
        and all(shape == expected[name] for name, shape in its.items())
    )


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    # lazy: no shape yet
    return {name: () if is_lazy(value) else tuple(value.shape) for name, value in tensors.items()}


def _different(candidates: list[Candidate]) -> list[Candidate]:
    """Candidates without those that hold the very same weights as an earlier one."""
    kept: list[Candidate] = []
    for candidate in candidates:
        if not any(_equal(candidate.tensors, other.tensors) for other in kept):
            kept.append(candidate)
    return kept


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _say(candidate: Candidate, file: Path) -> None:
    """Say in a line how the weights were found, unless the file was a plain state dict."""
    if candidate.plain:
        return
    if candidate.where:
        parts = [f"the weights are those under {candidate.where!r}"]
    else:
        parts = []
    if candidate.prefix:
        parts.append(f"the prefix {candidate.prefix!r} of their names was taken off")
    if candidate.unwrapped:
        parts.append("what wrappers had put into their names, such as 'module.', was taken out")
    if candidate.unused:
        parts.append(f"not used: {_some(candidate.unused)}")
    say(f"{file}: {', '.join(parts)}")


def _load_as_it_is(model: nn.Module, found: Mapping[str, Mapping[str, Tensor]], file: Path) -> None:
    """The last try: a module may have its own way to read older names. Raises BadFile with the
    differences.
    """
    best = max(found, key=lambda where: len(found[where].keys() & model.state_dict().keys()))
    why = None
    if len(found) == 1 or found[best].keys() & model.state_dict().keys():
        try:
            model.load_state_dict(dict(found[best]), strict=True)
            return
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as problem:
            why = problem
    raise BadFile(
        f"{file} does not fit {type(model).__name__}: {_brief(model, found[best])}; "
        f"{_listed([], found)}; "
        "give the weights of this architecture"
    ) from why


def _brief(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    mine = _shapes(model.state_dict())
    its = _shapes(tensors)
    missing = [*(mine.keys() - its.keys())]
    extra = [*(its.keys() - mine.keys())]
    other = [name for name in mine.keys() & its.keys() if mine[name] != its[name]]
    parts = [("missing", missing), ("not expected", extra), ("of another shape", other)]
    said = [f"{len(names)} {word} (such as {min(names)})" for word, names in parts if names]
    return ", ".join(said) or "its names and shapes are right, and the model refuses them"


def _listed(candidates: list[Candidate], found: Mapping[str, Mapping[str, Tensor]]) -> str:
    """What is in the file: what would fit, or the keys."""
    if candidates:
        return f"what fits is {', '.join(each.name for each in candidates)}"
    parts = [f"{where or 'itself'}: {_some(tuple(tensors))}" for where, tensors in found.items()]
    return f"the file holds {'; '.join(parts[:4])}"


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
