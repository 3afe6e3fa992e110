"""Atomic writes and safe reads: no file is half-written, and no file runs code.

Every file is written whole (`_support/replacement.py`), and replaces only an earlier one of the
same kind. JSON documents have a schema version and a checksum, which reveals edits. Arrays are
`.npz` without pickles, and weights are safetensors; `.pt` and `.pth` are read with
`weights_only=True`. Only regular files are read, up to a limit.
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
from offramp._support.sentences import few
from offramp.errors import BadFile, NewerSchema

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
HEADER = "header.json"
CHECKPOINTS = {".pt", ".pth", ".th", ".bin", ".ckpt"}
UNSUSPICIOUS = 256 * 2**20  # bytes that a file may always unpack to
# Above that, a file may grow by this factor. Real data rarely shrinks to a hundredth, but zeros
# shrink to a thousandth.
MOST_TIMES = 100
WEIGHTS_MARK = b'"written_by":"offramp"'  # in the metadata of our safetensors files
MOST_TEXT = 1 << 30  # bytes of a document; a plan has eight for every row that it was made from
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet computes a text that starts so


def checksum(body: object) -> str:
    """Compute the checksum of a JSON body: 16 hex digits of the SHA-256 of its canonical form."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_document(kind: str, version: int, body: Mapping[str, Any]) -> str:
    """Write a body as JSON text with its schema and its checksum.

    Args:
        kind: of the document, such as "plan".
        version: of the schema.
        body: plain data.
    """
    plain = json.loads(json.dumps(dict(body)))  # as a reader will see it: lists, names as text
    document = {"schema": f"offramp/{kind}/{version}", "checksum": checksum(plain), **plain}
    return json.dumps(document, indent=1) + "\n"


def from_document(text: str, kind: str, newest: int, where: str) -> tuple[int, dict[str, Any]]:
    """Read a text that `to_document` wrote.

    Args:
        text: the text.
        kind: of the document, such as "plan".
        newest: the newest schema version that can be read.
        where: the file, for messages.

    Returns:
        The schema version and the body.

    Raises:
        BadFile: the text is another document, or was edited.
        NewerSchema: its version is above `newest`.
    """
    try:
        document = json.loads(text, object_pairs_hook=_require_unique)
        family, name, version = document.pop("schema").split("/")
        number = int(version)
        stated = document.pop("checksum")
        computed = checksum(document)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as problem:
        raise BadFile(
            f"{where} must be an offramp {kind}, got a file that is not JSON with a schema. Make "
            f"it again"
        ) from problem
    if (family, name) != ("offramp", kind):
        raise BadFile(f"{where} must be an offramp {kind}, got an {family}/{name}")
    if number < 1:
        raise BadFile(
            f"{where} must have a schema of at least offramp/{kind}/1, got offramp/{kind}/{number}"
        )
    if number > newest:
        raise NewerSchema(
            f"{where} must have a schema of at most offramp/{kind}/{newest}, got "
            f"offramp/{kind}/{number}. Upgrade offramp"
        )
    if stated != computed:
        raise BadFile(
            f"{where} was edited or damaged after it was written (its checksum differs). Make it "
            f"again"
        )
    return number, document


def _require_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys. Of a repeated key some readers take the first value and
    others the last.
    """
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a key is repeated")
    return unique


def write_json(path: str | Path, kind: str, version: int, body: Mapping[str, Any]) -> None:
    """Write a JSON document with a version and a checksum. An existing file is replaced only if it
    is one of the same kind.

    Args:
        path: the file.
        kind: of the document, such as "plan".
        version: of the schema.
        body: plain data.

    Raises:
        BadFile: the file cannot be written, or is of another kind.
    """
    with replacing(path, mark=document_mark(kind), what=kind) as temporary:
        temporary.write_text(to_document(kind, version, body))


def document_mark(kind: str) -> bytes:
    """The bytes near the beginning of every document of a kind."""
    return f'"schema": "offramp/{kind}/'.encode()


def read_json(path: str | Path, kind: str, newest: int) -> tuple[int, dict[str, Any]]:
    """Read a document that `write_json` wrote. Returns and raises the same as `from_document`."""
    return from_document(read_text(path), kind, newest, str(path))


def read_text(path: str | Path, *, most: int = MOST_TEXT) -> str:
    """Read a regular UTF-8 file.

    Args:
        path: the file.
        most: its largest size in bytes.

    Raises:
        BadFile: it cannot be read, is not UTF-8, or is too large.
    """
    require_regular(path, most=most)
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise BadFile(
            f"cannot read {path} as text ({problem}). Check the path and the file"
        ) from problem


def require_regular(path: str | Path, *, most: int | None = None) -> None:
    """Raise BadFile for anything else than a regular file. A device, a pipe or a socket could be
    read for ever.

    Args:
        path: the file.
        most: its largest size in bytes; None for any.
    """
    path = require_path("path", path)
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise BadFile(f"{path} does not exist. Check the path") from problem
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise BadFile(f"cannot read {path} ({problem}). Check the path") from problem
    if stat.S_ISDIR(about.st_mode):
        content = ""
        if (Path(path) / "network.json").is_file():
            content = " with a network"
        raise BadFile(
            f"{path} must be a file, got a folder{content}. Check the order of the arguments"
        )
    if not stat.S_ISREG(about.st_mode):
        raise BadFile(
            f"{path} must be a regular file, got a device, a pipe or a socket. Copy its content to "
            f"a file"
        )
    if most is not None and about.st_size > most:
        raise BadFile(f"{path} must have at most {most:,} bytes, got {about.st_size:,}")


def write_csv(
    path: str | Path, head: Sequence[str], rows: Iterable[Sequence[object]], *, what: str
) -> None:
    """Write a table as CSV. An existing file is replaced only if it has the same first columns.

    A text that a spreadsheet would take for a formula gets a ' before it. Numbers are not changed,
    and None is an empty cell.

    Args:
        path: the file.
        head: names of the columns; the first three identify the table.
        rows: the cells of each row, in the order of `head`.
        what: the name of the table, for the message if another file is there.

    Raises:
        BadFile: the file cannot be written, or is another one.
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
    """Make a cell that no spreadsheet computes: a text that begins like a formula gets a ' before
    it.
    """
    if isinstance(value, str) and value.startswith(FORMULA):
        return "'" + value
    return value


