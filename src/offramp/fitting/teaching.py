"""`fit`: teach a network by a recipe."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.data.rows import rows
from offramp.errors import BadData, BadInput, BadNetwork, MissingExtra
from offramp.files import checksum
from offramp.find import find_file, imported
from offramp.fitting.checkpoint import load_checkpoint
from offramp.fitting.history import History
from offramp.fitting.lessons import Augment, drawn, roll_of
from offramp.fitting.looking import Looking
from offramp.fitting.loop import Course, Held, Loop
from offramp.fitting.pooling import Pooling
from offramp.inputs import as_inputs
from offramp.network import Network
from offramp.recipe import Phase, Recipe, plain, poolable

PRECISIONS = ("no", "bf16", "fp16")


def fit(
    network: Network,
    data: object,
    *,
    recipe: str | Recipe = "hinge",
    development: object = None,
    batch_size: int = 128,
    seed: int = 0,
    augment: Augment | None = None,
    views: int = 1,
    precision: str = "no",
    folder: str | Path | None = None,
    cache: str | Path | None = None,
    resume: bool = False,
    track: str | None = None,
    progress: bool = True,
) -> History:
    """Teach a network's exits, in place, where it lies; it ends in eval mode, ready to be recorded.

    data: whatever `offramp.data.rows` takes, with rows by number and labels. recipe: a name on the shelf (hinge,
    cross_entropy, joint, boosted, ...), an object made of one with other arguments, or your own (`my.module:Recipe`).
    development: rows on which recipes choose, and by which each epoch is measured; never those of a promise.
    augment: of a batch x, drawn anew from torch's generator; where pooled features are computed once, `views` fixed
    copies of each row are kept. precision: "no", "bf16" or "fp16". folder: metrics.csv, and a checkpoint after each
    epoch and each minute, from which `resume=True` goes on, bit for bit on one CPU; Ctrl-C writes one more. cache:
    where pooled features stay for other runs too (`folder` if not given). track: a tracker of Accelerate, such as
    "tensorboard".
    The rows are remembered: calibrate refuses them. Raises BadInput, BadData, BadNetwork (the recipe cannot teach this
    network: nothing was changed), Diverged, Mismatch (another run's folder), MissingExtra.
    """
    method, home = recipe_of(recipe), None if folder is None else Path(folder)
    _require_options(precision, batch_size, views)
    network.require_eval()
    with _as_it_was(network):
        torch.manual_seed(drawn(seed))  # for what prepare draws
        method.prepare(network)
        phases = tuple(method.phases(network))
        _require_phases(network, phases)
        accelerator = _accelerator(network, precision, track, home)
        taught = _called(data, network, labels=any(phase.labels for phase in phases), progress=progress)
        held = None if development is None else _called(development, network, labels=True, progress=progress)
        options = {"batch_size": batch_size, "seed": seed, "augment": plain(augment), "views": views}
        begun = _begun(network, method, phases, taught, held) | options | {"precision": precision}
        kept = home if cache is None else Path(cache)
        pooling = Pooling(network, poolable(network), views, augment, seed=seed, folder=kept, progress=progress)
        course = Course(
            network, method, phases, taught, held, pooling, accelerator, batch_size, seed, home, begun, progress
        )
        checkpoint = _checkpoint(home, resume=resume)
        _remember(network, taught, held)
        return Loop(course, None if checkpoint is None else load_checkpoint(checkpoint, network, begun)).run()


def _require_options(precision: str, batch_size: int, views: int) -> None:
    if precision not in PRECISIONS or batch_size < 1 or views < 1:
        raise BadInput(
            f"got precision={precision!r}, batch_size={batch_size} and views={views}, expected one of "
            f"{', '.join(PRECISIONS)}, and numbers of at least 1"
        )


def recipe_of(recipe: str | Recipe, **arguments: Any) -> Recipe:
    """A recipe from its name: the one Recipe in the file of that name on the shelf, or `my.module:Recipe`.

    Raises UnknownName with the nearest names, BadInput for what is no recipe or does not take these arguments.
    """
    found: Any = recipe
    if isinstance(recipe, str):
        found = imported(recipe) if ":" in recipe else _one_recipe(find_file("recipes", recipe))
    if isinstance(found, type) and issubclass(found, Recipe):
        try:
            found = found(**arguments)
        except TypeError as problem:
            known = ", ".join(inspect.signature(found).parameters) or "nothing"
            raise BadInput(f"the recipe {recipe!r} cannot be made ({problem}); it takes {known}") from problem
    elif arguments:
        raise BadInput(f"the recipe {recipe!r} is made already and takes no {', '.join(arguments)}; give its class")
    if not isinstance(found, Recipe):
        raise BadInput(f"the recipe is a {type(found).__name__}, expected a name, a Recipe or my.module:Recipe")
    return found


def _one_recipe(module: Any) -> type[Recipe]:
    own = (value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__)
    return next(value for value in own if issubclass(value, Recipe))


def _require_phases(network: Network, phases: tuple[Phase, ...]) -> None:
    """Raise BadNetwork, before anything is changed, for phases that this network cannot go through."""
    known = {id(value) for value in network.parameters()}
    can_pool = poolable(network)
    pooled = {id(value) for name in can_pool for value in network.exit_of(name).parameters()}
    beside = {id(value) for aid in network.aids.values() for value in aid.parameters()}
    known, pooled = known | beside, pooled | beside | {id(value) for value in network.gates.parameters()}
    for phase in phases:
        mine = {id(value) for value in phase.parameters}
        if not mine or not mine <= known:
            raise BadNetwork(
                f"the phase {phase.name!r} teaches {len(mine)} parameters, {len(mine - known)} of them not of this "
                "network, expected one or more of its own; hang on what the recipe needs in prepare"
            )
        if (phase.reads == "pooled" or phase.by == "solve") and not mine <= pooled:
            others = [name for name in network.chain.exits if name not in can_pool]
            raise BadNetwork(
                f"the phase {phase.name!r} reads features that are pooled once, and teaches what does more than pool "
                f"({', '.join(others) or 'the backbone'}); use exits such as linear_grid, or a recipe that reads inputs"
            )


def _begun(
    network: Network, method: Recipe, phases: tuple[Phase, ...], taught: Held, held: Held | None
) -> dict[str, Any]:
    """What a run must be begun with to go on from its checkpoint."""
    return {
        "recipe": f"{type(method).__name__} {checksum(method.config())}",
        "phases": [phase.name for phase in phases],
        "network": checksum(network.config()),
        "data": taught[1].seen.fingerprint,
        "development": held and held[1].seen.fingerprint,
    }


def _remember(network: Network, taught: Held, held: Held | None) -> None:
    """Keep the rows' digests with the network. Raises OverlappingRows when rows are taught and measured on."""
    learned = taught[1].seen
    if held is not None:
        learned.refuse_overlap(held[1].seen.digests, "development")
        learned = learned.and_also(held[1].seen)
    network.learned = learned if network.learned is None else network.learned.and_also(learned)


def _called(data: object, network: Network, *, labels: bool, progress: bool) -> Held:
    """Rows, and what one pass tells of them. Raises BadData without labels, and for those that are no class here."""
    source = rows(data)
    roll = roll_of(source, progress=progress)
    if labels and roll.y is None:
        raise BadData(f"{source.name} has no labels, and this recipe needs them; give (x, y)")
    with torch.no_grad():
        first = Looking(network)(as_inputs(source.take(np.arange(1)).x, network.device()), False)["logits"]
    classes = min(logits.shape[1] for logits in first.values())
    if roll.y is not None and (roll.y.min() < 0 or roll.y.max() >= classes):
        raise BadData(
            f"the labels of {source.name} lie in {roll.y.min()} to {roll.y.max()}, expected 0 to {classes - 1}, the "
            "classes of this network; give the data that it is for"
        )
    return source, roll


def _checkpoint(home: Path | None, *, resume: bool) -> Path | None:
    """The checkpoint to go on from. Raises BadInput where one would be lost."""
    if home is None:
        if resume:
            raise BadInput("got resume=True without a folder, expected the folder of the run; give folder=")
        return None
    there = home / "checkpoint"
    if there.is_dir() and not resume:
        raise BadInput(
            f"{there} is that of an earlier run; go on from it with resume=True (--resume), or name another folder"
        )
    return there if there.is_dir() else None


def _accelerator(network: Network, precision: str, track: str | None, home: Path | None) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as problem:
        raise MissingExtra("accelerate", "fit", "fit") from problem
    if track == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError as problem:
            raise MissingExtra("tensorboard", "tensorboard", "track='tensorboard'") from problem
    if track is not None and home is None:
        raise BadInput(f"got track={track!r} without a folder, expected one for what it writes; give folder=")
    place = network.device()
    try:
        made = Accelerator(mixed_precision=precision, cpu=place.type == "cpu", log_with=track, project_dir=home)
    except ValueError as problem:
        raise BadInput(
            f"Accelerate refuses precision {precision!r} on {place} ({problem}); begin in a fresh process"
        ) from problem
    if made.device.type != place.type or made.num_processes != 1:
        raise BadInput(
            f"Accelerate works on {made.device} in {made.num_processes} process(es) and the network lies on {place}, "
            "expected one process and the same device; begin in a fresh process"
        )
    if track is not None:
        made.init_trackers("offramp")
    return made


@contextlib.contextmanager
def _as_it_was(network: Network) -> Iterator[None]:
    """Eval mode, parameters' wishes for gradients and torch's generators as before when the block ends; no aids."""
    before = [(value, value.requires_grad) for value in network.parameters()]
    place = network.device()
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        try:
            yield
        finally:
            network.eval()
            network.aids.clear()
            for value, wish in before:
                value.requires_grad_(wish)
