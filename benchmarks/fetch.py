"""Fetch the public data and weights that the benchmarks use.

    python benchmarks/fetch.py DIR [cifar10|mnist|weights|all]

Afterwards `cifar10:DIR`, `mnist:DIR` and DIR/weights/cifar10_resnet{20,32,56}.safetensors are
there. Every download is checked against a published checksum before it takes its place; what is
there already is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

# Internal: files are written whole, as the package writes them.
from offramp._support.files import read_tensors, replacing, write_tensors
from offramp.errors import BadFile, OfframpError

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}

# Yerlan Idelbayev's CIFAR-10 ResNets; the SHA-256 of each file begins with the digits in its name.
WEIGHTS = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/d5489e89/pretrained_models/"
CHECKPOINTS = {"resnet20": "12fca82f", "resnet32": "d509ac18", "resnet56": "4bfd9763"}
# BSD-2-Clause, kept with any copy
NOTICE = Path(__file__).parent.parent / "licenses" / "pytorch_resnet_cifar10.txt"


def download(url: str, target: Path, algorithm: str, expected: str) -> None:
    """Fetch `url` to `target` when its checksum begins with `expected`; BadFile otherwise. Shows
    its progress.
    """
    found = hashlib.new(algorithm)
    with replacing(target) as temporary:
        with urllib.request.urlopen(url, timeout=60) as source, temporary.open("wb") as sink:
            total = int(source.headers.get("Content-Length") or 0)
            done = 0
            while piece := source.read(1 << 18):
                sink.write(piece)
                found.update(piece)
                done += len(piece)
                of = f" of {total / 1e6:.1f}" if total else ""
                print(
                    f"\r{target.name}: {done / 1e6:.1f}{of} MB", end="", file=sys.stderr, flush=True
                )
        print(file=sys.stderr)
        if not found.hexdigest().startswith(expected):
            raise BadFile(
                f"{url} has the {algorithm} {found.hexdigest()}; expected {expected}: it was cut "
                f"short or changed, "
                "run this again"
            )


def cifar10(folder: Path, url: str = CIFAR10, md5: str = CIFAR10_MD5) -> None:
    """CIFAR-10 in its authors' binary form, in `folder/cifar-10-batches-bin/`."""
    if (folder / "cifar-10-batches-bin" / "test_batch.bin").is_file():
        return
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as inside:
        archive = Path(inside) / "cifar-10-binary.tar.gz"
        download(url, archive, "md5", md5)
        with tarfile.open(archive) as tar:
            tar.extractall(inside, filter="data")
        (Path(inside) / "cifar-10-batches-bin").rename(folder / "cifar-10-batches-bin")


def mnist(folder: Path, base: str = MNIST) -> None:
    """The four MNIST files, in `folder/mnist/`."""
    for name, md5 in MNIST_MD5.items():
        if not (folder / "mnist" / name).is_file():
            download(base + name, folder / "mnist" / name, "md5", md5)


def weights(folder: Path, base: str = WEIGHTS) -> None:
    """Trained CIFAR-10 ResNets and their licence, in `folder/weights/`."""
    for name, sha256 in CHECKPOINTS.items():
        target = folder / "weights" / f"cifar10_{name}.safetensors"
        if target.is_file():
            continue
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as inside:
            checkpoint = Path(inside) / f"{name}-{sha256}.th"
            download(base + checkpoint.name, checkpoint, "sha256", sha256)
            convert(checkpoint, target)


def convert(checkpoint: Path, target: Path) -> None:
    """A `.th` checkpoint (read with weights_only=True) -> safetensors with the keys of a plain
    model, and a notice.

    Counters of batch norms (`num_batches_tracked`) are left out; values stay as they are.
    """
    tensors = {
        key: value
        for key, value in read_tensors(checkpoint).items()
        if not key.endswith("num_batches_tracked")
    }
    with replacing(target.parent / "LICENSE-pytorch_resnet_cifar10.txt") as temporary:
        temporary.write_bytes(NOTICE.read_bytes())
    write_tensors(target, tensors)


def main(arguments: list[str] | None = None) -> int:
    """Fetch what was asked for; 2 when something is wrong."""
    parser = argparse.ArgumentParser(
        description="Fetch the public data and weights that the benchmarks use."
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "what", nargs="?", choices=["cifar10", "mnist", "weights", "all"], default="all"
    )
    asked = parser.parse_args(arguments)
    try:
        asked.folder.mkdir(parents=True, exist_ok=True)
        for name, fetch in (("cifar10", cifar10), ("mnist", mnist), ("weights", weights)):
            if asked.what in (name, "all"):
                fetch(asked.folder)
    except (OfframpError, OSError, tarfile.TarError) as problem:
        print(
            f"fetch: {problem}; check the connection and the place, then run this again",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
