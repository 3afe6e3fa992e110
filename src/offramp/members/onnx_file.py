"""An ONNX file as a member of a ladder, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp._support.arguments import name_of, require_path
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
    """An `.onnx` file as a member.

    The logits [B, C] are its only output, the one called `logits`, or the one named here.

    The bytes of the file are part of the network: `save` stores them with the weights, and `load`
    does not need the file. A file with a fixed batch size runs in batches of that size; the last
    batch is filled up with its last row.

    Args:
        path: the file. It must contain its weights. None for a member that gets the bytes from a
            saved network.
        gives: "logits" or "probabilities"; see `Member`.
        output: which output has the answers, if there are several.

    Raises:
        BadFile: the file cannot be read, or has weights in other files.
        InvalidArgument: it has no output of this name, or has several and none is named.
        MissingExtra: ONNX Runtime is not installed.
    """

    file: torch.Tensor

    def __init__(
        self, path: str | Path | None, *, gives: str | None = None, output: str | None = None
    ) -> None:
        content = b""
        if path is not None:
            path = require_path("path", path)
            try:
                content = Path(path).read_bytes()
            except OSError as problem:
                raise BadFile(f"cannot read {path}: {problem.strerror or problem}") from problem
        kind = "an ONNX file"
        if path is not None:
            kind = f"the ONNX file {Path(path).name!r}"
        super().__init__(kind, bytes(32), gives)
        self._output = output
        self._session: Any = None
        self._threads = 0  # of the session
        self._inputs = dict[str, tuple[str, list[Any]]]()  # type and shape, by name
        self._answers = ""
        self.register_buffer("file", as_bytes(b""))
        if path is not None:
            self._fill(content)

    @property
    def spec(self) -> str:  # type: ignore[override]
        """The text from which it is built again: its options. The bytes are in the weights."""
        options = list[str]()
        if self.gives is not None:
            options.append(f"gives={self.gives}")
        if self._output is not None:
            options.append(f"output={self._output}")
        if not options:
            return SPEC
        return f"{SPEC}?{'&'.join(options)}"

    def _fill(self, content: bytes) -> None:
        """Take the bytes of a file."""
        _require_whole(content, self.outside_torch)
        options = json.dumps([self.gives, self._output]).encode()
        self.identity = as_bytes(hashlib.sha256(options + content).digest())
        self.file = as_bytes(content)
        self._session = None
        self._opened()

    def _opened(self) -> Any:
        """The session. It is opened again if torch's number of threads has changed."""
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
            reason = " ".join(str(problem).split())[:200]
            raise BadFile(
                f"{self.outside_torch} cannot be opened by ONNX Runtime: {reason}"
            ) from problem
        self._inputs = {}
        for value in session.get_inputs():
            self._inputs[value.name] = (str(value.type), [*value.shape])
        self._answers = self._chosen(session.get_outputs())
        self._session = session
        self._threads = torch.get_num_threads()
        return session

    def _chosen(self, outputs: Sequence[Any]) -> str:
        """The name of the output with the answers."""
        names = [output.name for output in outputs]
        if self._output is not None:
            if self._output not in names:
                raise InvalidArgument(f"output must be one of {names}, got {self._output!r}")
            return self._output
        if "logits" in names:
            return "logits"
        candidates = list[str]()
        for output in outputs:
            if output.type in KINDS and len(output.shape) == 2:
                candidates.append(str(output.name))
        if len(candidates) != 1:
            raise InvalidArgument(
                f"{self.outside_torch} must have one output [B, C] of numbers, got {names}. Choose "
                "one with output=..."
            )
        return candidates[0]

    def predict(self, args: Sequence[Array], kwargs: dict[str, Array]) -> Array:
        """The chosen output [B, C]."""
        session = self._opened()
        names = list(self._inputs)
        if len(args) > len(names):
            raise BadNetwork(f"{self.outside_torch} takes the inputs {names}, got {len(args)}")
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if set(inputs) != set(names):
            raise BadNetwork(f"{self.outside_torch} takes the inputs {names}, got {sorted(inputs)}")
        inputs = {name: self._cast(name, value) for name, value in inputs.items()}
        count = len(next(iter(inputs.values())))
        size = self._batch_size()
        if size is None or size == count:
            return np.asarray(session.run([self._answers], inputs)[0])
        if not count:
            return np.zeros((0, 2), np.float32)

        # A fixed batch size: run the rows in batches of it. The last batch repeats the last row,
        # and its answers for the repeated rows are cut off.
        answers = list[Array]()
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            batch = {name: value[rows] for name, value in inputs.items()}  # [size, ...]
            values = np.asarray(session.run([self._answers], batch)[0])  # [size, C]
            answers.append(values[: count - start])
        return np.concatenate(answers)

    def _batch_size(self) -> int | None:
        """The batch size for which the file is written; None for any."""
        sizes = set[int]()
        for _, shape in self._inputs.values():
            if shape and isinstance(shape[0], int):
                sizes.add(shape[0])
        return sizes.pop() if len(sizes) == 1 else None

    def _cast(self, name: str, value: Array) -> Array:
        """Floats with the width that the file takes; other types unchanged."""
        kind = KINDS.get(self._inputs[name][0])
        if kind is not None and value.dtype.kind == "f":
            return value.astype(kind)
        return value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Load a saved member: one without a file takes the saved bytes, any other is compared."""
        content = state_dict.get(prefix + "file")
        if content is not None and not len(self.file):
            self._fill(content.cpu().numpy().tobytes())
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the session, which cannot be copied. It is opened again when needed."""
        return {**self.__dict__, "_session": None}


def onnx_of(spec: str) -> OnnxFile:
    """The member that a text names.

    Args:
        spec: such as `onnx:FILE?gives=probabilities&output=NAME`. Without a file the member gets
            its bytes from a saved network.

    Raises:
        InvalidArgument: an unknown option.
        BadFile, MissingExtra: as for `OnnxFile`.
    """
    name, arguments = name_of(spec)
    options = dict[str, str]()
    for key, value in arguments.items():
        if key not in ("gives", "output"):
            raise InvalidArgument(
                f"{spec!r} must have no options but gives and output, got {key!r}"
            )
        options[key] = str(value)
    return OnnxFile(name.removeprefix(SPEC) or None, **options)


def _require_whole(content: bytes, what: str) -> None:
    """Raise BadFile if a model has weights in other files. These could be any file of the machine.

    Args:
        content: bytes of the file.
        what: a description of it, for messages.
    """
    try:
        import onnx
    except ImportError as problem:
        raise MissingExtra("onnx", "onnxruntime", "an ONNX file in a ladder") from problem
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as problem:
        raise BadFile(f"{what} is not a readable ONNX file") from problem
    for tensor in _tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise BadFile(
                f"{what} must contain its weights, got weights in other files. Save it as one file"
            )


def _tensors_of(model: Any) -> Iterator[Any]:
    """All tensors of a model: weights of its graphs, and attributes of their nodes.

    Graphs can be nested: a node such as an `If` has graphs among its attributes.
    """
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield from getattr(graph, "initializer", ())  # a function has none
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield sparse.values
            yield sparse.indices
        for node in graph.node:
            for attribute in node.attribute:
                waiting += attribute.graphs
                yield from attribute.tensors
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                if attribute.HasField("t"):
                    yield attribute.t
