"""Atomic writes and safe reads: nothing half-written, nothing that runs code.

Every file is written whole (`_support/replacement.py`), and replaces only an earlier one of its own
kind. JSON bodies carry a schema version and a checksum, so that an edited file is noticed. Arrays
are `.npz` without pickles, weights safetensors; `.pt` and `.pth` are read with `weights_only=True`.
Only regular files are read, and none without a limit.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from offramp._support.arguments import require_path
from offramp._support.replacement import replacing as replacing
from offramp._support.replacement import require_writable as require_writable
from offramp.errors import BadFile, NewerSchema

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
HEADER = "header.json"
CHECKPOINTS = {".pt", ".pth", ".th", ".bin", ".ckpt"}
UNSUSPICIOUS = 256 * 2**20  # bytes: a file may unpack to as much, however tightly it is packed
MOST_TIMES = 100  # beyond that: real data rarely shrinks to a hundredth, and zeros to a thousandth
WEIGHTS_MARK = b'"written_by":"offramp"'  # in the metadata of our safetensors files
MOST_TEXT = 1 << 30  # bytes of a document: a plan carries eight for every row that it was made from
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # with which a spreadsheet begins to compute


def checksum(body: object) -> str:
    """Sixteen hex digits of the SHA-256 of a JSON body in canonical form."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_document(kind: str, version: int, body: Mapping[str, Any]) -> str:
    """A JSON text that names its schema and carries the checksum of its body."""
    plain = json.loads(json.dumps(dict(body)))
    document = {"schema": f"offramp/{kind}/{version}", "checksum": checksum(plain), **plain}
    return json.dumps(document, indent=1) + "\n"


def from_document(text: str, kind: str, newest: int, where: str) -> tuple[int, dict[str, Any]]:
    """The schema version and the body of a text written by `to_document`.

    Raises BadFile for what is no such document or was edited, NewerSchema for a later version.
    """
    try:
        document = json.loads(text, object_pairs_hook=_once)
        family, name, version = document.pop("schema").split("/")
        number = int(version)
        stated = document.pop("checksum")
        computed = checksum(document)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as problem:
        raise BadFile(
            f"{where} is not an offramp {kind}: no readable JSON with a schema; make it again"
        ) from problem
    if (family, name) != ("offramp", kind):
        raise BadFile(f"{where} must be an offramp {kind}, got an {family}/{name}")
    if number < 1:
        raise BadFile(
            f"{where} must have a schema of at least offramp/{kind}/1, got offramp/{kind}/{number}"
        )
    if number > newest:
        raise NewerSchema(
            f"{where} has schema offramp/{kind}/{number}, this offramp reads up to {newest}; "
            f"upgrade offramp"
        )
    if stated != computed:
        raise BadFile(
            f"{where} was edited or damaged after it was written (its checksum differs); make it "
            f"again"
        )
    return number, document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which every key stands once: else two readers could take two meanings from
    one file.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def write_json(path: str | Path, kind: str, version: int, body: Mapping[str, Any]) -> None:
    """Write a versioned, checksummed JSON document, onto nothing but an earlier one of the same
    kind.
    """
    with replacing(path, mark=document_mark(kind), what=kind) as temporary:
        temporary.write_text(to_document(kind, version, body))


def document_mark(kind: str) -> bytes:
    """Bytes near the beginning of every document of a kind."""
    return f'"schema": "offramp/{kind}/'.encode()


def read_json(path: str | Path, kind: str, newest: int) -> tuple[int, dict[str, Any]]:
    """Read a document written by `write_json`; see `from_document` for what it raises."""
    return from_document(read_text(path), kind, newest, str(path))


def read_text(path: str | Path, *, most: int = MOST_TEXT) -> str:
    """The text of a regular UTF-8 file of at most `most` bytes, or BadFile."""
    require_regular(path, most=most)
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise BadFile(
            f"cannot read {path} as text ({problem}); check the path and the file"
        ) from problem


def require_regular(path: str | Path, *, most: int | None = None) -> None:
    """Raise BadFile for what is no file of bytes: a folder, a device, a pipe or a socket would be
    read for ever.

    most: the largest size in bytes.
    """
    path = require_path("path", path)
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise BadFile(f"{path} does not exist; check the path") from problem
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise BadFile(f"cannot read {path} ({problem}); check the path") from problem
    if stat.S_ISDIR(about.st_mode):
        if (Path(path) / "network.json").is_file():
            holds = " that holds a network"
        else:
            holds = ""
        raise BadFile(
            f"{path} must be a file, got a folder{holds}. Check the order of the arguments"
        )
    if not stat.S_ISREG(about.st_mode):
        raise BadFile(
            f"{path} must be a regular file, got a device, a pipe or a socket. Copy what it "
            "gives to a file"
        )
    if most is not None and about.st_size > most:
        raise BadFile(f"{path} must have at most {most:,} bytes, got {about.st_size:,}")


