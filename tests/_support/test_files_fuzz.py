"""Whatever happens to a file, only an OfframpError escapes, and no damaged file is taken for a
sound one.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import offramp as off
from offramp._support.files import (
    from_document,
    read_arrays,
    read_tensors,
    to_document,
    write_arrays,
    write_json,
    write_tensors,
)
from offramp.errors import BadFile, OfframpError
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace

GOLDEN = Path(__file__).parents[1] / "golden"


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, other bytes, a cut, a hole, a repeated piece, or zeros."""
    kind = rng.integers(0, 6)
    at = int(rng.integers(0, len(data)))
    size = int(rng.integers(1, 40))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.integers(0, 8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.bytes(size) + data[at + size :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[at + size :]
    if kind == 4:
        return data[:at] + data[at : at + size] + data[at:]
    return data[:at] + bytes(size) + data[at + size :]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["plan.json", "trace.npz"])
def test_damaged_plans_and_traces(tmp_path, name, seed):
    load = {"plan.json": Plan.load, "trace.npz": Trace.load}[name]
    rng = np.random.default_rng(seed)
    sound = (GOLDEN / name).read_bytes()
    path = tmp_path / name
    refused = 0
    whole = load(GOLDEN / name)
    for _ in range(120):
        path.write_bytes(damaged(sound, rng))
        try:
            again = load(path)
        except OfframpError:
            refused += 1
            continue
        if name == "plan.json":
            assert again == whole  # white space, or a byte replaced by itself
        else:
            assert again.header == whole.header
            assert all(
                again.columns[key].tobytes() == column.tobytes()
                for key, column in whole.columns.items()
            )
    assert refused > 60


@pytest.mark.parametrize("name", ["network.json", "weights.safetensors"])
def test_damaged_networks(tmp_path, name):
    shutil.copytree(GOLDEN / "network", tmp_path / "net")
    rng = np.random.default_rng(0)
    refused = 0
    sound = (GOLDEN / "network" / name).read_bytes()
    whole = off.load(GOLDEN / "network").fingerprint()
    for _ in range(150):
        (tmp_path / "net" / name).write_bytes(damaged(sound, rng))
        try:
            assert off.load(tmp_path / "net").fingerprint() == whole
        except OfframpError:
            refused += 1
    assert refused > 75


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_weights(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    rng = np.random.default_rng(1)
    refused = 0
    tensors = {"a.weight": torch.randn(3, 4), "a.bias": torch.zeros(3), "count": torch.tensor(7)}
    if suffix == ".pt":
        torch.save(tensors, path)
    else:
        write_tensors(path, tensors)
    sound = path.read_bytes()
    for _ in range(250):
        path.write_bytes(damaged(sound, rng))
        try:
            read_tensors(path)
        except OfframpError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"PK\x03\x04", b"\x80\x04.", b"{" * 5000, bytes(100), b"\xff" * 64]
)
def test_what_was_never_ours(tmp_path, content):
    for name in ("plan.json", "trace.npz", "w.safetensors", "w.pt", "network.json"):
        (tmp_path / name).write_bytes(content)
    for load, name in (
        (Plan.load, "plan.json"),
        (Trace.load, "trace.npz"),
        (read_tensors, "w.safetensors"),
        (read_tensors, "w.pt"),
        (off.load, "."),
    ):
        with pytest.raises(BadFile):
            load(tmp_path / name)


ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(
            [
                "margin",
                "small",
                "inf",
                "nan",
                "Own",
                "os:getcwd",
                "offramp:resnet20",
                10**400,
                -1,
                1e39,
            ]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)


def replaced(draw: st.DataObject, body: dict) -> dict:
    """A copy of plain data in which one thing, anywhere, was dropped, renamed or replaced by
    anything.
    """
    body = copy.deepcopy(body)
    here = body
    key = None
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = draw.draw(st.sampled_from(keys))
        if (
            not isinstance(here[key], dict | list)
            or not here[key]
            or draw.draw(st.integers(0, 3)) == 0
        ):
            break
        here = here[key]
    what = draw.draw(st.sampled_from(["replace", "replace", "replace", "drop", "double"]))
    if what == "drop":
        del here[key]
    elif what == "double" and isinstance(here, list):
        here.append(copy.deepcopy(here[key]))
    else:
        here[key] = draw.draw(ANYTHING)
    return body


def body_of(text: str, kind: str) -> dict:
    return from_document(text, kind, 1, "golden")[1]


many = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@many
@given(st.data())
def test_plans_with_anything_in_them(data):
    body = body_of((GOLDEN / "plan.json").read_text(), "plan")
    try:
        plan = Plan.from_json(to_document("plan", 1, replaced(data, body)))
    except OfframpError:
        return
    assert str(plan)
    assert plan.open_gates() <= plan.thresholds.keys()
    assert Plan.from_json(plan.to_json()) == plan


@many
@given(st.data())
def test_traces_with_anything_in_them(tmp_path, data):
    header, columns = read_arrays(GOLDEN / "trace.npz")
    changed = to_document("trace", 1, replaced(data, body_of(header, "trace")))
    write_arrays(tmp_path / "trace.npz", changed, columns)
    try:
        trace = Trace.load(tmp_path / "trace.npz")
    except OfframpError:
        return
    assert str(trace)
    assert len(trace.replay(Plan.by_hand({})).exit) == 60


@many
@given(st.data())
def test_networks_with_anything_in_them(tmp_path, data):
    body = body_of((GOLDEN / "network" / "network.json").read_text(), "network")
    shutil.copytree(GOLDEN / "network", tmp_path / "net", dirs_exist_ok=True)
    write_json(tmp_path / "net" / "network.json", "network", 1, replaced(data, body))
    try:
        net = off.load(tmp_path / "net")
    except OfframpError:
        return
    assert [len(logits) for logits in net(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))] == [2, 2]


@given(ANYTHING)
def test_texts_that_are_no_documents(value):
    for text in (json.dumps(value), str(value)):
        with pytest.raises(BadFile):
            Plan.from_json(text)
