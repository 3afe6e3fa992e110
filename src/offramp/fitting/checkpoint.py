"""A run on disk: a network as `save` writes it, and beside it what the loop needs to go on.

checkpoint/   network.json, weights.safetensors      the network, as `offramp.load` reads it
              optimizer.safetensors, training.json   where the run is, and what it was begun with
              aids.safetensors                       what the recipe hung on while it trains

training.json holds a digest of each file beside it: damaged weights are no weights to go on from.
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
KEEP = "keep"  # beside the names of the optimizer's tensors, which have a slash


@dataclass(frozen=True)
class Progress:
    """Where a run is: the next step, the sums of this epoch's figures so far, and the epochs behind
    it.
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
    """What a checkpoint holds for the loop.

    progress: where the run is. keep: the positions of the rows that the phase trains on, chosen
    when it began.
    optimizer, extra: the state of the optimizer, and of its schedule and scaler. At the end of a
    phase the optimizer's is None, or that of the ended phase where the next one continues from it.
    """

    progress: Progress
    keep: Tensor | None
    optimizer: Mapping[str, Any] | None
    extra: Mapping[str, Any]


def save_checkpoint(
    folder: Path,
    network: Network,
    begun: Mapping[str, Any],
    progress: Progress,
    keep: Tensor | None,
    optimizer: Optimizer | None,
    extra: Mapping[str, Any],
) -> None:
    """Write `folder` atomically. begun: what a run must be begun with to go on from here, as plain
    data.
    """
    tensors, state = _packed(optimizer)
    if keep is not None:
        tensors[KEEP] = keep
    with saving(network, folder, FOLDER) as path:
        write_tensors(path / OPTIMIZER, tensors)
        if network.auxiliary:
            write_tensors(path / AUXILIARY, held(network.auxiliary).state_dict())
        digests = {file.name: digest_file(file) for file in sorted(path.iterdir())}
        body = {
            "begun": begun,
            "progress": asdict(progress),
            "optimiser": state,
            "extra": extra,
            "files": digests,
        }
        write_json(path / "training.json", "training", SCHEMA, body)


def load_checkpoint(folder: Path, network: Network, begun: Mapping[str, Any]) -> Resumed:
    """Load the weights into `network`, and what the loop needs.

    Raises BadFile for a checkpoint that is damaged or of another network, Mismatch for a run that
    was begun otherwise.
    """
    return read_whole(folder, lambda path: _load(path, network, begun), FOLDER.require_own)


def _load(folder: Path, network: Network, begun: Mapping[str, Any]) -> Resumed:
    version, body = read_json(folder / "training.json", "training", SCHEMA)
    try:
        _require_same_run(folder, body["begun"], begun)
        _require_undamaged(folder, version, body)
        tensors = read_tensors(folder / OPTIMIZER)
        keep = tensors.pop(KEEP, None)
        state = _unpacked(tensors, body["optimiser"])
        resumed = Resumed(Progress.from_json(body["progress"]), keep, state, body["extra"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
        raise BadFile(
            f"{folder} is no complete checkpoint ({problem!r}); begin in another folder"
        ) from problem
    try:
        network.load_state_dict(read_tensors(folder / "weights.safetensors"), strict=True)
        if network.auxiliary:
            held(network.auxiliary).load_state_dict(read_tensors(folder / AUXILIARY), strict=True)
    except RuntimeError as problem:
        raise BadFile(
            f"{folder} does not fit this network; give the network that the run was begun with"
        ) from problem
    return resumed


def _require_same_run(folder: Path, was: Mapping[str, Any], begun: Mapping[str, Any]) -> None:
    for key, value in begun.items():
        if was.get(key) != value:
            raise Mismatch(
                f"the run in {folder} was begun with {key} {was.get(key)!r:.200}, this one has "
                f"{value!r:.200}; begin "
                "with the same, or in another folder"
            )


def _require_undamaged(folder: Path, version: int, body: Mapping[str, Any]) -> None:
    """Raise BadFile for files that are not those that were written with training.json."""
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
                f"{folder / name} was damaged or exchanged after it was written; remove {folder} "
                f"and begin again, or "
                "put back a copy of it"
            )


def _packed(optimizer: Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """An optimizer's state in tensors and plain data."""
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
                    f"{type(optimizer).__name__} keeps {key!r} as a {type(value).__name__}, which "
                    f"a checkpoint cannot "
                    "hold; train without a folder, or with another optimizer"
                )
    return tensors, {"groups": table["param_groups"], "rest": rest}


def _unpacked(
    tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    if plain is None:
        return None
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*plain["rest"].items(), *tensors.items()):
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    groups = [
        {key: tuple(v) if key == "betas" else v for key, v in group.items()}
        for group in plain["groups"]
    ]
    return {"state": state, "param_groups": groups}
