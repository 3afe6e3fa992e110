"""A member behind HTTP: a server on this machine that answers, dawdles, lies and fails."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import InvalidArgument, MemberUnavailable
from offramp.members.endpoint import Endpoint

X = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)


class Served:
    """What the server does: `mode`, and the requests that came."""

    def __init__(self):
        self.mode = "v2"
        self.requests = []
        self.failures = 0

    def answer(self, body):
        """Status and body of an answer."""
        self.requests.append(body)
        if self.failures:
            self.failures -= 1
            return 503, b"later"
        if self.mode == "v1":
            return 200, json.dumps(
                {"predictions": (np.array(body["instances"]) @ WEIGHTS).tolist()}
            ).encode()
        given = body["inputs"][0]
        logits = np.array(given["data"], np.float32).reshape(given["shape"]) @ WEIGHTS
        if self.mode == "short":
            logits = logits[:1, :2]
        outputs = [
            {
                "name": "y",
                "shape": [*logits.shape],
                "datatype": "FP32",
                "data": logits.ravel().tolist(),
            }
        ]
        if self.mode == "two":
            outputs.append({**outputs[0], "name": "z", "data": (-logits).ravel().tolist()})
        answers = {
            "error": (500, b"{}"),
            "no json": (200, b"<html>"),
            "other json": (200, b'{"outputs": 3}'),
        }
        return answers.get(self.mode, (200, json.dumps({"outputs": outputs}).encode()))


@pytest.fixture
def served(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    state = Served()
    with _serving(state) as url:
        state.url = url
        yield state


@contextmanager
def _serving(state):
    stopped = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if state.mode == "redirect":
                self.send_response(302)
                self.send_header("Location", state.url + "/elsewhere")
                self.end_headers()
                return
            if state.mode == "silent":
                stopped.wait(5)
                return
            code, content = state.answer(body)
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if state.mode == "dripping":
                for byte in content:
                    if stopped.wait(0.05):
                        return
                    self.wfile.write(bytes([byte]))
                return
            self.wfile.write(content)

        def log_message(self, *_):
            pass

        def handle(self):
            with suppress(ConnectionError):  # the client has gone
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/infer"
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def endpoint(served, **options):
    return Endpoint(served.url, version="1", **{"timeout_s": 5.0, **options})


def test_it_speaks_v2(served):
    found = endpoint(served)(torch.from_numpy(X))
    np.testing.assert_allclose(found.numpy(), X @ WEIGHTS, rtol=1e-4, atol=1e-5)
    (sent,) = served.requests
    assert {key: value for key, value in sent["inputs"][0].items() if key != "data"} == {
        "name": "x", "shape": [40, 6], "datatype": "FP32",
    }  # fmt: skip


def test_it_speaks_v1(served):
    served.mode = "v1"
    found = endpoint(served, protocol="v1")(torch.from_numpy(X))
    np.testing.assert_allclose(found.numpy(), X @ WEIGHTS, rtol=1e-4, atol=1e-5)
    assert (
        endpoint(served, protocol="v1")._body({"a": X[:1, :2], "b": X[:1, 0]})
        == json.dumps({"instances": [{"a": X[0, :2].tolist(), "b": float(X[0, 0])}]}).encode()
    )


def test_one_of_several_outputs(served):
    served.mode = "two"
    found = endpoint(served, output="z")(torch.from_numpy(X))
    np.testing.assert_allclose(found.numpy(), -(X @ WEIGHTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("error", "status 500"),
        ("no json", "does not answer in JSON"),
        ("other json", "other JSON than protocol 'v2'"),
        ("short", r"must give numbers \[40, C\]"),
        ("redirect", "status 302"),
    ],
)
def test_what_is_no_answer_is_a_failure(served, mode, sentence):
    served.mode = mode
    with pytest.raises(MemberUnavailable, match=sentence):
        endpoint(served)(torch.from_numpy(X))
    assert len(served.requests) <= 1


@pytest.mark.parametrize("mode", ["silent", "dripping"])
def test_a_slow_answer_is_given_up(served, mode):
    served.mode = mode
    with pytest.raises(MemberUnavailable, match=r"did not answer within 0\.2 seconds"):
        endpoint(served, timeout_s=0.2)(torch.from_numpy(X))


def test_nobody_there(served):
    gone = Endpoint("http://127.0.0.1:9/infer", version="1", timeout_s=2.0)
    with pytest.raises(MemberUnavailable, match="cannot be reached"):
        gone(torch.from_numpy(X))


def test_a_failed_request_is_sent_again(served):
    served.failures = 2
    assert endpoint(served, retries=2)(torch.from_numpy(X)).shape == (40, 3)
    assert len(served.requests) == 3
    served.failures = 2
    with pytest.raises(MemberUnavailable, match="status 503"):
        endpoint(served, retries=1)(torch.from_numpy(X))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"url": "ftp://127.0.0.1/x"}, "must start with http"),
        ({"url": "file:///etc/hosts"}, "must start with http"),
        ({"url": "http://user:word@127.0.0.1/"}, "must not contain a user or password"),
        ({"version": ""}, "version must be"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"timeout_s": float("inf")}, "timeout_s must be"),
        ({"protocol": "v3"}, "protocol must be"),
        ({"retries": -1}, "retries must be"),
        ({"gives": "votes"}, "gives must be"),
    ],
)
def test_arguments_are_checked(options, sentence):
    with pytest.raises(InvalidArgument, match=sentence):
        Endpoint(**{"url": "http://127.0.0.1/", "version": "1", **options})


def test_the_identity_is_url_and_version_and_never_a_header():
    one = Endpoint("http://127.0.0.1/", version="1")
    assert one.digest != Endpoint("http://127.0.0.1/", version="2").digest
    assert one.digest != Endpoint("http://127.0.0.2/", version="1").digest
    secret = Endpoint("http://127.0.0.1/", version="1", headers={"Authorization": "Bearer secret"})
    assert secret.digest == one.digest
    assert "secret" not in repr(secret)


@pytest.fixture
def ladder(served):
    torch.manual_seed(0)
    net = off.ladder({"small": nn.Linear(6, 3).eval(), "far": endpoint(served)}).eval()
    trace = off.record(net, X, progress=False)
    return net, trace


def test_rows_of_a_failed_endpoint_get_the_deepest_answer_that_there_is(served, ladder):
    net, trace = ladder
    plan = off.Plan.by_hand({"small": float(np.median(trace.scores[:, 0]))})
    runner = off.open(net, plan)
    well = runner(X)
    assert set(well.reasons()) == {"gate", "end"}
    served.mode = "error"
    lost = runner(X)
    assert [{"end": "unavailable"}.get(why, why) for why in well.reasons()] == lost.reasons()
    assert lost.exit.tolist() == [0] * len(X)
    np.testing.assert_allclose(lost.logits.numpy(), trace.outputs[:, 0], rtol=1e-4, atol=1e-5)
    left = (well.exit == 0).nonzero()[:, 0]
    assert torch.equal(lost.logits[left], well.logits[left])
    served.mode = "v2"
    assert runner(X).exit.tolist() == well.exit.tolist()


def test_without_an_earlier_answer_the_failure_is_raised(served, ladder):
    net, _ = ladder
    runner = off.open(net, off.Plan.never_leave(net.topology))
    served.mode = "error"
    with pytest.raises(MemberUnavailable, match="status 500"):
        runner(X)


def test_the_answer_before_last_in_a_ladder_of_three(served):
    torch.manual_seed(0)
    models = {"a": nn.Linear(6, 3).eval(), "b": nn.Linear(6, 3).eval(), "far": endpoint(served)}
    net = off.ladder(models).eval()
    runner = off.open(net, off.Plan.by_hand({"a": 1.0, "b": 1.0}))
    well = runner(X)
    assert set(well.exit.tolist()) == {0, 1, 2}
    served.mode = "error"
    lost = runner(X)
    assert lost.exit.tolist() == [min(index, 1) for index in well.exit.tolist()]
    arrived = torch.from_numpy(np.flatnonzero(np.array(lost.reasons()) == "unavailable"))
    assert torch.equal(arrived, (well.exit == 2).nonzero()[:, 0])
    second = models["b"](torch.from_numpy(X)).detach()
    np.testing.assert_allclose(
        lost.logits[arrived].numpy(), second[arrived].numpy(), rtol=1e-4, atol=1e-5
    )


def test_recording_stops_where_the_endpoint_fails(served, ladder):
    net, _ = ladder
    served.mode = "error"
    with pytest.raises(MemberUnavailable):
        off.record(net, X, progress=False)


def test_it_must_be_given_again_and_is_compared(served, ladder, tmp_path):
    net, _ = ladder
    off.save(net, tmp_path / "net")
    small = nn.Linear(6, 3)
    with pytest.raises(InvalidArgument, match="'far' was built by its user"):
        off.load(tmp_path / "net", {"small": small})
    with pytest.raises(InvalidArgument, match="'far' must be the one that was saved"):
        off.load(tmp_path / "net", {"small": small, "far": Endpoint(served.url, version="2")})
    again = off.load(tmp_path / "net", {"small": small, "far": endpoint(served, timeout_s=3.0)})
    assert again.fingerprint() == net.fingerprint()
    text = (tmp_path / "net" / "network.json").read_text()
    assert served.url not in text


def test_requests_from_several_threads(served, ladder):
    net, _ = ladder
    runner = off.open(net, off.Plan.by_hand({"small": 1.0}))
    wanted = runner(X).logits
    found = [None] * 4

    def work(index):
        found[index] = runner(X).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.allclose(each, wanted) for each in found)
