"""Finds the model inside wrappers: compiled, in parallel, averaged; and refuses scripted ones."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from offramp.errors import BadNetwork

Copied = TypeVar("Copied")
COMPILED = "_orig_mod"  # where torch.compile keeps what it wraps
INNER = {
    nn.DataParallel: "module",
    nn.parallel.DistributedDataParallel: "module",
    AveragedModel: "module",
}


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """Take a model out of its wrappers.

    Wrappers are `torch.compile`, DataParallel, DistributedDataParallel and AveragedModel.

    Args:
        model: perhaps wrapped, also several times.

    Returns:
        The model, and the prefix that its modules have in the wrapper, such as "_orig_mod.module.".
    """
    prefix = ""
    name = _inside(model)
    while name is not None:
        model = getattr(model, name)
        prefix += f"{name}."
        name = _inside(model)
    return model, prefix


def deep_copy(value: Copied) -> Copied:
    """A deep copy of a module, or of a tuple of modules.

    Old-style `weight_norm` and `torch.nn.utils.prune` keep a weight that a hook computes before
    each forward. After a forward with gradients such a weight belongs to a graph of autograd, and
    `copy.deepcopy` refuses it. The copy has its values instead, until the next forward.

    Args:
        value: to copy; None stays None.
    """
    memo: dict[int, Any] = {}  # id of an object -> its copy, as `deepcopy` keeps them
    parts = value if isinstance(value, tuple) else (value,)
    for part in parts:
        if not isinstance(part, nn.Module):
            continue
        for module in part.modules():
            for attribute in vars(module).values():
                if isinstance(attribute, Tensor) and not attribute.is_leaf:
                    memo[id(attribute)] = attribute.detach().clone()
    return copy.deepcopy(value, memo)


def require_plain(model: nn.Module, what: str) -> None:
    """Check that a model and the modules inside it are neither scripted nor compiled.

    A model that was compiled in place (`model.compile()`) is accepted: it is called without its
    compiled code.

    Args:
        model: to check.
        what: its name in messages.

    Raises:
        BadNetwork: the model is scripted, or has a scripted or compiled module; the message names
            it.
    """
    for name, module in model.named_modules():
        where = f"{name!r} in the {what}" if name else f"the {what}"
        if isinstance(module, torch.jit.ScriptModule):
            raise BadNetwork(
                f"{where} is traced or scripted by TorchScript, expected the Python module that "
                f"it was made from: "
                "its layers and weights cannot be looked at"
            )
        is_compiled = (
            _inside(module) == COMPILED or getattr(module, "_compiled_call_impl", None) is not None
        )
        if name and is_compiled:
            raise BadNetwork(
                f"{where} is compiled by torch.compile, expected the module as it was before: it "
                f"would be compiled "
                "again while it serves; compile the network instead: engine='torch:compile'"
            )


def _inside(module: nn.Module) -> str | None:
    """The name of the module inside a wrapper; None for a module that is not a wrapper."""
    if COMPILED in vars(module).get("_modules", {}):
        return COMPILED
    return INNER.get(type(module))
