"""WAE: a model that reads an image as two of half the size, of low and of high frequencies.

Chen, Lin, Zuo, Luo and Zhang, Learning a Wavelet-like Auto-Encoder to Accelerate Deep Neural
Networks, AAAI 2018, arXiv 1712.07493. The model itself reads the low image, for about a quarter of
its cost; a thin copy reads the high one; the answer is the sum of two heads, A on the low features
and F on both. `wae_vgg16` is the graph of the authors' file for Caffe. They published no other:
`wae` makes the like of any classifier that ends in a linear layer. The recipe `wae` trains all of
it.

Head A comes before anything of the thin copy is computed. So a WAE is cut at `head_low`, with head
A's answer as an exit, and the high-frequency branch runs only for rows that are not sure:

    model = off.wae(resnet56, example)
    net = off.cut(model, example, at=model.cuts, exits="own")

Where we differ: pooling with ceil_mode, as Caffe has it; the features of both branches are
concatenated as vectors, which is the authors' concatenation of channels in another order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.find import shelved
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.preprocess import Preprocess
from offramp.layers.wavelet import Wavelet97, WaveletEncoder
from offramp.models._thin import thinned
from offramp.networks.wrappers import unwrapped

__all__ = ["wae", "wae_resnet50", "wae_vgg16"]

TRANSFORMS = ("encoder", "wavelet")
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
        """The sum of both heads' logits."""
        low, high = self.transform(x)  # each [B, ., H/2, W/2]
        features = self.low(self.low_norm(low))
        sure = self.head_low(features)
        thin = self.high(self.high_norm(high))
        both = torch.cat([features.flatten(1), thin.flatten(1)], 1)
        logits: Tensor = sure + self.head_both(both)
        return logits


def wae_vgg16(classes: int = 1000) -> Wae:
    """VGG-16 of images 224 x 224 as the authors' file has it: 53.3 M parameters, 4.38 G MACs."""
    return Wae(
        WaveletEncoder(3),
        _vgg(1),
        _vgg(4),
        _head(512 * 4 * 4, 1024, classes),
        _head((512 + 128) * 4 * 4, 2048, classes),
    )


def wae_resnet50(classes: int = 1000, thin: int = 4) -> Wae:
    """ResNet-50 of images 224 x 224; the authors' own was never published."""
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
    """A WAE of a classifier: a copy of it reads the low image, its last layer is head A.

    Args:
        model: a classifier of images that ends in a linear layer and takes images of half the size,
            such as one with global pooling; or the name of one on the shelf `models`, with its
            arguments as `options`. It stays as it is.
        example: images [B, C, H, W] as the model takes them, H and W even. None: of three channels
            and `size`.
        size: H and W where there is no example.
        thin: by how much the thin copy's layers are narrower than the model's.
        transform: "encoder", which is learned, or "wavelet", the fixed 9/7 one (a control).
        start: of the encoder: "mean" (ours), whose low image is the mean over 2x2 pixels at first,
            or "xavier" (the authors').
        high: what gives features [B, F] of the high image, instead of a thin copy: [B, C, H/2, W/2]
            from an encoder, three times as many channels from the wavelet.
        options: arguments of a model that is named.

    Returns:
        The model in eval mode, on the device and in the type of the one that was given. The thin
        copy, the transform and head F are new and must be trained.

    Raises:
        InvalidArgument: a number or a word out of range, options for a model that is not named.
        BadNetwork: a model that does not end in a linear layer, does not take half the size, or
            cannot be made thin.
    """
    if thin < 1:
        raise InvalidArgument(f"thin must be 1 or more, got {thin}")
    if transform not in TRANSFORMS:
        raise InvalidArgument(
            f"transform must be one of {', '.join(TRANSFORMS)}, got {transform!r}"
        )
    if isinstance(model, str):
        whole: nn.Module = shelved("models", model)(**options)
    elif options:
        raise InvalidArgument(
            f"got {', '.join(options)}, which only a model that is given by name can take"
        )
    elif isinstance(model, nn.Module):
        whole = copy.deepcopy(unwrapped(model)[0])
    else:
        raise InvalidArgument(
            f"the model must be a torch.nn.Module or the name of one, got a {type(model).__name__}"
        )
    value = next((value for value in whole.parameters()), torch.zeros(()))
    x = torch.zeros(2, 3, size, size) if example is None else example[:2]
    x = x.to(value)
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise InvalidArgument(
            f"a WAE takes images [B, C, H, W] with even H and W, got {list(x.shape)}"
        )
    low, head_low = _without_head(whole.eval(), x)
    channels = x.shape[1]
    split: nn.Module = Wavelet97(channels)
    if transform == "encoder":
        split = WaveletEncoder(channels, start)
    split.to(value)
    with torch.no_grad():
        images = split(x)
    shapes = images[0].shape[1], images[1].shape[1]
    advice = "the model does not take images of half the size"
    features = _features(low, images[0], advice)
    if features != head_low.in_features:
        raise BadNetwork(
            f"{advice}: its last layer reads {head_low.in_features} features, got {features}"
        )
    if high is None:
        high = thinned(low, thin, channels, shapes[1]).to(value).eval()
        advice = f"the model cannot be made {thin} times thinner; give high="
    else:
        advice = "the module given as high= does not take the high image"
    others = _features(high, images[1], advice)
    head_both = nn.Linear(features + others, head_low.out_features)
    found = Wae(split, low, high, head_low, head_both, shapes)
    return found.to(value).eval()


def _without_head(model: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Linear]:
    """A model without its last layer, in place, and that layer. Raises BadNetwork unless linear."""
    ran = list[tuple[str, nn.Module, Tensor]]()
    handles = []
    for name, part in model.named_modules():
        if name and not list(part.children()):
            handles.append(part.register_forward_hook(_noting(name, ran)))
    try:
        with torch.no_grad():
            logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    last = [one for one in ran if isinstance(logits, Tensor) and one[2] is logits]
    if not last or not isinstance(last[-1][1], nn.Linear) or logits.dim() != 2:
        raise BadNetwork(
            "the model does not end in a linear layer of its own; WAE needs its features"
        )
    name, head, _ = last[-1]
    assert isinstance(head, nn.Linear)
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, nn.Identity())
    return model, head


def _noting(name: str, ran: list[tuple[str, nn.Module, Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        ran.append((name, module, output))

    return hook


def _features(branch: nn.Module, image: Tensor, advice: str) -> int:
    """How many features a branch gives for a row. Raises BadNetwork."""
    try:
        with torch.no_grad():
            found = branch(image)
    except Exception as problem:  # whatever the user's code raises
        why = str(problem).strip().partition("\n")[0]
        raise BadNetwork(f"{advice} ({why})") from problem
    if not isinstance(found, Tensor) or found.shape[0] != image.shape[0]:
        raise BadNetwork(f"{advice}: it must give one tensor of features, [B, ...]")
    return found[0].numel()


def _vgg(thin: int) -> nn.Sequential:
    """The convolutions of VGG-16, 1 / `thin` as wide: 112 x 112 pixels -> [B, 512 / thin, 4, 4]."""
    layers = list[nn.Module]()
    before = 3
    for width in PLAN:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        layers += [nn.Conv2d(before, width // thin, 3, padding=1), nn.ReLU()]
        before = width // thin
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
