"""Bring back the accuracy of a converted model: distil it from the model that it was converted
from.

First layer by layer: each new layer gets the input that the original's layer gets, and learns to
give what that gives (He, Zhang and Sun, 2017, arXiv 1707.06168, reconstruct layers so). These are
independent problems: one layer's error does not disturb the next one's batch. Then as a whole: the
converted model learns the original's logits at a temperature (Hinton, Vinyals and Dean, 2015, arXiv
1503.02531) and its features after the modules that hold converted layers (Romero et al., 2015,
arXiv 1412.6550, without an adapter: the shapes are the same). Labels are not needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from offramp._support.arguments import require
from offramp._support.find import unknown
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import given
from offramp.networks.layer import Layer, outer_layers
from offramp.networks.network import Network, last_model, plain_network
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.networks.wrappers import unwrapped
from offramp.recipes._schedules import cosine
from offramp.recipes._together import parameters_of, soft_cross_entropy

__all__ = ["Recover"]

ORIGINAL = "original"
LAYERS = "layers"
WHOLE = "whole"
BY = ("both", LAYERS, WHOLE)
TINY = 1e-12


class Recover(Recipe):
    """T^2 CE(z / T, original / T) + features x relative squared error of the features.

    Args:
        original: the model before it was converted, or a network of it. It is copied and stays as
            it is. At the command line: --original and --original-weights.
        by: "both" goes through the layers and then the whole; "layers" or "whole" does only that.
        epochs: of the whole.
        layer_epochs: of the layers.
        rate: of Adam for the whole, falling along a cosine.
        layer_rate: of Adam for the layers.
        temperature: T.
        features: the weight of the features' errors.
        at: modules after which features are compared, with commas between; by default the outermost
            modules that hold something that was converted and give the shapes that they gave.
        labels: the share of the loss that comes from labels instead of the original's logits.
        decay: weight decay of the whole.
    """

    trains_models = True

    def __init__(
        self,
        original: nn.Module | None = None,
        *,
        by: str = "both",
        epochs: int = 5,
        layer_epochs: int = 1,
        rate: float = 1e-3,
        layer_rate: float = 1e-3,
        temperature: float = 4.0,
        features: float = 1.0,
        at: str | None = None,
        labels: float = 0.0,
        decay: float = 0.0,
    ) -> None:
        self.original = original
        self.by = by
        self.epochs = epochs
        self.layer_epochs = layer_epochs
        self.rate = rate
        self.layer_rate = layer_rate
        self.temperature = temperature
        self.features = features
        self.at = at
        self.labels = labels
        self.decay = decay
        # What modules gave in the step that is being made, by name
        self._students: dict[str, Tensor] = {}
        self._teachers: dict[str, Tensor] = {}

    def config(self) -> dict[str, Any]:
        """The arguments; of the original its class, for its weights are in the checkpoint."""
        values = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        values["original"] = type(self.original).__name__
        return values

    def prepare(self, network: Network) -> None:
        """Check the arguments and hang on the original.

        Args:
            network: of one model, converted; it may be cut.

        Raises:
            InvalidArgument: an argument that is out of range, or no original.
            BadNetwork: a ladder, or two models that have nothing in common.
        """
        if len(network.members) > 1:
            raise BadNetwork(
                f"recover trains the parameters of one converted model, got a ladder of "
                f"{len(network.members)}; "
                "recover each model before they are stacked"
            )
        if self.by not in BY:
            raise InvalidArgument(f"by must be one of {', '.join(BY)}, got {self.by!r}")
        require("temperature", self.temperature, above=0)
        require("features", self.features, low=0)
        require("decay", self.decay, low=0)
        if not 0 <= self.labels <= 1:
            raise InvalidArgument(f"labels must be a share from 0 to 1, got {self.labels!r}")
        if not isinstance(self.original, nn.Module):
            raise InvalidArgument(
                "recover needs original=, the model before it was converted; at the command line "
                "--original SPEC --original-weights FILE"
            )
        network.auxiliary = {ORIGINAL: self._original_of(network)}
        student, teacher = self._models(network)
        if self.by != WHOLE and not replaced_names(student, teacher) and self.by == LAYERS:
            raise BadNetwork(
                "by='layers' needs layers that were replaced and give the same shapes; this model "
                "has none, so use by='whole'"
            )
        self._feature_names(student, teacher)
        for layer in outer_layers(student).values():
            layer.anneal(0.0)

    def _original_of(self, network: Network) -> Network:
        """A copy of the original as a network of one node, behind the same preprocessing."""
        original = self.original
        assert original is not None
        if isinstance(original, Network):
            made = last_model(original, copied=True)
        else:
            member = network.members[0]
            preprocess = copy.deepcopy(network.preprocess_of(member))
            model = copy.deepcopy(unwrapped(original)[0])
            made = plain_network(model, replace(member, spec=None), preprocess)
        return made.eval().requires_grad_(False).to(network.device())

    def _models(self, network: Network) -> tuple[nn.Module, nn.Module]:
        """The converted model and the original's."""
        original = network.auxiliary[ORIGINAL]
        assert isinstance(original, Network)
        return network.model_of(network.members[0]), original.model_of(original.members[0])

    def _feature_names(self, student: nn.Module, teacher: nn.Module) -> list[str]:
        """The modules after which features are compared."""
        if self.at is None:
            return changed_children(student, teacher)
        known = dict(student.named_modules()).keys() & dict(teacher.named_modules()).keys()
        names = [name.strip() for name in self.at.split(",")]
        for name in names:
            if name not in known:
                raise unknown(name, sorted(known - {""}), "module of both models")
        return names

    def phases(self, network: Network) -> list[Phase]:
        """The layers, then the whole."""
        student, teacher = self._models(network)
        phases: list[Phase] = []
        names = replaced_names(student, teacher)
        if self.by != WHOLE and names:
            own = [student.get_submodule(name) for name in names]
            values = tuple(value for layer in own for value in layer.parameters())
            adam = partial(torch.optim.Adam, lr=self.layer_rate)
            phases.append(
                Phase(
                    LAYERS,
                    values,
                    self.layer_epochs,
                    adam,
                    cosine,
                    by="update",
                    looks=False,
                    labels=False,
                )
            )
        if self.by != LAYERS:
            adamw = partial(torch.optim.AdamW, lr=self.rate, weight_decay=self.decay)
            phases.append(
                Phase(
                    WHOLE,
                    parameters_of(network),
                    self.epochs,
                    adamw,
                    cosine,
                    labels=self.labels > 0,
                    teacher=ORIGINAL,
                    during=partial(self._listening, student, teacher),
                )
            )
        return phases

    def update(
        self, outputs: TrainingOutputs, batch: TrainingBatch, optimizer: Optimizer
    ) -> Losses:
        """A step of all layers, each on its own: the mean of their relative squared errors."""
        network = outputs.network
        student, teacher = self._models(network)
        names = replaced_names(student, teacher)
        inputs: dict[str, Tensor] = {}
        network_outputs: dict[str, Tensor] = {}
        modules = {name: teacher.get_submodule(name) for name in names}
        original = network.auxiliary[ORIGINAL]
        with torch.no_grad(), _recorded(modules, network_outputs, inputs):
            original(given(outputs.inputs))
        errors: list[Tensor] = []
        penalties: list[Tensor] = []
        for name in names:
            layer = student.get_submodule(name)
            errors.append(_own_error(name, layer, inputs[name], network_outputs[name]))
            penalty = layer.penalty() if isinstance(layer, Layer) else None
            if penalty is not None:
                penalties.append(penalty)
        loss = torch.stack(errors).sum()
        if penalties:
            loss = loss + torch.stack(penalties).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        self._anneal(student, batch)
        return {"layers": torch.stack(errors).detach().mean()}

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """By exit the distance from the original's logits; of the last one also that of
        features.
        """
        assert outputs.teacher is not None
        losses: dict[str, Tensor] = {}
        for name, logits in outputs.logits.items():
            soft = soft_cross_entropy(logits, outputs.teacher, self.temperature)
            value = (1 - self.labels) * self.temperature**2 * soft
            if self.labels:
                value = value + self.labels * cross_entropy(logits, batch.labels())
            losses[name] = value
        last = outputs.network.topology.exits[-1]
        student, _ = self._models(outputs.network)
        for name, value in self._students.items():
            if name not in self._teachers or not self.features:
                continue
            wanted = self._teachers[name]
            if value.shape != wanted.shape:  # channels were taken out there
                if self.at is None:
                    continue
                raise BadNetwork(
                    f"at must name modules that give the same shapes in both models; {name!r} "
                    f"gives {tuple(value.shape[1:])} and gave {tuple(wanted.shape[1:])}"
                )
            losses[last] = losses[last] + self.features * relative_error(value, wanted)
        for layer in outer_layers(student).values():
            penalty = layer.penalty()
            if penalty is not None:
                losses[last] = losses[last] + penalty
        self._students.clear()
        self._teachers.clear()
        self._anneal(student, batch)
        return losses

    def _anneal(self, student: nn.Module, batch: TrainingBatch) -> None:
        """Get layers ready for the step after this one."""
        done = min(1.0, (batch.step + 1) / max(1, batch.steps))
        if batch.phase == WHOLE and self.by == "both":
            done = 1.0  # they hardened layer by layer
        for layer in outer_layers(student).values():
            layer.anneal(done)

    @contextmanager
    def _listening(self, student: nn.Module, teacher: nn.Module) -> Iterator[None]:
        """While a phase lasts, what both models' modules give is kept for `loss`."""
        names = self._feature_names(student, teacher)
        own = {name: student.get_submodule(name) for name in names}
        others = {name: teacher.get_submodule(name) for name in names}
        with _recorded(own, self._students), _recorded(others, self._teachers):
            yield
        for layer in outer_layers(student).values():
            layer.anneal(1.0)


