"""Models as their users wrapped them: compiled, in parallel, averaged, scripted."""

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
    """The model inside of `torch.compile`, DataParallel, DistributedDataParallel and AveragedModel.

    Returns:
        The model, and the prefix that its modules have in the wrapper, such as "_orig_mod.module.".
    """
    prefix = ""
    while (name := _inside(model)) is not None:
        model = getattr(model, name)
        prefix += f"{name}."
    return model, prefix


def require_plain(model: nn.Module, what: str) -> None:
    """Raise BadNetwork for a model that is scripted, or has scripted or compiled modules within it.

    A model that was compiled in place (`model.compile()`) is plain: it is called without what was
    compiled.
    """
    for name, module in model.named_modules():
        where = f"{name!r} in the {what}" if name else f"the {what}"
        if isinstance(module, torch.jit.ScriptModule):
            raise BadNetwork(
                f"{where} is traced or scripted by TorchScript, expected the Python module that "
                f"it was made from: "
                "its layers and weights cannot be looked at"
            )
        if name and (
            _inside(module) == COMPILED or getattr(module, "_compiled_call_impl", None) is not None
        ):
            raise BadNetwork(
                f"{where} is compiled by torch.compile, expected the module as it was before: it "
                f"would be compiled "
                "again while it serves; compile the network instead: engine='torch:compile'"
            )


def _inside(module: nn.Module) -> str | None:
    """The name of what a wrapper holds; None for what is no wrapper."""
    if COMPILED in vars(module).get("_modules", {}):
        return COMPILED
    return next((name for kind, name in INNER.items() if type(module) is kind), None)
