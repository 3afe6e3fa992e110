"""Finds the dimension of a tensor that holds its channels, from the operations that made it.

A convolution writes [B, C, T], a linear layer or a layer norm [B, T, C]. The shapes alone do not
distinguish them, and an exit that averages over the wrong dimension loses its features.
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
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "batch_norm",
        "instance_norm",
        "group_norm",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
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
    """While it is active, it notes the dimension of the channels of every new tensor.

    It follows the operations, which is no proof. Tensors that it cannot judge have no entry.
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
        """Run the operation, then note the dimension of the channels of its result."""
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
        """The dimension of the channels in the result of an operation; None where unknown."""
        if name in CHANNELS_FIRST:
            return 1
        if name in CHANNELS_LAST:
            return result.dim() - 1
        source: Tensor | None = None
        for tensor in _tensors_in(args):
            if tensor in self._dims:
                source = tensor
                break
        if source is None:
            return None
        dim: int = self._dims[source]
        if name in MOVES:
            return _moved(source, dim, name, args, kwargs, result)
        if name in RESHAPES:
            return _reshaped(source, dim, result)
        # Anything else that keeps the rank and the number of channels (an activation, a sum, a
        # slice of positions) keeps the order of dimensions too.
        same = source.dim() == result.dim() and source.shape[dim] == result.shape[dim]
        if not same:
            return None
        return dim


def layouts_of(
    values: Mapping[str, object], tracker: ChannelTracker, *, free: bool = False
) -> dict[str, str | None]:
    """Find the layout of features by node.

    Args:
        values: the features [B, ...] by node, made while the tracker was active.
        tracker: with its notes.
        free: whether the length of a text is free.

    Returns:
        "channels_first" or "channels_last". "both" means that the channels are not known and that
        either of two dimensions may hold them; a text whose length is free has its words first, so
        it is "channels_last" instead. None for features [B, F].
    """
    unknown = "channels_last" if free else "both"
    layouts: dict[str, str | None] = {}
    for node, value in values.items():
        if not isinstance(value, Tensor) or value.dim() < 3:
            layouts[node] = None
            continue
        dim = tracker.dim_of(value)
        if dim == 1:
            layouts[node] = "channels_first"
        elif dim == value.dim() - 1:
            layouts[node] = "channels_last"
        elif value.dim() == 3:
            layouts[node] = unknown
        else:  # images, by torch's convention
            layouts[node] = "channels_first"
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
    """Where a permutation puts a dimension; None where that is not known.

    A tensor without data gets the sizes 1, 2, 3, ..., so that each size identifies its dimension,
    and is permuted in the same way.
    """
    marks = torch.empty(tuple(range(1, source.dim() + 1)), device="meta")  # [1, 2, 3, ...]
    rest = [marks if value is source else value for value in args]
    try:
        with torch._C.DisableTorchFunction():
            moved = getattr(marks, name.rstrip("_"))(*rest[1:], **kwargs)
    except (TypeError, RuntimeError, IndexError, AttributeError):
        return None
    if moved.dim() != result.dim() or dim + 1 not in moved.shape:
        return None
    return list(moved.shape).index(dim + 1)


def _reshaped(source: Tensor, dim: int, result: Tensor) -> int | None:
    """Where a reshape leaves a dimension: unchanged from the left, or unchanged from the right."""
    if source.shape[: dim + 1] == result.shape[: dim + 1]:
        return dim
    from_right = source.dim() - dim  # this dimension and all behind it
    at = result.dim() - from_right
    if at >= 0 and source.shape[dim:] == result.shape[at:]:
        return at
    return None
