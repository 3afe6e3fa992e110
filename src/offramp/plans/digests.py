"""What identifies a row: a digest of the values that a network reads, whatever type or container
they came in.

The canonical form of a row (form 2; docs/concepts/promises.md says what it means for a promise):

- Every number is rounded to float32, which is what networks compute in: float64, float16, integers
  and booleans of equal value are equal, -0.0 is 0.0, and all NaNs are one. Integers that float32
  cannot hold (all are beyond 2^24) are told apart exactly; as floats they are the row that float32
  makes of them.
- The shape of the row counts. Strides, byte order and memory format (channels_last) do not.
- The names of several inputs count. A single input is the same row under any name, or none.
- A complex number counts as its real and its imaginary part.
- Texts: where the `attention_mask` [T] of a row holds zeros and ones, positions that it hides do
  not count in inputs along the text (`ALONG`), so that a text padded to another length, or on the
  other side, is the same row. Other inputs count whole, whatever their size. `token_type_ids` that
  are all zero count as absent, and so does a mask that hides nothing.

Form 1, of the first edition, hashes the type and bytes as they came; files that hold it are still
compared by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offramp._support.files import Array
from offramp.plans.provenance import FORM

MASK = "attention_mask"
ZERO_IS_ABSENT = ("token_type_ids",)
# inputs [n, T, ...] along a text, by the names that tokenizers and models give them
ALONG = frozenset(
    (
        "input_ids",
        "inputs_embeds",
        "token_type_ids",
        "position_ids",
        "special_tokens_mask",
        "global_attention_mask",
        "bbox",
        "langs",
        "tokens",
        "token_ids",
        "segment_ids",
    )
)
EXACT = 2**24  # float32 holds every whole number up to here, and not every one beyond

Digests = NDArray[np.uint64]
Fields = Sequence[tuple[str, Array]]


def digests_of(x: Array | dict[str, Array], form: int = FORM) -> Digests:
    """The content digest of each row, by which rows are known again.

    Args:
        x: one array [n, ...], or named arrays [n, ...].
        form: 2 for the canonical form (see the top of this file), 1 for that of the first edition.

    Returns:
        uint64 [n]: the first 8 bytes of BLAKE2b.
    """
    fields = sorted(x.items()) if isinstance(x, dict) else [("", x)]
    rows = len(fields[0][1])
    hashes = _first_form(fields, rows) if form == 1 else _canonical(fields, rows)
    return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)


def rounded_digests_of(x: Array | dict[str, Array], digests: Digests) -> Digests:
    """Digests of what float16 and bfloat16 make of rows, by which a network that is cast afterwards
    knows them again.

    Args:
        x: one array [n, ...], or named arrays [n, ...].
        digests: their `digests_of`.

    Returns:
        uint64, of the rows that such a rounding changes.
    """
    fields = x if isinstance(x, dict) else {"": x}
    found = [np.zeros(0, np.uint64)]
    for rounding in (_to_float16, _to_bfloat16):
        rounded = {}
        for name, part in fields.items():
            wide = part.dtype.kind == "f" and part.dtype.itemsize > 2
            rounded[name] = rounding(_numbers(part)) if wide else part
        if any(not np.array_equal(rounded[name], part) for name, part in fields.items()):
            other = digests_of(rounded)
            found.append(other[other != digests])
    return np.concatenate(found)


def fingerprint_of(digests: Digests) -> str:
    """Sixteen hex digits of the SHA-256 over row digests in their order: the identity of a data
    set.
    """
    return hashlib.sha256(np.asarray(digests).astype("<u8").tobytes()).hexdigest()[:16]


def _canonical(fields: Fields, rows: int) -> list[bytes]:
    fields = [(name, _real(part)) for name, part in fields]
    shown = _shown(fields)
    numbers = {name: _numbers(part) for name, part in fields}
    whole = {name: _whole(part) for name, part in fields}
    others = [name for name, _ in fields if name != MASK]
    along = set[str]()
    if shown is not None:
        length = shown.shape[1:]
        along = {name for name, part in fields if name in ALONG and part.shape[1:2] == length}
        if len(others) == 1:  # what is masked is the text, whatever it is called
            along |= {name for name, part in fields if name in others and part.shape[1:2] == length}
    found = []
    for at in range(rows):
        masked = shown is not None and _hides(numbers[MASK][at])
        names = others if masked else [name for name, _ in fields]
        row: dict[str, tuple[Array, Array | None]] = {}
        for name in names:
            value = numbers[name][at]
            integers = whole[name]
            exact = None if integers is None else integers[at]
            if masked and shown is not None and name in along:
                value = value[shown[at]]
                exact = None if exact is None else exact[shown[at]]
            if name not in ZERO_IS_ABSENT or len(names) == 1 or value.any():
                row[name] = (value, exact)
        found.append(_hash(row))
    return found


def _real(part: Array) -> Array:
    """Complex numbers [...] as their real and imaginary parts [..., 2]; others as they are."""
    return np.stack([part.real, part.imag], axis=-1) if part.dtype.kind == "c" else part


def _hides(mask: Array) -> bool:
    """Whether the mask [T] of a row says with zeros and ones which positions count."""
    return bool(((mask == 0) | (mask == 1)).all())


def _hash(row: dict[str, tuple[Array, Array | None]]) -> bytes:
    """The digest of one row in canonical form: float32 values, and integers where float32 may have
    rounded them.
    """
    mark = hashlib.blake2b()
    for name, (value, exact) in row.items():
        mark.update(f"{name if len(row) > 1 else ''}:{list(value.shape)};".encode())
        mark.update(value.tobytes())
        if exact is not None and _rounded(value, exact):
            mark.update(b"exact;")
            mark.update(exact.tobytes())
    return mark.digest()[:8]


def _rounded(value: Array, exact: Array) -> bool:
    """Whether float32 changed any of these integers."""
    if not (np.abs(value) >= EXACT).any():
        return False
    with np.errstate(invalid="ignore"):  # 2^63 and more has no int64; such a row counts as rounded
        return bool((value.astype(np.int64) != exact).any())


def _numbers(part: Array) -> Array:
    """Values as little-endian float32; one zero and one NaN."""
    # Beyond float32 is infinity, as it is for the network; a NaN may be one that signals.
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = np.asarray(part).astype("<f4", order="C") + np.float32(0)  # -0.0 + 0.0 is 0.0
    numbers[np.isnan(numbers)] = np.nan
    return np.ascontiguousarray(numbers, dtype="<f4")


def _to_float16(numbers: Array) -> Array:
    with np.errstate(over="ignore"):
        return numbers.astype(np.float16)


def _to_bfloat16(numbers: Array) -> Array:
    """The upper half of float32, rounded to the nearest, and to the even one between two."""
    bits = numbers.view("<u4")
    kept = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(
        0xFFFF0000
    )
    return np.where(np.isfinite(numbers), kept.view("<f4"), numbers)


def _whole(part: Array) -> Array | None:
    """Integers as little-endian int64, where float32 might round them. uint64 wraps: float32 tells
    the sign.
    """
    if part.dtype.kind not in "iu" or part.dtype.itemsize < 4:
        return None
    return np.ascontiguousarray(part.astype("<i8"))


def _shown(fields: Fields) -> Array | None:
    """Which positions [n, T] of texts a mask shows; None where there is no mask [n, T], or nothing
    else.
    """
    mask = dict(fields).get(MASK)
    if mask is None or mask.ndim != 2 or len(fields) == 1:
        return None
    shown: Array = mask != 0
    shown[~shown.any(axis=1)] = True  # a text without any token has nothing else to be known by
    return shown


def _first_form(fields: Fields, rows: int) -> list[bytes]:
    hashes = [hashlib.blake2b() for _ in range(rows)]
    for name, part in fields:
        plain = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
        header = f"{name}:{plain.dtype.str}{list(plain.shape[1:])};".encode()
        for one, row in zip(hashes, plain, strict=True):
            one.update(header)
            one.update(row.tobytes())
    return [one.digest()[:8] for one in hashes]
