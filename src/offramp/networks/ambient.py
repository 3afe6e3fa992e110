"""Settings of the process that change what a network computes: which are switched off, and which
are written down.

    autocast                    switched off around everything that is measured or served: an engine
                                option asks for it
    float32 matmul precision    written into the precision of a trace and a plan where it is not
                                "highest"
    mkldnn's fp32_precision     likewise where convolutions or recurrences are in tf32 or bf16
    default floating type       likewise where it is not float32: models that make tensors follow it

cuDNN's convolutions are in TF32 by torch's own default: the comparison of batches allows for it
(`probing`). What moves only the last bits (the number of threads, deterministic algorithms,
denormal numbers, cuDNN's choice of an algorithm) is left alone: it stays within the float band.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

KINDS = ("cpu", "cuda")  # of devices for which autocast is looked at
MIXED = "mixed"
EXACT = ("none", "ieee")  # values of `fp32_precision` that leave float32 as it is
NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def without_autocast(*kinds: str) -> Iterator[None]:
    """Compute in the types of the weights and inputs, whatever `torch.autocast` stands around the
    call.

    Also a decorator.

    Args:
        kinds: Types of devices, such as "cpu"; by default the CPU and CUDA.
    """
    with contextlib.ExitStack() as stack:
        for kind in kinds or KINDS:
            stack.enter_context(autocast_off(kind))
        yield


def autocast_off(kind: str) -> contextlib.AbstractContextManager[object]:
    """The same for one type of device, and cheap where nothing is to be switched off: a batch of
    one waits for it.
    """
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return NOTHING


def settings() -> tuple[str, torch.dtype]:
    """What a Runner compares at every call: the precision of matrix products, "mixed" where
    backends have their own, and the default type.
    """
    return _matmul(), torch.get_default_dtype()


def told() -> str:
    """The settings that are not torch's defaults, in words; empty where all are."""
    matmul, default = settings()
    words = [] if matmul == "highest" else [f"float32 matmul precision {matmul}"]
    mkldnn: Any = torch.backends.mkldnn  # torch's types do not tell what it has
    backends = {"mkldnn convolutions": mkldnn.conv, "mkldnn recurrences": mkldnn.rnn}
    if matmul == MIXED:
        backends |= {"cuda matmul": torch.backends.cuda.matmul, "mkldnn matmul": mkldnn.matmul}
    for name, backend in backends.items():
        if backend.fp32_precision not in EXACT:
            words.append(f"{name} in {backend.fp32_precision}")
    if default != torch.float32:
        words.append(f"default type {str(default).removeprefix('torch.')}")
    return " and ".join(words)


def _matmul() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to sum up what was set for one backend alone
        return MIXED
