"""The settings of a comparison: a flat TOML file with the flags of the command line.

    train = "cifar10/train:data/cifar10"          # for all methods; a method may have its own
    calibration = "cifar10:data/cifar10[1000:5000]"
    test = "cifar10:data/cifar10[5000:]"
    model = "offramp:resnet56"
    at = "layer1,layer2"
    seeds = [0, 1, 2]

    [method.hinge]
    recipe = "hinge"

    [method.resnet20]                             # a smaller network, not cut: a mark in every plot
    model = "offramp:resnet20"
    static = true

Every key is a flag of cut, fit, record, calibrate or bench without its dashes. A flag that can be
repeated is a list of texts (`exit-of = ["layer2=mlp"]`). Other keys, such as `seeds`, `gates`,
`budgets`, `static` and `members`, are described at `Method` and `Settings` below. reading.py reads
a file into them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offramp._support.arguments import words
from offramp._support.find import unknown
from offramp.building.placement.flags import AUTO, exits_at

OWN = "own"  # the gate that a network was cut or trained with
# Flags without effect on a network that is not cut, and on one that is not trained.
CUTTING = ("example", "at", "parts", "labelled", "exit", "exit_of", "gate", "length")
TRAINING = ("arguments", "train", "development", "batch_size", "augment", "views", "precision")
# All flags with an effect on a ladder.
STACKING = ("members", "gate")
CONVERTING = ("layer", "data")


@dataclass(frozen=True)
class Method:
    """One way to make a network, with the flags of cut and fit.

    Attributes:
        name: of the method, from the head of its table.
        start: the name of an earlier method, whose trained model this one begins with.
        layer: PATTERN=METHOD texts, as in `convert`: layers that are replaced in the model (or in
            that of `start`) before it is cut. The recipe recover learns from the model before that.
        data: labelled rows for methods that use gradients. They count as rows that trained.
        model: the spec of the model.
        weights: the file of the model's weights.
        preprocess: the spec of the preprocessing; "auto" is the model's own.
        example: rows to cut on; None takes calibration rows.
        at: the modules to cut after. "auto" cuts all seeds where exits pay on the rows of
            `labelled`, which count as rows that trained.
        parts: the number of parts, and with at = "auto" the largest number.
        labelled: the rows of at = "auto".
        exit: of all cuts.
        exit_of: NODE=EXIT texts, at modules named in `at`.
        gate: that the network is cut with.
        length: inputs whose length of text is free.
        recipe: None takes the model as it is.
        arguments: of the recipe, NAME=VALUE texts.
        train: rows that train.
        development: rows that choose, such as a regularizer.
        batch_size: in training and recording.
        augment: the name of an augmentation.
        views: augmented copies of each row.
        precision: of training.
        seeds: one network is made for each. They also draw the weights of a model without a file.
        gates: scores under which the trained network is measured. "own" is the gate that it was cut
            or trained with.
        static: True for a network that is not cut. Only its last output counts.
        members: names of other methods whose networks are stacked, cheapest first. Nothing is
            trained then.
        skip: units that rows may skip, as in `cut --skip`. This and the next two make networks with
            forks, instead of `at` and `parts`.
        sizes: the sizes that rows choose, as in `resolutions --sizes`.
        unrolled: True runs the model's stages of adaptive depth unit by unit, after training.
        settings: of networks with more than sixteen paths, as in `record --settings`.
    """

    name: str
    start: str | None = None
    layer: tuple[str, ...] = ()
    data: str | None = None
    model: str | None = None
    weights: str | None = None
    preprocess: str = "auto"
    example: str | None = None
    at: str | None = None
    parts: int | None = None
    labelled: str | None = None
    exit: str = "linear_grid"
    exit_of: tuple[str, ...] = ()
    gate: str = "margin"
    length: str | None = None
    recipe: str | None = None
    arguments: tuple[str, ...] = ()
    train: str | None = None
    development: str | None = None
    batch_size: int = 128
    augment: str | None = None
    views: int = 1
    precision: str = "no"
    seeds: tuple[int, ...] = (0, 1, 2)
    gates: tuple[str, ...] = ("own",)
    static: bool = False
    members: tuple[str, ...] = ()
    skip: str | None = None
    sizes: str | None = None
    unrolled: bool = False
    settings: tuple[float, ...] = ()

    @property
    def forks(self) -> bool:
        """Whether its networks have forks instead of exits."""
        return self.skip is not None or self.sizes is not None or self.unrolled

    @property
    def scores(self) -> tuple[str, ...]:
        """The gates under which its networks are measured.

        A static network has only "own", with which every row goes to the end.
        """
        if self.static:
            return (OWN,)
        return self.gates

    @property
    def trained(self) -> bool:
        """Whether anything is trained."""
        return self.recipe is not None and not self.members

    @property
    def training(self) -> tuple[str, ...]:
        """All rows that its networks have used."""
        used: list[str | None] = []
        if self.trained:
            used += [self.train, self.development]
        if self.auto:
            used.append(self.labelled)
        if self.layer and not self.members:
            used.append(self.data)
        return tuple(data for data in used if data is not None)

    @property
    def auto(self) -> bool:
        """Whether it is cut where exits pay on its labelled rows."""
        return self.at == AUTO and not (self.static or self.members or self.forks)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The modules that `at` names."""
        if self.at == AUTO or self.forks:
            return ()
        return tuple(words(self.at) or ())

    @property
    def exits(self) -> str | dict[str, str]:
        """The exit of all cuts, or one for each cut."""
        return exits_at(self.at, self.exit, self.exit_of)

    def asked(self, seed: int) -> dict[str, Any]:
        """The flags that have an effect on one network of this method, as plain data.

        A saved network is used only if these are the same.
        """
        flags = self.flags(seed)
        # A ladder only stacks networks, whose own flags are in their own folders.
        if self.members:
            return {key: flags[key] for key in STACKING}
        without_effect = set[str]()
        if self.static:
            without_effect.update(CUTTING)
        if not self.trained:
            without_effect.update(TRAINING)
        if not self.layer:
            without_effect.update(CONVERTING)
        elif self.static:  # layers are converted on rows of the example
            without_effect.remove("example")
        for key in without_effect:
            del flags[key]
        return flags

    def flags(self, seed: int) -> dict[str, Any]:
        """All flags of one network, as plain data."""
        flags = asdict(self)
        # The name does not matter to the network, and a network has one seed and its own gate.
        for key in ("name", "seeds", "gates"):
            del flags[key]
        for key, value in flags.items():
            if isinstance(value, tuple):
                flags[key] = list(value)  # as JSON has it
        flags["seed"] = seed
        return flags


