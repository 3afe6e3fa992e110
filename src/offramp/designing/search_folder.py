"""The folder of a search, from which it can go on or search again.

search.json             the inputs of the training, its progress, cost tables and judged networks
supernet.safetensors    weights and buffers of the supernet, and the momentum of its training

search.json holds a digest of the weights, so a search never continues from damaged ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp._support.files import digest_file, read_json, read_tensors, write_json, write_tensors
from offramp._support.ownership import FolderKind
from offramp._support.replacement import read_whole, replacing_folder
from offramp.designing.evolution import CostTable, Judged
from offramp.designing.single_path import TrainingState
from offramp.designing.supernet import Subnet, Supernet
from offramp.errors import BadFile, Mismatch

SCHEMA = 1
WEIGHTS = "supernet.safetensors"
MANIFEST = "search.json"
FOLDER = FolderKind("a search", MANIFEST, "search", frozenset({MANIFEST, WEIGHTS}))
MODEL = "model/"  # before the names of weights and buffers
MOMENTUM = "momentum/"
TORCH_DRAWS = "torch_draws"

Memory = dict[Subnet, Judged | None]


@dataclass
class SearchState:
    """The progress of a search.

    Args:
        training: the state of the training; None before its first step.
        tables: cost tables; the key describes how the costs were counted or timed.
        judged: judged networks, with None for those outside the budget; the key describes the rows
            and the budget.
    """

    training: TrainingState | None = None
    tables: dict[str, CostTable] = field(default_factory=dict)
    judged: dict[str, Memory] = field(default_factory=dict)


def write_search(
    folder: Path, supernet: Supernet, identity: Mapping[str, Any], state: SearchState
) -> None:
    """Write a folder in one step; an earlier search there is replaced.

    Args:
        folder: the folder.
        supernet: its weights are written.
        identity: the inputs of the training as plain data. Only a search with the same inputs can
            go on from the folder.
        state: the progress so far.

    Raises:
        BadFile: the folder cannot be written, or holds a file that offramp did not write.
    """
    tensors = dict[str, Tensor]()
    for name, value in supernet.state_dict().items():
        tensors[MODEL + name] = value
    body: dict[str, Any] = {"begun": identity, "training": None}
    if state.training is not None:
        tensors[TORCH_DRAWS] = state.training.torch_draws
        for name, value in state.training.momentum.items():
            tensors[MOMENTUM + name] = value
        body["training"] = {
            "step": state.training.step,
            "losses": state.training.losses,
            "draws": state.training.draws,
        }
    body["tables"] = {key: _table_to_json(table) for key, table in state.tables.items()}
    body["judged"] = {key: _memory_to_json(memory) for key, memory in state.judged.items()}
    # the weights come first, because the manifest holds their digest
    with replacing_folder(folder, FOLDER.require_own) as path:
        write_tensors(path / WEIGHTS, tensors)
        body["weights"] = digest_file(path / WEIGHTS)
        write_json(path / MANIFEST, "search", SCHEMA, body)


def read_search(folder: Path, supernet: Supernet, identity: Mapping[str, Any]) -> SearchState:
    """Load the weights of a search into a supernet.

    Args:
        folder: a folder from `write_search`.
        supernet: built from the same model and choices; its weights are replaced.
        identity: the inputs of this search.

    Returns:
        The progress so far.

    Raises:
        BadFile: the folder is missing or damaged.
        Mismatch: it belongs to a search with other inputs.
    """
    return read_whole(folder, lambda path: _read(path, supernet, identity), FOLDER.require_own)


def _read(folder: Path, supernet: Supernet, identity: Mapping[str, Any]) -> SearchState:
    _, body = read_json(folder / MANIFEST, "search", SCHEMA)
    try:
        for key, value in identity.items():
            before = body["begun"].get(key)
            if before != value:
                raise Mismatch(
                    f"{key} must be the same as in the search in {folder}, {before!r:.200}, got "
                    f"{value!r:.200}. Use the same inputs, or another folder"
                )
        if digest_file(folder / WEIGHTS) != body["weights"]:
            raise BadFile(
                f"{folder / WEIGHTS} was damaged or exchanged after it was written. Put back a "
                f"copy of it, or remove {folder} and search again"
            )
        tensors = read_tensors(folder / WEIGHTS)
        state = SearchState()
        if body["training"] is not None:
            state.training = TrainingState(
                step=body["training"]["step"],
                losses=body["training"]["losses"],
                momentum=_within(tensors, MOMENTUM),
                draws=body["training"]["draws"],
                torch_draws=tensors[TORCH_DRAWS].to(torch.uint8),
            )
        for key, table in body["tables"].items():
            state.tables[key] = _table_from_json(table)
        for key, memory in body["judged"].items():
            state.judged[key] = _memory_from_json(memory)
    except (AttributeError, LookupError, TypeError, ValueError) as problem:
        raise BadFile(
            f"{folder} is not a complete search ({problem!r}). Use another folder"
        ) from problem
    try:
        supernet.load_state_dict(_within(tensors, MODEL), strict=True)
    except RuntimeError as problem:
        raise BadFile(
            f"{folder} does not fit this supernet. Use the model and the choices that the search "
            f"started with"
        ) from problem
    return state


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    selected = dict[str, Tensor]()
    for name, value in tensors.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = value
    return selected


def _table_to_json(table: CostTable) -> dict[str, Any]:
    # JSON has no tuples as keys, so the exits are a list of [tap, task, cost]
    exits = [[tap, task, cost] for (tap, task), cost in table.exits.items()]
    # also a list, because the places must keep the order in which a subnet lists its options
    options = [[place, list(costs)] for place, costs in table.options.items()]
    return {
        "unit": table.unit,
        "options": options,
        "rest": dict(table.rest),
        "before": dict(table.before),
        "exits": exits,
        "order": list(table.order),
    }


def _table_from_json(body: Mapping[str, Any]) -> CostTable:
    exits = {(tap, task): cost for tap, task, cost in body["exits"]}
    options = {place: tuple(costs) for place, costs in body["options"]}
    return CostTable(
        body["unit"], options, body["rest"], body["before"], exits, tuple(body["order"])
    )


def _memory_to_json(memory: Memory) -> list[list[Any]]:
    """A list [options, exits, accuracy, cost, threshold] for each network."""
    rows = list[list[Any]]()
    for subnet, judged in memory.items():
        row: list[Any] = [list(subnet.options), list(subnet.exits)]
        if judged is not None:
            threshold: float | None = judged.threshold
            if judged.threshold == math.inf:  # no row leaves early, and JSON has no infinity
                threshold = None
            row += [judged.accuracy, judged.cost, threshold]
        rows.append(row)
    return rows


def _memory_from_json(rows: list[list[Any]]) -> Memory:
    memory: Memory = {}
    for options, exits, *figures in rows:
        subnet = Subnet(tuple(options), tuple(exits))
        memory[subnet] = None
        if figures:
            accuracy, cost, threshold = figures
            if threshold is None:
                threshold = math.inf
            memory[subnet] = Judged(subnet, accuracy, cost, threshold)
    return memory
