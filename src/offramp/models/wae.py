"""WAE: a model that splits an image into two of half the size, one with low and one with high
frequencies.

Chen, Lin, Zuo, Luo and Zhang, Learning a Wavelet-like Auto-Encoder to Accelerate Deep Neural
Networks, AAAI 2018, arXiv 1712.07493. The model itself reads the low image, for about a quarter of
its cost. A thin copy reads the high image. The logits are the sum of two heads: A on the low
features, and F on both. `wae_vgg16` is the graph of the authors' file for Caffe, the only one that
they published. `wae` does the same with any classifier that ends in a linear layer. The recipe
`wae` trains it.

Head A runs before the thin copy. So a WAE can be cut at `head_low`, with the logits of head A as an
exit. The high-frequency branch then runs only for rows that are not sure:

    model = off.wae(resnet56, example)
    net = off.cut(model, example, at=model.cuts, exits="own")

Where we differ: poolings use ceil_mode, as Caffe does. The features of both branches are
concatenated as vectors, which is the authors' concatenation of channels in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import require_count
from offramp._support.find import shelved
from offramp._support.sentences import first_line
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.preprocess import Preprocess
from offramp.layers.wavelet import Wavelet97, WaveletEncoder
from offramp.models._thin import thinned
from offramp.networks.inputs import as_input
from offramp.networks.wrappers import deep_copy, unwrapped

__all__ = ["wae", "wae_resnet50", "wae_vgg16"]

TRANSFORMS = ("encoder", "wavelet")
# VGG-16: the widths of its convolutions, and its poolings
PLAN = (
    64,
    64,
    "pool",
    128,
    128,
    "pool",
    256,
    256,
    256,
    "pool",
    512,
    512,
    512,
    "pool",
    512,
    512,
    512,
    "pool",
)


def preprocess() -> Preprocess:
    """Normalisation by ImageNet's constants; images keep their size."""
    return Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Wae(nn.Module):
    """Images [B, C, H, W] -> logits [B, classes] = A(low) + F(low, high).

    Args:
        transform: of an image into two of half the size.
        low: features of the low image, [B, ...].
        high: features of the high image, [B, ...], at a small part of the cost.
        head_low: head A, from the features of the low image.
        head_both: head F, from the flat features of both.
        channels: those of the low and of the high image.
    """

    cuts = ("head_low",)

    def __init__(
        self,
        transform: nn.Module,
        low: nn.Module,
        high: nn.Module,
        head_low: nn.Module,
        head_both: nn.Module,
        channels: tuple[int, int] = (3, 3),
    ) -> None:
        super().__init__()
        self.transform = transform
        self.low_norm = nn.BatchNorm2d(channels[0], affine=False)
        self.high_norm = nn.BatchNorm2d(channels[1], affine=False)
        self.low = low
        self.high = high
        self.head_low = head_low
        self.head_both = head_both

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> the sum of both heads' logits, [B, classes]."""
        low, high = self.transform(x)  # [B, ., H/2, W/2] each
        low_features = self.low(self.low_norm(low))
        low_logits = self.head_low(low_features)
        high_features = self.high(self.high_norm(high))
        features = torch.cat([low_features.flatten(1), high_features.flatten(1)], 1)
        logits: Tensor = low_logits + self.head_both(features)
        return logits


def wae_vgg16(classes: int = 1000) -> Wae:
    """VGG-16 for images of 224 x 224, as in the authors' file: 53.3 M parameters, 4.38 G MACs."""
    return Wae(
        WaveletEncoder(3),
        _vgg(1),
        _vgg(4),
        _head(512 * 4 * 4, 1024, classes),
        _head((512 + 128) * 4 * 4, 2048, classes),
    )


def wae_resnet50(classes: int = 1000, thin: int = 4) -> Wae:
    """ResNet-50 for images of 224 x 224. The authors' own was never published."""
    return wae("resnet50", size=224, thin=thin, start="xavier", classes=classes)


