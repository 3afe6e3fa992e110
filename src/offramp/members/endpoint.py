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

from offramp.errors import BadNetwork, InvalidArgument, MemberUnavailable
from offramp.members._member import Array, Member

__all__ = ["Endpoint"]

PROTOCOLS = ("v2", "v1")
LARGEST = 64 * 2**20  # bytes of an answer
CHUNK = 64 * 1024
DATATYPES = {
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


class Endpoint(Member):
    """A model behind an HTTP endpoint that takes and gives JSON.

    Where it does not answer in time, or not with logits, a Runner gives its rows the answer of the
    deepest exit that they have had, and `why` says "unavailable"; no promise covers those rows.
    `record` stops instead: a trace with such rows would be of another ladder. Nothing follows a
    redirect.

    Args:
        url: where to send a POST request; http or https.
        version: which model answers there. A promise is about this version: change it when the
            model changes, for nothing here can see that.
        timeout_s: seconds for a whole request, its answer included.
        gives: "logits" or "probabilities"; see `Member`.
        protocol: "v2" or "v1".
        output: the name of the output that holds the answers, where v2 gives several.
        retries: how often a failed request is sent again, each time for `timeout_s`.
        headers: headers to send, such as an authorization; they are neither saved nor printed.

    Raises:
        InvalidArgument: an argument has no such value.
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
        where = urlsplit(url)
        if where.scheme not in ("http", "https") or not where.hostname:
            raise InvalidArgument(
                f"url must start with http:// or https:// and name a host, got {url!r}"
            )
        if where.username or where.password:
            raise InvalidArgument("url must hold no user and password; give them in headers")
        if not isinstance(version, str) or not version:
            raise InvalidArgument(
                f"version must be a text that names the model behind the url, got {version!r}"
            )
        if not 0 < timeout_s < float("inf"):
            raise InvalidArgument(f"timeout_s must be above 0 and finite, got {timeout_s}")
        if protocol not in PROTOCOLS:
            raise InvalidArgument(f"protocol must be 'v2' or 'v1', got {protocol!r}")
        if not isinstance(retries, int) or retries < 0:
            raise InvalidArgument(f"retries must be a whole number from 0, got {retries!r}")
        told = json.dumps([url, version, gives, protocol, output])
        super().__init__(f"the endpoint {url}", hashlib.sha256(told.encode()).digest(), gives)
        self.may_be_unavailable = True
        self._url = url
        self._timeout_s = float(timeout_s)
        self._protocol = protocol
        self._output = output
        self._retries = retries
        self._headers = {"Content-Type": "application/json", **dict(headers or {})}

    def predict(self, args: Sequence[Array], kwargs: dict[str, Array]) -> Array:
        """What the endpoint answers [B, C]. Raises MemberUnavailable."""
        named = {
            f"input_{index}" if index else "x": value for index, value in enumerate(args)
        } | kwargs
        count = len(next(iter(named.values())))
        body = self._body(named)
        for attempt in range(self._retries + 1):
            try:
                return self._answers(self._sent(body), count)
            except MemberUnavailable:
                if attempt == self._retries:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def logits(self, values: Array, rows: int) -> Array:
        """As for every member, but what is no logits is a failure of the endpoint, not of the
        network.
        """
        try:
            return super().logits(values, rows)
        except BadNetwork as problem:
            raise MemberUnavailable(str(problem)) from problem

    def _body(self, named: dict[str, Array]) -> bytes:
        if self._protocol == "v1":
            rows = {name: value.tolist() for name, value in named.items()}
            if set(named) == {"x"}:
                return _json({"instances": rows["x"]})
            columns = zip(*rows.values(), strict=True)
            return _json({"instances": [dict(zip(rows, row, strict=True)) for row in columns]})
        inputs = list[dict[str, Any]]()
        for name, value in named.items():
            kind = DATATYPES.get(value.dtype.name)
            if kind is None:
                raise BadNetwork(
                    f"{self.outside_torch} takes numbers, got {value.dtype.name} for {name!r}"
                )
            inputs.append(
                {
                    "name": name,
                    "shape": [*value.shape],
                    "datatype": kind,
                    "data": value.ravel().tolist(),
                }
            )
        return _json({"inputs": inputs})

    def _sent(self, body: bytes) -> Any:
        """The answer to a request as JSON, whole and in time."""
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
                brief = f"did not answer within {self._timeout_s:g} seconds"
            else:
                brief = f"cannot be reached ({' '.join(str(reason).split())[:100]})"
            raise MemberUnavailable(f"{self.outside_torch} {brief}") from problem
        try:
            return json.loads(b"".join(chunks))
        except (ValueError, RecursionError) as problem:
            raise MemberUnavailable(f"{self.outside_torch} does not answer in JSON") from problem

    def _answers(self, body: Any, count: int) -> Array:
        """Numbers [B, C] of an answer."""
        try:
            if self._protocol == "v1":
                return np.asarray(body["predictions"], np.float32)
            outputs = {one["name"]: one for one in body["outputs"]}
            name = self._output
            if name is None:
                name = "logits" if "logits" in outputs else next(iter(outputs))
                if name != "logits" and len(outputs) > 1:
                    raise BadNetwork(
                        f"{self.outside_torch} has the outputs {sorted(outputs)}; say output=..."
                    )
            found = np.asarray(outputs[name]["data"], np.float32)
            return found.reshape([int(size) for size in outputs[name]["shape"]])
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            StopIteration,
            OverflowError,
        ) as problem:
            raise MemberUnavailable(
                f"{self.outside_torch} answers with other JSON than protocol {self._protocol!r} has"
            ) from problem


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer with that status: rows are sent where the user said, and nowhere
    else.
    """

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _json(body: object) -> bytes:
    return json.dumps(body).encode()
