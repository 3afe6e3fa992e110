"""What the benchmark of cheaper parts computes itself: the convolution over packed bits, and its
methods.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "cheaper_parts.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("cheaper_parts_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("channels", [3, 64, 70, 130])
def test_the_convolution_over_bits_is_exact(benchmark, channels):
    draw = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, 5, 7, generator=draw)
    signs = torch.where(torch.randn(4, channels, 3, 3, generator=draw) >= 0, 1.0, -1.0)
    weight = benchmark.bits(signs.numpy().transpose(2, 3, 0, 1))
    found = benchmark.xor_convolution(x.numpy(), weight)
    assert np.array_equal(found.transpose(0, 3, 1, 2), benchmark._dense_signs(x, signs).numpy())


def test_every_method_converts_a_resnet(benchmark):
    from offramp.building.converting import convert
    from offramp.building.factories import make_model

    model = make_model("offramp:resnet20")
    for name, layers in benchmark.METHODS.items():
        if name.startswith("pruned"):
            continue  # needs Torch-Pruning
        made = convert(model, layers)
        assert made(torch.zeros(2, 3, 32, 32)).shape == (2, 10), name
