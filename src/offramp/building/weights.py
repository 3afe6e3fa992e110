"""Load weights into a model from files of many layouts.

A file may hold a plain state dict, or one under a key (`state_dict`, `model_state_dict`, `net`,
`model_ema`, ...). Names may have a prefix: `module.` (DataParallel, AveragedModel), `_orig_mod.`
(torch.compile), `model.` (Lightning). A key and a prefix are used only if the rest fits the model
exactly, name by name and shape by shape. If two different sets fit, such as weights and their
moving average, the user chooses one: `FILE?key=model_ema`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from offramp._support.arguments import require_path
from offramp._support.files import read_state_dicts
from offramp._support.notices import say
from offramp.errors import BadFile

KEY = "?key="
# Parts of names that DataParallel, torch.compile, FSDP and activation checkpointing insert.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
COUNTER = "num_batches_tracked"  # of batch norms: old files lack it, and torch fills it in
SHOWN = 6  # names in a message

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Candidate:
    """Weights in a file that fit a model.

    Attributes:
        where: their key in the file; empty for the file itself.
        prefix: the prefix of their names.
        tensors: the weights by the model's names.
        unused: the names that do not have this prefix.
        unwrapped: whether parts of wrappers, such as `module.`, were taken out of the names.
    """

    where: str
    prefix: str
    tensors: Mapping[str, Tensor]
    unused: tuple[str, ...]
    unwrapped: bool

    @property
    def name(self) -> str:
        """The text by which a user chooses it."""
        return "/".join(part for part in (self.where, self.prefix) if part) or "the file itself"

    @property
    def plain(self) -> bool:
        """Whether the file is a plain state dict of the model, so that there was no choice."""
        return not (self.where or self.prefix or self.unused or self.unwrapped)


def load_weights(model: nn.Module, path: str | Path, *, key: str | None = None) -> None:
    """Load weights into a model. The file must have all of the model's names. Unless it is a plain
    state dict, a notice says where the weights were found.

    Args:
        model: the model; its weights are changed in place.
        path: a `.safetensors` file or a checkpoint (`.pt`, `.pth`, `.th`, `.bin`, `.ckpt`), which
            is read with `weights_only=True`. `FILE?key=NAME` is the same as `key`.
        key: chooses between several weights in the file that fit: a key such as `state_dict_ema`,
            a prefix such as `teacher.`, or both as `state_dict/teacher.`.

    Raises:
        BadFile: the file is missing, damaged or would run code; no weights in it fit (the message
            lists the differences and the keys), or several do.
    """
    file, wanted = _split_key(require_path("path", path), key)
    state_dicts = read_state_dicts(file)
    candidates = list(_candidates(model, state_dicts))
    kind = type(model).__name__
    if wanted is not None:
        fitting = candidates
        candidates = list[Candidate]()
        for candidate in fitting:
            if wanted in (candidate.where, candidate.prefix, candidate.name):
                candidates.append(candidate)
        if not candidates:
            raise BadFile(
                f"{file} has no {wanted!r} that fits {kind}; {_listed(fitting, state_dicts)}"
            )
    candidates = _without_copies(candidates)
    if len(candidates) > 1:
        listed = ", ".join(candidate.name for candidate in candidates)
        raise BadFile(
            f"{file} holds {len(candidates)} different sets of weights that fit {kind}: {listed}. "
            f"Choose one, such as {file}{KEY}{candidates[-1].name}"
        )
    if not candidates:
        _load_as_it_is(model, state_dicts, file)
        return
    _report(candidates[0], file)
    model.load_state_dict(dict(candidates[0].tensors), strict=True)


def _split_key(path: str | Path, key: str | None) -> tuple[Path, str | None]:
    """The file and the key of `FILE?key=NAME`."""
    file, mark, written = str(path).partition(KEY)
    if not mark or Path(path).exists():
        return Path(path), key
    return Path(file), written or key


def _candidates(
    model: nn.Module, state_dicts: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[Candidate]:
    """All parts of a file that fit the model exactly."""
    expected = _shapes(model.state_dict())
    for where, tensors in state_dicts.items():
        fitting = list(_prefixed(where, tensors, expected, unwrapped=False))
        if not fitting:  # perhaps a part of the model was wrapped: features.module.0.weight
            fitting = list(_prefixed(where, _unwrapped(tensors), expected, unwrapped=True))
        yield from fitting


def _prefixed(
    where: str, tensors: Mapping[str, Tensor], expected: Shapes, *, unwrapped: bool
) -> Iterator[Candidate]:
    """The candidates of one state dict, one for each prefix that fits.

    The idea: one name of the model must end some name of the file, and the rest is the prefix. So
    only a few prefixes are tried. Batch norms' counters are no use here, as old files lack them.
    """
    if not expected:
        return
    first = next(iter(expected))
    for name in expected:
        if not name.endswith(COUNTER):
            first = name
            break
    for full_name in tensors:
        if not full_name.endswith(first):
            continue
        prefix = full_name.removesuffix(first)
        if prefix and not prefix.endswith("."):
            continue
        # the names with this prefix must be exactly those of the model
        part = dict[str, Tensor]()
        unused = list[str]()
        for name, value in tensors.items():
            if name.startswith(prefix):
                part[name.removeprefix(prefix)] = value
            else:
                unused.append(name)
        if _fits(_shapes(part), expected):
            yield Candidate(where, prefix, part, tuple(unused), unwrapped)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names without wrappers' parts; empty if two names would become one."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parts = [part for part in name.split(".") if f"{part}." not in WRAPPERS]
        renamed[".".join(parts)] = value
    return renamed if len(renamed) == len(tensors) else {}


def _fits(shapes: Shapes, expected: Shapes) -> bool:
    """Whether names and shapes are those of the model; counters of batch norms may be missing."""
    if not shapes.keys() <= expected.keys():
        return False
    for name, shape in expected.items():
        if name not in shapes:
            if not name.endswith(COUNTER):
                return False
        elif shapes[name] != shape:
            return False
    return True


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """The shapes by name; () for a lazy tensor, which has none yet."""
    shapes: Shapes = {}
    for name, value in tensors.items():
        shapes[name] = () if is_lazy(value) else tuple(value.shape)
    return shapes


def _without_copies(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates without those that hold the very same weights as an earlier one."""
    different: list[Candidate] = []
    for candidate in candidates:
        if not _is_among(candidate, different):
            different.append(candidate)
    return different


