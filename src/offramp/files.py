"""Atomic writes and safe reads: nothing half-written, nothing that runs code.

Every file is written under a temporary name beside its place and renamed; a reader meets the old file or the
new one. JSON bodies carry a schema version and a checksum, so that an edited file is noticed. Arrays are `.npz`
without pickles, weights safetensors; `.pt` and `.pth` are read with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.errors import BadFile, NewerSchema

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
HEADER = "header.json"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block ends well, else remove it."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
    except OSError as problem:
        raise unwritable(target, problem) from problem
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as problem:
        raise unwritable(target, problem) from problem
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the place of `path` when the block ends well.

    A folder that holds anything but an earlier offramp folder (one with a JSON file of ours) is never replaced.
    """
    target = Path(path)
    require_replaceable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as problem:
        raise unwritable(target, problem) from problem
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
    except OSError as problem:
        raise unwritable(target, problem) from problem
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def restored(folder: Path) -> Path:
    """The folder; where a process was killed in the moment in which it was replaced, the one before is put back."""
    if not folder.exists():
        for old in sorted(folder.parent.glob(f".{folder.name}.*.old")):
            os.rename(old, folder)
            break
    return folder


def require_replaceable(folder: Path) -> None:
    """Raise BadFile for a folder that holds something else than an earlier offramp folder."""
    try:
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_ours(folder))):
            raise BadFile(f"{folder} exists and was not written by offramp; name an empty or a new folder")
    except OSError as problem:
        raise unwritable(folder, problem) from problem


def require_writable(place: Path, *, folder: bool = False) -> None:
    """Raise BadFile for a place that cannot be written, before the work is done and not after it.

    folder: what is to be there is a folder, which may exist already.
    """
    homes = [place, *place.absolute().parents] if folder else [*place.absolute().parents]
    home = next(each for each in homes if os.path.lexists(each))
    wrong = None
    if place.is_dir() and not folder:
        wrong = errno.EISDIR
    elif not home.is_dir():
        wrong = errno.ENOTDIR
    elif not os.access(home, os.W_OK | os.X_OK):
        wrong = errno.EACCES
    if wrong is not None:
        raise unwritable(place, OSError(wrong, os.strerror(wrong)))


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("network.json", "manifest.json"))


def unwritable(path: Path, problem: OSError) -> BadFile:
    """The error for a place that cannot be written."""
    return BadFile(f"cannot write {path}: {problem.strerror or problem}; choose a folder that you may write to")


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
        document = json.loads(text)
        family, name, version = document.pop("schema").split("/")
        number, stated = int(version), document.pop("checksum")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as problem:
        raise BadFile(f"{where} is not an offramp {kind}: no readable JSON with a schema; make it again") from problem
    if (family, name) != ("offramp", kind):
        raise BadFile(f"{where} is an {family}/{name}, not an offramp {kind}; give the right file")
    if number < 1:
        raise BadFile(f"{where} has schema offramp/{kind}/{number}, and there is none below 1; give the right file")
    if number > newest:
        raise NewerSchema(
            f"{where} has schema offramp/{kind}/{number}, this offramp reads up to {newest}; upgrade offramp"
        )
    if stated != checksum(document):
        raise BadFile(f"{where} was edited or damaged after it was written (its checksum differs); make it again")
    return number, document


def write_json(path: str | Path, kind: str, version: int, body: Mapping[str, Any]) -> None:
    """Write a versioned, checksummed JSON document."""
    with replacing(path) as temporary:
        temporary.write_text(to_document(kind, version, body))


def read_json(path: str | Path, kind: str, newest: int) -> tuple[int, dict[str, Any]]:
    """Read a document written by `write_json`; see `from_document` for what it raises."""
    return from_document(read_text(path), kind, newest, str(path))


def _refuse_folder(path: str | Path) -> None:
    """Raise BadFile for a folder, of which somebody else would say that it is no file."""
    if Path(path).is_dir():
        holds = "network.json" if (Path(path) / "network.json").is_file() else None
        told = "a folder that holds a network" if holds else "a folder"
        raise BadFile(f"{path} is {told}, expected a file; check the order of the arguments")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or BadFile."""
    _refuse_folder(path)
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as problem:
        raise BadFile(f"{path} does not exist; check the path") from problem
    except (OSError, UnicodeDecodeError) as problem:
        raise BadFile(f"cannot read {path} as text ({problem}); check the path and the file") from problem


def write_arrays(path: str | Path, header: str, columns: Mapping[str, Array]) -> None:
    """Write named arrays and a text header into one `.npz`, uncompressed."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        text: Array = np.frombuffer(header.encode(), dtype=np.uint8)
        np.savez(file, allow_pickle=False, **{HEADER: text, **columns})


def read_arrays(path: str | Path) -> tuple[str, dict[str, Array]]:
    """The header and the arrays of a file written by `write_arrays`.

    Raises BadFile for anything else: missing, truncated, pickled, no header.
    """
    _refuse_folder(path)
    if not Path(path).is_file():
        raise BadFile(f"{path} does not exist; check the path")
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
        return columns.pop(HEADER).tobytes().decode(), columns
    except Exception as problem:  # a damaged archive can fail anywhere inside zip, header parser or allocator
        raise BadFile(
            f"{path} is not a readable array file ({type(problem).__name__}); it is truncated, damaged or of "
            "another kind: make it again"
        ) from problem


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors; shared memory is written once per name."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, temporary)
        except SafetensorError as problem:  # a full disk among others
            raise BadFile(f"cannot write {path} ({problem}); make room, or choose another folder") from problem


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Named tensors from `.safetensors`, or from `.pt`/`.pth`/`.th`/`.bin` read with `weights_only=True`.

    A checkpoint that wraps its weights in `state_dict` or `model` is unwrapped, and `module.` prefixes go.
    Raises BadFile for a missing, truncated or pickled file.
    """
    place = Path(path)
    if not place.is_file():
        raise BadFile(f"{place} does not exist; check the path")
    if place.suffix in {".pt", ".pth", ".th", ".bin", ".ckpt"}:
        return _read_checkpoint(place)
    from safetensors.torch import load_file

    try:
        return load_file(place)
    except Exception as problem:
        raise BadFile(
            f"{place} is not a readable safetensors file ({problem}); a PyTorch checkpoint must be named .pt or .pth"
        ) from problem


def _read_checkpoint(place: Path) -> dict[str, Tensor]:
    import torch

    try:
        loaded = torch.load(place, map_location="cpu", weights_only=True)
    except Exception as problem:  # pickle, zip and torch errors alike: the file is not plain weights
        raise BadFile(
            f"{place} cannot be read as plain weights (weights_only=True); it is damaged or would run code: save "
            "model.state_dict() and give that file"
        ) from problem
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise BadFile(f"{place} holds no state dict of tensors; save model.state_dict() and give that file")
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def digest_file(path: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
