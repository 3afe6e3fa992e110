"""Recover the accuracy of a converted model by distillation from the original model.

First layer by layer: each new layer gets the input of the original's layer, and learns its output,
as He, Zhang and Sun (2017, arXiv 1707.06168) reconstruct layers. These problems are independent:
one layer's error does not disturb the next one's batch. Then as a whole: the converted model learns
the original's logits at a temperature (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531) and its
features after the modules that hold converted layers (Romero et al., 2015, arXiv 1412.6550, without
an adapter, because the shapes are the same). Labels are not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from offramp.networks.network import Network
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.recipes._schedules import cosine
from offramp.recipes._together import parameters_of, soft_cross_entropy, teacher_network

__all__ = ["Recover"]

ORIGINAL = "original"
LAYERS = "layers"
WHOLE = "whole"
BY = ("both", LAYERS, WHOLE)
TINY = 1e-12


class Recover(Recipe):
    """T^2 CE(z / T, original / T) + features x relative squared error of the features.

    Args:
        original: the model before it was converted, or a network of it. It is copied, and stays as
            it is. At the command line: --original and --original-weights.
        by: "layers" trains layer by layer, "whole" trains the model as a whole, "both" does one
            after the other.
        epochs: of training as a whole.
        layer_epochs: of training layer by layer.
        rate: of AdamW for the model as a whole. It falls along a cosine.
        layer_rate: of Adam for the layers.
        temperature: T.
        features: the weight of the features' errors.
        at: modules after which features are compared, separated by commas. By default these are the
            outermost modules that hold something that was converted and give the shapes that they
            gave.
        labels: the share of the loss that comes from labels instead of the original's logits.
        decay: weight decay of training as a whole.
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
        # The features of this step, by module.
        self._students: dict[str, Tensor] = {}
        self._teachers: dict[str, Tensor] = {}

    def config(self) -> dict[str, Any]:
        """The arguments. The original appears by class, for its weights are in the checkpoint."""
        values = dict[str, Any]()
        for key, value in vars(self).items():
            if not key.startswith("_"):
                values[key] = value
        values["original"] = type(self.original).__name__
        return values

    def prepare(self, network: Network) -> None:
        """Check the arguments, and copy the original into the network's auxiliary modules.

        Args:
            network: of one converted model. It may be cut.

        Raises:
            InvalidArgument: an argument is out of range, or there is no original.
            BadNetwork: there are several models, or the two models have nothing in common.
        """
        if len(network.members) > 1:
            raise BadNetwork(
                "recover trains the parameters of one converted model, got a ladder of "
                f"{len(network.members)}. Recover each model before you stack them"
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
                "recover needs original=, the model before it was converted. At the command line "
                "use --original SPEC --original-weights FILE"
            )
        network.auxiliary = {ORIGINAL: teacher_network(self.original, network)}
        student, teacher = self._models(network)
        if self.by == LAYERS and not _new_parameters(student, teacher):
            raise BadNetwork(
                "by='layers' needs replaced layers with parameters, whose outputs have the "
                "original shapes, but this model has none. Use by='whole'"
            )
        self._feature_names(student, teacher)  # refuses unknown names before anything is trained
        # Layers that harden in training begin soft.
        for layer in outer_layers(student).values():
            layer.anneal(0.0)

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
        values = _new_parameters(student, teacher)
        if self.by != WHOLE and values:
            adam = partial(torch.optim.Adam, lr=self.layer_rate)
            phases.append(
                Phase(
                    LAYERS,
                    tuple(values),
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
        """One step of all layers, each for itself.

        Args:
            outputs: the inputs of a batch, and the network.
            batch: the step within the run.
            optimizer: of the layers.

        Returns:
            The mean of the layers' relative squared errors, as "layers".
        """
        network = outputs.network
        student, teacher = self._models(network)
        names = replaced_names(student, teacher)

        # One forward of the original gives every layer's input and output.
        layer_inputs: dict[str, Tensor] = {}
        layer_outputs: dict[str, Tensor] = {}
        modules = {name: teacher.get_submodule(name) for name in names}
        original = network.auxiliary[ORIGINAL]
        with torch.no_grad(), _recorded(modules, layer_outputs, layer_inputs):
            original(given(outputs.inputs))

        # Each new layer runs on the original's input, so the errors are independent.
        errors: list[Tensor] = []
        penalties: list[Tensor] = []
        for name in names:
            layer = student.get_submodule(name)
            errors.append(_own_error(name, layer, layer_inputs[name], layer_outputs[name]))
            if isinstance(layer, Layer):
                penalty = layer.penalty()
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
        """Each exit's distance from the original's logits; for the last exit also the errors of the
        features and the penalties of the layers.
        """
        assert outputs.teacher is not None
        losses: dict[str, Tensor] = {}
        for name, logits in outputs.logits.items():
            soft = soft_cross_entropy(logits, outputs.teacher, self.temperature)
            value = (1 - self.labels) * self.temperature**2 * soft
            if self.labels:
                value = value + self.labels * cross_entropy(logits, batch.labels())
            losses[name] = value
        # Features and penalties are those of the model, so they count once, at its end.
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
        """Set the hardness of layers for the next step."""
        done = min(1.0, (batch.step + 1) / max(1, batch.steps))
        if batch.phase == WHOLE and self.by == "both":
            done = 1.0  # they became hard layer by layer
        for layer in outer_layers(student).values():
            layer.anneal(done)

    @contextmanager
    def _listening(self, student: nn.Module, teacher: nn.Module) -> Iterator[None]:
        """While a phase lasts, keep the outputs of both models' modules for `loss`."""
        names = self._feature_names(student, teacher)
        students = {name: student.get_submodule(name) for name in names}
        teachers = {name: teacher.get_submodule(name) for name in names}
        with _recorded(students, self._students), _recorded(teachers, self._teachers):
            yield
        for layer in outer_layers(student).values():
            layer.anneal(1.0)


@contextmanager
def _recorded(
    modules: Mapping[str, nn.Module],
    outputs: dict[str, Tensor],
    inputs: dict[str, Tensor] | None = None,
) -> Iterator[None]:
    """Inside this context, record the input and output tensors of modules under their names."""

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output
        if inputs is not None:
            inputs[name] = args[0].clone()  # a later module may change it in place

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(record, name)))
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
    """The sum of squared errors as a share of the sum of squares that is wanted, without gradient
    to the latter.
    """
    wanted = wanted.detach()
    return ((got - wanted) ** 2).sum() / (wanted**2).sum().clamp_min(TINY)


def replaced_names(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The names of the student's layers that replace a plain module of the teacher."""
    before = dict(teacher.named_modules())
    names = list[str]()
    for name in outer_layers(student):
        if name in before and not isinstance(before[name], Layer):
            names.append(name)
    return names


def _new_parameters(student: nn.Module, teacher: nn.Module) -> list[nn.Parameter]:
    """The parameters of the replaced layers; a layer such as `skip` has none."""
    values = list[nn.Parameter]()
    for name in replaced_names(student, teacher):
        values.extend(student.get_submodule(name).parameters())
    return values


def changed_children(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The names of direct children whose parameters or buffers differ between the models."""
    before = dict(teacher.named_children())
    names: list[str] = []
    for name, child in student.named_children():
        if name in before and _shapes_of(child) != _shapes_of(before[name]):
            names.append(name)
    return names


def _shapes_of(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """The shapes of a module's parameters and buffers, by name and in order."""
    return [(name, tuple(value.shape)) for name, value in module.state_dict().items()]
