"""A network under a plan -> a self-contained folder: graphs, plan, manifest, and a program that
runs them.

    network folder/  0-small.onnx  1-large.onnx  plan.json  manifest.json  run.py

`manifest.json` says what goes in, which graph reads and gives what, and under which promise; and it
has a digest of every file. run.py needs NumPy and ONNX Runtime, nothing of ours, and answers as
`offramp.run` does. It compares all files with their digests first, and opens none outside of the
folder.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from offramp._support.arguments import require_flag, require_kind
from offramp._support.files import digest_file, write_json
from offramp._support.ownership import FolderKind
from offramp._support.replacement import replacing_folder
from offramp.deploy.one_file import WrittenStage, one_model
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.ambient import without_autocast
from offramp.networks.inputs import State, as_inputs
from offramp.networks.network import LOGITS, EngineStage, Network, as_network, described
from offramp.networks.walking import with_defaults
from offramp.plans.plan import BAND, Plan
from offramp.plans.schedule import Stage
from offramp.plans.signature import INPUT, Input
from offramp.plans.signature import example as rows_like
from offramp.plans.topology import LEAVE, Default
from offramp.plans.trace import WHY
from offramp.runtime.engine import engine_of, kind_of
from offramp.runtime.graphs import graphs_of
from offramp.runtime.session import check_origin

SCHEMA = 3  # 1 had no digests, 2 one successor a stage


def _graphs(manifest: Mapping[str, Any]) -> list[str]:
    """The graphs that a manifest names, of any version."""
    stages = manifest["stages"] if "stages" in manifest else manifest["parts"]
    return [str(stage["file"]) for stage in stages] + [str(manifest["one_file"])]


FOLDER = FolderKind(
    "an exported network",
    "manifest.json",
    "export",
    frozenset({"manifest.json", "plan.json", "run.py"}),
    listed=_graphs,
    python=True,
)
ROWS = 4  # that the graphs are tried on
ENGINE = "onnxruntime"
RUN = Path(__file__).with_name("run.py")


@dataclass(frozen=True)
class Exported:
    """What was written where; prints itself as a sentence."""

    folder: str
    files: tuple[str, ...]
    bytes: int
    plan: Plan
    note: str | None

    def __str__(self) -> str:
        said = f"{self.folder}: {', '.join(self.files)} ({self.bytes:,} bytes). {self.plan}"
        return f"{said} {self.note}" if self.note else said


@without_autocast()
def export(
    network: Network, plan: Plan, folder: str | Path, *, example: Any = None, one_file: bool = False
) -> Exported:
    """Write a folder that answers under a plan with NumPy and ONNX Runtime alone, without offramp
    and torch.

    Every graph is compared with the network before the folder is put into place. An earlier export
    there is replaced.

    Args:
        network: In eval mode.
        plan: Its promise goes along if it was made on this ONNX Runtime. Otherwise the promise is
            left out, and the printed note says so.
        folder: Where. It may hold an earlier export and nothing else.
        example: A batch as the network takes it, if neither the plan nor a cut has seen one.
        one_file: Also write the whole plan as one graph, with compaction inside and thresholds as
            inputs.

    Returns:
        What was written; it prints as a sentence.

    Raises:
        BadNetwork: An operator cannot be written, or gives something else.
        Mismatch: The plan belongs to another network.
        InvalidArgument: The plan does not fit, or an example is missing.
        BadFile: The folder cannot be written, or holds anything but an earlier export.
        MissingExtra: ONNX or ONNX Runtime is not installed.
    """
    one_file = require_flag("one_file", one_file)
    require_kind("the plan", plan, Plan, "from calibrate, Plan.load or Plan.by_hand")
    network = as_network(network)
    FOLDER.require_own(Path(folder))
    network.require_eval()
    _, identity = engine_of(ENGINE)
    state = as_inputs(_example(network, plan, example), network.device())
    if plan.origin is not None:
        check_origin(network, plan, plan.origin.engine)
    kept, note = _kept(plan, identity)
    written, tried = _written(network, plan, state)
    last = written[-1].stage.name
    if one_file:
        network.topology.require_chain("an export as one file")
    body: dict[str, Any] = {
        "made_with": {name: version(name) for name in ("offramp", "torch", "onnx", ENGINE)},
        "network": {"fingerprint": network.fingerprint(), "precision": network.precision()},
        "inputs": [_input(name, value) for name, value in state.items()],
        "preprocessing": {
            name: described(preprocess) for name, preprocess in network.fronts.items()
        },
        "exits": [*network.topology.exits],
        "classes": tried[last + LOGITS].shape[1],
        "logits": _kind(tried[last + LOGITS]),
        "gates": [one.stage.name for one in written if one.stage.gate],
        "stages": [_described(one, number, tried) for number, one in enumerate(written)],
        "defaults": [_default(one) for one in network.topology.defaults],
        "one_file": "network.onnx" if one_file else None,
        "sentence": str(kept),
        "promise": asdict(kept.promise) if kept.promise else None,
    }
    with replacing_folder(folder, FOLDER.require_own) as path:
        if one_file:
            (path / "network.onnx").write_bytes(_one(written, kept, body))
        else:
            for one, stage in zip(written, body["stages"], strict=True):
                (path / stage["file"]).write_bytes(one.graph.model.SerializeToString())
        kept.save(path / "plan.json")
        shutil.copyfile(RUN, path / "run.py")
        body["files"] = {file.name: digest_file(file) for file in sorted(path.iterdir())}
        write_json(path / "manifest.json", "export", SCHEMA, body)
        files = sorted(path.iterdir())
        size = sum(file.stat().st_size for file in files)
    return Exported(str(folder), tuple(file.name for file in files), size, kept, note)


def _example(network: Network, plan: Plan, example: Any) -> Any:
    if example is not None:
        return example
    if plan.origin is not None and plan.origin.probe is not None:
        return plan.origin.probe.some(ROWS)
    known = next((member.inputs for member in network.members if member.inputs), None)
    if known is None:
        raise InvalidArgument(
            "the plan has seen no rows, expected it from calibrate, or an example; give "
            "example=some rows"
        )
    return rows_like(known, ROWS)


def _kept(plan: Plan, identity: str) -> tuple[Plan, str | None]:
    """The plan as it goes along: a promise that was made on another engine does not."""
    if plan.origin is None or plan.origin.engine == identity:
        return plan, None
    note = (
        f"It was made on {plan.origin.engine}, and this folder runs on {identity}: to take a "
        f"promise along, record "
        f"with engine={ENGINE!r} and calibrate that."
    )
    return plan.changed(
        origin=replace(plan.origin, engine=identity)
    ), note if plan.promise else None


def _written(network: Network, plan: Plan, state: State) -> tuple[list[WrittenStage], State]:
    """The stages of a plan as graphs, each compared with the network on these rows; and all named
    tensors of them.

    Every row goes along every edge here: a stage is compared whoever its rows will be.
    """
    schedule = plan.schedule(network.topology)
    device = network.device()
    engine_stages: Sequence[EngineStage] = kind_of(ENGINE)().open(network, schedule, device)
    eager = {
        engine_stage.name: engine_stage
        for engine_stage in kind_of("torch")().open(network, schedule, device)
    }
    tried = dict(with_defaults(network.topology, state))
    written = list[WrittenStage]()
    with torch.inference_mode():
        for engine_stage, graph in zip(
            engine_stages, graphs_of(network, schedule, tried), strict=True
        ):
            mine = dict(tried)
            engine_stage.call(mine)
            for node in engine_stage.stage.nodes:
                eager[node].call(tried)
            _compare(engine_stage.name, engine_stage.writes, mine, tried)
            if network.topology.node(engine_stage.name).has_exit:
                index = network.topology.exit_index(engine_stage.name)
            else:
                index = -1
            written.append(
                WrittenStage(engine_stage.stage, graph, index, _carried(engine_stage.stage, state))
            )
    return written, tried


def _carried(stage: Stage, inputs: State) -> tuple[tuple[str, ...], ...]:
    """What each edge of a stage carries, the inputs by their own names."""
    found = list[tuple[str, ...]]()
    for edge in stage.edges:
        names = list[str]()
        for name in edge.carries:
            names += [*inputs] if name == INPUT else [name]
        found.append(tuple(names))
    return tuple(found)


def _compare(stage: str, writes: Sequence[str], mine: State, own: State) -> None:
    for name in writes:
        got = mine[name].double()
        want = own[name].double()
        far = (
            (got - want).abs().nan_to_num(0).max() / want.abs().nan_to_num(0).max().clamp(min=1)
        ).item()
        if not far <= BAND or not torch.equal(got.isnan(), want.isnan()):
            raise BadNetwork(
                f"segment {stage!r} gives {name!r} {far:.2g} away from the network in ONNX "
                f"Runtime, expected "
                f"at most {BAND:g}; run it with engine='torch'"
            )


def _described(one: WrittenStage, number: int, tried: State) -> dict[str, Any]:
    """A stage as run.py reads it: which graph, what it reads and gives, and where its rows go."""
    stage = one.stage
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", stage.name)
    edges = list[dict[str, Any]]()
    for edge, names in zip(stage.edges, one.carries, strict=True):
        edges.append(
            {
                "to": None if edge.to == LEAVE else edge.to,
                "carries": [_input(key, tried[key]) for key in names],
            }
        )
    return {
        "name": stage.name,
        "nodes": [*stage.nodes],
        "file": f"{number}-{name}.onnx",
        "reads": [*one.graph.reads],
        "writes": [*one.graph.writes],
        "gate": stage.gate,
        "routes": [*stage.routes],
        "edges": edges,
        "exit": one.exit_index,
        "why": WHY.index(stage.why),
    }


def _default(one: Default) -> dict[str, Any]:
    name = one.exit if one.output else one.exit + LOGITS
    return {"name": name, "shape": [*one.shape], "dtype": "float32", "value": one.value}


def _input(name: str, value: torch.Tensor) -> dict[str, Any]:
    given = Input.of(name, value.cpu().numpy())
    return {"name": given.name, "shape": [*given.shape], "dtype": given.dtype}


def _kind(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _one(written: Sequence[WrittenStage], plan: Plan, body: Mapping[str, Any]) -> bytes:
    import numpy as np
    from onnx import helper

    infos = []
    for one in body["inputs"]:
        infos.append(
            helper.make_tensor_value_info(
                one["name"],
                helper.np_dtype_to_tensor_dtype(np.dtype(one["dtype"])),
                ["batch", *one["shape"]],
            )
        )
    thresholds = {gate: plan.thresholds[gate][0] for gate in body["gates"]}
    found: bytes = one_model(written, infos, thresholds, body["classes"]).SerializeToString()
    return found
