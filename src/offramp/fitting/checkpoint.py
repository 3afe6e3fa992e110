"""A run on disk: the network as `save` writes it, and the state that the loop needs to continue.

checkpoint/   network.json, weights.safetensors      the network, as `offramp.load` reads it
              optimizer.safetensors, training.json   the progress and the inputs of the run
              aids.safetensors                       auxiliary modules of the recipe

training.json holds a digest of each other file, so a run never continues from damaged weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from offramp._support.files import digest_file, read_json, read_tensors, write_json, write_tensors
from offramp._support.ownership import ANY_VERSION, FolderKind
from offramp._support.replacement import read_whole
from offramp.building.saving import FOLDER as NETWORK_FOLDER
from offramp.building.saving import saving
from offramp.errors import BadFile, InvalidArgument, Mismatch
from offramp.fitting.history import Epoch
from offramp.networks.members import held
from offramp.networks.network import Network

SCHEMA = 2  # 1 had no digests
OPTIMIZER = "optimizer.safetensors"
AUXILIARY = "aids.safetensors"
FOLDER = FolderKind(
    "a checkpoint",
    "training.json",
    "training",
    NETWORK_FOLDER.files | {"training.json", OPTIMIZER, AUXILIARY},
)
KEEP = "keep"  # a name without a slash; the names of the optimizer's tensors have one


@dataclass(frozen=True)
class Progress:
    """The point that a run has reached.

    Attributes:
        phase: number of the phase.
        epoch: number of the epoch within the phase.
        step: number of the next step within the epoch.
        sums: the figures of this epoch, summed over the rows so far; None before its first step.
        seconds: time that this epoch took so far.
        epochs: the epochs that are done.
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    sums: Mapping[str, float] | None = None
    seconds: float = 0.0
    epochs: tuple[Epoch, ...] = ()

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Progress:
        """The progress written by `dataclasses.asdict`."""
        return replace(Progress(**body), epochs=tuple(map(Epoch.from_json, body["epochs"])))


@dataclass(frozen=True)
class Resumed:
    """The content of a checkpoint.

    Attributes:
        progress: the point that the run has reached.
        keep: positions of the rows that the phase trains on; None if it trains on all.
        optimizer: state of the optimizer. At the end of a phase: None, or the state of the phase
            that has ended if the next one continues from it.
        extra: state of the schedule and of the loss scaler.
    """

    progress: Progress
    keep: Tensor | None
    optimizer: Mapping[str, Any] | None
    extra: Mapping[str, Any]


def save_checkpoint(
    folder: Path,
    network: Network,
    identity: Mapping[str, Any],
    progress: Progress,
    keep: Tensor | None,
    optimizer: Optimizer | None,
    extra: Mapping[str, Any],
) -> None:
    """Write a checkpoint atomically.

    Args:
        folder: where; an earlier checkpoint there is replaced.
        network: the network being trained.
        identity: the inputs of the run as plain data. Only a run with the same ones can continue.
        progress: the point that the run has reached.
        keep: positions of the rows that the phase trains on; None for all.
        optimizer: of the phase; None between phases.
        extra: state of the schedule and of the loss scaler, as plain data.

    Raises:
        InvalidArgument: The optimizer's state holds anything but tensors and numbers.
    """
    tensors, state = _packed(optimizer)
    if keep is not None:
        tensors[KEEP] = keep
    with saving(network, folder, FOLDER) as path:
        write_tensors(path / OPTIMIZER, tensors)
        if network.auxiliary:
            write_tensors(path / AUXILIARY, held(network.auxiliary).state_dict())
        # training.json comes last, because it holds the digests of all other files
        digests = {file.name: digest_file(file) for file in sorted(path.iterdir())}
        body = {
            "begun": identity,
            "progress": asdict(progress),
            "optimiser": state,
            "extra": extra,
            "files": digests,
        }
        write_json(path / "training.json", "training", SCHEMA, body)


