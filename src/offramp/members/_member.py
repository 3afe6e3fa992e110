"""The base class of members that compute outside of torch: inputs in, logits [B, C] out, and an
identity.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError

GIVES = ("logits", "probabilities")
FLOOR = 1e-7  # a probability of 0 counts as this, because its logarithm must be finite
TOLERANCE = 1e-2  # how far the sum of a row's probabilities may be from 1

Array = NDArray[Any]


class Member(nn.Module, abc.ABC):
    """A model that computes outside of torch, as a torch module: tensors in, logits [B, C] float32
    out.

    It has no parameters, so it cannot be trained. Its multiply-adds are unknown, so a ladder with
    such a member is priced in milliseconds. Its identity, 32 bytes, is part of the fingerprint of
    the network: a plan that was made with another member raises an error.

    Args:
        kind: a description for messages, such as "a scikit-learn estimator (SVC)".
        identity: 32 bytes that change whenever its answers would change.
        gives: "logits" or "probabilities". The logits are then the logarithm of the probabilities,
            at least log 1e-7. None means logits, and values that look like probabilities raise an
            error.

    Raises:
        InvalidArgument: `gives` is neither.
    """

    identity: Tensor
    # The text from which a saved network builds it again; None if the user must pass it again.
    spec: str | None = None

    def __init__(self, kind: str, identity: bytes, gives: str | None = None) -> None:
        super().__init__()
        if gives is not None and gives not in GIVES:
            raise InvalidArgument(f"gives must be 'logits' or 'probabilities', got {gives!r}")
        self.outside_torch = kind
        self.gives = gives
        self.register_buffer("identity", as_bytes(identity))
        self.training = False

    @abc.abstractmethod
    def predict(self, args: Sequence[Array], kwargs: dict[str, Array]) -> Array:
        """Logits or probabilities [B, C] for inputs [B, ...], positional and by name."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Logits [B, C] float32, on the device of the inputs."""
        first = next(iter([*args, *kwargs.values()]))
        arrays = [_array(value) for value in args]
        named = {name: _array(value) for name, value in kwargs.items()}
        try:
            values = np.asarray(self.predict(arrays, named))
        except OfframpError:
            raise
        except Exception as problem:  # whatever the user's code or its library raises
            shapes = ", ".join([str(value.shape) for value in [*arrays, *named.values()]])
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            raise BadData(
                f"{self.outside_torch} fails on rows of shape {shapes}: {reason}"
            ) from problem
        return torch.from_numpy(self.logits(values, len(first))).to(first.device)

    def logits(self, values: Array, rows: int) -> Array:
        """Turn values of `predict` into logits.

        Args:
            values: logits or probabilities, as an array of any kind.
            rows: of the batch.

        Returns:
            Logits [rows, C] float32.

        Raises:
            BadNetwork: the values are not numbers [rows, C], or neither logits nor probabilities.
        """
        is_table = values.ndim == 2 and len(values) == rows and values.shape[1] >= 2
        if not is_table or values.dtype.kind not in "fiub":
            raise BadNetwork(
                f"{self.outside_torch} must give numbers [{rows}, C] of at least two classes, got "
                f"{values.dtype.name} {list(values.shape)}"
            )
        values = values.astype(np.float32)
        likely = _like_probabilities(values)  # [rows] bool
        if self.gives == "probabilities":
            if not likely.all():
                total = float(values[~likely][0].sum())
                raise BadNetwork(
                    f"{self.outside_torch} must give probabilities, got a row that sums to "
                    f"{total:.4g}. Use gives='logits'"
                )
            logarithm: Array = np.log(np.clip(values, FLOOR, 1.0))
            return logarithm
        if self.gives is None and rows and np.isfinite(values).all() and likely.all():
            raise BadNetwork(
                f"{self.outside_torch} gives rows between 0 and 1 that sum to 1, which look like "
                "probabilities. Use gives='probabilities', or gives='logits' if they are logits"
            )
        return values

    def extra_repr(self) -> str:
        """The description and the identity, for print."""
        return f"{self.outside_torch}, identity {self.digest}"

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the identity, for messages."""
        return bytes(self.identity.cpu().numpy()).hex()[:16]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Compare the identity with the saved one. It is never loaded, because a file cannot turn
        this member into another one.
        """
        saved = state_dict.get(prefix + "identity")
        if saved is None:
            missing_keys.append(prefix + "identity")
        elif not torch.equal(saved.cpu(), self.identity.cpu()):
            name = prefix.rstrip(".").rpartition(".")[2]
            saved_digest = bytes(saved.cpu().numpy()).hex()[:16]
            raise InvalidArgument(
                f"the member {name!r} must be the one that was saved (identity {saved_digest}), "
                f"got {self.outside_torch} (identity {self.digest})"
            )


def as_bytes(content: bytes) -> Tensor:
    """Bytes as a tensor uint8 [n]."""
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _array(value: Tensor) -> Array:
    plain = value.detach().cpu()
    if plain.dtype == torch.bfloat16:  # NumPy has no bfloat16
        plain = plain.float()
    return plain.numpy()


def _like_probabilities(values: Array) -> NDArray[np.bool_]:
    """Which rows of values [B, C] may be probabilities, [B] bool. A row with a NaN may be."""
    outside = ((values < -TOLERANCE) | (values > 1 + TOLERANCE)).any(1)
    with np.errstate(invalid="ignore"):
        wrong = np.abs(values.sum(1) - 1) > TOLERANCE
    likely: NDArray[np.bool_] = ~(outside | wrong)
    return likely
