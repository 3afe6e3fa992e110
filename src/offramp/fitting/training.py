"""`fit`: train a network by a recipe."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp._support.arguments import name_of, require_count, require_flag, require_path
from offramp._support.files import checksum, require_writable
from offramp._support.find import find, find_file, imported, unknown, users_code
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

# Types of a recipe's arguments, by their annotations, and their names in messages.
KINDS: dict[str, tuple[type, str]] = {
    "float": (Real, "a number"),
    "int": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "str": (str, "a text"),
}


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
    """Train the exits of a network by a recipe, in place and on the network's device. Afterwards
    the network is in eval mode, ready to be recorded.

    The network remembers its training rows: `calibrate` refuses them. Under torchrun or accelerate
    launch every process must call this; each one takes its share of every batch, and all end with
    the same weights.

    Args:
        network: Made by `cut` or `ladder`; for a recipe that trains a whole model, such as
            `recover`, also a model or (model, preprocess).
        data: Anything that `offramp.rows` takes, with labels and rows by number.
        recipe: A name on the shelf `recipes` (hinge, cross_entropy, joint, ...), one with arguments
            ("joint?epochs=5"), a Recipe, or your own by name ("my.module:Recipe").
        development: Rows that each epoch is measured on and that some recipes choose by. Never use
            them for a promise.
        batch_size: Rows of one step, over all processes.
        seed: Of everything that is drawn.
        augment: A name on the shelf `augments` (crop_flip, flip), "my.module:function", or a
            function of a batch x.
        views: Number of fixed augmented copies of each row, for features that are pooled once.
        precision: "no", "bf16" or "fp16".
        folder: Where metrics.csv and checkpoints are written: after each epoch, after each minute,
            and at Ctrl-C.
        cache: Where pooled features are kept for other runs; by default `folder`.
        resume: Continue from the checkpoint in `folder`, bit for bit on one CPU.
        track: A tracker of Accelerate, such as "tensorboard".
        progress: Whether to show progress.
        **arguments: Arguments of the recipe, such as epochs=5. docs/reference/recipes.md lists
            them; at the command line they are --with epochs=5.

    Returns:
        The history: the losses and accuracies of each epoch.

    Raises:
        BadNetwork: The recipe cannot train this network; nothing was changed.
        InvalidArgument: An argument has a wrong value.
        BadData: The rows do not fit, or have no labels.
        Diverged: A loss is no longer finite.
        Mismatch: `folder` belongs to another run.
        MissingExtra: Accelerate, or the tracker, is not installed.
    """
    # 1. Check the arguments, before anything is read or changed.
    method = recipe_of(recipe, **arguments)
    network = _network_of(network, method)
    home = None if folder is None else require_path("folder", folder)
    cache_folder = home if cache is None else require_path("cache", cache)
    _require_options(network, batch_size, views, seed, (home, cache_folder))
    batch_size = int(batch_size)  # from NumPy's integers too
    views = int(views)
    seed = int(seed)
    resume = require_flag("resume", resume)
    progress = require_flag("progress", progress)
    augment_function = _augment_of(augment)

    # New exits are often random, so each process has other ones: take those of the main process.
    processes = here(network.device())
    processes.spread(network.state_dict().values())
    with _restored_afterwards(network), contextlib.ExitStack() as at_end:
        # 2. Let the recipe prepare the network and name its phases.
        before = snapshot(network)
        if not method.forks:
            network.topology.require_chain(f"the recipe {type(method).__name__.lower()}")
        torch.manual_seed(drawn(seed))  # `prepare` may draw
        method.prepare(network)
        phases = tuple(method.phases(network))
        _require_phases(network, phases)
        accelerator = at_end.enter_context(
            accelerating(network, precision, phases, track, home, processes)
        )
        checkpoint = processes.agreed(lambda: _checkpoint(home, resume=resume))

        # 3. Read the rows once.
        labels = any(phase.labels for phase in phases)
        training = _read(data, network, processes, labels=labels, progress=progress)
        source, index = training
        names = network.class_names
        if not names:
            names = None if index.y is None else source.class_names
        held = None
        if development is not None:
            held = _read(
                development, network, processes, labels=True, progress=progress, names=names
            )
        training_rows = _training_rows(network, training, held)

        # 4. Load the checkpoint, if there is one.
        identity = _run_identity(network, method, phases, training, held)
        identity["batch_size"] = batch_size
        identity["seed"] = seed
        identity["augment"] = plain(augment_function)
        identity["views"] = views
        identity["precision"] = precision
        pooling = Pooling(
            network,
            poolable(network),
            views,
            augment_function,
            seed=seed,
            folder=cache_folder,
            progress=progress,
            processes=processes,
        )
        resumed = processes.agreed(
            lambda: None if checkpoint is None else load_checkpoint(checkpoint, network, identity)
        )

        # 5. Train. The rows are remembered before the first step, because a run that stops at any
        # point has already learned from some of them.
        network.trained_on = training_rows
        at_end.callback(remember, network, training_rows, before)
        network.class_names = names
        with tracking(accelerator, track) as log:
            config = RunConfig(
                network=network,
                recipe=method,
                phases=phases,
                training=training,
                development=held,
                pooling=pooling,
                accelerator=accelerator,
                log=log,
                batch_size=batch_size,
                seed=seed,
                folder=home,
                identity=identity,
                progress=progress and processes.main,
                processes=processes,
            )
            return Loop(config, resumed).run()


def _network_of(thing: object, method: Recipe) -> Network:
    """The network to train. If the recipe trains plain models, a model becomes a network of one
    node that shares its weights.
    """
    if not method.trains_models:
        return as_network(thing)
    pair: Any = thing if isinstance(thing, tuple) and len(thing) == 2 else (thing, None)
    model, preprocess = pair
    is_model = isinstance(model, nn.Module) and not isinstance(unwrapped(model)[0], Network)
    is_preprocess = preprocess is None or isinstance(preprocess, nn.Module)
    if not is_model or not is_preprocess:
        return as_network(thing)  # a Network, or else it raises
    return plain_network(unwrapped(model)[0], ModelSpec(BACKBONE), preprocess)


def _require_options(
    network: Network,
    batch_size: object,
    views: object,
    seed: object,
    folders: tuple[Path | None, ...],
) -> None:
    """Raise for arguments that would fail later, before anything is read."""
    require_count("batch_size", batch_size, 1)
    require_count("views", views, 1)
    require_count("seed", seed, 0)
    for path in folders:
        if path is not None:
            require_writable(path, folder=True)
    network.require_eval()


def _augment_of(augment: str | Augment | None) -> Augment | None:
    """The function of a name, or the function itself. Raises UnknownName, InvalidArgument."""
    function: Any = find("augments", augment) if isinstance(augment, str) else augment
    if function is not None and not callable(function):
        raise InvalidArgument(
            f"augment must be a name or a function of a batch, got a {type(function).__name__}"
        )
    checked: Augment | None = function
    return checked


def recipe_of(recipe: str | Recipe, **arguments: Any) -> Recipe:
    """Make a recipe with its arguments.

    Args:
        recipe: the name of a file on the shelf of recipes or `my.module:Recipe`, either of them
            with or without arguments ("joint?epochs=5&rate=1e-4"); a class; or a recipe object.
        arguments: more arguments of the recipe. Each one may appear in one place only.

    Returns:
        The recipe.

    Raises:
        UnknownName: there is no recipe, or no argument of it, with this name; the message offers
            the nearest names.
        InvalidArgument: it is not a recipe, an argument has a wrong value or appears twice, or a
            recipe object comes with arguments.
    """
    factory: Any = recipe
    if isinstance(recipe, str):
        name, written = name_of(recipe)
        twice = sorted(written.keys() & arguments.keys())
        if twice:
            raise InvalidArgument(
                f"{twice[0]} must appear once, got it in {recipe!r} and as an argument"
            )
        arguments = written | arguments
        factory = recipe_class(name)

    is_class = isinstance(factory, type) and issubclass(factory, Recipe)
    if not is_class:
        # a recipe object
        if arguments:
            raise InvalidArgument(
                f"the recipe {recipe!r} is an object and takes no arguments, got "
                f"{', '.join(arguments)}. Use its class"
            )
        if not isinstance(factory, Recipe):
            raise InvalidArgument(
                f"the recipe must be a name, a Recipe or my.module:Recipe, got a "
                f"{type(factory).__name__}"
            )
        return factory

    known = inspect.signature(factory).parameters
    kinds = [parameter.kind for parameter in known.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:  # such a recipe takes any name
        for argument in arguments:
            if argument not in known:
                raise unknown(argument, [*known], f"argument of the recipe {recipe!r}")
    _require_kinds(recipe, known, arguments)
    is_typed = isinstance(recipe, str) and ":" in recipe
    with users_code(str(recipe), "make a Recipe") if is_typed else contextlib.nullcontext():
        try:
            made: Recipe = factory(**arguments)
        except TypeError as problem:
            names = ", ".join(known) or "none"
            raise InvalidArgument(
                f"the recipe {recipe!r} cannot be made ({problem}). Its arguments are {names}"
            ) from problem
    return made


def recipe_class(name: str) -> Any:
    """Find the class of a recipe.

    Args:
        name: of a file on the shelf of recipes, or the user's `my.module:Recipe`.

    Returns:
        The class; for `my.module:Recipe` any object of that name.

    Raises:
        UnknownName: there is no such recipe.
    """
    if ":" in name:
        return imported(name)
    # The class of a file is the one that is defined there, not imported.
    module: Any = find_file("recipes", name)
    for value in vars(module).values():
        is_own = inspect.isclass(value) and value.__module__ == module.__name__
        if is_own and issubclass(value, Recipe):
            return value
    raise AssertionError(f"the file of the recipe {name!r} defines no Recipe")


def _require_kinds(
    recipe: object, known: Mapping[str, inspect.Parameter], arguments: Mapping[str, object]
) -> None:
    """Raise InvalidArgument for a text where a recipe takes a number, and the like."""
    for name, value in arguments.items():
        annotation = str(known[name].annotation) if name in known else ""
        plain = annotation.removesuffix(" | None")
        optional = plain != annotation
        if plain not in KINDS or (optional and value is None):
            continue
        kind, words = KINDS[plain]
        # True is an int for Python, and not a number here
        is_flag = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or is_flag:
            raise InvalidArgument(f"{name} of the recipe {recipe!r} must be {words}, got {value!r}")


def _require_phases(network: Network, phases: tuple[Phase, ...]) -> None:
    """Raise BadNetwork for phases that cannot train this network, before anything is changed."""
    # Two sets of parameters: all that a phase may train, and those that pooled features reach.
    auxiliary = set[int]()
    for module in network.auxiliary.values():
        auxiliary |= _ids(module.parameters())
    trainable = _ids(network.parameters()) | auxiliary
    can_pool = poolable(network)
    behind_pooling = _ids(network.gates.parameters()) | auxiliary
    for name in can_pool:
        behind_pooling |= _ids(network.exit_of(name).parameters())

    for phase in phases:
        _require_steps(phase)
        trained = _ids(phase.parameters)
        if not trained or not trained <= trainable:
            raise BadNetwork(
                f"the phase {phase.name!r} must train parameters of this network, got "
                f"{len(trained)} parameters, {len(trained - trainable)} of them not of this "
                f"network. Add what the recipe needs in its prepare"
            )
        pooled = phase.reads == "pooled" or phase.by == "solve"
        if pooled and not trained <= behind_pooling:
            others = [name for name in network.topology.exits if name not in can_pool]
            raise BadNetwork(
                f"the phase {phase.name!r} reads features that are pooled once, so it can train "
                f"only exits that pool, got {', '.join(others) or 'the backbone'}. Use exits such "
                f"as linear_grid, or a recipe that reads inputs"
            )


def _ids(parameters: Iterable[Tensor]) -> set[int]:
    """The identities of parameters: tensors compare by value, so a set of them would not do."""
    return {id(parameter) for parameter in parameters}


def _require_steps(phase: Phase) -> None:
    """Raise InvalidArgument for a wrong number of epochs, and if the optimizer cannot be made."""
    if not isinstance(phase.epochs, int) or phase.epochs < 1:
        raise InvalidArgument(
            f"the epochs of the phase {phase.name!r} must be a whole number of at least 1, got "
            f"{phase.epochs!r}"
        )
    if phase.by == "solve" or not phase.parameters:
        return
    try:
        phase.optimizer(phase.parameters)
    except (TypeError, ValueError) as problem:
        raise InvalidArgument(
            f"the optimizer of the phase {phase.name!r} cannot be made ({problem}). Use "
            f"other arguments of the recipe"
        ) from problem


def _run_identity(
    network: Network,
    method: Recipe,
    phases: tuple[Phase, ...],
    training: IndexedRows,
    held: IndexedRows | None,
) -> dict[str, Any]:
    """The inputs of a run as plain data: a checkpoint continues only a run with the same ones."""
    index = training[1]
    return {
        "recipe": f"{type(method).__name__} {checksum(method.config())}",
        "phases": [phase.name for phase in phases],
        "network": checksum(network.config()),
        "data": index.seen.fingerprint,
        "labels": None if index.y is None else checksum(index.y.tolist()),
        "development": None if held is None else held[1].seen.fingerprint,
    }


def _training_rows(network: Network, training: IndexedRows, held: IndexedRows | None) -> SeenRows:
    """All rows that this run and earlier ones train on. Raises OverlappingRows if some of them are
    development rows too.
    """
    seen = training[1].seen
    development = None
    if held is not None:
        development = held[1].seen
        seen.refuse_overlap(development.digests, "development")
    rows = union([network.training_rows(), seen, development])
    assert rows is not None
    return rows


def _read(
    data: object,
    network: Network,
    processes: Processes,
    *,
    labels: bool,
    progress: bool,
    names: tuple[str, ...] | None = None,
) -> IndexedRows:
    """Read rows once, and check them against the network.

    Args:
        data: anything that `offramp.rows` takes.
        network: the network to train.
        processes: that read together.
        labels: whether labels are needed.
        progress: whether to show progress.
        names: class names that give the numbers of the labels; None takes those of the data.

    Returns:
        The rows, and their labels and digests.

    Raises:
        BadData: Labels are missing or out of range, or the network does not take the rows.
    """
    source = rows_for(network, data)
    if names is not None:
        source = source.numbered_as(names)
    with proposing(network.fronts.values()):
        index = index_of(source, progress=progress, processes=processes)
    if labels and index.y is None:
        raise BadData(f"{source.name} has no labels, and this recipe needs them. Use (x, y)")
    logits = _logits_of_first_row(source, network)
    classes = min(value.shape[1] for value in logits.values())
    if index.y is not None and (index.y.min() < 0 or index.y.max() >= classes):
        raise BadData(
            f"the labels of {source.name} must be between 0 and {classes - 1}, the classes of this "
            f"network, got {index.y.min()} to {index.y.max()}"
        )
    return source, index


def _logits_of_first_row(source: Rows, network: Network) -> dict[str, Tensor]:
    """The logits [1, C] of each exit. Raises BadData if the network does not take the row."""
    state = as_inputs(source.take_x(np.arange(1)), network.device())
    require_read(network, state, source.name)
    network.require_inputs(state, source.name)
    try:
        with torch.no_grad():
            logits: dict[str, Tensor] = TrainingForward(network)(state, False)["logits"]
    except (RuntimeError, TypeError, ValueError, IndexError) as problem:
        inputs = list[str]()
        for name, value in state.items():
            inputs.append(f"{name} {value.dtype} {list(value.shape[1:])}")
        reason = " ".join(str(problem).split())[:160]
        way = remedy(state, problem, "give rows of the type and shape that it was trained on")
        raise BadData(
            f"the network fails on the first row of {source.name} ({', '.join(inputs)}): {reason}; "
            f"{way}"
        ) from problem
    return logits


def _checkpoint(home: Path | None, *, resume: bool) -> Path | None:
    """The checkpoint to continue from; None if there is none. Raises InvalidArgument if an earlier
    run would be overwritten.
    """
    if home is None:
        if resume:
            raise InvalidArgument("folder must be the folder of the run for resume=True, got None")
        return None
    checkpoint = restored(home / "checkpoint", FOLDER.require_own)
    if not checkpoint.is_dir():
        return None
    if not resume:
        raise InvalidArgument(
            f"{checkpoint} belongs to an earlier run. Continue it with resume=True (--resume), or "
            f"use another folder"
        )
    return checkpoint


@contextlib.contextmanager
def _restored_afterwards(network: Network) -> Iterator[None]:
    """At the end put the network into eval mode, remove auxiliary modules, and restore gradients,
    `requires_grad` and the state of torch's random generators.
    """
    before = list[tuple[nn.Parameter, bool, Tensor | None]]()
    for parameter in network.parameters():
        before.append((parameter, parameter.requires_grad, parameter.grad))
        parameter.grad = None
    device = network.device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            network.eval()
            network.auxiliary.clear()
            for parameter, requires_grad, gradient in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
