"""Which dimension of a tensor holds its channels, read from the operations that made it.

A convolution writes [B, C, T], a linear layer or a layer norm [B, T, C]. The shapes alone do not
tell them apart, and an exit that averages over the wrong one throws away what it should look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

CHANNELS_FIRST = frozenset(
    {
        *(f"conv{n}d" for n in (1, 2, 3)),
        *(f"conv_transpose{n}d" for n in (1, 2, 3)),
        "batch_norm",
        "instance_norm",
        "group_norm",
        *(f"{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)),
        *(f"adaptive_{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)),
    }
)
CHANNELS_LAST = frozenset(
    {
        "linear",
        "layer_norm",
        "rms_norm",
        "embedding",
        "multi_head_attention_forward",
        "scaled_dot_product_attention",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
    }
)
MOVES = frozenset(
    {"transpose", "swapaxes", "swapdims", "transpose_", "permute", "movedim", "moveaxis"}
)
SWAPS = (Tensor.mT.__get__, Tensor.mH.__get__)  # type: ignore[attr-defined]
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten"})


class ChannelTracker(TorchFunctionMode):
    """While it is active, it notes for every tensor that is made which dimension holds its
    channels.

    What it does not know has no entry: it is a reading of the operations, not a proof.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dims = WeakTensorKeyDictionary()

    def dim_of(self, tensor: Tensor) -> int | None:
        """The dimension of the channels (1 to dim - 1); None where it is not known."""
        dims: Mapping[Tensor, int] = self._dims
        return dims.get(tensor)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, then note what follows for its result."""
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) and result else result
        if isinstance(first, Tensor) and first.dim() > 2:
            name = getattr(func, "__name__", "")
            if func in SWAPS:
                name = "transpose"
                args = (*args[:1], -2, -1)
            dim = self._dim_after(name, args, kwargs or {}, first)
            if dim is not None:
                self._dims[first] = dim
        return result

    def _dim_after(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> int | None:
        if name in CHANNELS_FIRST:
            return 1
        if name in CHANNELS_LAST:
            return result.dim() - 1
        known = [tensor for tensor in _tensors_in(args) if tensor in self._dims]
        if not known:
            return None
        source = known[0]
        dim: int = self._dims[source]
        if name in MOVES:
            return _moved(source, dim, name, args, kwargs, result)
        if name in RESHAPES:
            return _reshaped(source, dim, result)
        # Anything else that keeps the rank and the number of channels (an activation, a sum, a
        # slice of positions) keeps the order of dimensions too.
        same = source.dim() == result.dim() and source.shape[dim] == result.shape[dim]
        return dim if same else None


def layouts_of(
    values: Mapping[str, object], tracker: ChannelTracker, *, free: bool = False
) -> dict[str, str | None]:
    """The layout of features by node: "channels_first", "channels_last" or "both".

    "both" stands where the channels are not known and either of two dimensions may hold them. A
    text whose length is free has its words in front, so there it is "channels_last". None: features
    of one dimension.

    Args:
        values: the features [B, ...] by node, made while the tracker was active.
        tracker: what it noted.
        free: whether the length of a text is free.
    """
    unknown = "channels_last" if free else "both"
    layouts: dict[str, str | None] = {}
    for node, value in values.items():
        rank = value.dim() if isinstance(value, Tensor) else 0
        dim = tracker.dim_of(value) if isinstance(value, Tensor) else None
        if rank < 3:
            layouts[node] = None
        elif dim == 1:
            layouts[node] = "channels_first"
        elif dim == rank - 1:
            layouts[node] = "channels_last"
        else:
            layouts[node] = unknown if rank == 3 else "channels_first"
    return layouts


def _tensors_in(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among the arguments, those in a list of tensors (as `cat` takes) included."""
    tensors: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (tuple, list)):
            tensors += [part for part in value if isinstance(part, Tensor)]
    return tensors


def _moved(
    source: Tensor,
    dim: int,
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    result: Tensor,
) -> int | None:
    """Where a permutation puts a dimension, found by permuting a shape whose sizes name the
    dimensions.
    """
    marks = torch.empty(tuple(range(1, source.dim() + 1)), device="meta")
    rest = [marks if value is source else value for value in args]
    try:
        with torch._C.DisableTorchFunction():
            moved = getattr(marks, name.rstrip("_"))(*rest[1:], **kwargs)
    except (TypeError, RuntimeError, IndexError, AttributeError):
        return None
    at = list(moved.shape).index(dim + 1) if dim + 1 in moved.shape else None
    return at if moved.dim() == result.dim() else None


def _reshaped(source: Tensor, dim: int, result: Tensor) -> int | None:
    """Where a reshape leaves a dimension: unchanged from the left, or unchanged from the right."""
    if source.shape[: dim + 1] == result.shape[: dim + 1]:
        return dim
    behind = source.dim() - dim
    if behind <= result.dim() and source.shape[dim:] == result.shape[result.dim() - behind :]:
        return result.dim() - behind
    return None
