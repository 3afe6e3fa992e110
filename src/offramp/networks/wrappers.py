"""Finds the model inside wrappers: compiled, in parallel, averaged; and refuses scripted ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from offramp.errors import BadNetwork

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