def wae(
    model: nn.Module | str,
    example: Tensor | None = None,
    *,
    size: int = 32,
    thin: int = 4,
    transform: str = "encoder",
    start: str = "mean",
    high: nn.Module | None = None,
    **options: Any,
) -> Wae:
    """Make a WAE of a classifier. A copy of it reads the low image, and its last layer is head A.

    Args:
        model: a classifier of images that ends in a linear layer and works on images of half the
            size, for example one with global pooling; or the name of one on the shelf `models`. It
            is not changed.
        example: images [B, C, H, W] as the model takes them, H and W even. None for images of three
            channels and of `size`.
        size: H and W without an example.
        thin: the divisor of the thin copy's widths.
        transform: "encoder", which is learned, or "wavelet", the fixed 9/7 one (a baseline).
        start: initial weights of the encoder: "mean" (ours), whose low image is at first the mean
            over 2x2 pixels, or "xavier" (the authors').
        high: a module that turns the high image into features [B, F], instead of a thin copy. The
            high image is [B, C, H/2, W/2] from an encoder, and has three times as many channels
            from the wavelet.
        options: arguments of a model on the shelf.

    Returns:
        The WAE in eval mode, on the model's device and in its dtype. The thin copy, the transform
        and head F are new and must be trained.

    Raises:
        InvalidArgument: an argument is out of range, or there are options for a module.
        BadNetwork: the model fails on the example, does not end in a linear layer, does not work
            on half the size, or cannot be made thin.
        BadData: the example is no tensor or array.
    """
    # 1. Get the model, and two example images on its device.
    require_count("thin", thin)
    require_count("size", size)
    if transform not in TRANSFORMS:
        raise InvalidArgument(
            f"transform must be one of {', '.join(TRANSFORMS)}, got {transform!r}"
        )
    if isinstance(model, str):
        classifier: nn.Module = shelved("models", model)(**options)
    elif options:
        raise InvalidArgument(
            f"model must be the name of one for options, got a {type(model).__name__} and "
            f"{', '.join(options)}"
        )
    elif isinstance(model, nn.Module):
        classifier = deep_copy(unwrapped(model)[0])
    else:
        raise InvalidArgument(
            f"model must be a torch.nn.Module or the name of one, got a {type(model).__name__}"
        )
    like = next(classifier.parameters(), torch.zeros(()))  # its device and dtype
    if example is None:
        example = torch.zeros(2, 3, size, size)
    x = as_input(example)[:2].to(like)
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise InvalidArgument(
            f"example must be images [B, C, H, W] with even H and W, got {list(x.shape)}"
        )

    # 2. Take off the last layer, which becomes head A, and split the images.
    low, head_low = _without_head(classifier.eval(), x)
    channels = x.shape[1]
    split: nn.Module = Wavelet97(channels)
    if transform == "encoder":
        split = WaveletEncoder(channels, start)
    split.to(like)
    with torch.no_grad():
        low_image, high_image = split(x)
    low_channels = low_image.shape[1]
    high_channels = high_image.shape[1]

    # 3. Check that the model works on the low image, and make the branch for the high image.
    problem = "the model does not work on images of half the size"
    low_features = _features(low, low_image, problem)
    if low_features != head_low.in_features:
        raise BadNetwork(
            f"{problem}: its last layer reads {head_low.in_features} features, got {low_features}"
        )
    if high is None:
        high = thinned(low, thin, channels, high_channels).to(like).eval()
        problem = f"the model cannot be made {thin} times thinner, use high= instead"
    else:
        problem = "the module high= does not work on the high image"
    high_features = _features(high, high_image, problem)

    # 4. Join both branches by head F.
    head_both = nn.Linear(low_features + high_features, head_low.out_features)
    joined = Wae(split, low, high, head_low, head_both, (low_channels, high_channels))
    return joined.to(like).eval()


def _without_head(model: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Linear]:
    """Replace the last layer of a model by an identity, in place. Return the model and this layer.
    Raise BadNetwork if it is not linear, or if the model fails on the images.
    """
    # Run the model, and find the layer whose output is the model's own.
    runs = list[tuple[str, nn.Module, Tensor]]()
    handles = []
    for name, module in model.named_modules():
        if name and not list(module.children()):
            handles.append(module.register_forward_hook(_noting(name, runs)))
    try:
        with torch.no_grad():
            logits = model(x)
    except (RuntimeError, ValueError, IndexError, TypeError) as problem:
        why = first_line(problem)
        raise BadNetwork(
            f"the model fails on images {list(x.shape)} ({why}). Give example=, some images as the "
            f"model takes them"
        ) from problem
    finally:
        for handle in handles:
            handle.remove()
    head_name = ""
    head: nn.Module | None = None
    for name, module, output in runs:
        if output is logits:
            head_name = name
            head = module
    if not isinstance(head, nn.Linear) or logits.dim() != 2:
        raise BadNetwork("the model must end in a linear layer, whose features a WAE needs")
    parent, _, key = head_name.rpartition(".")
    setattr(model.get_submodule(parent), key, nn.Identity())
    return model, head


def _noting(name: str, runs: list[tuple[str, nn.Module, Tensor]]) -> Callable[..., None]:
    """A forward hook that appends the name, the module and its output to a list."""

    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        runs.append((name, module, output))

    return hook


def _features(branch: nn.Module, image: Tensor, what: str) -> int:
    """The number of features of a branch for a row. `what` begins the message of BadNetwork."""
    try:
        with torch.no_grad():
            features = branch(image)
    except Exception as problem:  # whatever the user's code raises
        why = first_line(problem)
        raise BadNetwork(f"{what} ({why})") from problem
    if not isinstance(features, Tensor) or features.shape[0] != image.shape[0]:
        raise BadNetwork(f"{what}: it must give one tensor of features, [B, ...]")
    return features[0].numel()


def _vgg(thin: int) -> nn.Sequential:
    """The convolutions of VGG-16 with widths divided by `thin`: [B, 3, 112, 112] -> [B, 512 / thin,
    4, 4].
    """
    layers = list[nn.Module]()
    width_in = 3
    for width in PLAN:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        layers += [nn.Conv2d(width_in, width // thin, 3, padding=1), nn.ReLU()]
        width_in = width // thin
    return nn.Sequential(*layers)


def _head(features: int, width: int, classes: int) -> nn.Sequential:
    """Two hidden layers with dropout, and one for the classes."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(width, classes),
    )