@dataclass(frozen=True)
class Settings:
    """The methods, and the settings that they share.

    Attributes:
        methods: in the order of the file.
        calibration: rows on which every threshold is chosen.
        test: rows of all figures.
        title: of the page.
        budgets: shares of the unit of cost, which is the cost of the plain network of the first
            method that is cut.
        risk: the name of the risk of `at_most`.
        at_most: also certify this level of the risk.
        confidence: of that promise.
        engine: the name of the engine.
        splits: the number of random splits of all these rows. They give the spread of the first
            seed's figures.
        wall_clock: time the best plan of each method's first seed and first gate at batch 1 and 64.
        wall_clock_budget: the one of the budgets whose plans are timed and shown in detail.
        repeats: how often they are timed.
        repeated_rows: "independent" or "once", how rows of equal content count in the promise.
        drop_seen: leave out rows that are in two roles (trained and calibration, or either of them
            and test), instead of refusing them.
    """

    methods: tuple[Method, ...]
    calibration: str
    test: str
    title: str = "comparison"
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    risk: str = "accuracy_gap"
    at_most: float | None = None
    confidence: float = 0.95
    engine: str = "torch"
    splits: int = 0
    wall_clock: bool = False
    wall_clock_budget: float = 0.75
    repeats: int = 7
    repeated_rows: str | None = None
    drop_seen: bool = False

    def method(self, name: str) -> Method:
        """The method of this name. Raises UnknownName."""
        for method in self.methods:
            if method.name == name:
                return method
        names = [method.name for method in self.methods]
        raise unknown(name, names, "method in this comparison")

    @property
    def shown(self) -> int:
        """The index of the budget whose plans are timed and shown in detail."""
        distances = [abs(budget - self.wall_clock_budget) for budget in self.budgets]
        return distances.index(min(distances))
