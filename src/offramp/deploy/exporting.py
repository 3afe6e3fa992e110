"""Write a network under a plan as a self-contained folder: graphs, plan, manifest and a program.

    network folder/  0-small.onnx  1-large.onnx  plan.json  manifest.json  run.py

`manifest.json` describes the inputs, the graphs (what each one reads and writes) and the promise,
and holds a digest of every file. run.py gives the same answers as `offramp.run`. It needs NumPy and
ONNX Runtime, but not offramp. It checks all digests first and opens no file outside the folder.
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

from offramp._support.arguments import require_flag, require_kind, require_path
from offramp._support.files import digest_file, write_json
from offramp._support.ownership import FolderKind
from offramp._support.replacement import replacing_folder
from offramp.deploy.one_file import WrittenStage, one_model
from offramp.deploy.one_file_forks import one_model_of_forks
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.ambient import without_autocast
from offramp.networks.inputs import State, as_inputs
from offramp.networks.network import LOGITS, EngineStage, Network, as_network, described
from offramp.networks.walking import with_defaults
from offramp.plans.plan import BAND, Plan
from offramp.plans.replay import WHY
from offramp.plans.schedule import Stage
from offramp.plans.signature import INPUT, Input
from offramp.plans.signature import example as rows_like
from offramp.plans.topology import LEAVE, Default
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
ROWS = 4  # rows that the graphs are compared with the network on
ENGINE = "onnxruntime"
RUN = Path(__file__).with_name("run.py")


@dataclass(frozen=True)
class Exported:
    """The result of `export`. It prints as a sentence.

    Attributes:
        folder: where it was written.
        files: names of the files, in order.
        bytes: size of all files together.
        plan: the plan as it was written, with or without its promise.
        note: why the promise was left out; None if it was not.
    """

    folder: str
    files: tuple[str, ...]
    bytes: int
    plan: Plan
    note: str | None

    def __str__(self) -> str:
        sentence = f"{self.folder}: {', '.join(self.files)} ({self.bytes:,} bytes). {self.plan}"
        return f"{sentence} {self.note}" if self.note else sentence


@without_autocast()
def export(
    network: Network, plan: Plan, folder: str | Path, *, example: Any = None, one_file: bool = False
) -> Exported:
    """Write a folder that runs a network under a plan with NumPy and ONNX Runtime alone, without
    offramp and torch.

    Every graph is compared with the network before the folder is written. An earlier export in the
    folder is replaced.

    Args:
        network: The network, in eval mode.
        plan: The plan. Its promise is exported if it was calibrated on this ONNX Runtime. Otherwise
            the promise is left out, and the printed note says so.
        folder: The folder to write. It may hold an earlier export and nothing else.
        example: A batch as the network takes it. Needed if neither the plan nor a cut has seen one.
        one_file: Whether to write the plan as one graph, with compaction inside and thresholds as
            inputs.

    Returns:
        The files that were written; it prints as a sentence.

    Raises:
        BadNetwork: An operator cannot be written as ONNX, or gives another result there.
        Mismatch: The plan belongs to another network.
        InvalidArgument: The plan does not fit, or an example is missing.
        BadFile: The folder cannot be written, or holds anything but an earlier export.
        MissingExtra: ONNX or ONNX Runtime is not installed.
    """
    one_file = require_flag("one_file", one_file)
    require_kind("the plan", plan, Plan, "from calibrate, Plan.load or Plan.by_hand")
    network = as_network(network)
    FOLDER.require_own(require_path("folder", folder))
    network.require_eval()
    _, identity = engine_of(ENGINE)
    state = as_inputs(_example(network, plan, example), network.device())
    if plan.origin is not None:
        check_origin(network, plan, plan.origin.engine)
    exported_plan, note = _plan_for_engine(plan, identity)
    stages, tensors = _written_stages(network, plan, state)
    manifest = _manifest(network, exported_plan, state, stages, tensors)
    manifest["one_file"] = "network.onnx" if one_file else None

    # Write everything next to the folder; it replaces the folder once it is complete.
    with replacing_folder(folder, FOLDER.require_own) as path:
        if one_file:
            (path / "network.onnx").write_bytes(
                _one_graph(network, stages, exported_plan, manifest, tensors)
            )
        else:
            for stage, entry in zip(stages, manifest["stages"], strict=True):
                (path / entry["file"]).write_bytes(stage.graph.model.SerializeToString())
        exported_plan.save(path / "plan.json")
        shutil.copyfile(RUN, path / "run.py")
        # The manifest comes last, because it holds the digests of all other files.
        manifest["files"] = {file.name: digest_file(file) for file in sorted(path.iterdir())}
        write_json(path / "manifest.json", "export", SCHEMA, manifest)
        files = sorted(path.iterdir())
        names = tuple(file.name for file in files)
        size = sum(file.stat().st_size for file in files)
    return Exported(str(folder), names, size, exported_plan, note)


def _manifest(
    network: Network, plan: Plan, state: State, stages: Sequence[WrittenStage], tensors: State
) -> dict[str, Any]:
    """The content of manifest.json, without the files and their digests.

    Args:
        network: the network.
        plan: the plan as it is exported.
        state: the inputs of some rows by name.
        stages: the stages of the plan as graphs.
        tensors: all named tensors of the network on these rows.
    """
    gates = list[str]()
    stage_entries = list[dict[str, Any]]()
    for number, written in enumerate(stages):
        stage_entries.append(_stage(written, number, tensors))
        if written.stage.gate:
            gates.append(written.stage.name)
    logits = tensors[stages[-1].stage.name + LOGITS]  # [B, C]
    return {
        "made_with": {name: version(name) for name in ("offramp", "torch", "onnx", ENGINE)},
        "network": {"fingerprint": network.fingerprint(), "precision": network.precision()},
        "inputs": [_input(name, value) for name, value in state.items()],
        "preprocessing": {name: described(module) for name, module in network.fronts.items()},
        "exits": [*network.topology.exits],
        "classes": logits.shape[1],
        "logits": str(logits.dtype).removeprefix("torch."),
        "gates": gates,
        "stages": stage_entries,
        "defaults": list(map(_default, network.topology.defaults)),
        "one_file": None,
        "sentence": str(plan),
        "promise": asdict(plan.promise) if plan.promise else None,
    }


def _example(network: Network, plan: Plan, example: Any) -> Any:
    """Rows to compare graphs and network on: the example, or seeded rows like those seen before."""
    if example is not None:
        return example
    if plan.origin is not None and plan.origin.probe is not None:
        return plan.origin.probe.some(ROWS)
    for member in network.members:
        if member.inputs:
            return rows_like(member.inputs, ROWS)
    raise InvalidArgument(
        "example must be a batch of rows, got None. The plan has seen no rows that could replace it"
    )


def _plan_for_engine(plan: Plan, identity: str) -> tuple[Plan, str | None]:
    """The plan to export, and a note if its promise is left out: a promise holds only for the
    engine that it was calibrated on.
    """
    if plan.origin is None or plan.origin.engine == identity:
        return plan, None
    changed = plan.changed(origin=replace(plan.origin, engine=identity))
    if plan.promise is None:
        return changed, None
    note = (
        f"The promise was left out, because it was made on {plan.origin.engine} and this folder "
        f"runs on {identity}. To export a promise, record with engine={ENGINE!r} and calibrate "
        f"that trace."
    )
    return changed, note


def _written_stages(network: Network, plan: Plan, state: State) -> tuple[list[WrittenStage], State]:
    """The stages of a plan as graphs, each compared with the network on some rows.

    All rows go along every edge here, so that a stage is compared whichever rows will reach it.

    Args:
        network: the network.
        plan: decides which stages there are.
        state: the inputs of the rows by name, each [B, ...].

    Returns:
        The stages, and all named tensors of the network on these rows.
    """
    # The same stages in two engines. torch has one stage per node, ONNX Runtime may join nodes.
    schedule = plan.schedule(network.topology)
    device = network.device()
    onnx_stages: Sequence[EngineStage] = kind_of(ENGINE)().open(network, schedule, device)
    torch_stages = dict[str, EngineStage]()
    for torch_stage in kind_of("torch")().open(network, schedule, device):
        torch_stages[torch_stage.name] = torch_stage
    tensors = dict(with_defaults(network.topology, state))
    stages = list[WrittenStage]()
    with torch.inference_mode():
        graphs = graphs_of(network, schedule, tensors)
        for onnx_stage, graph in zip(onnx_stages, graphs, strict=True):
            # Run the stage in both engines on the same inputs; torch's tensors go on.
            onnx_tensors = dict(tensors)
            onnx_stage.call(onnx_tensors)
            for node in onnx_stage.stage.nodes:
                torch_stages[node].call(tensors)
            _require_close(onnx_stage.name, onnx_stage.writes, onnx_tensors, tensors)
            exit_index = -1
            if network.topology.node(onnx_stage.name).has_exit:
                exit_index = network.topology.exit_index(onnx_stage.name)
            carries = _carried(onnx_stage.stage, state)
            stages.append(WrittenStage(onnx_stage.stage, graph, exit_index, carries))
    return stages, tensors


def _carried(stage: Stage, inputs: State) -> tuple[tuple[str, ...], ...]:
    """The tensors that each edge of a stage carries; `x` stands for all inputs by their names."""
    carries = list[tuple[str, ...]]()
    for edge in stage.edges:
        names = list[str]()
        for name in edge.carries:
            names += [*inputs] if name == INPUT else [name]
        carries.append(tuple(names))
    return tuple(carries)


def _require_close(stage: str, names: Sequence[str], onnx_tensors: State, tensors: State) -> None:
    """Raise BadNetwork if ONNX Runtime and torch differ by more than the last bits."""
    for name in names:
        got = onnx_tensors[name].double()
        want = tensors[name].double()
        # The largest difference, relative to the largest value if that is above 1.
        difference = (got - want).abs().nan_to_num(0).max()
        scale = want.abs().nan_to_num(0).max().clamp(min=1)
        relative = (difference / scale).item()
        if not relative <= BAND or not torch.equal(got.isnan(), want.isnan()):
            raise BadNetwork(
                f"{name!r} of segment {stage!r} must be within {BAND:g} of the network in ONNX "
                f"Runtime, got a difference of {relative:.2g}. Use engine='torch'"
            )


def _stage(written: WrittenStage, number: int, tensors: State) -> dict[str, Any]:
    """A stage as run.py reads it: its graph, what it reads and writes, and where its rows go."""
    stage = written.stage
    file_name = re.sub(r"[^A-Za-z0-9_.-]", "-", stage.name)  # safe on every system
    edges = list[dict[str, Any]]()
    for edge, names in zip(stage.edges, written.carries, strict=True):
        target = None if edge.to == LEAVE else edge.to  # None: the row is answered
        carries = list[dict[str, Any]]()
        for name in names:
            carries.append(_input(name, tensors[name]))
        edges.append({"to": target, "carries": carries})
    return {
        "name": stage.name,
        "nodes": [*stage.nodes],
        "file": f"{number}-{file_name}.onnx",
        "reads": [*written.graph.reads],
        "writes": [*written.graph.writes],
        "gate": stage.gate,
        "routes": [*stage.routes],
        "edges": edges,
        "exit": written.exit_index,
        "why": WHY.index(stage.why),
    }


def _default(default: Default) -> dict[str, Any]:
    """A default value as run.py reads it."""
    name = default.exit if default.output else default.exit + LOGITS
    return {"name": name, "shape": [*default.shape], "dtype": "float32", "value": default.value}


def _input(name: str, value: torch.Tensor) -> dict[str, Any]:
    """A tensor as run.py reads it: its name, the shape of a row and the NumPy dtype."""
    described_input = Input.of(name, value.cpu().numpy())
    return {
        "name": described_input.name,
        "shape": [*described_input.shape],
        "dtype": described_input.dtype,
    }


def _one_graph(
    network: Network,
    stages: Sequence[WrittenStage],
    plan: Plan,
    manifest: Mapping[str, Any],
    tensors: State,
) -> bytes:
    """The whole plan as one ONNX file.

    Args:
        network: the network.
        stages: of the plan, as graphs.
        plan: the plan as it is exported.
        manifest: the content of manifest.json.
        tensors: all named tensors of the network on some rows.
    """
    import numpy as np
    from onnx import helper

    inputs = []
    for entry in manifest["inputs"]:
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(entry["dtype"]))
        shape = ["batch", *entry["shape"]]
        inputs.append(helper.make_tensor_value_info(entry["name"], dtype, shape))
    classes = manifest["classes"]
    if not network.topology.is_chain:
        limits = dict[str, list[float]]()
        for stage in manifest["stages"]:
            if stage["gate"]:
                values = plan.thresholds[stage["name"]]
                limits[stage["name"]] = [values[route] for route in stage["routes"]]
        defaults = {entry["name"]: entry["value"] for entry in manifest["defaults"]}
        forked = one_model_of_forks(stages, inputs, limits, classes, tensors, defaults)
        return bytes(forked.SerializeToString())
    # In a chain a gate has one threshold.
    thresholds = {gate: plan.thresholds[gate][0] for gate in manifest["gates"]}
    model: bytes = one_model(stages, inputs, thresholds, classes).SerializeToString()
    return model
