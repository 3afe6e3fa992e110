"""What is made of a network is made once, by one thread, and goes when the network goes or
changes.
"""

from __future__ import annotations

import ast
import copy
import gc
import threading
import weakref

import pytest
import torch

import house
import offramp as off
from offramp._support.find import find
from offramp.networks.compiled import Compiled, compiled_of
from offramp.partition.segmenting import segments_of
from offramp.plans.plan import Plan
from offramp.runtime.graphs import lazy_parts
from small import dense, ladder_of, rows_of

KEEPERS = {
    "networks.compiled",
    "networks.trained",
}  # the one owner; and who trained what, which is the process's


def made(counts, key="thing"):
    def make():
        counts.append(key)
        return [key]

    return make


def test_it_is_made_once_for_each_key():
    kept = Compiled()
    counts = []
    first = kept.once("a", made(counts, "a"))
    assert kept.once("a", made(counts, "a")) is first
    assert kept.once("b", made(counts, "b")) == ["b"]
    assert counts == ["a", "b"]
    assert len(kept) == 2


def test_what_no_longer_fits_is_made_again():
    kept = Compiled()
    counts = []
    first = kept.once("a", made(counts))
    assert kept.once("a", made(counts), lambda found: found is first) is first
    assert kept.once("a", made(counts), lambda found: found is not first) is not first
    assert len(counts) == 2


def test_what_fails_keeps_nothing():
    kept = Compiled()
    counts = []
    kept.once("a", made(counts))
    with pytest.raises(ZeroDivisionError):
        kept.once("a", lambda: 1 // 0, lambda found: False)
    assert kept.found("a") is None
    assert kept.once("a", made(counts)) == ["thing"]


def test_what_is_made_may_ask_for_more():
    kept = Compiled()
    counts = []
    assert kept.once("outer", lambda: kept.once("inner", made(counts))) is kept.found("inner")


def test_of_many_threads_one_makes_it():
    kept = Compiled()
    counts = []
    begun = threading.Barrier(8)
    found = []

    def ask():
        begun.wait()
        found.append(kept.once("a", made(counts)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == ["thing"]
    assert len(found) == 8
    assert all(one is found[0] for one in found)


def test_each_network_has_its_own_which_a_copy_does_not_share():
    net = ladder_of(2)
    segments_of(net)
    assert compiled_of(net) is compiled_of(net)
    assert len(compiled_of(net)) > 0
    assert len(compiled_of(copy.deepcopy(net))) == len(compiled_of(net.with_gates({}))) == 0


def test_it_goes_with_the_network():
    net = ladder_of(2)
    x = rows_of(3)
    off.run(net, Plan.by_hand({"small": 0.5}), x)
    kept = weakref.ref(compiled_of(net))
    gone = weakref.ref(net)
    assert kept().found("runner") is not None
    del net
    gc.collect()
    assert gone() is None
    assert kept() is None


def test_segments_are_made_again_after_a_model_was_replaced():
    net = ladder_of(2)
    first = segments_of(net)
    assert segments_of(net) is first
    net.backbone["small"] = dense(0, seed=7)
    assert segments_of(net) is not first


def test_another_exit_in_place_forgets_what_was_made():
    net = ladder_of(2)
    x = rows_of(3)
    plan = Plan.by_hand({"small": torch.inf})
    before = off.run(net, plan, x).logits
    net.hang_exit("middle", find("exits", "Added")(net.exit_of("middle"), "small", 2.0))
    assert len(compiled_of(net)) == 0
    assert not torch.allclose(off.run(net, plan, x).logits, before)


def test_a_part_is_compiled_once_for_each_shape_over_all_openings():
    net = ladder_of(2)
    shapes = []

    def make(engine_stage, state, key):
        assert "counted" in key
        shapes.append(tuple(state["x"].shape[1:]))
        return lambda given: dict.fromkeys(engine_stage.writes, given["x"])

    schedule = Plan.never_leave(net.topology).schedule(net.topology)
    for _ in range(2):
        (engine_stage,) = lazy_parts(net, schedule, net.device(), "counted", make)
        for wide in (4, 4, 5):
            for rows in (1, 3):
                engine_stage.call({"x": torch.zeros(rows, wide)})
    assert shapes == [(4,), (5,)]
    with torch.no_grad():
        next(net.model_of(net.members[-1]).parameters()).add_(1)
    (engine_stage,) = lazy_parts(net, schedule, net.device(), "counted", make)
    engine_stage.call({"x": torch.zeros(2, 4)})
    assert shapes == [(4,), (5,), (4,)]


@pytest.mark.parametrize("module", [name for name in house.modules() if name not in KEEPERS])
def test_no_other_module_keeps_what_it_made_of_networks(module):
    for node in house.parsed(house.modules()[module]).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            made = ast.unparse(node.value)
            assert not made.startswith(("Weak", "weakref.Weak")), (
                f"{module} keeps {made}; use compiled_of(network)"
            )
