"""Packed layers: bytes on disk, measured, and equal outputs after they are loaded."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import offramp as off
from offramp.building.converting import conversions_of, convert, spec_with
from offramp.building.factories import make_model
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.binary import Binary
from offramp.layers.packed import Packed, packed_bits, unpacked_bits
from offramp.layers.ternary import Ternary
from offramp.testing import check_layer
from small import seeded

X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONVERTED = "layer*"
LEAST = {"ternary": 14, "binary": 25}


def resnet(depth=20):
    return seeded(lambda: make_model(f"offramp:resnet{depth}"), 0)


@pytest.mark.parametrize("bits", [1, 2])
def test_bits_and_back(bits):
    for count in (1, 7, 8, 33):
        values = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
        code = packed_bits(values, bits)
        assert len(code) == -(-count * bits // 8)
        assert torch.equal(unpacked_bits(code, bits, count), values)


@pytest.mark.parametrize("kind", [Ternary, Binary])
@pytest.mark.parametrize(
    "dense", [nn.Conv2d(6, 7, 3, groups=1), nn.Conv2d(6, 8, 3, 2, 1, groups=2, bias=False)]
)
def test_it_gives_what_the_layer_gave(kind, dense):
    layer = kind.from_layer(dense.eval())
    with torch.no_grad():
        if kind is Binary:
            layer.shift.normal_()
    check_layer(Packed, layer, (6, 8, 8))
    x = torch.randn(2, 6, 8, 8)
    made = Packed.from_layer(layer)
    if kind is Ternary:
        assert torch.equal(made.weight, layer.used())
        assert torch.equal(made(x), layer(x))
    else:
        with torch.no_grad():
            for value in (layer.scale, layer.bias, layer.shift):
                value.copy_(value.half().float())
        assert torch.allclose(Packed.from_layer(layer)(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["ternary", "binary"])
@pytest.mark.parametrize("depth", [20, 56])
def test_bytes_on_disk_and_equal_outputs_when_loaded(kind, depth, tmp_path):
    model = resnet(depth)
    soft = convert(model, {CONVERTED: kind})
    made = convert(soft, {CONVERTED: "packed"})
    names = [name for name, module in made.named_modules() if isinstance(module, Packed)]
    assert len(names) == depth - 2
    dense = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in names}
    packed = {key: value for key, value in made.state_dict().items() if key.endswith(".code")}
    save_file(dense, str(tmp_path / "dense.safetensors"))
    save_file(packed, str(tmp_path / "packed.safetensors"))
    before = (tmp_path / "dense.safetensors").stat().st_size
    after = (tmp_path / "packed.safetensors").stat().st_size
    assert after * LEAST[kind] <= before

    spec = spec_with(f"offramp:resnet{depth}", conversions_of(made, model))
    save_file(made.state_dict(), str(tmp_path / "model.safetensors"))
    again = make_model(spec, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(again(X), made(X))
    assert load_file(str(tmp_path / "model.safetensors")).keys() == made.state_dict().keys()


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_a_network_with_packed_layers_is_saved_and_loaded(kind, tmp_path):
    model = resnet()
    made = convert(convert(model, {"layer3.*": kind}), {"layer3.*": "packed"})
    spec = spec_with("offramp:resnet20", conversions_of(made, model))
    specs = {"small": spec, "large": "offramp:resnet20"}
    net = off.ladder({"small": made, "large": model}, sources=specs).eval()
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(again(X)[0], net(X)[0])


def test_what_it_refuses():
    with pytest.raises(
        BadNetwork, match=r"saves nothing here: .0.: packed replaces Ternary and Binary"
    ):
        convert(nn.Sequential(nn.Linear(2, 2)), {"0": "packed"})
    with pytest.raises(InvalidArgument, match="of must be ternary or binary"):
        Packed.from_layer(nn.Linear(2, 2), of="quaternary")
    with pytest.raises(BadNetwork, match="got Linear"):
        Packed.from_layer(nn.Linear(2, 2))


def test_a_binary_linear_layer_on_maps_with_the_channels_last():
    layer = Binary.from_layer(seeded(lambda: nn.Linear(6, 4), 0)).eval()
    with torch.no_grad():
        layer.shift.copy_(torch.linspace(-1, 1, 6))
    packed = Packed.from_layer(layer)
    x = torch.randn(2, 6, 5, 6)
    assert torch.allclose(packed(x), layer(x), atol=1e-2)
    assert torch.equal(packed(x)[:, 0], packed(x[:, 0]))
