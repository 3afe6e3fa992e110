"""WAE: an auto-encoder of two half-size images, then the classifier of them, then both together.

Chen, Lin, Zuo, Luo and Zhang, Learning a Wavelet-like Auto-Encoder to Accelerate Deep Neural
Networks, AAAI 2018, arXiv 1712.07493. With the images L (low) and H (high) of an image I:

    l_t = mean (I - decoder(L, H))^2 + balance * mean H^2       reconstruction and energy
    l_c = sum of w_h CE(h) over the heads h = A + F, A and F
    stage 1   l_t, on encoder and decoder
    stage 2   l_c, with the encoder frozen
    stage 3   l_c + gamma l_t, on everything

The decoder is dropped after training. The three stages and gamma are the paper's. Its balance,
optimizers, rates, epochs and weights of the heads are not known, so all values below are ours
unless they are marked as the paper's. Means are over elements, so that no value depends on the size
of an image; the authors' images are in 0 to 255.
The norms before the branches hold the mean and variance of both images. They follow the batches in
stage 1 and stay fixed after that, as in the authors' file.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, mse_loss
from torch.optim import Optimizer

from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.wavelet import WaveletDecoder
from offramp.models.wae import Wae
from offramp.networks.network import Network
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.recipes._schedules import dropped
from offramp.recipes._together import soft_cross_entropy, teacher_network

__all__ = ["WaveletLike"]

# The names of the auxiliary modules.
DECODER = "decoder"
ORIGINAL = "original"
# The three stages.
IMAGES = "images"
CLASSES = "classes"
JOINT = "joint"


class WaveletLike(Recipe):
    """Encoder, then classifier, then both: for a model made by `offramp.wae`, cut at its head A.

    The paper has two controls. `images=0` with `gamma=0` trains everything by the classes alone
    (Decomposition + CNN). A model made with transform="wavelet" has nothing to train in stage 1
    (Wavelet + CNN).

    Args:
        images: epochs of stage 1, by Adam. 0 leaves stages 1 and 2 out.
        classes: epochs of stage 2, by SGD with momentum 0.9.
        joint: epochs of stage 3, by SGD with momentum 0.9.
        balance: the weight of the energy relative to the reconstruction, the paper's lambda.
        gamma: the weight of l_t relative to l_c in stage 3; 0.001 is the paper's.
        sum_weight: of the cross-entropy of A + F, the final logits.
        low_weight: of the cross-entropy of head A, the early exit.
        both_weight: of the cross-entropy of head F alone.
        anchor: the weight of mean (L - M)^2 relative to l_t, with M the mean over 2x2 pixels. It
            keeps the low image readable for weights that were trained on images. 0, the paper's
            value, leaves it out.
        original: the model for images of full size, or a network of it. The heads learn its outputs
            besides the labels. It is copied. Not in the paper.
        soft: the share of l_c that comes from the original's logits, if there is an original.
        temperature: of those logits.
        images_rate: of Adam in stage 1.
        rate: of SGD in stage 2; it falls tenfold at 1/2 and 3/4.
        joint_rate: of SGD in stage 3; it falls in the same way.
        decay: weight decay in stages 2 and 3.
    """

    def __init__(
        self,
        *,
        images: int = 5,
        classes: int = 20,
        joint: int = 10,
        balance: float = 1.0,
        gamma: float = 0.001,
        sum_weight: float = 1.0,
        low_weight: float = 0.5,
        both_weight: float = 0.5,
        anchor: float = 0.0,
        original: nn.Module | None = None,
        soft: float = 0.5,
        temperature: float = 4.0,
        images_rate: float = 1e-3,
        rate: float = 0.01,
        joint_rate: float = 1e-3,
        decay: float = 5e-4,
    ) -> None:
        self.images = images
        self.classes = classes
        self.joint = joint
        self.balance = balance
        self.gamma = gamma
        self.sum_weight = sum_weight
        self.low_weight = low_weight
        self.both_weight = both_weight
        self.anchor = anchor
        self.original = original
        self.soft = soft
        self.temperature = temperature
        self.images_rate = images_rate
        self.rate = rate
        self.joint_rate = joint_rate
        self.decay = decay

    def config(self) -> dict[str, Any]:
        """The arguments. The original appears by class, for its weights are in the checkpoint."""
        values = super().config()
        if self.original is not None:
            values["original"] = type(self.original).__name__
        return values

    def prepare(self, network: Network) -> None:
        """Check the arguments, and add the decoder and a copy of the original.

        Args:
            network: of a WAE, cut at its head A.

        Raises:
            InvalidArgument: a weight is below 0, there are no epochs, or an argument is out of
                range.
            BadNetwork: the model is not a WAE, or it is not cut at its head A.
        """
        for name in ("balance", "gamma", "sum_weight", "low_weight", "both_weight", "anchor"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InvalidArgument(f"{name} must be at least 0, got {value}")
        if self.sum_weight + self.low_weight + self.both_weight == 0:
            raise InvalidArgument("one of sum_weight, low_weight and both_weight must be above 0")
        if self.images + self.classes + self.joint == 0:
            raise InvalidArgument(
                "one of images, classes and joint must be above 0, got 0 epochs in all"
            )
        if not 0 <= self.soft <= 1:
            raise InvalidArgument(f"soft must be a share from 0 to 1, got {self.soft}")
        if not 0 < self.temperature < float("inf"):
            raise InvalidArgument(f"temperature must be above 0, got {self.temperature}")
        model = _model_of(network)
        network.auxiliary = {}
        if self.original is not None and not isinstance(self.original, nn.Module):
            raise InvalidArgument(
                f"original must be a torch.nn.Module, got a {type(self.original).__name__}"
            )
        if self.original is not None:
            network.auxiliary[ORIGINAL] = teacher_network(self.original, network)
        channels = _encoder_channels(model)
        if channels:
            device = next(model.transform.parameters()).device
            network.auxiliary[DECODER] = WaveletDecoder(channels).to(device)

    def phases(self, network: Network) -> list[Phase]:
        """The stages that have epochs and something to train."""
        model = _model_of(network)
        transform = tuple(model.transform.parameters())
        decoder = tuple[nn.Parameter, ...]()
        if DECODER in network.auxiliary:
            decoder = tuple(network.auxiliary[DECODER].parameters())
        teacher = None
        if ORIGINAL in network.auxiliary:
            teacher = ORIGINAL
        branches = tuple[nn.Parameter, ...]()
        for part in (model.low, model.high, model.head_low, model.head_both):
            branches += tuple(part.parameters())
        sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=self.decay)
        schedule = dropped(1 / 2, 3 / 4)
        phases = list[Phase]()
        norms = tuple[nn.Module, ...]()  # those that are fixed after stage 1
        if self.images and transform:
            adam = partial(torch.optim.Adam, lr=self.images_rate)
            both = (*transform, *decoder)
            phases.append(
                Phase(IMAGES, both, self.images, adam, by="update", looks=False, labels=False)
            )
            norms = (model.low_norm, model.high_norm)
        # With images=0 a transform that learns does so in stage 3, so stage 2 is left out too.
        if self.classes and (self.images or not transform):
            rate = partial(sgd, lr=self.rate)
            phases.append(
                Phase(CLASSES, branches, self.classes, rate, schedule, still=norms, teacher=teacher)
            )
        if self.joint:
            rate = partial(sgd, lr=self.joint_rate)
            if self.gamma:
                learning = (*transform, *branches, *decoder)
            else:
                learning = (*transform, *branches)
            phases.append(
                Phase(JOINT, learning, self.joint, rate, schedule, still=norms, teacher=teacher)
            )
        return phases

    def update(
        self, outputs: TrainingOutputs, batch: TrainingBatch, optimizer: Optimizer
    ) -> Losses:
        """A step of stage 1: encoder and decoder learn l_t, and the norms see both images."""
        model = _model_of(outputs.network)
        image = _image(outputs)
        low, high = model.transform(image)  # [B, C, H, W] -> two of [B, C, H / 2, W / 2]
        losses = self._transform_losses(outputs.network, image, low, high)
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        # A forward in training mode moves the statistics of the norms.
        with torch.no_grad():
            model.low_norm(low.detach())
            model.high_norm(high.detach())
        return {name: value.detach() for name, value in losses.items()}

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The loss of each head, and in stage 3 the parts of l_t too."""
        y = batch.labels()
        model = _model_of(outputs.network)
        low_node, sum_node = _nodes(outputs.network)
        low = outputs.logits[low_node]
        total = outputs.logits[sum_node]
        both = total - low  # head F alone
        losses = {
            "sum": self.sum_weight * self._head_loss(total, y, outputs.teacher),
            "low": self.low_weight * self._head_loss(low, y, outputs.teacher),
            "both": self.both_weight * self._head_loss(both, y, outputs.teacher),
        }
        if batch.phase == JOINT and self.gamma and DECODER in outputs.network.auxiliary:
            image = _image(outputs)
            halves = model.transform(image)
            for name, value in self._transform_losses(outputs.network, image, *halves).items():
                losses[name] = self.gamma * value
        return losses

    def _head_loss(self, logits: Tensor, y: Tensor, teacher: Tensor | None) -> Tensor:
        """Cross-entropy of logits [b, C] with the labels, and with the original's outputs."""
        hard = cross_entropy(logits, y)
        if teacher is None:
            return hard
        soft = self.temperature**2 * soft_cross_entropy(logits, teacher, self.temperature)
        return (1 - self.soft) * hard + self.soft * soft

    def _transform_losses(
        self, network: Network, image: Tensor, low: Tensor, high: Tensor
    ) -> dict[str, Tensor]:
        """The parts of l_t, each with its weight."""
        decoded = network.auxiliary[DECODER](low, high)
        losses = {
            "reconstruction": mse_loss(decoded, image),
            "energy": self.balance * high.square().mean(),
        }
        if self.anchor:
            losses["anchor"] = self.anchor * mse_loss(low, avg_pool2d(image, 2))
        return losses