def _is_among(candidate: Candidate, others: list[Candidate]) -> bool:
    """Whether any of the others holds the same weights."""
    for other in others:
        if _equal(candidate.tensors, other.tensors):
            return True
    return False


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(torch.equal(first[name], second[name]) for name in first)


def _report(candidate: Candidate, file: Path) -> None:
    """Print where the weights were found, unless the file is a plain state dict."""
    if candidate.plain:
        return
    # Each step of the search that was needed becomes a phrase.
    parts = list[str]()
    if candidate.where:
        parts.append(f"the weights are those under {candidate.where!r}")
    if candidate.prefix:
        parts.append(f"the prefix {candidate.prefix!r} of their names was taken off")
    if candidate.unwrapped:
        parts.append("parts of wrappers, such as 'module.', were taken out of their names")
    if candidate.unused:
        parts.append(f"not used: {_some(candidate.unused)}")
    say(f"{file}: {', '.join(parts)}")


def _load_as_it_is(
    model: nn.Module, state_dicts: Mapping[str, Mapping[str, Tensor]], file: Path
) -> None:
    """The last try: a module may have its own way to read older names. Raises BadFile with the
    differences.
    """
    # the state dict with most of the model's names
    known = model.state_dict().keys()
    best = max(state_dicts, key=lambda where: len(state_dicts[where].keys() & known))
    tensors = state_dicts[best]
    # A single state dict is tried anyway, several only if some name is right.
    reason = None
    if len(state_dicts) == 1 or tensors.keys() & known:
        try:
            model.load_state_dict(dict(tensors), strict=True)
            return
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as problem:
            reason = problem
    raise BadFile(
        f"{file} does not fit {type(model).__name__}: {_differences(model, tensors)}; "
        f"{_listed([], state_dicts)}. Use weights of this architecture"
    ) from reason


def _differences(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """The names that are missing, not expected, or of another shape."""
    expected = _shapes(model.state_dict())
    shapes = _shapes(tensors)
    other = [name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]]
    groups = {
        "missing": [*(expected.keys() - shapes.keys())],
        "not expected": [*(shapes.keys() - expected.keys())],
        "of another shape": other,
    }
    phrases = list[str]()
    for words, names in groups.items():
        if names:
            phrases.append(f"{len(names)} {words} (such as {min(names)})")
    return ", ".join(phrases) or "its names and shapes are right, and the model refuses them"


def _listed(candidates: list[Candidate], state_dicts: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The weights in a file that fit; without any, the keys in the file."""
    if candidates:
        return f"these fit: {', '.join(candidate.name for candidate in candidates)}"
    parts = list[str]()
    for where, tensors in state_dicts.items():
        parts.append(f"{where or 'itself'}: {_some(tuple(tensors))}")
    return f"the file holds {'; '.join(parts[:4])}"


def _some(names: tuple[str, ...]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
