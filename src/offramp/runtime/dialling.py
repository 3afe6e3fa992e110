"""A network with forks recorded at settings of one dial: a threshold that all of its gates share.

An answer depends on the path of a row. Where there are more paths than can be recorded, the network
is run at each setting, and what became of every row is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp.errors import InvalidArgument
from offramp.networks.inputs import State, given
from offramp.networks.network import Network
from offramp.plans.plan import Plan
from offramp.plans.schedule import full_schedule
from offramp.runtime.engine import Engine
from offramp.runtime.running import Runner

MOST = 200

Array = np.ndarray[Any, np.dtype[Any]]


def settings_of(settings: Sequence[float]) -> tuple[float, ...]:
    """The settings of a dial, the one that closes all gates first. Raises InvalidArgument for what
    are none.
    """
    if isinstance(settings, (str, int, float)):
        raise InvalidArgument(
            f"settings must be a list of thresholds, such as [2.0, 1.0, 0.0], got {settings!r}"
        )
    values = [float(np.float32(value)) for value in settings]
    if not values or len(values) > MOST or not all(map(math.isfinite, values)):
        raise InvalidArgument(f"settings must be 1 to {MOST} finite thresholds, got {len(values)}")
    if any(later >= earlier for earlier, later in itertools.pairwise(values)):
        raise InvalidArgument(
            "settings must fall: they are tested in this order, from the safest on"
        )
    return (math.inf, *values)


class Dial:
    """Runs batches at every setting.

    Args:
        network: a network with forks.
        engine: what runs it.
        settings: as `settings_of` gives them.
        band: the float band of the scores.
    """

    def __init__(
        self, network: Network, engine: Engine, settings: Sequence[float], band: float
    ) -> None:
        self.band = band
        self.runners: list[Runner] = []
        topology = network.topology
        every = engine.open(network, full_schedule(topology), network.device())
        for value in settings:
            plan = Plan.never_leave(topology)
            if value < math.inf:
                plan = Plan.by_hand(
                    {gate: (value,) * topology.routes(gate) for gate in topology.gates}
                )
            parts = engine.open(network, plan.schedule(topology), network.device())
            self.runners.append(
                Runner(network, plan, parts, every, None, own_threads=engine.own_threads)
            )

    def columns(self, x: State) -> dict[str, Array]:
        """What became of a batch, by the names of columns."""
        columns: dict[str, Array] = {}
        for number, runner in enumerate(self.runners):
            answers, seen = runner.observed(given(x), self.band)
            columns[f"setting/exit#{number}"] = answers.exit.cpu().numpy()
            columns[f"setting/answer#{number}"] = answers.logits.argmax(1).cpu().numpy()
            columns[f"setting/why#{number}"] = answers.why.cpu().numpy().astype(np.int64)
            columns[f"setting/near#{number}"] = seen.near
            for name, ran in seen.ran.items():
                columns[f"setting/{name}#{number}"] = ran
        return columns