def _model_of(network: Network) -> Wae:
    """The WAE of a network. Raises BadNetwork for another model, or another cut."""
    model = network.model_of(network.members[0])
    if len(network.members) > 1 or not isinstance(model, Wae):
        kind = type(model).__name__
        raise BadNetwork(f"wae trains the parameters of a model made by offramp.wae, got a {kind}")
    if not set(model.cuts) <= set(network.members[0].cuts):
        raise BadNetwork(
            "The recipe wae needs head A's logits. Use cut(model, example, at=model.cuts, "
            "exits='own')"
        )
    return model


def _nodes(network: Network) -> tuple[str, str]:
    """The node of head A and the last one."""
    member = network.members[0]
    return member.node(Wae.cuts[0]), network.topology.exits[-1]


def _encoder_channels(model: Wae) -> int:
    """Channels of an encoder's images; 0 for a transform without parameters."""
    if next(model.transform.parameters(), None) is None:
        return 0
    return model.low_norm.num_features


def _image(outputs: TrainingOutputs) -> Tensor:
    """The model's input: the rows [B, C, H, W], preprocessed."""
    member = outputs.network.members[0]
    preprocess = outputs.network.preprocess_of(member)
    (image,) = outputs.inputs.values()
    if preprocess is not None:
        image = preprocess(image)
    return image
