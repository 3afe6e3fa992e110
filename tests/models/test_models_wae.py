"""WAE: the authors' graph of VGG-16 by its sizes and costs, WAEs of other models, and the lazy high
branch.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d

import offramp as off
from offramp.building.factories import make_model, preprocess_of
from offramp.errors import BadData, BadNetwork, InvalidArgument
from offramp.exits.whole import Own
from offramp.layers.wavelet import Wavelet97
from offramp.models.resnet50 import resnet50
from offramp.models.wae import Wae, wae, wae_resnet50, wae_vgg16
from offramp.runtime.measuring import macs
from small import images_of, seeded, sizes

GIGA = 1e9


def on_meta(make):
    """A model without memory for its weights: for sizes and costs of large ones."""
    with torch.device("meta"):
        return make().eval()


def count(module):
    return sum(value.numel() for value in module.parameters())


class Tiny(nn.Module):
    """A classifier of images of one channel with two convolutions and global pooling."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3)
        )
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        return self.fc(self.drop(self.body(x).relu().mean((2, 3))))


def tiny():
    return seeded(Tiny, 0).eval()


def lazy_net(**options):
    model = seeded(lambda: wae(tiny(), images_of(2), thin=2, **options), 1)
    return off.cut(model, images_of(4), at=model.cuts, exits="own")


def test_vgg16_has_the_costs_of_the_released_graph():
    model = on_meta(wae_vgg16)
    x = torch.zeros(1, 3, 224, 224, device="meta")
    low, high = model.transform(x)
    assert macs(lambda: model(x)) / GIGA == pytest.approx(4.382, abs=5e-4)
    assert count(model) / 1e6 == pytest.approx(53.3, abs=0.05)
    assert macs(lambda: model.low(low)) / GIGA == pytest.approx(3.837, abs=5e-4)
    assert macs(lambda: model.high(high)) / GIGA == pytest.approx(0.244, abs=5e-4)
    heads = macs(lambda: model.head_low(model.low(low))) - macs(lambda: model.low(low))
    assert heads / GIGA == pytest.approx(0.0105, abs=5e-5)


