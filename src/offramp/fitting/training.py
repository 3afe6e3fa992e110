"""`fit`: train a network by a recipe."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp._support.arguments import name_of, require_count, require_flag
from offramp._support.files import checksum, require_writable
from offramp._support.find import find, find_file, imported, unknown
from offramp._support.processes import Processes, here
from offramp._support.replacement import restored
from offramp.data.rows import Rows, proposing, rows_for
from offramp.errors import BadData, BadNetwork, InvalidArgument
from offramp.fitting.accelerating import accelerating, tracking
from offramp.fitting.checkpoint import FOLDER, load_checkpoint
from offramp.fitting.forward import TrainingForward
from offramp.fitting.history import History
from offramp.fitting.loader import Augment, drawn, index_of
from offramp.fitting.loop import IndexedRows, Loop, RunConfig
from offramp.fitting.pooling import Pooling
from offramp.networks.ambient import without_autocast
from offramp.networks.dependence import require_read
from offramp.networks.inputs import as_inputs, remedy
from offramp.networks.members import BACKBONE, ModelSpec
from offramp.networks.network import Network, as_network, plain_network
from offramp.networks.recipe import Phase, Recipe, plain, poolable
from offramp.networks.trained import remember, snapshot
from offramp.networks.wrappers import unwrapped
from offramp.plans.provenance import SeenRows, union

KINDS: dict[str, tuple[type, str]] = {
    "float": (Real, "a number"),
    "int": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "str": (str, "a text"),
}  # of arguments, by their annotations


@without_autocast()
def fit(
    network: Network | nn.Module | tuple[nn.Module, nn.Module | None],
    data: object,
    *,
    recipe: str | Recipe = "hinge",
    development: object = None,
    batch_size: int = 128,
    seed: int = 0,
    augment: str | Augment | None = None,
    views: int = 1,
    precision: str = "no",
    folder: str | Path | None = None,
    cache: str | Path | None = None,
    resume: bool = False,
    track: str | None = None,
    progress: bool = True,
    **arguments: Any,
) -> History:
    """Train a network's exits, in place and on its device, by a recipe. It ends in eval mode, ready
    to be recorded.

    The network remembers the rows: `calibrate` refuses them. Under torchrun or accelerate launch
    every process must call this; each takes its share of every batch, and all end with the same
    weights.

    Args:
        network: Made by `cut` or `ladder`; for a recipe that trains a whole model, such as
            `recover`, also a model or (model, preprocess).
        data: Whatever `offramp.rows` takes, with labels and rows by number.
        recipe: A name on the shelf `recipes` (hinge, cross_entropy, joint, ...), one with arguments
            ("joint?epochs=5"), a Recipe, or your own by name ("my.module:Recipe").
        development: Rows by which each epoch is measured and on which some recipes choose. Never
            rows of a promise.
        batch_size: Rows of one step, over all processes.
        seed: Of everything that is drawn.
        augment: A name on the shelf `augments` (crop_flip, flip), "my.module:function", or a
            function of a batch x.
        views: How many fixed augmented copies of each row are kept where pooled features are
            computed once.
        precision: "no", "bf16" or "fp16".
        folder: Where metrics.csv and checkpoints go: one after each epoch and each minute, and one
            at Ctrl-C.
        cache: Where pooled features stay for other runs; by default `folder`.
        resume: Continue from the checkpoint in `folder`, bit for bit on one CPU.
        track: A tracker of Accelerate, such as "tensorboard".
        progress: Whether to show progress.
        **arguments: Of the recipe, such as epochs=5. docs/reference/recipes.md lists them; at the
            command line they are --with epochs=5.

    Returns:
        The history: what each epoch measured.

    Raises:
        BadNetwork: The recipe cannot train this network; nothing was changed.
        InvalidArgument: An argument is not what it must be.
        BadData: The rows do not fit, or have no labels.
        Diverged: A loss is no longer finite.
        Mismatch: `folder` belongs to another run.
        MissingExtra: Accelerate, or the tracker, is not installed.
    """
    method = recipe_of(recipe, **arguments)
    network = _network_of(network, method)
    home = None if folder is None else Path(folder)
    kept = home if cache is None else Path(cache)
    _require_options(network, batch_size, views, seed, (home, kept))
    batch_size, views, seed = int(batch_size), int(views), int(seed)  # also NumPy's
    resume = require_flag("resume", resume)
    progress = require_flag("progress", progress)
    drawing = _augment_of(augment)
    many = here(network.device())
    # exits are often drawn, and in each process differently
    many.spread(network.state_dict().values())
    with _as_it_was(network), contextlib.ExitStack() as until_the_end:
        before = snapshot(network)
        if not method.forks:
            network.topology.require_chain(f"the recipe {type(method).__name__.lower()}")
        torch.manual_seed(drawn(seed))  # for what prepare draws
        method.prepare(network)
        phases = tuple(method.phases(network))
        _require_phases(network, phases)
        asked = (network, precision, phases, track, home, many)
        accelerator = until_the_end.enter_context(accelerating(*asked))
        checkpoint = many.agreed(lambda: _checkpoint(home, resume=resume))
        trained = _called(
            data, network, many, labels=any(phase.labels for phase in phases), progress=progress
        )
        names = network.class_names or (
            trained[0].class_names if trained[1].y is not None else None
        )
        held = None
        if development is not None:
            held = _called(development, network, many, labels=True, progress=progress, names=names)
        options = {
            "batch_size": batch_size,
            "seed": seed,
            "augment": plain(drawing),
            "views": views,
        }
        begun = _begun(network, method, phases, trained, held) | options | {"precision": precision}
        training_rows = _training_rows(network, trained, held)
        pools = poolable(network)
        pooling = Pooling(
            network,
            pools,
            views,
            drawing,
            seed=seed,
            folder=kept,
            progress=progress,
            processes=many,
        )
        resumed = many.agreed(
            lambda: None if checkpoint is None else load_checkpoint(checkpoint, network, begun)
        )
        # before the first step: a run that stops anywhere has trained some of them
        network.trained_on = training_rows
        until_the_end.callback(remember, network, training_rows, before)
        network.class_names = names
        given = (network, method, phases, trained, held, pooling)
        with tracking(accelerator, track) as log:
            config = RunConfig(
                *given,
                accelerator,
                log,
                batch_size,
                seed,
                home,
                begun,
                progress and many.main,
                many,
            )
            return Loop(config, resumed).run()


def _network_of(thing: object, method: Recipe) -> Network:
    """A network as it is; for a recipe that trains plain models, one as a network of one node with
    its own weights.
    """
    if not method.trains_models:
        return as_network(thing)
    pair: Any = thing if isinstance(thing, tuple) and len(thing) == 2 else (thing, None)
    model, preprocess = pair
    is_model = isinstance(model, nn.Module) and not isinstance(unwrapped(model)[0], Network)
    if not is_model or not (preprocess is None or isinstance(preprocess, nn.Module)):
        return as_network(thing)
    return plain_network(unwrapped(model)[0], ModelSpec(BACKBONE), preprocess)


def _require_options(
    network: object,
    batch_size: object,
    views: object,
    seed: object,
    places: tuple[Path | None, ...],
) -> None:
    """Raise for what would go wrong later, before anything is read."""
    if not isinstance(network, Network):
        raise InvalidArgument(
            f"got a {type(network).__name__} to train, expected a Network; make one with cut or "
            f"ladder"
        )
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("views", views, 1),
        ("seed", seed, 0),
    ):
        require_count(name, value, least)
    for path in places:
        if path is not None:
            require_writable(path, folder=True)
    network.require_eval()


def _augment_of(augment: str | Augment | None) -> Augment | None:
    """What a name, or a function as it is, stands for. Raises UnknownName, InvalidArgument."""
    found: Any = find("augments", augment) if isinstance(augment, str) else augment
    if found is not None and not callable(found):
        raise InvalidArgument(
            f"augment is a {type(found).__name__}, expected a name or a function of a batch; give "
            f"one"
        )
    drawing: Augment | None = found
    return drawing


def recipe_of(recipe: str | Recipe, **arguments: Any) -> Recipe:
    """A recipe with its arguments.

    Args:
        recipe: the name of a file on the shelf of recipes, `my.module:Recipe`, either of them with
            arguments ("joint?epochs=5&rate=1e-4"), a class, or an object that is made already.
        arguments: more of its arguments, each given in one place only.

    Raises:
        UnknownName: no recipe, or no argument of it, has that name; the nearest names are offered.
        InvalidArgument: it is no recipe, does not take such a value, or an argument is given twice.
    """
    found: Any = recipe
    if isinstance(recipe, str):
        name, written = name_of(recipe)
        if twice := sorted(written.keys() & arguments.keys()):
            raise InvalidArgument(
                f"{twice[0]} is given twice, in {recipe!r} and beside it. Give it once."
            )
        arguments = written | arguments
        found = recipe_class(name)
    if isinstance(found, type) and issubclass(found, Recipe):
        known = inspect.signature(found).parameters
        anything = any(one.kind is one.VAR_KEYWORD for one in known.values())
        if not anything and (wrong := [name for name in arguments if name not in known]):
            raise unknown(wrong[0], [*known], f"argument of the recipe {recipe!r}")
        _require_kinds(recipe, known, arguments)
        try:
            found = found(**arguments)
        except TypeError as problem:
            told = ", ".join(known) or "nothing"
            raise InvalidArgument(
                f"the recipe {recipe!r} cannot be made ({problem}); it takes {told}"
            ) from problem
    elif arguments:
        raise InvalidArgument(
            f"the recipe {recipe!r} is made already and takes no {', '.join(arguments)}; give its "
            f"class"
        )
    if not isinstance(found, Recipe):
        raise InvalidArgument(
            f"the recipe is a {type(found).__name__}, expected a name, a Recipe or my.module:Recipe"
        )
    return found


def recipe_class(name: str) -> Any:
    """What the name of a recipe stands for: the Recipe in that file on the shelf, or the user's
    `my.module:Recipe`.
    """
    return imported(name) if ":" in name else _one_recipe(find_file("recipes", name))


def _require_kinds(
    recipe: object, known: Mapping[str, inspect.Parameter], arguments: Mapping[str, object]
) -> None:
    """Raise InvalidArgument for a text where a recipe takes a number, and the like."""
    for name, value in arguments.items():
        annotation = str(known[name].annotation) if name in known else ""
        optional = annotation.endswith(" | None")
        plain = annotation.removesuffix(" | None")
        if plain not in KINDS or (optional and value is None):
            continue
        kind, told = KINDS[plain]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InvalidArgument(f"{name} of the recipe {recipe!r} must be {told}, got {value!r}")


def _one_recipe(module: Any) -> type[Recipe]:
    own = (
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    )
    return next(value for value in own if issubclass(value, Recipe))


def _require_phases(network: Network, phases: tuple[Phase, ...]) -> None:
    """Raise BadNetwork, before anything is changed, for phases that this network cannot go
    through.
    """
    known = {id(value) for value in network.parameters()}
    can_pool = poolable(network)
    pooled = {id(value) for name in can_pool for value in network.exit_of(name).parameters()}
    beside = {id(value) for aux in network.auxiliary.values() for value in aux.parameters()}
    known = known | beside
    pooled = pooled | beside | {id(value) for value in network.gates.parameters()}
    for phase in phases:
        _require_steps(phase)
        mine = {id(value) for value in phase.parameters}
        if not mine or not mine <= known:
            raise BadNetwork(
                f"the phase {phase.name!r} trains {len(mine)} parameters, {len(mine - known)} of "
                f"them not of this "
                "network, expected one or more of its own; hang on what the recipe needs in prepare"
            )
        if (phase.reads == "pooled" or phase.by == "solve") and not mine <= pooled:
            others = [name for name in network.topology.exits if name not in can_pool]
            raise BadNetwork(
                f"the phase {phase.name!r} reads features that are pooled once, and trains what "
                f"does more than pool "
                f"({', '.join(others) or 'the backbone'}); use exits such as linear_grid, or a "
                f"recipe that reads inputs"
            )


def _require_steps(phase: Phase) -> None:
    """Raise InvalidArgument for epochs that cannot be counted, and for arguments that the optimizer
    refuses.
    """
    if not isinstance(phase.epochs, int) or phase.epochs < 1:
        raise InvalidArgument(
            f"the phase {phase.name!r} has {phase.epochs!r} epochs, expected a whole number of at "
            f"least 1"
        )
    if phase.by == "solve" or not phase.parameters:
        return
    try:
        phase.optimizer(phase.parameters)
    except (TypeError, ValueError) as problem:
        raise InvalidArgument(
            f"the optimizer of the phase {phase.name!r} cannot be made ({problem}); give the "
            f"recipe other arguments"
        ) from problem


def _begun(
    network: Network,
    method: Recipe,
    phases: tuple[Phase, ...],
    trained: IndexedRows,
    held: IndexedRows | None,
) -> dict[str, Any]:
    """What a run must be begun with to go on from its checkpoint."""
    return {
        "recipe": f"{type(method).__name__} {checksum(method.config())}",
        "phases": [phase.name for phase in phases],
        "network": checksum(network.config()),
        "data": trained[1].seen.fingerprint,
        "labels": None if trained[1].y is None else checksum(trained[1].y.tolist()),
        "development": held and held[1].seen.fingerprint,
    }


def _training_rows(network: Network, trained: IndexedRows, held: IndexedRows | None) -> SeenRows:
    """All rows that this run and earlier ones train by. Raises OverlappingRows where some measure
    it too.
    """
    if held is not None:
        trained[1].seen.refuse_overlap(held[1].seen.digests, "development")
    known = union([network.training_rows(), trained[1].seen, held and held[1].seen])
    assert known is not None
    return known


def _called(
    data: object,
    network: Network,
    processes: Processes,
    *,
    labels: bool,
    progress: bool,
    names: tuple[str, ...] | None = None,
) -> IndexedRows:
    """Rows, and what one pass tells of them. Raises BadData without labels, and for those that are
    no class here.

    names: of the classes of rows that train the same network.
    """
    source = rows_for(network, data)
    if names is not None:
        source = source.numbered_as(names)
    with proposing(network.fronts.values()):
        index = index_of(source, progress=progress, processes=processes)
    if labels and index.y is None:
        raise BadData(f"{source.name} has no labels, and this recipe needs them; give (x, y)")
    first = _first(source, network)
    classes = min(logits.shape[1] for logits in first.values())
    if index.y is not None and (index.y.min() < 0 or index.y.max() >= classes):
        raise BadData(
            f"the labels of {source.name} lie in {index.y.min()} to {index.y.max()}, expected 0 "
            f"to {classes - 1}, the "
            "classes of this network; give the data that it is for"
        )
    return source, index


def _first(source: Rows, network: Network) -> dict[str, Tensor]:
    """The logits of the first row. Raises BadData when the network does not take it."""
    state = as_inputs(source.take_x(np.arange(1)), network.device())
    require_read(network, state, source.name)
    network.require_inputs(state, source.name)
    try:
        with torch.no_grad():
            found: dict[str, Tensor] = TrainingForward(network)(state, False)["logits"]
    except (RuntimeError, TypeError, ValueError, IndexError) as problem:
        rows_ = ", ".join(
            f"{name} {value.dtype} {list(value.shape[1:])}" for name, value in state.items()
        )
        reason = " ".join(str(problem).split())[:160]
        way = remedy(state, problem, "give rows of the type and shape that it was trained on")
        raise BadData(
            f"the network refuses the first row of {source.name} ({rows_}: {reason}), expected "
            f"what its model takes; "
            f"{way}"
        ) from problem
    return found


def _checkpoint(home: Path | None, *, resume: bool) -> Path | None:
    """The checkpoint to go on from. Raises InvalidArgument where one would be lost."""
    if home is None:
        if resume:
            raise InvalidArgument(
                "got resume=True without a folder, expected the folder of the run; give folder="
            )
        return None
    there = restored(home / "checkpoint", FOLDER.require_own)
    if there.is_dir() and not resume:
        raise InvalidArgument(
            f"{there} is that of an earlier run; go on from it with resume=True (--resume), or "
            f"name another folder"
        )
    return there if there.is_dir() else None


@contextlib.contextmanager
def _as_it_was(network: Network) -> Iterator[None]:
    """Eval mode, parameters' wishes for gradients, gradients and generators as before in the
    end.
    """
    before = [(value, value.requires_grad, value.grad) for value in network.parameters()]
    for value in network.parameters():
        value.grad = None
    device = network.device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            network.eval()
            network.auxiliary.clear()
            for value, wish, gradient in before:
                value.requires_grad_(wish)
                value.grad = gradient
