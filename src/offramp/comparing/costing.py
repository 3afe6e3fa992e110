"""What the model of a method costs: its size, its operations, and its time beside the model that
is the unit of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from offramp.building.costing import cost_of
from offramp.networks.inputs import as_inputs, count_of, given
from offramp.networks.layer import stored_bytes
from offramp.networks.network import Network
from offramp.runtime.benching import plain_call, plain_of
from offramp.runtime.engine import engine_of
from offramp.runtime.measuring import Ratio, interleaved, macs, ratio


@dataclass(frozen=True)
class ModelTime:
    """The time of one batch in a model, beside the unit of the comparison.

    Args:
        batch: rows.
        ms: of the plain model, without exits; a median.
        unit_ms: of the plain model that is the unit.
        over_unit: the first over the second.
        same: the second over itself, which shows the noise.
    """

    batch: int
    ms: float
    unit_ms: float
    over_unit: Ratio
    same: Ratio


@dataclass(frozen=True)
class ModelCost:
    """What a model costs for one row, and its size.

    Args:
        parameters: of the network, with its exits and gates.
        stored_bytes: of the network in a file, with its exits and gates. Packed layers count as
            packed.
        macs: of the model without exits.
        bit_operations: multiply-adds times the bits of a weight and of an activation, also of the
            model without exits.
        times: of the model without exits; empty if nothing was timed.
    """

    parameters: int
    stored_bytes: int
    macs: float
    bit_operations: float
    times: tuple[ModelTime, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> ModelCost:
        """The cost that `to_json` wrote."""
        times = []
        for line in body["times"]:
            ratios = {key: Ratio(**line[key]) for key in ("over_unit", "same")}
            times.append(ModelTime(line["batch"], line["ms"], line["unit_ms"], **ratios))
        return ModelCost(**{**body, "times": tuple(times)})


def size_of(network: Network, x: Any) -> ModelCost:
    """Count what a network costs.

    Args:
        network: in eval mode, of one model or with forks.
        x: some rows.

    Returns:
        The size of the whole network. The operations are those of its model; with forks they are
        those of the dearest path, in the bits of its weights.
    """
    if len(network.members) > 1:
        return _size_of_forks(network, x)
    member = network.members[0]
    model = network.model_of(member)
    preprocess = network.preprocess_of(member)
    rows = given(as_inputs(x))
    cost = cost_of(model, rows if preprocess is None else preprocess(rows))
    parameters = cost.parameters
    stored = cost.stored_bytes
    for added in (network.exits, network.gates):
        parameters += sum(value.numel() for value in added.parameters())
        stored += stored_bytes(added)
    return ModelCost(parameters, stored, cost.macs, cost.bit_operations)


def _size_of_forks(network: Network, x: Any) -> ModelCost:
    """The cost of a network with forks, whose arms may share weights."""
    parameters = 0
    for value in network.parameters():  # shared ones once
        parameters += value.numel()
    weight = next(network.parameters(), torch.empty(0))  # networks without weights count as float32
    bits = 8 * weight.element_size()
    stored = 0
    counted = set[int]()
    for value in network.state_dict(keep_vars=True).values():
        if id(value) not in counted:
            counted.add(id(value))
            stored += value.numel() * value.element_size()
    rows = as_inputs(x)
    # On several rows, for models that need them; the count is of all of them.
    total = macs(plain_call(network, rows, engine_of("torch")[0])) / count_of(rows)
    return ModelCost(parameters, stored, total, total * bits * bits)


def times_of(
    network: Network,
    unit: Network,
    x: Any,
    *,
    batches: tuple[int, ...],
    repeats: int,
    engine: str,
    clock: Callable[[], float],
) -> tuple[ModelTime, ...]:
    """Time the plain model of a network beside that of another, in turn.

    Args:
        network: whose model is timed without its exits.
        unit: the other network.
        x: at least as many rows as the largest batch.
        batches: numbers of rows.
        repeats: rounds; each runs every call once.
        engine: where both run.
        clock: seconds.

    Returns:
        One entry per batch.
    """
    shelved, _ = engine_of(engine)
    inputs = as_inputs(x)
    # An engine that compiles does so here, once for all sizes.
    bind_unit = plain_of(unit, inputs, shelved)
    bind_model = plain_of(network, inputs, shelved)
    times = []
    for batch in batches:
        rows = {name: value[:batch] for name, value in inputs.items()}
        reference = bind_unit(rows)
        # The unit is first and last: rounds go forwards and backwards, so that both have the same
        # neighbours.
        calls = {
            "unit": reference,
            "model": bind_model(rows),
            "same": reference,
        }
        taken = interleaved(calls, repeats=repeats, warmup=2, clock=clock)
        times.append(
            ModelTime(
                batch,
                float(np.median(taken["model"])),
                float(np.median(taken["unit"])),
                ratio(taken["model"], taken["unit"]),
                ratio(taken["same"], taken["unit"]),
            )
        )
    return tuple(times)