def test_vgg16_has_the_sizes_of_the_released_graph():
    model = on_meta(wae_vgg16)
    half = torch.zeros(1, 3, 112, 112, device="meta")
    for branch, thin in ((model.low, 1), (model.high, 4)):
        layers = sizes(branch, lambda branch=branch: branch(half))
        pools = [shape for kind, shape in layers if kind == "MaxPool2d"]
        sides = (56, 28, 14, 7, 4)
        widths = (64, 128, 256, 512, 512)
        assert pools == [
            (width // thin, side, side) for width, side in zip(widths, sides, strict=True)
        ]
        kinds = [shape[0] * thin for kind, shape in layers if kind == "Conv2d"]
        assert kinds == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    linear = [
        (part.in_features, part.out_features)
        for part in model.head_low
        if isinstance(part, nn.Linear)
    ]
    assert linear == [(8192, 1024), (1024, 1024), (1024, 1000)]
    linear = [
        (part.in_features, part.out_features)
        for part in model.head_both
        if isinstance(part, nn.Linear)
    ]
    assert linear == [(10240, 2048), (2048, 2048), (2048, 1000)]


def test_the_answer_is_the_sum_of_both_heads_on_whitened_images():
    model = seeded(lambda: wae(tiny(), images_of(2)), 0)
    with torch.no_grad():
        model.low_norm.running_mean.fill_(0.5)
        model.high_norm.running_var.fill_(4.0)
    x = images_of(5)
    low, high = model.transform(x)
    low = (low - 0.5) / (1 + 1e-5) ** 0.5
    high = high / (4 + 1e-5) ** 0.5
    features = model.low(low)
    thin = model.high(high)
    expected = model.head_low(features) + model.head_both(torch.cat([features, thin], 1))
    torch.testing.assert_close(model(x), expected)


def test_head_a_of_a_new_wae_is_the_model_on_half_the_pixels():
    plain = tiny()
    model = wae(plain, images_of(2))
    x = images_of(5)
    with torch.no_grad():
        model.low_norm.running_var.fill_(1 - 1e-5)
        got = model.head_low(model.low(model.low_norm(model.transform(x)[0])))
        torch.testing.assert_close(got, plain(avg_pool2d(x, 2)), atol=1e-5, rtol=1e-5)
    assert isinstance(plain.fc, nn.Linear)  # what was given stays as it is
    assert isinstance(model.low.fc, nn.Identity)


def test_the_thin_copy_is_narrower_everywhere():
    model = wae(make_model("offramp:resnet20"), torch.zeros(2, 3, 32, 32), thin=4)
    widths = [part.out_channels for part in model.low.modules() if isinstance(part, nn.Conv2d)]
    assert [
        part.out_channels * 4 for part in model.high.modules() if isinstance(part, nn.Conv2d)
    ] == widths
    x = torch.zeros(1, 3, 16, 16)
    assert model.high(x).shape == (1, 16)
    first = 16 * 3 * 9 * 256  # of three channels in both
    costs = [macs(lambda branch=branch: branch(x)) for branch in (model.low, model.high)]
    assert costs[1] - first / 4 == pytest.approx((costs[0] - first) / 16)
    assert model.head_both.in_features == 64 + 16


def test_resnet50_is_that_of_the_papers_and_has_torchvisions_names():
    model = on_meta(resnet50)
    x = torch.zeros(1, 3, 224, 224, device="meta")
    assert count(model) == 25_557_032
    assert macs(lambda: model(x)) / GIGA == pytest.approx(4.09, abs=5e-3)
    names = set(model.state_dict())
    assert {"layer1.0.downsample.1.running_var", "layer4.2.bn3.weight", "fc.bias"} <= names
    assert len(names) == 320


def test_a_wae_of_resnet50_costs_about_a_third():
    model = wae_resnet50(classes=10)
    assert model.head_both.in_features == 2048 + 512
    x = torch.zeros(1, 3, 224, 224)
    assert 0.3 < macs(lambda: model(x)) / (4.089 * GIGA) < 0.37


def test_a_wae_by_name():
    model = make_model("offramp:wae?model=resnet20&classes=5&thin=2")
    assert isinstance(model, Wae)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert preprocess_of("offramp:wae?model=resnet20").size is None


def test_a_model_is_taken_out_of_its_wrapper():
    model = wae(nn.DataParallel(tiny()).eval(), images_of(2))
    assert isinstance(model.low, Tiny)


def test_the_wavelet_control_reads_four_bands():
    model = wae(tiny(), images_of(2), transform="wavelet")
    assert isinstance(model.transform, Wavelet97)
    assert next(model.high.parameters()).shape[1] == 3  # of one channel
    assert model(images_of(5)).shape == (5, 3)


def test_a_thin_copy_of_the_users_own():
    own = nn.Sequential(nn.Flatten(), nn.Linear(16, 7))
    model = wae(tiny(), images_of(2), high=own)
    assert model.high is own
    assert model.head_both.in_features == 12 + 7


class Fixed(nn.Module):
    """Takes images of one size alone."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Scaled(Tiny):
    """Has a parameter of its own, of which nothing says how it becomes thinner."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(12, 1, 1))

    def forward(self, x):
        return self.fc((self.body(x) * self.scale).mean((2, 3)))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: wae(nn.Sequential(Tiny(), nn.Softmax(1)).eval(), images_of(2)),
            BadNetwork,
            "end in a linear",
        ),
        (
            lambda: wae(Fixed(), images_of(2)),
            BadNetwork,
            "does not work on images of half the size",
        ),
        (
            lambda: wae(Scaled().eval(), images_of(2), thin=2),
            BadNetwork,
            "cannot be made 2 times thinner|Scaled",
        ),
        (
            lambda: wae(tiny(), images_of(2)[..., :7]),
            InvalidArgument,
            r"even H and W, got \[2, 1, 8, 7\]",
        ),
        (lambda: wae([tiny()], images_of(2)), InvalidArgument, "or the name of one, got a list"),
        (
            lambda: wae(tiny(), images_of(2), thin=0),
            InvalidArgument,
            "thin must be a whole number of at least 1, got 0",
        ),
        (
            lambda: wae(tiny(), images_of(2), transform="haar"),
            InvalidArgument,
            "encoder, wavelet, got 'haar'",
        ),
        (
            lambda: wae(tiny(), images_of(2), classes=5),
            InvalidArgument,
            "must be the name of one for options, got a .* and classes",
        ),
        (
            lambda: wae(tiny(), images_of(2), high=nn.Linear(5, 5)),
            BadNetwork,
            "high= does not work on the high image",
        ),
    ],
)
def test_what_cannot_be_made_a_wae_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_the_high_branch_is_lazy():
    net = lazy_net()
    assert net.topology.exits == ("head_low", "backbone")
    assert isinstance(net.exit_of("head_low"), Own)
    x = images_of(40)
    trace = off.record(net, x, timed=False, progress=False)
    model = net.backbone
    both = macs(lambda: model(x[:2])) / 2
    image = model.transform(x[:2])[1]
    high = macs(lambda: model.high(image)) / 2 + model.head_both.weight.numel()
    cost = {name: trace.columns[f"cost/segment/{name}"][0] for name in net.topology.exits}
    assert cost == {"head_low": both - high, "backbone": high}
    plan = off.Plan.by_hand({"head_low": float(np.median(trace.columns["score/head_low"]))})
    y = off.run(net, plan, x)
    assert y.exit.bincount().tolist() == [20, 20]
    chosen = torch.stack(net(x)).detach()[y.exit.clone(), torch.arange(40)]
    torch.testing.assert_close(y.logits, chosen, atol=1e-5, rtol=1e-5)
    answers, seen = off.open(net, plan).observed(x[y.exit == 0], 0.0)
    assert answers.exit.tolist() == [0] * 20
    assert not seen.ran["backbone"].any()


