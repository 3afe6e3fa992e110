"""Settings of the process that change what a network computes: which are switched off, and which are written down.

    autocast                    switched off around everything that is measured or served: an engine option asks for it
    float32 matmul precision    written into the precision of a trace and a plan where it is not "highest"
    default floating type       likewise where it is not float32: models that make tensors follow it

What moves only the last bits (the number of threads, deterministic algorithms, denormal numbers, cuDNN's choice of an
algorithm) is left alone: it stays within the float band.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

KINDS = ("cpu", "cuda")  # of devices for which autocast is looked at
NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def without_autocast(*kinds: str) -> Iterator[None]:
    """Compute in the types of the weights and inputs, whatever `torch.autocast` stands around the call.

    Also a decorator.

    Args:
        kinds: Types of devices, such as "cpu"; by default the CPU and CUDA.
    """
    with contextlib.ExitStack() as stack:
        for kind in kinds or KINDS:
            stack.enter_context(autocast_off(kind))
        yield


def autocast_off(kind: str) -> contextlib.AbstractContextManager[object]:
    """The same for one type of device, and cheap where nothing is to be switched off: a batch of one waits for it."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else NOTHING


def settings() -> tuple[str, torch.dtype]:
    """What `told` is about, cheap enough to be compared at every call."""
    return torch.get_float32_matmul_precision(), torch.get_default_dtype()


def told() -> str:
    """The settings that are not torch's defaults, in words; empty where all are."""
    matmul, default = settings()
    words = [] if matmul == "highest" else [f"float32 matmul precision {matmul}"]
    if default != torch.float32:
        words.append(f"default type {str(default).removeprefix('torch.')}")
    return " and ".join(words)
