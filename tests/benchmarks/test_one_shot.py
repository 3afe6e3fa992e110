"""What the benchmark of one-shot search decides itself: hand-made networks, and which of them beat
a found one.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from offramp.designing.supernet import Subnet
from supernets import supernet_of

FILE = Path(__file__).parents[2] / "benchmarks" / "one_shot.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("one_shot_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_hand_made_networks_have_one_option_where_it_exists(benchmark):
    net = supernet_of()
    assert benchmark.uniform(net, "narrow?by=2") == Subnet((2, 2, 2))
    assert benchmark.uniform(net, "skip", ".2") == Subnet((0, 0, 3))
    assert benchmark.uniform(net, "low_rank") == Subnet((0, 0, 0))


def test_a_network_is_dominated_by_what_is_as_good_in_both_and_better_in_one(benchmark):
    results = {
        "small": {"accuracy": 0.8, "ms": 1.0},
        "middle": {"accuracy": 0.85, "ms": 2.0},
        "large": {"accuracy": 0.9, "ms": 4.0},
        "found, budget 0.5": {"accuracy": 0.85, "ms": 2.0},
        "found, budget 0.6": {"accuracy": 0.84, "ms": 2.0},
        "found, budget 0.7": {"accuracy": 0.89, "ms": 3.0},
        "found, budget 0.8": {"accuracy": 0.85, "ms": 2.1},
    }
    assert benchmark.dominated_by("found, budget 0.5", results) == []
    assert benchmark.dominated_by("found, budget 0.6", results) == ["middle"]
    assert benchmark.dominated_by("found, budget 0.7", results) == []
    assert benchmark.dominated_by("found, budget 0.8", results) == ["middle"]


def test_the_labels_of_the_second_task(benchmark):
    labels = benchmark.vehicle(torch.arange(10))
    assert labels.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1, 1]
