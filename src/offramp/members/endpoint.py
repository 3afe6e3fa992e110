"""A model behind HTTP as a member of a ladder, such as one that a KServe, Triton or TensorFlow
server serves.

Requests and answers are those of the Open Inference Protocol v2 (`protocol="v2"`), or
`{"instances": rows}` and `{"predictions": logits}` (`protocol="v1"`).
"""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from offramp._support.arguments import require, require_count
from offramp.errors import BadNetwork, InvalidArgument, MemberUnavailable
from offramp.members._member import Array, Member

__all__ = ["Endpoint"]

PROTOCOLS = ("v2", "v1")
LARGEST = 64 * 2**20  # bytes of an answer
CHUNK = 64 * 1024  # bytes of one read
DATATYPES = {  # of NumPy, and as protocol v2 names them
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "bool": "BOOL",
}


# errors of an answer that lacks something, or has it in another form
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)


class Endpoint(Member):
    """A model behind an HTTP endpoint that takes and returns JSON.

    If the endpoint does not answer in time, or not with logits, a Runner gives its rows the answer
    of the deepest exit that they have passed. Their reason `why` is "unavailable", and no promise
    covers them. `record` raises MemberUnavailable instead, because a trace with such rows would be
    that of another ladder. Redirects are not followed.

    Args:
        url: where to send a POST request; http or https.
        version: a name for the model that answers there. A promise holds for this version only.
            Change it when the model changes, because the change cannot be seen from here.
        timeout_s: seconds for a whole request, its answer included.
        gives: "logits" or "probabilities"; see `Member`.
        protocol: "v2" or "v1".
        output: the name of the output with the answers, if v2 returns several.
        retries: how often a failed request is sent again, each time with `timeout_s`.
        headers: headers to send, such as an authorization; they are neither saved nor printed.

    Raises:
        InvalidArgument: an argument is outside of its range.
    """

    def __init__(
        self,
        url: str,
        *,
        version: str,
        timeout_s: float = 1.0,
        gives: str | None = None,
        protocol: str = "v2",
        output: str | None = None,
        retries: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgument(
                f"url must start with http:// or https:// and name a host, got {url!r}"
            )
        if parts.username or parts.password:
            raise InvalidArgument("url must not contain a user or password. Use headers")
        if not isinstance(version, str) or not version:
            raise InvalidArgument(
                f"version must be a text that names the model behind the url, got {version!r}"
            )
        timeout_s = require("timeout_s", timeout_s, above=0)
        if protocol not in PROTOCOLS:
            raise InvalidArgument(f"protocol must be 'v2' or 'v1', got {protocol!r}")
        retries = require_count("retries", retries, low=0)
        # Headers are not part of the identity: they may be secret, and do not choose the model.
        options = json.dumps([url, version, gives, protocol, output])
        super().__init__(f"the endpoint {url}", hashlib.sha256(options.encode()).digest(), gives)
        self.may_be_unavailable = True
        self._url = url
        self._timeout_s = timeout_s
        self._protocol = protocol
        self._output = output
        self._retries = retries
        self._headers = {"Content-Type": "application/json", **dict(headers or {})}

    def predict(self, args: Sequence[Array], kwargs: dict[str, Array]) -> Array:
        """The answer of the endpoint [B, C]. Raises MemberUnavailable."""
        inputs = dict[str, Array]()  # positional ones are called x, input_1, input_2, ...
        for index, value in enumerate(args):
            name = f"input_{index}" if index else "x"
            inputs[name] = value
        inputs.update(kwargs)
        body = self._body(inputs)
        # The last attempt raises its own error.
        for attempt in range(self._retries + 1):
            try:
                return self._answers(self._sent(body))
            except MemberUnavailable:
                if attempt == self._retries:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def logits(self, values: Array, rows: int) -> Array:
        """As for every member. Values that are not logits are a failure of the endpoint, and not of
        the network.
        """
        try:
            return super().logits(values, rows)
        except BadNetwork as problem:
            raise MemberUnavailable(str(problem)) from problem

    def _body(self, inputs: dict[str, Array]) -> bytes:
        """A request with inputs [B, ...] by name."""
        if self._protocol == "v1":
            return _json({"instances": _instances(inputs)})
        entries = list[dict[str, Any]]()
        for name, value in inputs.items():
            datatype = DATATYPES.get(value.dtype.name)
            if datatype is None:
                raise BadNetwork(
                    f"{self.outside_torch} takes numbers, got {value.dtype.name} for {name!r}"
                )
            entry = {
                "name": name,
                "shape": [*value.shape],
                "datatype": datatype,
                "data": value.ravel().tolist(),
            }
            entries.append(entry)
        return _json({"inputs": entries})

    def _sent(self, body: bytes) -> Any:
        """Send a request. Returns its answer, which is JSON.

        The timeout of urllib is one for each read. A server that sends a byte now and then would
        never exceed it, so the clock is checked after every read as well.
        """
        until = time.monotonic() + self._timeout_s
        request = urllib.request.Request(self._url, data=body, headers=self._headers, method="POST")
        chunks = list[bytes]()
        size = 0
        try:
            with _OPENER.open(request, timeout=self._timeout_s) as answer:
                while chunk := answer.read1(CHUNK):
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > LARGEST:
                        raise MemberUnavailable(
                            f"{self.outside_torch} answers with more than {LARGEST:,} bytes"
                        )
                    if time.monotonic() > until:
                        raise TimeoutError
        except TimeoutError as problem:
            raise MemberUnavailable(
                f"{self.outside_torch} did not answer within {self._timeout_s:g} seconds"
            ) from problem
        except urllib.error.HTTPError as problem:
            problem.close()
            raise MemberUnavailable(
                f"{self.outside_torch} answers with the status {problem.code}"
            ) from problem
        except (OSError, HTTPException, ValueError) as problem:
            reason = getattr(problem, "reason", problem)
            if isinstance(reason, TimeoutError):
                failure = f"did not answer within {self._timeout_s:g} seconds"
            else:
                text = " ".join(str(reason).split())[:100]
                failure = f"cannot be reached ({text})"
            raise MemberUnavailable(f"{self.outside_torch} {failure}") from problem
        try:
            return json.loads(b"".join(chunks))
        except (ValueError, RecursionError) as problem:
            raise MemberUnavailable(f"{self.outside_torch} does not answer in JSON") from problem

    def _answers(self, body: Any) -> Array:
        """The numbers [B, C] in an answer."""
        try:
            if self._protocol == "v1":
                return np.asarray(body["predictions"], np.float32)
            outputs = {output["name"]: output for output in body["outputs"]}
            output = outputs[self._name_of_output([*outputs])]
            shape = [int(size) for size in output["shape"]]
            return np.asarray(output["data"], np.float32).reshape(shape)
        except MALFORMED as problem:
            raise MemberUnavailable(
                f"{self.outside_torch} answers with other JSON than protocol {self._protocol!r} has"
            ) from problem

    def _name_of_output(self, names: Sequence[str]) -> str:
        """Which output has the answers. Raises BadNetwork if that is not clear."""
        if self._output is not None:
            return self._output
        if "logits" in names:
            return "logits"
        if len(names) > 1:
            raise BadNetwork(
                f"{self.outside_torch} has the outputs {sorted(names)}. Choose one with output=..."
            )
        return names[0]


def _instances(inputs: dict[str, Array]) -> list[Any]:
    """One entry for each row, as protocol v1 has it: a value, or a mapping of several by name."""
    columns = {name: value.tolist() for name, value in inputs.items()}
    if set(columns) == {"x"}:
        rows: list[Any] = columns["x"]
        return rows
    instances = list[Any]()
    for row in zip(*columns.values(), strict=True):
        instances.append(dict(zip(columns, row, strict=True)))
    return instances


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Treats a redirect as an answer with that status. Rows are sent only to the user's url."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _json(body: object) -> bytes:
    return json.dumps(body).encode()