@contextmanager
def _recorded(
    modules: Mapping[str, nn.Module],
    outputs: dict[str, Tensor],
    inputs: dict[str, Tensor] | None = None,
) -> Iterator[None]:
    """While it lasts, the tensors that modules take and give are kept under their names."""

    def heard(name: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output
        if inputs is not None:
            inputs[name] = args[0].clone()  # a later module may work in place on it

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(heard, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own_error(name: str, layer: nn.Module, x: Tensor, wanted: Tensor) -> Tensor:
    """The error of a new layer on the input of the old one. Raises BadNetwork if it takes or gives
    other shapes, because channels were taken out beside it.
    """
    try:
        got: Tensor = layer(x)
        if got.shape == wanted.shape:
            return relative_error(got, wanted)
    except RuntimeError:
        pass
    raise BadNetwork(
        f"{name!r} takes or gives other shapes than in the original, so it cannot learn layer by "
        f"layer; use by='whole'"
    )


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """The squared error as a share of the square of what is wanted."""
    wanted = wanted.detach()
    return ((got - wanted) ** 2).sum() / (wanted**2).sum().clamp_min(TINY)


def replaced_names(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The layers that stand in another one's place, by name."""
    before = dict(teacher.named_modules())
    found = outer_layers(student)
    return [name for name in found if name in before and not isinstance(before[name], Layer)]


def changed_children(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The outermost modules of both models that hold something that differs, but for the model."""
    before = dict(teacher.named_children())
    found: list[str] = []
    for name, child in student.named_children():
        if name in before and _shape_of(child) != _shape_of(before[name]):
            found.append(name)
    return found


def _shape_of(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(value.shape)) for name, value in module.state_dict().items()]
