"""Handles settings of the process that change the results of a network.

    autocast                    is switched off around everything that is measured or served; an
                                engine option turns it on
    float32 matmul precision    is noted in the precision of a trace and a plan if it is not
                                "highest"
    mkldnn's fp32_precision     is noted in the same way if convolutions or recurrences are in tf32
                                or bf16
    default floating type       is noted in the same way if it is not float32, because models that
                                make tensors follow it

cuDNN's convolutions are in TF32 by torch's own default, and the comparison of batches allows for
that (`probing`). Settings that only change the last bits are left alone, because their effect is
within the float band: the number of threads, deterministic algorithms, denormal numbers, cuDNN's
choice of an algorithm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

KINDS = ("cpu", "cuda")  # types of devices whose autocast is checked
MIXED = "mixed"
EXACT = ("none", "ieee")  # values of `fp32_precision` that leave float32 as it is
NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def without_autocast(*kinds: str) -> Iterator[None]:
    """While it is open, compute in the types of the weights and inputs, without `torch.autocast`.

    It also works as a decorator.

    Args:
        kinds: Types of devices, such as "cpu"; by default the CPU and CUDA.
    """
    with contextlib.ExitStack() as stack:
        for kind in kinds or KINDS:
            stack.enter_context(autocast_off(kind))
        yield


def autocast_off(kind: str) -> contextlib.AbstractContextManager[object]:
    """Make a context without autocast on one type of device.

    It costs almost nothing if autocast is off already, because every batch waits for it.

    Args:
        kind: of device, such as "cpu".
    """
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return NOTHING


def settings() -> tuple[str, torch.dtype]:
    """The settings that a Runner compares at every call.

    Returns:
        The precision of matrix products ("mixed" if backends differ), and the default type.
    """
    return _matmul(), torch.get_default_dtype()


def told() -> str:
    """The settings that are not torch's defaults, in words; "" where all are defaults."""
    matmul, default = settings()
    words = list[str]()
    if matmul != "highest":
        words.append(f"float32 matmul precision {matmul}")
    mkldnn: Any = torch.backends.mkldnn  # torch's type hints lack its attributes
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
    except RuntimeError:  # torch refuses if backends have different settings
        return MIXED
