"""The user's models in a network: their names and cuts, what stands at their nodes, and the dict
that holds modules.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import State, call_model, copies
from offramp.networks.taps import listening, logits_in, plain_attention, tapped
from offramp.plans.signature import INPUT, Input

BACKBONE = "backbone"  # the only member of a model that was cut, and its last node
RESERVED = (INPUT, BACKBONE, "last")  # the raw input, and what `reference` may name

Modules = Mapping[str, nn.Module] | nn.ModuleDict


def require_name(name: object) -> None:
    """Raise InvalidArgument for a name that no model of a ladder can have.

    The same rule holds for names that are typed and for those that stand in a file.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise InvalidArgument(
            f"a member is called {name!r}, expected letters, digits, - and _; name it otherwise"
        )
    if name in RESERVED:
        raise InvalidArgument(
            f"a member is called {name!r}, which has a meaning of its own here; name it otherwise"
        )
    if hasattr(nn.ModuleDict, name):
        raise InvalidArgument(
            f"a member is called {name!r}, which is a method of every torch module; name it "
            f"otherwise"
        )


@dataclass(frozen=True)
class ModelSpec:
    """A model of the user's: a member of a ladder, or (under the name `backbone`) the one model
    that was cut.

    spec: how to build it again (`offramp:resnet20`); None means by the user. cuts: modules after
    which it is cut, in the order in which they run. inputs: what a cut model was tried on; empty
    where nothing was cut. length: those of them [B, T, ...] whose T may be another one in every
    batch. output: which of a model's outputs are its logits, named as `tensors_of(output, "y")` has
    it; None where that is clear.
    """

    name: str
    spec: str | None = None
    cuts: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    length: tuple[str, ...] = ()
    output: str | None = None

    def node(self, cut: str | None) -> str:
        """The node after a cut (None: at the model's end): `layer1`, in a ladder `member/layer1`
        and `member`.
        """
        if cut is None:
            return self.name
        return cut if self.name == BACKBONE else f"{self.name}/{cut}"

    def nodes(self) -> tuple[str, ...]:
        """All nodes of this member, in order."""
        return tuple(self.node(cut) for cut in (*self.cuts, None))


class NamedModules(nn.ModuleDict):
    """A ModuleDict under any names, such as `blocks.5`, or `half` (a method of every module), both
    of which it refuses.

    The state-dict keys are the names all the same: `exits.blocks.5.weight`.
    """

    def hang(self, name: str, module: nn.Module) -> None:
        """Put a module under any name, in the place of the one that is there."""
        self._modules[name] = module

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        _local: Any,
        strict: bool,
        _missing: Any,
        unexpected: Any,
        _errors: Any,
    ) -> None:
        """Torch's own would take every key below a name with a dot for unexpected."""
        known = tuple(f"{prefix}{name}." for name in self._modules)
        if strict:
            unexpected += [
                key for key in state_dict if key.startswith(prefix) and not key.startswith(known)
            ]


def outside_torch(modules: Iterable[object]) -> str | None:
    """What the first of these modules is that computes outside of torch; None where all of them are
    torch's.
    """
    for module in modules:
        kind = getattr(module, "outside_torch", None)
        if isinstance(kind, str):
            return kind
    return None


def held(modules: Modules) -> NamedModules:
    """Modules in a ModuleDict that takes any names."""
    found = NamedModules()
    for name, module in modules.items():
        found.hang(name, module)
    return found


def digest(module: nn.Module) -> str | None:
    """Sixteen hex digits over a module's parameters; None when it has none, and so nothing to be
    trained.
    """
    values = [value.detach().cpu().double().numpy().tobytes() for value in module.parameters()]
    return hashlib.sha256(b"".join(values)).hexdigest()[:16] if values else None


def values_of(
    model: nn.Module, preprocess: nn.Module | None, member: ModelSpec, inputs: State
) -> dict[str, Any]:
    """The features at a member's nodes in the order in which they came; at its end the model's
    logits.

    Of several tensors that a tapped module gives the first counts. Each is copied, because an
    operation that works in place may follow. Raises BadNetwork for a module that ran twice or
    never, or gave no tensor.
    """
    values: dict[str, Any] = {}
    ours = threading.get_ident()

    def keep(cut: str, output: object) -> None:
        if threading.get_ident() != ours:
            return  # another thread runs the same model
        if member.node(cut) in values:
            raise BadNetwork(
                f"module {cut!r} runs more than once in a forward pass; cut where a module runs "
                f"once"
            )
        leaves = [*tapped(output, cut).values()]
        if not leaves:
            raise BadNetwork(
                f"module {cut!r} gives no tensor, expected one [B, ...]; cut elsewhere"
            )
        values[member.node(cut)] = leaves[0].clone()

    inputs = copies(inputs)
    if not member.cuts:
        return {member.name: logits_in(call_model(model, preprocess, inputs), member.output)}
    with listening({cut: model.get_submodule(cut) for cut in member.cuts}, keep), plain_attention():
        output = call_model(model, preprocess, inputs)
    if silent := [cut for cut in member.cuts if member.node(cut) not in values]:
        raise BadNetwork(
            f"module {silent[0]!r} did not run in a forward pass; cut where every input passes"
        )
    return values | {member.name: logits_in(output, member.output)}
