"""Small files that would fill the memory: their sizes are looked at before anything is unpacked."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offramp._support import files
from offramp._support.files import HEADER, read_arrays, require_memory, write_arrays
from offramp.data.rows import rows
from offramp.errors import BadFile
from written_files import write_idx

MANY = 300 * 2**20  # bytes, of zeros


def zeros(
    path, name: str, count: int = MANY, *, header: bytes | None = None, method=zipfile.ZIP_DEFLATED
) -> None:
    """An npz of uint8 zeros [count], deflated to a thousandth, written without having them in
    memory.
    """
    head = header or np.lib.format.magic(1, 0) + _padded(
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count},), }}"
    )
    with (
        zipfile.ZipFile(path, "a", method) as archive,
        archive.open(f"{name}.npy", "w", force_zip64=True) as member,
    ):
        member.write(head)
        chunk = bytes(2**20)
        for _ in range(count // len(chunk)):
            member.write(chunk)
        member.write(bytes(count % len(chunk)))


def _padded(text: str) -> bytes:
    padded = (text + " " * 128)[:117] + "\n"
    return struct.pack("<H", len(padded)) + padded.encode()


def peak(code: str, *arguments: object) -> tuple[str, float]:
    """What a program prints, and the most memory in MB that it had."""
    code += (
        "\nprint(next(line.split()[1] for line in open('/proc/self/status') if "
        "line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    *said, most = done.stdout.splitlines()
    return "\n".join(said), int(most) / 1024


READ = """
import sys
from offramp.errors import OfframpError
from offramp.data.rows import rows
from offramp.plans.trace import Trace
try:
    Trace.load(sys.argv[1]) if len(sys.argv) > 2 else rows(f"npz:{sys.argv[1]}")
except OfframpError as problem:
    print(type(problem).__name__, problem)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="Linux tells the most memory that was used"
)
def test_deflated_zeros_are_refused_before_they_are_unpacked(tmp_path):
    zeros(tmp_path / "a.npz", "x")
    assert (tmp_path / "a.npz").stat().st_size < 2**20
    for more, says in (
        ((), "must grow at most 100 times in memory, got 0.3 MB that would grow to 315 MB"),
        ((1,), "must have uncompressed arrays"),
    ):
        said, most = peak(READ, tmp_path / "a.npz", *more)
        assert says in said
        assert most < 200  # torch is not loaded: NumPy alone has about 60


def test_compressed_arrays_of_a_user_are_read(tmp_path):
    x = np.random.default_rng(0).integers(0, 9, (50, 40))
    np.savez_compressed(tmp_path / "a.npz", x=x, y=np.zeros(50, int))
    np.testing.assert_array_equal(rows(f"npz:{tmp_path}/a.npz").take(np.arange(50)).x, x)


def test_what_is_not_read_counts_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UNSUSPICIOUS", 2**20)
    np.savez(tmp_path / "a.npz", x=np.arange(4.0), y=np.arange(4))
    zeros(tmp_path / "a.npz", "features_train", 2**22)
    with pytest.raises(BadFile, match="must grow at most 100 times in memory"):
        rows(f"npz/train:{tmp_path}/a.npz")
    assert len(rows(f"npz:{tmp_path}/a.npz")) == 4


def test_our_own_files_hold_nothing_compressed(tmp_path):
    write_arrays(tmp_path / "a.npz", "{}", {"x": np.zeros(1000)})
    header, columns = read_arrays(tmp_path / "a.npz")
    np.savez_compressed(
        tmp_path / "b.npz", **{HEADER: np.frombuffer(header.encode(), np.uint8)}, **columns
    )
    with pytest.raises(BadFile, match="must have uncompressed arrays"):
        read_arrays(tmp_path / "b.npz")


def test_members_that_share_their_bytes(tmp_path):
    """A directory that lists one stored array many times: each would be read and kept."""
    file = tmp_path / "a.npz"
    np.savez(file, **{HEADER: np.zeros(2, np.uint8), "x": np.zeros(5000)})
    with zipfile.ZipFile(file, "a") as archive:
        (entry,) = (one for one in archive.infolist() if one.filename == "x.npy")
        archive.filelist += [entry] * 40
        archive._didModify = True
    with pytest.raises(BadFile, match="its arrays share bytes"):
        read_arrays(file)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_claims_more_than_there_is(tmp_path, method):
    claims = np.lib.format.magic(1, 0) + _padded(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999,), }"
    )
    zeros(tmp_path / "a.npz", "x", 100, header=claims, method=method)
    with pytest.raises(BadFile, match=r"must have 8000000\d+ bytes by its header"):
        rows(f"npz:{tmp_path}/a.npz")
    with pytest.raises(BadFile):
        read_arrays(tmp_path / "a.npz")


def test_what_is_larger_than_the_free_memory(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=np.zeros((1000, 10)))
    monkeypatch.setattr(files, "free_memory", lambda: 90_000)
    with pytest.raises(BadFile, match="needs 0 MB of memory, but only 0 MB are free"):
        rows(f"npz:{tmp_path}/a.npz")
    monkeypatch.setattr(files, "free_memory", lambda: 110_000)
    assert len(rows(f"npz:{tmp_path}/a.npz")) == 1000


def test_free_memory_is_a_number():
    assert files.free_memory() > 10_000_000
    require_memory("a", 10, 256 * 2**20)  # tight, and not large
    with pytest.raises(BadFile, match="100 times"):
        require_memory("a", 10, 256 * 2**20 + 1)


@pytest.mark.parametrize("large", ["label", "x"])
def test_runs_of_equal_numbers_in_parquet(tmp_path, monkeypatch, large):
    """Parquet stores a run of equal values as one: a billion of them fit into some kilobytes."""
    monkeypatch.setattr(files, "UNSUSPICIOUS", 2**20)
    rows_, wide = (300_000, 1) if large == "label" else (300, 1000)
    x = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows_ * wide, np.int8)), wide)
    table = pa.table({"label": pa.array(np.zeros(rows_, np.int8)), "x": x})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows_)
    with pytest.raises(BadFile, match="must grow at most 100 times in memory"):
        list(rows(f"parquet:{tmp_path}/a.parquet").batches(64))


def test_gzipped_zeros_for_images(tmp_path):
    count = 1_000_000
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", 2049, np.zeros(9, np.uint8))
    with gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">IIII", 2051, count, 28, 28))
        for _ in range(8):
            file.write(bytes(10_000_000))
    with pytest.raises(BadFile, match=r"got 0\.1 MB that would grow to 784 MB"):
        rows(f"mnist:{tmp_path}")
