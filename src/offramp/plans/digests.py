"""Digests of rows: a digest identifies a row by the values that a network reads, whatever type or
container they came in.

The canonical form of a row (form 2; docs/concepts/promises.md says what it means for a promise):

- Every number is rounded to float32, because networks compute in it: float64, float16, integers
  and booleans of equal value are equal, -0.0 is 0.0, and all NaNs are one. Integers that float32
  cannot hold (all are beyond 2^24) are told apart exactly; as floats they are the row that float32
  makes of them.
- The shape of the row counts. Strides, byte order and memory format (channels_last) do not.
- The names of several inputs count. A single input is the same row under any name, or none.
- A complex number counts as its real and its imaginary part.
- Texts: if the `attention_mask` [T] of a row holds zeros and ones, the positions that it hides do
  not count in inputs along the text (`ALONG`). So a text padded to another length, or on the other
  side, is the same row. All values of other inputs count, whatever their size. `token_type_ids`
  that are all zero count as absent, and so does a mask that hides nothing.

Form 1, of the first edition, hashes the type and bytes as they came. Files that hold it are still
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
    """The content digest of each row, by which rows are recognized.

    Args:
        x: one array [n, ...], or named arrays [n, ...].
        form: 2 for the canonical form (see the top of this file), 1 for that of the first edition.

    Returns:
        uint64 [n]: the first 8 bytes of BLAKE2b.
    """
    # the order of the names does not count
    fields = sorted(x.items()) if isinstance(x, dict) else [("", x)]
    rows = len(fields[0][1])
    if form == 1:
        hashes = _first_form(fields, rows)
    else:
        hashes = _canonical(fields, rows)
    return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)


def rounded_digests_of(x: Array | dict[str, Array], digests: Digests) -> Digests:
    """Digests of the rows after rounding to float16 and bfloat16.

    A network that is cast afterwards recognizes its training rows by them.

    Args:
        x: one array [n, ...], or named arrays [n, ...].
        digests: their `digests_of`.

    Returns:
        uint64, of the rows that the rounding changes.
    """
    fields = x if isinstance(x, dict) else {"": x}
    changed = [np.zeros(0, np.uint64)]
    for rounding in (_to_float16, _to_bfloat16):
        rounded = {}
        is_changed = False
        for name, part in fields.items():
            rounded[name] = part
            # only floats of more than two bytes lose anything
            if part.dtype.kind == "f" and part.dtype.itemsize > 2:
                rounded[name] = rounding(_numbers(part))
                is_changed |= not np.array_equal(rounded[name], part)
        if is_changed:
            rounded_digests = digests_of(rounded)
            changed.append(rounded_digests[rounded_digests != digests])
    return np.concatenate(changed)


def fingerprint_of(digests: Digests) -> str:
    """The identity of a data set: 16 hex digits of the SHA-256 over its row digests in order."""
    return hashlib.sha256(np.asarray(digests).astype("<u8").tobytes()).hexdigest()[:16]


def _canonical(fields: Fields, rows: int) -> list[bytes]:
    """Form 2: the hash of each row in its canonical form, see the top of this file."""
    fields = [(name, _real(part)) for name, part in fields]
    shown = _shown(fields)
    numbers = {name: _numbers(part) for name, part in fields}
    integers = {name: _integers(part) for name, part in fields}
    names = [name for name, _ in fields]
    names_but_mask = [name for name in names if name != MASK]
    masked_names = set[str]()
    if shown is not None:
        masked_names = _along_text(fields, shown)
    hashes = []
    for index in range(rows):
        # A mask of zeros and ones hides positions, and its own values do not count then. A mask
        # with other values is an input like any other.
        is_masked = shown is not None and _hides(numbers[MASK][index])
        row_names = names_but_mask if is_masked else names
        row: dict[str, tuple[Array, Array | None]] = {}
        for name in row_names:
            value = numbers[name][index]
            exact = integers[name]
            if exact is not None:
                exact = exact[index]
            if is_masked and shown is not None and name in masked_names:
                value = value[shown[index]]  # [T, ...] -> [positions shown, ...]
                if exact is not None:
                    exact = exact[shown[index]]
            if name not in ZERO_IS_ABSENT or len(row_names) == 1 or value.any():
                row[name] = (value, exact)
        hashes.append(_hash(row))
    return hashes


def _along_text(fields: Fields, shown: Array) -> set[str]:
    """The names of the inputs [n, T, ...] that run along a text of T positions."""
    others = [name for name, _ in fields if name != MASK]
    names = set[str]()
    for name, part in fields:
        # the only input besides the mask is the text, whatever its name
        may_run_along = name in ALONG or others == [name]
        if may_run_along and part.shape[1:2] == shown.shape[1:]:
            names.add(name)
    return names


def _real(part: Array) -> Array:
    """Complex numbers [...] as their real and imaginary parts [..., 2]; others as they are."""
    if part.dtype.kind != "c":
        return part
    return np.stack([part.real, part.imag], axis=-1)


def _hides(mask: Array) -> bool:
    """Whether the mask [T] of a row consists of zeros and ones: then it hides positions."""
    return bool(((mask == 0) | (mask == 1)).all())


def _hash(row: dict[str, tuple[Array, Array | None]]) -> bytes:
    """The digest of one row: its float32 values, and integers that float32 may have rounded."""
    mark = hashlib.blake2b()
    for name, (value, exact) in row.items():
        counted_name = name if len(row) > 1 else ""  # a single input is the same under any name
        mark.update(f"{counted_name}:{list(value.shape)};".encode())
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
    # Numbers beyond float32 become infinite, as in the network. A signaling NaN would warn.
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = np.asarray(part).astype("<f4", order="C") + np.float32(0)  # -0.0 + 0.0 is 0.0
    numbers[np.isnan(numbers)] = np.nan
    return np.ascontiguousarray(numbers, dtype="<f4")


def _to_float16(numbers: Array) -> Array:
    """Values rounded to float16; beyond its range they become infinite."""
    with np.errstate(over="ignore"):
        return numbers.astype(np.float16)


def _to_bfloat16(numbers: Array) -> Array:
    """Values rounded to the nearest bfloat16, ties to even, held as float32."""
    # bfloat16 is the upper half of float32. Adding half of the lower half's range (minus one, plus
    # the last bit that stays) carries into the upper half exactly where it must be rounded up.
    bits = numbers.view("<u4")
    last_bit = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + last_bit) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(numbers), rounded.view("<f4"), numbers)


def _integers(part: Array) -> Array | None:
    """Integers as little-endian int64 where float32 might round them, None for other types.

    uint64 wraps around, and its float32 value tells the two halves apart.
    """
    if part.dtype.kind not in "iu" or part.dtype.itemsize < 4:
        return None
    return np.ascontiguousarray(part.astype("<i8"))


def _shown(fields: Fields) -> Array | None:
    """The positions [n, T] of texts that the mask shows.

    None where there is no mask [n, T], or no other input.
    """
    mask = dict(fields).get(MASK)
    if mask is None or mask.ndim != 2 or len(fields) == 1:
        return None
    shown: Array = mask != 0
    # a text without any token has nothing else to be recognized by
    shown[~shown.any(axis=1)] = True
    return shown


def _first_form(fields: Fields, rows: int) -> list[bytes]:
    """Form 1: the hash of each row's names, types, shapes and bytes."""
    hashes = [hashlib.blake2b() for _ in range(rows)]
    for name, part in fields:
        plain = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
        header = f"{name}:{plain.dtype.str}{list(plain.shape[1:])};".encode()
        for row_hash, row in zip(hashes, plain, strict=True):
            row_hash.update(header)
            row_hash.update(row.tobytes())
    return [row_hash.digest()[:8] for row_hash in hashes]