def load_checkpoint(folder: Path, network: Network, identity: Mapping[str, Any]) -> Resumed:
    """Load the weights of a checkpoint into a network.

    Args:
        folder: the checkpoint.
        network: the network; its weights are replaced.
        identity: the inputs of this run as plain data.

    Returns:
        The state that the loop needs to continue.

    Raises:
        BadFile: The checkpoint is damaged, or does not fit the network.
        Mismatch: The checkpoint is from a run with other inputs.
    """
    return read_whole(folder, lambda path: _load(path, network, identity), FOLDER.require_own)


def _load(folder: Path, network: Network, identity: Mapping[str, Any]) -> Resumed:
    """See `load_checkpoint`. Everything is checked before the first weight is replaced."""
    version, body = read_json(folder / "training.json", "training", SCHEMA)
    try:
        _require_same_run(folder, body["begun"], identity)
        _require_undamaged(folder, version, body)
        tensors = read_tensors(folder / OPTIMIZER)
        keep = tensors.pop(KEEP, None)
        state = _unpacked(tensors, body["optimiser"])
        resumed = Resumed(Progress.from_json(body["progress"]), keep, state, body["extra"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
        raise BadFile(
            f"{folder} is not a complete checkpoint ({problem!r}). Use another folder"
        ) from problem
    try:
        network.load_state_dict(read_tensors(folder / "weights.safetensors"), strict=True)
        if network.auxiliary:
            held(network.auxiliary).load_state_dict(read_tensors(folder / AUXILIARY), strict=True)
    except RuntimeError as problem:
        raise BadFile(
            f"{folder} does not fit this network. Use the network that the run started with"
        ) from problem
    return resumed


def _require_same_run(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise Mismatch if a run has other inputs than the one in the checkpoint."""
    for key, value in now.items():
        if before.get(key) != value:
            raise Mismatch(
                f"the run in {folder} has {key} {before.get(key)!r:.200}, this one has "
                f"{value!r:.200}. Use the same inputs, or another folder"
            )


def _require_undamaged(folder: Path, version: int, body: Mapping[str, Any]) -> None:
    """Raise BadFile if a file is not the one that was written with training.json."""
    digests = body["files"] if version > 1 else {}
    for name in sorted({"weights.safetensors", OPTIMIZER, *digests} & FOLDER.files):
        if name in digests:
            expected = digests[name]
        elif version == 1 and name == "weights.safetensors":
            expected = read_json(folder / "network.json", "network", ANY_VERSION)[1]["weights"]
        else:  # a checkpoint of the first version has no other digests
            continue
        if digest_file(folder / name) != expected:
            raise BadFile(
                f"{folder / name} was damaged or exchanged after it was written. Put back a copy "
                f"of it, or remove {folder} and train again"
            )


def _packed(optimizer: Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """An optimizer's state as tensors and plain data.

    The state is a table from the index of a parameter to named values, such as Adam's `exp_avg`.
    Value `exp_avg` of parameter 3 is stored under `3/exp_avg`.
    """
    if optimizer is None:
        return {}, None
    table = optimizer.state_dict()
    tensors = dict[str, Tensor]()
    rest = dict[str, Any]()
    for index, values in table["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            elif isinstance(value, (int, float, bool, type(None))):
                rest[f"{index}/{key}"] = value
            else:
                raise InvalidArgument(
                    f"the state of an optimizer must be tensors and numbers to be saved, got a "
                    f"{type(value).__name__} as {key!r} of {type(optimizer).__name__}. Train "
                    f"without a folder, or use another optimizer"
                )
    return tensors, {"groups": table["param_groups"], "rest": rest}


def _unpacked(
    tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The inverse of `_packed`: an optimizer's state dict."""
    if plain is None:
        return None
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*plain["rest"].items(), *tensors.items()):
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    groups = list[dict[str, Any]]()
    for stored in plain["groups"]:
        group = dict(stored)
        if "betas" in group:
            group["betas"] = tuple(group["betas"])  # JSON made it a list
        groups.append(group)
    return {"state": state, "param_groups": groups}