def write_arrays(path: str | Path, header: str, columns: Mapping[str, Array]) -> None:
    """Write named arrays and a text header into one uncompressed `.npz`. An existing file is
    replaced only if it is one of the same kind.

    Args:
        path: the file.
        header: a document (`to_document`), whose schema names the kind.
        columns: arrays by name.

    Raises:
        BadFile: the file cannot be written, or is of another kind.
    """
    mark: bytes | None = None
    what = "file"
    schema = re.search(r'"schema": "offramp/(\w+)/', header)
    if schema is not None:
        what = schema[1]
        mark = document_mark(what)
    with replacing(path, mark=mark, what=what) as temporary, temporary.open("wb") as file:
        text: Array = np.frombuffer(header.encode(), dtype=np.uint8)
        np.savez(file, allow_pickle=False, **{HEADER: text, **columns})


def read_arrays(path: str | Path) -> tuple[str, dict[str, Array]]:
    """Read a file that `write_arrays` wrote.

    Returns:
        The header and the arrays.

    Raises:
        BadFile: the file is missing, truncated, pickled or without a header.
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
            f"{path} is not a readable array file ({type(problem).__name__}). It is truncated, "
            f"damaged or of another kind. Make it again"
        ) from problem


def _require_stored(file: IO[bytes], path: str | Path) -> None:
    """Raise BadFile for a file whose arrays need more memory than the file has bytes. Files of
    offramp are uncompressed.
    """
    total = 0
    for packed, unpacked in npz_sizes(file).values():
        if packed != unpacked:
            raise BadFile(
                f"{path} must have uncompressed arrays, got compressed ones. Make it again"
            )
        total += unpacked
    if total > os.fstat(file.fileno()).st_size:
        raise BadFile(f"{path} is damaged: its arrays share bytes. Make it again")


def npz_sizes(file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """Find the size of each array in an open `.npz`, without unpacking it.

    The sizes come from the zip directory and from the header of each array. The file is left at its
    beginning.

    Returns:
        By array, its bytes in the file and its bytes in memory.

    Raises:
        ValueError: the directory and a header disagree.
    """
    sizes: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(file) as archive:
        for number, entry in enumerate(archive.infolist()):
            with archive.open(entry) as member:
                _require_honest(member, entry)
            name = entry.filename
            if name in sizes:  # a second array of the same name counts as well
                name = f"{name}#{number}"
            sizes[name] = (entry.compress_size, entry.file_size)
    file.seek(0)
    return {name.removesuffix(".npy"): size for name, size in sizes.items()}


def _require_honest(member: IO[bytes], entry: zipfile.ZipInfo) -> None:
    """Raise ValueError if an array is not as long as its header says. NumPy allocates memory by the
    header.
    """
    version = np.lib.format.read_magic(member)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"{entry.filename} has the unknown .npy version {version}")
    shape, _, dtype = readers[version](member)
    expected = member.tell() + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and entry.file_size != expected:  # objects are refused by np.load
        raise ValueError(
            f"{entry.filename} must have {expected} bytes by its header, got {entry.file_size}"
        )


def require_memory(path: str | Path, packed: int, unpacked: int) -> None:
    """Raise BadFile for a file whose contents are far larger than the file, or than free memory.

    Contents up to 256 MiB may be packed to any size.

    Args:
        path: the file, for the message.
        packed: bytes in the file.
        unpacked: bytes in memory.
    """
    needed = f"{unpacked / 1e6:,.0f} MB"
    if unpacked > UNSUSPICIOUS and unpacked > MOST_TIMES * packed:
        raise BadFile(
            f"{path} must grow at most {MOST_TIMES} times in memory, got {packed / 1e6:,.1f} MB "
            f"that would grow to {needed}. Store it uncompressed, or load the arrays yourself"
        )
    free = free_memory()
    if free is not None and unpacked > 0.8 * free:
        raise BadFile(
            f"{path} needs {needed} of memory, but only {free / 1e6:,.0f} MB are free. Split it, "
            f"or use a memory-mapped array"
        )


def free_memory() -> int | None:
    """The free memory in bytes; None if the system does not tell it."""
    try:  # Linux
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:  # other systems tell only the whole memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors. An existing file is replaced only if offramp wrote it.

    Tensors that share memory are written once for each name.

    Raises:
        BadFile: the file cannot be written, or is another one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(path, mark=WEIGHTS_MARK, what="weights file") as temporary:
        try:
            save_file(plain, temporary, metadata={"written_by": "offramp"})
        except SafetensorError as problem:  # a full disk among others
            raise BadFile(
                f"cannot write {path} ({problem}). Make room, or choose another folder"
            ) from problem


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors from a file of weights. A prefix `module.` of all names is removed.

    Args:
        path: `.safetensors`, or a checkpoint with one state dict, as for `read_state_dicts`.

    Raises:
        BadFile: the file is missing, truncated or pickled, or has several state dicts.
    """
    state_dicts = read_state_dicts(path)
    if len(state_dicts) > 1:
        raise BadFile(
            f"{path} must have one state dict, got {', '.join(state_dicts)}. Save only the one "
            f"that you need"
        )
    (tensors,) = state_dicts.values()
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def read_state_dicts(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read every state dict in a file of weights.

    Args:
        path: `.safetensors`, or a checkpoint (`.pt`, `.pth`, `.th`, `.bin`, `.ckpt`), which is read
            with `weights_only=True`.

    Returns:
        Tensors by name, for each state dict. The key is the path of keys to it in the checkpoint,
        such as `state_dict` or `ema/shadow`; "" if the file itself is the state dict.

    Raises:
        BadFile: the file is missing or truncated, would run code, or has no state dict.
    """
    folder = Path(path)
    require_regular(folder)
    if folder.suffix in CHECKPOINTS:
        loaded = _read_checkpoint(folder)
        state_dicts = dict(_state_dicts(loaded))
        if not state_dicts:
            content = f"a {type(loaded).__name__}"
            if isinstance(loaded, dict) and loaded:
                content = f"the keys {few(loaded, 8)}"
            raise BadFile(
                f"{folder} must have a state dict of tensors, got {content}. Save "
                f"model.state_dict() instead"
            )
        return state_dicts
    from safetensors.torch import load_file

    try:
        return {"": load_file(folder)}
    except Exception as problem:
        raise BadFile(
            f"{folder} is not a readable safetensors file ({problem}). A PyTorch checkpoint must "
            f"be named .pt or .pth"
        ) from problem


def _read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint, read without running code."""
    import torch

    if _is_compressed(path):
        raise BadFile(
            f"{path} must be an uncompressed archive, as torch.save writes it. Save the weights "
            f"again"
        )
    try:
        with torch.serialization.safe_globals(_inert()):
            return torch.load(path, map_location="cpu", weights_only=True)
    # pickle, zip or torch errors: the file is not plain weights
    except Exception as problem:
        reason = "is damaged or would run code"
        refused = re.search(
            r"Unsupported (?:global|class)[^A-Za-z]*(?:GLOBAL )?([\w.]+)", str(problem)
        )
        if refused:
            reason = f"has a {refused[1]}, which would run code"
        raise BadFile(
            f"{path} must have plain weights (weights_only=True), but it {reason}. Save "
            f"model.state_dict() instead"
        ) from problem


def _is_compressed(path: Path) -> bool:
    """Whether a zip archive has compressed members. False for a damaged archive or any other
    file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            types = {entry.compress_type for entry in archive.infolist()}
            return bool(types - {zipfile.ZIP_STORED})
    # a damaged directory can fail anywhere, and torch has the better message
    except Exception:
        return False


def _inert() -> list[Any]:
    """The harmless classes that many checkpoints have next to their weights: arguments of the
    command line, and figures such as the best accuracy.
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
    """The mappings of names to tensors in a checkpoint, with the path of keys to each. Numbers next
    to the tensors are left out.
    """
    import torch

    if not isinstance(loaded, dict) or depth > 3:
        return
    tensors: dict[str, Tensor] = {}
    inner = dict[str, object]()
    for name, value in loaded.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(name, str) and isinstance(value, dict):
            inner[name] = value
    if tensors:
        yield where, tensors
    for name, value in inner.items():
        path = name
        if where:
            path = f"{where}/{name}"
        yield from _state_dicts(value, path, depth + 1)


def digest_file(path: str | Path) -> str:
    """Compute the SHA-256 of a regular file, in hex. Raises BadFile for anything else."""
    require_regular(path)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_home(path: str) -> Path:
    """A path with `~` replaced by the home folder. It stays as it is if there is no such folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