def test_a_certified_lazy_wae_is_exported_and_runs_without_us(tmp_path):
    model = seeded(lambda: wae(tiny(), images_of(2), thin=2), 1)
    net = off.cut(model, images_of(4), at=model.cuts, exits="own")
    x = images_of(600, 5)
    y = net(x)[-1].argmax(1)
    trace = off.record(net, (x, y), timed=False, progress=False)
    plan = off.calibrate(trace, risk="disagreement", at_most=0.2)
    assert plan.promise is not None
    pytest.importorskip("onnxruntime")
    off.export(net, plan, tmp_path / "out")
    np.save(tmp_path / "x.npy", x[:50].numpy())
    code = "import numpy as np, run; np.savez('y.npz', **run.run(np.load('../x.npy')))"
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", check=True, capture_output=True
    )
    found = np.load(tmp_path / "out" / "y.npz")
    ours = off.run(net, plan, x[:50])
    assert (found["exit"] == ours.exit.numpy()).all()
    np.testing.assert_allclose(found["logits"], ours.logits.numpy(), atol=1e-4)


def test_a_trained_wae_is_saved_and_loaded_by_its_name(tmp_path):
    model = make_model("offramp:wae?model=resnet20")
    net = off.cut(
        model,
        torch.zeros(4, 3, 32, 32),
        at=model.cuts,
        exits="own",
        spec="offramp:wae?model=resnet20",
    )
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net")
    assert again.fingerprint() == net.fingerprint()


def test_a_model_that_fails_on_the_example_is_refused():
    """Without an example the images are of three channels and 32 pixels."""
    layers = [nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    gray = seeded(lambda: nn.Sequential(*layers), 0).eval()
    says = r"the model fails on images \[2, 3, 32, 32\] .*Give example="
    with pytest.raises(BadNetwork, match=says):
        wae(gray)
    with pytest.raises(BadNetwork, match=says):
        wae(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval())
    images = np.zeros((2, 1, 8, 8), np.float32)
    assert wae(gray, images)(torch.zeros(3, 1, 8, 8)).shape == (3, 3)
    with pytest.raises(BadData, match="expected a tensor or an array"):
        wae(gray, "digits")
    with pytest.raises(InvalidArgument, match="size must be"):
        wae(gray, size=-2)
