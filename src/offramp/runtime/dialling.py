"""Records a network with forks at several settings of one threshold that all of its gates share.

An answer depends on the path of a row. If there are too many paths to record each of them, the
network is run at each setting instead, and the outcome of every row is recorded.
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
from offramp.plans.topology import Topology
from offramp.runtime.engine import Engine
from offramp.runtime.running import Runner

MOST = 200  # settings

Array = np.ndarray[Any, np.dtype[Any]]


def settings_of(settings: Sequence[float]) -> tuple[float, ...]:
    """Check settings, and put the one that closes all gates in front of them.

    Args:
        settings: finite thresholds, falling.

    Returns:
        Infinity, then the settings, rounded to float32 as scores are.

    Raises:
        InvalidArgument: the settings are not a list, not finite, too many, or do not fall.
    """
    if isinstance(settings, (str, int, float)):
        raise InvalidArgument(
            f"settings must be a list of thresholds, such as [2.0, 1.0, 0.0], got {settings!r}"
        )
    values = [float(np.float32(value)) for value in settings]
    if not values or len(values) > MOST:
        raise InvalidArgument(f"settings must be 1 to {MOST} finite thresholds, got {len(values)}")
    for value in values:
        if not math.isfinite(value):
            raise InvalidArgument(f"settings must be finite thresholds, got {value}")
    for earlier, later in itertools.pairwise(values):
        if later >= earlier:
            raise InvalidArgument(
                f"settings must fall, because they are tested in this order from the safest on, "
                f"got {later:g} after {earlier:g}"
            )
    return (math.inf, *values)


def _plan_at(value: float, topology: Topology) -> Plan:
    """The plan whose gates all have this threshold."""
    if value == math.inf:
        return Plan.never_leave(topology)
    thresholds = dict[str, tuple[float, ...]]()
    for gate in topology.gates:
        # A gate with several routes has a score and a threshold for each.
        thresholds[gate] = (value,) * topology.routes(gate)
    return Plan.by_hand(thresholds)


class Dial:
    """Runs batches at every setting.

    Args:
        network: a network with forks.
        engine: runs the network.
        settings: from `settings_of`.
        band: the float band of the scores.
    """

    def __init__(
        self, network: Network, engine: Engine, settings: Sequence[float], band: float
    ) -> None:
        self.band = band
        self.runners: list[Runner] = []
        topology = network.topology
        device = network.device()
        every = engine.open(network, full_schedule(topology), device)
        for value in settings:
            plan = _plan_at(value, topology)
            engine_stages = engine.open(network, plan.schedule(topology), device)
            runner = Runner(
                network, plan, engine_stages, every, None, own_threads=engine.own_threads
            )
            self.runners.append(runner)

    def columns(self, x: State) -> dict[str, Array]:
        """Run a batch at every setting.

        Args:
            x: inputs by name, [B, ...] each.

        Returns:
            Columns of a trace, [B] each. Setting number 0 has the columns `setting/exit#0`,
            `setting/answer#0`, `setting/why#0`, `setting/near#0` and `setting/<node>#0`.
        """
        columns: dict[str, Array] = {}
        for number, runner in enumerate(self.runners):
            outputs, seen = runner.observed(given(x), self.band)
            answers = outputs.logits.argmax(1)  # [B, C] -> [B]
            columns[f"setting/exit#{number}"] = outputs.exit.cpu().numpy()
            columns[f"setting/answer#{number}"] = answers.cpu().numpy()
            columns[f"setting/why#{number}"] = outputs.why.cpu().numpy().astype(np.int64)
            columns[f"setting/near#{number}"] = seen.near
            for name, ran in seen.ran.items():
                columns[f"setting/{name}#{number}"] = ran
        return columns
