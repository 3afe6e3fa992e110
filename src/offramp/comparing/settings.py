"""What is compared: a flat TOML file of the command line's own flags.

    train = "cifar10/train:data/cifar10"          # for all methods; a method may give its own
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

Every key is a flag of cut, fit, record, calibrate or bench without its dashes, a flag that is
repeated a list of texts (`exit-of = ["layer2=mlp"]`); `seeds`, `gates`, `budgets`, `static`,
`members` and the like are told at the fields of `Method` and `Settings` below. reading.py makes
them of a file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offramp._support.arguments import words
from offramp._support.find import unknown
from offramp.building.placement.flags import AUTO, exits_at

OWN = "own"  # the gate that a network was cut or trained with
# What means nothing to a network that is not cut, or is not trained; and all that a ladder is made
# of.
CUTTING = ("example", "at", "parts", "labelled", "exit", "exit_of", "gate", "length")
TRAINING = ("arguments", "train", "development", "batch_size", "augment", "views", "precision")
STACKING = ("members", "gate")
CONVERTING = ("layer", "data")


@dataclass(frozen=True)
class Method:
    """One way to make a network, with the flags of cut and fit.

    seeds: one network each; they also draw the weights of a model that comes without any. gates:
    scores under which the trained network is measured; "own" is the one that it was cut (or
    trained) with. recipe: None takes the model as it is. start: the name of an earlier method,
    whose trained model this one begins with. static: not cut, its last answer alone counts.
    members: names of other methods whose networks are stacked, cheapest first; nothing is trained
    then. at = "auto" cuts all seeds where exits pay on the rows of labelled, which count as rows
    that trained; parts are then the most. exit_of: NODE=EXIT each, at modules named in `at`.
    Networks with forks, instead of `at` and `parts`: skip, as in `cut --skip`; sizes, as in
    `resolutions --sizes`; unrolled, the stages of adaptive depth of the model unit by unit, after
    it was trained. settings: of networks with more than sixteen paths, as in `record --settings`.
    layer: PATTERN=METHOD each, what `convert` replaces in the model (or in that of `start`) before
    it is cut; data: labelled rows for methods that use gradients, which count as rows that trained.
    The recipe recover learns from the model before it was converted.
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
        """The gates under which its networks are measured; a static one has none but its own way to
        the end.
        """
        return (OWN,) if self.static else self.gates

    @property
    def trained(self) -> bool:
        """Whether anything is trained."""
        return self.recipe is not None and not self.members

    @property
    def training(self) -> tuple[str, ...]:
        """All rows that have a part in its networks."""
        parts = [self.train, self.development] if self.trained else []
        if self.auto:
            parts.append(self.labelled)
        if self.layer and not self.members:
            parts.append(self.data)
        return tuple(data for data in parts if data is not None)

    @property
    def auto(self) -> bool:
        """Whether it is cut where exits pay on its labelled rows."""
        return self.at == AUTO and not (self.static or self.members or self.forks)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The modules named by `at`."""
        return () if self.at == AUTO or self.forks else tuple(words(self.at) or ())

    @property
    def exits(self) -> str | dict[str, str]:
        """The exit of all cuts, or one by cut."""
        return exits_at(self.at, self.exit, self.exit_of)

    def asked(self, seed: int) -> dict[str, Any]:
        """What one network of this method is made of, as plain data: a network of anything else is
        not taken for it.
        """
        whole = self.flags(seed)
        if self.members:
            return {key: whole[key] for key in STACKING}
        dropped = (*(CUTTING if self.static else ()), *(() if self.trained else TRAINING))
        if not self.layer:
            dropped = (*dropped, *CONVERTING)
        elif self.static:
            dropped = tuple(key for key in dropped if key != "example")
        return {key: value for key, value in whole.items() if key not in dropped}

    def flags(self, seed: int) -> dict[str, Any]:
        """All flags of one network, as plain data."""
        told = {
            key: value
            for key, value in asdict(self).items()
            if key not in ("name", "seeds", "gates")
        }
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in told.items()
        } | {"seed": seed}


@dataclass(frozen=True)
class Settings:
    """Methods, and what is asked of all of them.

    calibration: rows on which every threshold is chosen; test: those of all figures. budgets:
    shares of the cost of the plain network of the first method that is cut, which is the unit
    everywhere. at_most: also certify this level of `risk`. repeated_rows: "independent" or "once",
    what rows of equal content are in that promise. drop_seen: leave rows out that are in two roles
    (trained and calibration, either of them and test), instead of refusing them. splits: random
    splits of all these rows, for the spread beside the first seed's figures. wall_clock: time the
    best plan of each method's first seed and first gate at batch 1 and 64, `repeats` times.
    wall_clock_budget: one of the budgets, the one whose plans are timed and looked into.
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
        """The method of that name. Raises UnknownName."""
        for method in self.methods:
            if method.name == name:
                return method
        raise unknown(name, [method.name for method in self.methods], "method in this comparison")

    @property
    def shown(self) -> int:
        """The place among the budgets of the one whose plans are timed and looked into."""
        distances = [abs(budget - self.wall_clock_budget) for budget in self.budgets]
        return distances.index(min(distances))
