"""The real CIFAR-10 and MNIST, where `--data DIR` has them."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.data.rows import digests_of, fingerprint_of, rows


def mean_of(data, size=500):
    return sum(float(batch.x.sum(dtype=np.int64)) for batch in data.batches(size)) / len(data)


def test_cifar10(data_dir):
    data = rows(f"cifar10:{data_dir}")
    assert len(data) == 10_000
    assert data.labels[:3].tolist() == [3, 8, 8]
    assert np.bincount(data.labels).tolist() == [1000] * 10
    assert data.class_names[3] == "cat"
    part = data.select(slice(1000, 2000))
    (first, *_) = part.batches(100)
    assert first.x.shape == (100, 3, 32, 32)
    assert first.row[0] == 1000
    assert len(rows(f"cifar10/train:{data_dir}")) == 50_000


@pytest.mark.slow
def test_cifar10_pixels(data_dir):
    data = rows(f"cifar10:{data_dir}")
    assert mean_of(data) / 3072 == pytest.approx(121.529155, abs=1e-5)
    assert data.fingerprint == "fa95c7ef4352d9d1"
    first = [digests_of(batch.x, form=1) for batch in data.batches(1000)]
    # what files of the first edition hold
    assert fingerprint_of(np.concatenate(first)) == "b8ceb53e1e0f51d7"


def test_mnist(data_dir):
    data = rows(f"mnist:{data_dir}")
    assert data.labels[:3].tolist() == [7, 2, 1]
    assert mean_of(data) / 784 / 255 == pytest.approx(0.1325, abs=1e-4)
    train = rows(f"mnist/train:{data_dir}")
    assert (len(data), len(train), train.labels[0]) == (10_000, 60_000, 5)
    assert mean_of(train) / 784 / 255 == pytest.approx(0.1307, abs=1e-4)
