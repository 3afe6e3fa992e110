"""An ONNX file as a member of a ladder, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp._support.arguments import name_of
from offramp.errors import BadFile, BadNetwork, InvalidArgument, MissingExtra
from offramp.members._member import Array, Member, as_bytes

__all__ = ["OnnxFile", "onnx_of"]

SPEC = "onnx:"
KINDS = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
}


class OnnxFile(Member):
    """An `.onnx` file: its only output [B, C], or the one called `logits` or named here.

    The bytes of the file are part of the network: `save` stores them beside the weights, and `load`
    needs nothing again. A file with a fixed batch size runs in batches of that size, the last one
    filled up with its last row.

    Args:
        path: the file. Its weights must be inside of it, not in files beside it.
        gives: "logits" or "probabilities"; see `Member`.
        output: which of its outputs are the answers, where there are several.

    Raises:
        BadFile: the file cannot be read, or keeps weights elsewhere.
        InvalidArgument: it has no such output, or several and none is named.
        MissingExtra: ONNX Runtime is not installed.
    """

    file: torch.Tensor

    def __init__(
        self, path: str | Path | None, *, gives: str | None = None, output: str | None = None
    ) -> None:
        content = b""
        if path is not None:
            try:
                content = Path(path).read_bytes()
            except OSError as problem:
                raise BadFile(f"cannot read {path}: {problem.strerror or problem}") from problem
        super().__init__(
            "an ONNX file" if path is None else f"the ONNX file {Path(path).name!r}",
            bytes(32),
            gives,
        )
        self._output = output
        self._session: Any = None
        self._threads = 0
        self._inputs = dict[str, tuple[str, list[Any]]]()
        self._answers = ""
        self.register_buffer("file", as_bytes(b""))
        if path is not None:
            self._fill(content)

    @property
    def spec(self) -> str:  # type: ignore[override]
        """How it is built again: its options; the bytes are in the weights."""
        options = {"gives": self.gives, "output": self._output}
        told = "&".join(f"{key}={value}" for key, value in options.items() if value is not None)
        return f"{SPEC}?{told}" if told else SPEC

    def _fill(self, content: bytes) -> None:
        _require_whole(content, self.outside_torch)
        options = json.dumps([self.gives, self._output]).encode()
        self.identity = as_bytes(hashlib.sha256(options + content).digest())
        self.file = as_bytes(content)
        self._session = None
        self._opened()

    def _opened(self) -> Any:
        """The session on as many threads as torch has now."""
        if self._session is not None and self._threads == torch.get_num_threads():
            return self._session
        try:
            import onnxruntime
        except ImportError as problem:
            raise MissingExtra(
                "onnxruntime", "onnxruntime", "an ONNX file in a ladder"
            ) from problem
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        content = self.file.cpu().numpy().tobytes()
        try:
            session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as problem:  # errors of the runtime share no class but Exception
            brief = " ".join(str(problem).split())[:200]
            raise BadFile(
                f"{self.outside_torch} cannot be opened by ONNX Runtime: {brief}"
            ) from problem
        self._inputs = {one.name: (str(one.type), [*one.shape]) for one in session.get_inputs()}
        self._answers = self._chosen(session.get_outputs())
        self._session = session
        self._threads = torch.get_num_threads()
        return session

    def _chosen(self, outputs: Sequence[Any]) -> str:
        """The name of the output that holds the answers."""
        names = [one.name for one in outputs]
        if self._output is not None:
            if self._output not in names:
                raise InvalidArgument(f"output must be one of {names}, got {self._output!r}")
            return self._output
        if "logits" in names:
            return "logits"
        likely = [one.name for one in outputs if one.type in KINDS and len(one.shape) == 2]
        if len(likely) != 1:
            raise InvalidArgument(
                f"{self.outside_torch} must have one output [B, C] of numbers, got {names}; say "
                f"output=..."
            )
        return str(likely[0])

    def predict(self, args: Sequence[Array], kwargs: dict[str, Array]) -> Array:
        """The chosen output [B, C]."""
        session = self._opened()
        names = list(self._inputs)
        if len(args) > len(names):
            raise BadNetwork(f"{self.outside_torch} takes the inputs {names}, got {len(args)}")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if set(given) != set(names):
            raise BadNetwork(f"{self.outside_torch} takes the inputs {names}, got {sorted(given)}")
        given = {name: self._cast(name, value) for name, value in given.items()}
        count = len(next(iter(given.values())))
        size = self._batch()
        if size is None or size == count:
            return np.asarray(session.run([self._answers], given)[0])
        found = list[Array]()
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            some = {name: value[rows] for name, value in given.items()}
            found.append(np.asarray(session.run([self._answers], some)[0])[: count - start])
        return np.concatenate(found) if found else np.zeros((0, 2), np.float32)

    def _batch(self) -> int | None:
        """The number of rows that the file is written for; None for any."""
        fixed = {
            shape[0] for _, shape in self._inputs.values() if shape and isinstance(shape[0], int)
        }
        return fixed.pop() if len(fixed) == 1 else None

    def _cast(self, name: str, value: Array) -> Array:
        """Floats of another width as the file takes them; other types as they are."""
        kind = KINDS.get(self._inputs[name][0])
        if kind is not None and value.dtype.kind == "f":
            return value.astype(kind)
        return value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """A member that was built without a file takes the bytes; any other one is compared."""
        content = state_dict.get(prefix + "file")
        if content is not None and not len(self.file):
            self._fill(content.cpu().numpy().tobytes())
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __getstate__(self) -> dict[str, Any]:
        """A session is opened again where it is needed: it can be neither copied nor sent."""
        return {**self.__dict__, "_session": None}


def onnx_of(spec: str) -> OnnxFile:
    """The member that `onnx:FILE?gives=probabilities&output=NAME` names; without a file it waits
    for the bytes.
    """
    name, arguments = name_of(spec)
    if wrong := [key for key in arguments if key not in ("gives", "output")]:
        raise InvalidArgument(
            f"{spec!r} must have no options but gives and output, got {wrong[0]!r}"
        )
    return OnnxFile(
        name.removeprefix(SPEC) or None, **{key: str(value) for key, value in arguments.items()}
    )


def _require_whole(content: bytes, what: str) -> None:
    """Raise BadFile for a model that keeps weights in other files: those could be any file of the
    machine.
    """
    try:
        import onnx
    except ImportError as problem:
        raise MissingExtra("onnx", "onnxruntime", "an ONNX file in a ladder") from problem
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as problem:
        raise BadFile(f"{what} is not a readable ONNX file") from problem
    graphs: list[Any] = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        tensors = list(getattr(graph, "initializer", ()))
        for sparse in getattr(graph, "sparse_initializer", ()):
            tensors += [sparse.values, sparse.indices]
        for node in graph.node:
            for attribute in node.attribute:
                graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                tensors += [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors):
            raise BadFile(
                f"{what} must hold its weights itself, got some in files beside it; save it as "
                f"one file"
            )
