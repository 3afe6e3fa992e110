"""What `print(network)` shows of a chain: its nodes in order, with exit, gate and cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from offramp.networks.inputs import State, call_model
from offramp.networks.members import ModelSpec

if TYPE_CHECKING:
    from offramp.networks.network import Network


def chain_table(network: Network, rows: State) -> list[str]:
    """A line for each node of a chain, under a line of headings.

    Args:
        network: a chain.
        rows: a few rows to count the work on; empty if the shape of the inputs is not known. Then
            there is no column of costs.

    >>> import torch, offramp as off
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    >>> print(off.cut(model, torch.zeros(2, 6), at=["1"]))
    Network of 2 segments, 1 gate and 2 exits
      node      exit    gate     work up to here
      1         Pooled  margin               67%
      backbone  Own     answers             100%
    """
    costs = _costs(network, rows) if rows else {}
    cells = [["node", "exit", "gate", "work up to here"]]
    for node in network.topology.nodes:
        gate = "answers"
        if node.name in network.gates:
            gate = _name(network.gate_of(node.name))
        share = f"{costs[node.name]:.0%}" if node.name in costs else ""
        cells.append([node.name, _name(network.exit_of(node.name)), gate, share])
    # Every column is as wide as its widest cell.
    widths = [0, 0, 0, 0]
    for row in cells:
        for column, text in enumerate(row):
            widths[column] = max(widths[column], len(text))
    lines = list[str]()
    for name, exit, gate, share in cells:
        line = f"  {name:<{widths[0]}}  {exit:<{widths[1]}}  {gate:<{widths[2]}}"
        if costs:
            line += f"  {share:>{widths[3]}}"
        lines.append(line.rstrip())
    return lines


def _name(module: nn.Module) -> str:
    """A short name of an exit or a gate: that of its configuration, or of its class."""
    config: Any = getattr(module, "config", None)
    name = config()["name"] if callable(config) else type(module).__name__
    return str(name).rpartition(":")[2].rpartition(".")[2]


def _costs(network: Network, rows: State) -> dict[str, float]:
    """For each node the multiply-adds of all models up to there, as a share of the last model's.

    Exits and gates are not in it. Empty if the models cannot be counted on these rows.
    """
    spent = 0.0
    costs = dict[str, float]()
    last = 0.0
    try:
        for member in network.members:
            ends = _ends(network, member, rows)
            for node, count in ends.items():
                costs[node] = spent + count
            last = max(ends.values())
            spent += last
    except Exception:  # printing never fails: these rows are made up, and a model may refuse them
        return {}
    if not last:
        return {}
    return {node: count / last for node, count in costs.items()}


def _ends(network: Network, member: ModelSpec, rows: State) -> dict[str, float]:
    """The multiply-adds of one model when each of its cuts is reached, by node."""
    model = network.model_of(member)
    preprocess = network.preprocess_of(member)
    counter = FlopCounterMode(display=False)
    counts = dict[str, float]()
    modules = [model.get_submodule(cut) for cut in member.cuts]

    @contextlib.contextmanager
    def noting() -> Iterator[None]:
        handles = list[Any]()
        for node, module in zip(member.nodes(), modules, strict=False):

            def note(*_: Any, node: str = node) -> None:
                counts[node] = counter.get_total_flops() / 2

            handles.append(module.register_forward_hook(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    with torch.no_grad(), noting(), counter:
        call_model(model, preprocess, rows)
    counts[member.name] = counter.get_total_flops() / 2
    return counts
