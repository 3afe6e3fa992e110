"""Small files of every format, made anew for each session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from written_files import CLASSES, png, write_idx, write_parquet

N = 25


@pytest.fixture(scope="session")
def xy() -> tuple[np.ndarray, np.ndarray]:
    """Colour images uint8 [25, 3, 32, 32] and labels below 3."""
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (N, 3, 32, 32), dtype=np.uint8), draw.integers(0, 3, N)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, xy: tuple[np.ndarray, np.ndarray]) -> Path:
    """A folder with the same rows as cifar10/, binary/, folder/, rows.npz; and MNIST's files in
    mnist/.
    """
    root = tmp_path_factory.mktemp("place")
    x, y = xy
    write_parquet(root / "cifar10" / "test-00000-of-00001.parquet", x, y)
    write_parquet(root / "cifar10" / "train-00000-of-00002.parquet", x[::-1], y[::-1], group=4)
    write_parquet(root / "cifar10" / "train-00001-of-00002.parquet", x, y)
    binary = root / "binary" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    records = np.concatenate([y[:, None].astype(np.uint8), x.reshape(N, -1)], axis=1)
    for name in ["test_batch", *(f"data_batch_{number}" for number in range(1, 6))]:
        (binary / f"{name}.bin").write_bytes(records.tobytes())
    for i in np.argsort(y, kind="stable"):
        folder = root / "folder" / CLASSES[y[i]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03}.png").write_bytes(png(x[i]))
    np.savez(root / "rows.npz", x=x, y=y)
    (root / "mnist").mkdir()
    grey = np.random.default_rng(1).integers(0, 256, (N, 28, 28))
    write_idx(root / "mnist" / "t10k-images-idx3-ubyte.gz", 2051, grey)
    write_idx(root / "mnist" / "t10k-labels-idx1-ubyte.gz", 2049, y)
    write_idx(root / "mnist" / "train-images-idx3-ubyte", 2051, grey)
    write_idx(root / "mnist" / "train-labels-idx1-ubyte", 2049, y)
    return root