def write_csv(
    path: str | Path, head: Sequence[str], rows: Iterable[Sequence[object]], *, what: str
) -> None:
    """Write a table as CSV, onto nothing but an earlier one with the same first columns.

    A text that a spreadsheet would take for a formula gets a ' before it. Numbers stay as they are,
    and None is an empty cell.

    Args:
        path: the file.
        head: names of the columns; the first three tell whose table it is.
        rows: the cells of each row, in the order of `head`.
        what: what the table is, for the message where another file is there.
    """
    mark = ",".join(head[:3]).encode()
    with (
        replacing(path, mark=mark, what=what) as part,
        part.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([plain_cell(name) for name in head])
        for row in rows:
            writer.writerow([plain_cell(value) for value in row])


def plain_cell(value: object) -> object:
    """A cell of a table that no spreadsheet computes: a text that begins like a formula gets a '
    before it.
    """
    if isinstance(value, str) and value.startswith(FORMULA):
        return "'" + value
    return value


def write_arrays(path: str | Path, header: str, columns: Mapping[str, Array]) -> None:
    """Write named arrays and a text header into one `.npz`, uncompressed, onto nothing but one of
    the same kind.

    header: a document (`to_document`), whose schema names the kind.
    """
    schema = re.search(r'"schema": "offramp/(\w+)/', header)
    mark = None if schema is None else document_mark(schema[1])
    what = "file" if schema is None else schema[1]
    with replacing(path, mark=mark, what=what) as temporary, temporary.open("wb") as file:
        text: Array = np.frombuffer(header.encode(), dtype=np.uint8)
        np.savez(file, allow_pickle=False, **{HEADER: text, **columns})


def read_arrays(path: str | Path) -> tuple[str, dict[str, Array]]:
    """The header and the arrays of a file written by `write_arrays`.

    Raises BadFile for anything else: missing, truncated, pickled, no header.
    """
    require_regular(path)
    try:
        with Path(path).open("rb") as file:
            _require_stored(file, path)
            with np.load(file, allow_pickle=False) as archive:
                columns = {name: archive[name] for name in archive.files}
        return columns.pop(HEADER).tobytes().decode(), columns
    except BadFile:
        raise
    # a damaged archive can fail anywhere inside zip, header parser or allocator
    except Exception as problem:
        raise BadFile(
            f"{path} is not a readable array file ({type(problem).__name__}); it is truncated, "
            f"damaged or of "
            "another kind: make it again"
        ) from problem


def _require_stored(file: IO[bytes], path: str | Path) -> None:
    """Raise BadFile where reading a file of ours would need more memory than the file is long."""
    sizes = npz_sizes(file)
    if any(packed != unpacked for packed, unpacked in sizes.values()):
        raise BadFile(f"{path} holds compressed arrays, and offramp writes none; make it again")
    if sum(unpacked for _, unpacked in sizes.values()) > os.fstat(file.fileno()).st_size:
        raise BadFile(f"{path} has arrays that share their bytes; it is damaged, make it again")


def npz_sizes(file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """The bytes of each array in an open `.npz`, as stored and in memory.

    Read from the zip directory and the header of each array: nothing is unpacked. The file is left
    at its beginning. Raises ValueError where the directory and a header disagree.
    """
    sizes: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(file) as archive:
        for number, entry in enumerate(archive.infolist()):
            with archive.open(entry) as member:
                _require_honest(member, entry)
            # numbered: of two members with one name both count
            sizes[
                entry.filename if entry.filename not in sizes else f"{entry.filename}#{number}"
            ] = (
                entry.compress_size,
                entry.file_size,
            )
    file.seek(0)
    return {name.removesuffix(".npy"): size for name, size in sizes.items()}


def _require_honest(member: IO[bytes], entry: zipfile.ZipInfo) -> None:
    """Raise ValueError unless an array is as long as its header says: NumPy allocates by the
    header.
    """
    version = np.lib.format.read_magic(member)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"{entry.filename} has the .npy version {version}")
    shape, _, dtype = readers[version](member)
    expected = member.tell() + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and entry.file_size != expected:  # objects are refused by np.load
        raise ValueError(
            f"{entry.filename} has {entry.file_size} bytes, its header says {expected}"
        )


def require_memory(path: str | Path, packed: int, unpacked: int) -> None:
    """Raise BadFile for a file whose contents are far larger than the file, or than free memory.

    Args:
        path: the file, for the message.
        packed: bytes that are read from the file.
        unpacked: bytes that they need in memory.

    Contents up to 256 MiB are never refused for being packed tightly.
    """
    needed = f"{unpacked / 1e6:,.0f} MB"
    if unpacked > UNSUSPICIOUS and unpacked > MOST_TIMES * packed:
        raise BadFile(
            f"{path} would unpack {packed / 1e6:,.1f} MB to {needed}; expected to grow at most "
            f"{MOST_TIMES} times: "
            "store it uncompressed, or load the arrays yourself and hand them over"
        )
    free = free_memory()
    if free is not None and unpacked > 0.8 * free:
        raise BadFile(
            f"{path} needs {needed} of memory, and {free / 1e6:,.0f} MB are free; split it, or "
            f"hand over a "
            "memory-mapped array"
        )


def free_memory() -> int | None:
    """Bytes of memory that can be had, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    try:  # elsewhere: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, onto nothing but weights of ours; shared memory is
    written once per name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(path, mark=WEIGHTS_MARK, what="weights file") as temporary:
        try:
            save_file(plain, temporary, metadata={"written_by": "offramp"})
        except SafetensorError as problem:  # a full disk among others
            raise BadFile(
                f"cannot write {path} ({problem}); make room, or choose another folder"
            ) from problem


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Named tensors from `.safetensors`, or from `.pt`/`.pth`/`.th`/`.bin` read with
    `weights_only=True`.

    A checkpoint that wraps one state dict is unwrapped, and a prefix `module.` of all names goes.
    Raises BadFile for a missing, truncated or pickled file, and for one with several state dicts.
    """
    found = read_state_dicts(path)
    if len(found) > 1:
        raise BadFile(
            f"{path} holds several state dicts, {', '.join(found)}; expected one: save the one "
            f"that you mean"
        )
    (tensors,) = found.values()
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def read_state_dicts(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Every state dict in a file of weights, by where it stands there.

    Args:
        path: `.safetensors`, or a checkpoint (`.pt`, `.pth`, `.th`, `.bin`, `.ckpt`), which is read
            with `weights_only=True`.

    Returns:
        Names to tensors, by the keys that lead to them: `state_dict`, `ema/shadow`; "" for the file
        itself.

    Raises:
        BadFile: missing, truncated, would run code, or without a state dict.
    """
    folder = Path(path)
    require_regular(folder)
    if folder.suffix in CHECKPOINTS:
        loaded = _read_checkpoint(folder)
        found = dict(_state_dicts(loaded))
        if not found:
            if isinstance(loaded, dict) and loaded:
                keys = f": its keys are {_some(loaded)}"
            else:
                keys = ""
            raise BadFile(
                f"{folder} holds no state dict of tensors{keys}; save model.state_dict() and give "
                f"that file"
            )
        return found
    from safetensors.torch import load_file

    try:
        return {"": load_file(folder)}
    except Exception as problem:
        raise BadFile(
            f"{folder} is not a readable safetensors file ({problem}); a PyTorch checkpoint must "
            f"be named .pt or .pth"
        ) from problem


def _read_checkpoint(path: Path) -> Any:
    import torch

    if _is_compressed(path):
        raise BadFile(
            f"{path} is a compressed archive, and torch.save writes none; save the weights again"
        )
    try:
        with torch.serialization.safe_globals(_inert()):
            return torch.load(path, map_location="cpu", weights_only=True)
    # pickle, zip and torch errors alike: the file is not plain weights
    except Exception as problem:
        refused = re.search(
            r"Unsupported (?:global|class)[^A-Za-z]*(?:GLOBAL )?([\w.]+)", str(problem)
        )
        what = f"it holds a {refused[1]}, which" if refused else "it is damaged or"
        raise BadFile(
            f"{path} cannot be read as plain weights (weights_only=True); {what} would run code: "
            f"save "
            "model.state_dict() and give that file"
        ) from problem


def _is_compressed(path: Path) -> bool:
    """Whether a zip archive has compressed members; False for what is no archive, or a damaged
    one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    # a damaged directory can fail anywhere; torch says what is wrong with the file
    except Exception:
        return False


def _inert() -> list[Any]:
    """What stands beside weights in many checkpoints, and does nothing when it is made.

    Arguments of the command line, and figures such as the best accuracy.
    """
    numbers = [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")]
    scalar = np.float64(0).__reduce__()[0]
    return [
        argparse.Namespace,
        np.dtype,
        *numbers,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]


def _state_dicts(
    loaded: object, where: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The mappings of names to tensors in what a checkpoint holds; numbers beside the tensors are
    left out.
    """
    import torch

    if not isinstance(loaded, dict) or depth > 3:
        return
    tensors = {
        name: value
        for name, value in loaded.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if tensors:
        yield where, tensors
    for name, value in loaded.items():
        if isinstance(name, str) and isinstance(value, dict):
            yield from _state_dicts(value, f"{where}/{name}" if where else name, depth + 1)


def _some(names: Iterable[object], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def digest_file(path: str | Path) -> str:
    """The SHA-256 of a regular file, in hex. Raises BadFile."""
    require_regular(path)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
