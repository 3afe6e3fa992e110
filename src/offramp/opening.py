"""A network opened under a plan on an engine: checked once, and compiled before it serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from offramp.answers import Answers
from offramp.engine import engine_of
from offramp.errors import BadData, BadInput, Mismatch, OpenAgain
from offramp.inputs import State, as_inputs, count_of
from offramp.measuring import percentiles
from offramp.network import LOGITS, Network, Part, trial_rows
from offramp.plan import BAND, Plan
from offramp.running import Runner
from offramp.segmenting import undisturbed
from offramp.signature import example


def open(
    network: Network,
    plan: Plan,
    *,
    engine: str = "torch",
    device: str | torch.device | None = None,
    time_on: Any = None,
) -> Runner:
    """Check once, and make a Runner. The network stays where it is: place it first, then open it.

    time_on: rows [B, ...] on which every segment is timed at batch 1 to 64, for deadlines.
    engine: torch, onnxruntime or openvino, with options as in "torch:bf16". Raises Mismatch (another network, engine or
    precision; a probe that differs), BadNetwork (such as an operator that the engine lacks), BadInput, UnknownName,
    MissingExtra.
    """
    with undisturbed():
        return _opened(network, plan, engine, device, time_on)


def _opened(network: Network, plan: Plan, engine: str, device: str | torch.device | None, time_on: Any) -> Runner:
    network.require_eval()
    place = network.device()
    if device is not None and not _there(torch.device(device), place):
        raise BadInput(f"the network is on {place}, asked for was {device}; call net.to({str(device)!r}) first")
    shelved, identity = engine_of(engine)
    check_origin(network, plan, identity)
    steps = plan.steps(network.chain)
    for gate, values in plan.thresholds.items():
        if len(values) != 1:
            raise BadInput(f"gate {gate!r} has {len(values)} thresholds, expected one: its rows leave or go on")
    parts: Sequence[Part] = shelved.open(network, steps, place)
    every: Sequence[Part] = shelved.open(network, network.chain.walk(network.chain.gates), place)
    _check_probe(network, plan, every)
    if any(part.passes for part in parts):  # graphs of their own, which nothing else has looked at
        _check_probe(network, plan, parts)
    if shelved.compiles:
        _warm(network, plan, parts)
    timed = None if time_on is None else percentiles(parts, _some_rows(as_inputs(time_on, place)))
    return Runner(network, plan, parts, every, timed, own_threads=shelved.own_threads)


def _there(asked: torch.device, place: torch.device) -> bool:
    """Whether a network is where it was asked for: `cuda` is any GPU."""
    return asked.type == place.type and asked.index in (None, place.index or 0)


def _some_rows(rows: State) -> State:
    if not count_of(rows):
        raise BadData("time_on has no rows, expected at least one to time segments on; give some, or leave it out")
    return rows


def check_origin(network: Network, plan: Plan, engine: str) -> None:
    if plan.origin is None:
        return
    mine = (network.fingerprint(), engine, network.precision())
    its = (plan.origin.network, plan.origin.engine, plan.origin.precision)
    if mine != its:
        raise Mismatch(
            f"the plan is for network {its[0]} on {its[1]} in {its[2]}, this is network {mine[0]} on {mine[1]} in "
            f"{mine[2]}; record and calibrate this one, or drop the promise: Plan.by_hand(plan.thresholds)"
        )


def _warm(network: Network, plan: Plan, parts: Sequence[Part]) -> None:
    """Run parts on rows like the plan's probe or the example of a cut: what compiles does so before it serves."""
    probe = plan.origin.probe if plan.origin else None
    state = trial_rows(network, network.rungs[0])
    if probe is not None:
        state = as_inputs(example(probe.inputs, 2), network.device())
    if state:
        with torch.inference_mode():
            for part in parts:
                part.call(state)


def _check_probe(network: Network, plan: Plan, parts: Sequence[Part]) -> None:
    """Run the plan's probe on the engine itself, which also makes an engine that compiles do so now.

    Only exits that these parts run are compared.
    """
    probe = plan.origin.probe if plan.origin else None
    if probe is None:
        return
    state = as_inputs(probe.batch(), network.device())
    with torch.inference_mode():
        for part in parts:
            part.call(state)
    for name, stated in zip(network.chain.exits, probe.logits, strict=True):
        if (got := state.get(name + LOGITS)) is None:
            continue
        want = torch.tensor(stated, dtype=torch.float32)
        far = (got.float().cpu() - want).abs().max().item()
        band = plan.origin.band if plan.origin else BAND
        if not far <= band * max(1.0, want.abs().max().item() / 10):
            raise Mismatch(
                f"exit {name!r} answers the probe {far:.2g} away from where the plan was made (band {band:g}); this "
                "machine computes differently: record and calibrate here"
            )


_RUNNERS: WeakKeyDictionary[nn.Module, tuple[Plan, str, Runner]] = WeakKeyDictionary()


def run(network: Network, plan: Plan, x: Any, *, engine: str = "torch") -> Answers:
    """Open and call: Answers for a batch x. The last Runner of a network is kept while nothing has changed."""
    kept = _RUNNERS.get(network)
    if kept is None or kept[0] is not plan or kept[1] != engine or not _current(kept[2]):
        kept = (plan, engine, open(network, plan, engine=engine))
        _RUNNERS[network] = kept
    return kept[2](x)


def _current(runner: Runner) -> bool:
    try:
        runner.check()
    except OpenAgain:
        return False
    return True
