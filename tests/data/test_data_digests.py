"""Row digests: equal where a network reads equal values, whatever holds them, and different
elsewhere.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from offramp.data.rows import digests_of, rounded_digests_of, rows

N = 6
DRAW = np.random.default_rng(0)
WHOLE = DRAW.integers(0, 2, (N, 3, 4, 4))
REAL = DRAW.normal(size=(N, 3, 4, 4)).astype(np.float32)
IDS = DRAW.integers(1, 99, (N, 5))
MASK = np.ones_like(IDS)


def same(one: object, other: object) -> bool:
    """Whether all rows of two data sets have the same digests."""
    mine, its = (np.concatenate([b.digest for b in rows(data).batches(4)]) for data in (one, other))
    return bool((mine == its).all())


def unlike(one: object, other: object) -> bool:
    """Whether no row of one has the digest of its fellow in the other."""
    mine, its = (np.concatenate([b.digest for b in rows(data).batches(4)]) for data in (one, other))
    return bool((mine != its).all())


def padded(left: int, right: int, fill: int = 0) -> dict[str, np.ndarray]:
    """The texts of IDS, padded on both sides."""
    width = ((0, 0), (left, right))
    return {
        "input_ids": np.pad(IDS, width, constant_values=fill),
        "attention_mask": np.pad(MASK, width),
    }


def test_the_digest_is_the_documented_one():
    row = np.array([1.5, -2.0, 0.0], "<f4")
    expected = hashlib.blake2b(b":[3];" + row.tobytes()).digest()[:8]
    assert digests_of(row[None])[0] == int.from_bytes(expected, "little")
    mark = hashlib.blake2b(b"a:[3];" + row.tobytes() + b"b:[1];" + np.float32([7]).tobytes())
    assert digests_of({"b": np.array([[7]]), "a": row[None]})[0] == int.from_bytes(
        mark.digest()[:8], "little"
    )


@pytest.mark.parametrize(
    "kind", ["f8", "f4", ">f4", "f2", "i8", "i4", "i2", "i1", "u1", "u2", "u4", "u8", "?"]
)
def test_equal_numbers_of_any_type(kind):
    assert same(WHOLE.astype(kind), WHOLE.astype("f4"))
    assert same(torch.from_numpy(WHOLE.astype(kind.strip(">"))), WHOLE)


def test_float64_is_what_float32_makes_of_it():
    exact = DRAW.normal(size=(N, 7)) * 1e3
    assert same(exact, exact.astype(np.float32))
    assert unlike(exact, exact.astype(np.float16))  # a network that reads these reads other values
    assert same(exact.astype(np.float16), exact.astype(np.float16).astype(np.float64))
    assert same(np.full((1, 2), 1e300), np.full((1, 2), np.inf, np.float32))


def test_zeros_and_nan():
    assert same(np.where(WHOLE == 0, -0.0, WHOLE), WHOLE)
    odd = np.frombuffer(np.uint32([0x7FC00001, 0xFFC12345, 0x7F800001]).tobytes(), np.float32)
    assert np.isnan(odd).all()
    assert len(set(digests_of(odd[:, None]).tolist())) == 1
    assert same(odd[None], np.full((1, 3), np.nan))
    assert unlike(odd[None], np.zeros((1, 3)))


def test_layouts_in_memory():
    wide = np.zeros((N, 3, 4, 8), np.float32)
    wide[..., ::2] = REAL
    assert same(wide[..., ::2], REAL)
    assert same(np.asfortranarray(REAL), REAL)
    assert same(torch.from_numpy(REAL).to(memory_format=torch.channels_last), REAL)
    assert same(torch.from_numpy(REAL).requires_grad_(), REAL)


def test_integers_are_told_apart_exactly():
    near = [0, 2**24, 2**24 + 1, 2**24 + 2, -(2**24) - 1, 2**53, 2**53 + 1, 2**62, 2**62 + 1, -1]
    assert len(set(digests_of(np.array(near)[:, None]).tolist())) == len(near)
    large = np.array([2**63, 2**63 + 1, 2**64 - 1, 2**64 - 2, 1], np.uint64)
    assert (
        len(
            {
                *digests_of(large[:, None]).tolist(),
                *digests_of(np.array([[-1], [-2], [-(2**63)]])).tolist(),
            }
        )
        == 8
    )
    assert same(np.array([[2**24, 2**24 + 2]], np.int32), np.array([[2.0**24, 2.0**24 + 2]]))


def test_shape_and_content_count():
    assert unlike(REAL, REAL.reshape(N, 3, 16))
    assert unlike(REAL, REAL + 1)
    assert unlike(REAL, REAL.swapaxes(2, 3))
    assert len(set(digests_of(REAL).tolist())) == N


def test_names_of_inputs():
    assert same({"x": REAL}, REAL)
    assert same({"feats": REAL}, {"pixel_values": REAL})
    assert same({"a": REAL, "b": IDS}, {"b": IDS, "a": REAL})
    assert unlike({"a": REAL, "b": IDS}, {"a": IDS, "b": REAL})
    assert unlike({"a": REAL, "b": IDS}, REAL)


@pytest.mark.parametrize(
    "other", [padded(0, 3), padded(4, 0), padded(2, 2, fill=7), {"input_ids": IDS}, IDS]
)
def test_texts_padded_otherwise(other):
    assert same(padded(0, 0), other)
    assert same({**padded(0, 9), "token_type_ids": np.zeros((N, 14), int)}, other)


def test_texts_that_differ():
    pair = np.repeat([[0, 0, 0, 1, 1]], N, axis=0)
    assert unlike({**padded(0, 0), "token_type_ids": pair}, padded(0, 0))
    assert unlike({"input_ids": np.roll(IDS, 1, axis=1), "attention_mask": MASK}, padded(0, 0))
    # without a mask nobody can tell padding
    assert unlike({"input_ids": np.pad(IDS, ((0, 0), (0, 3)))}, IDS)
    short = {"input_ids": IDS, "attention_mask": np.where(np.arange(5) < 4, MASK, 0)}
    assert unlike(short, padded(0, 0))
    weights = {"input_ids": IDS, "attention_mask": np.where(np.arange(5) < 4, MASK, 0.5)}
    assert unlike(weights, padded(0, 0))  # such a mask is an input like another
    hidden = {"input_ids": IDS, "attention_mask": 0 * MASK}
    assert len(set(digests_of(hidden).tolist())) == N


def test_an_input_as_wide_as_the_text_is_not_cut_by_its_mask():
    columns = np.arange(N * 5, dtype=float).reshape(N, 5)
    hidden = MASK.copy()
    hidden[:, 3:] = 0
    texts = {"input_ids": IDS, "attention_mask": hidden, "columns": columns}
    other = columns.copy()
    other[:, 4] += 1
    assert unlike({**texts, "columns": other}, texts)
    longer = {
        "input_ids": np.pad(IDS, ((0, 0), (0, 2))),
        "attention_mask": np.pad(hidden, ((0, 0), (0, 2))),
    }
    assert same({**longer, "columns": columns}, texts)
    along = {"inputs_embeds": columns[:, :, None], "position_ids": IDS, "attention_mask": hidden}
    cut = {name: value[:, :3] for name, value in along.items()}
    assert same(along, cut)


def test_a_mask_is_judged_row_by_row():
    """A mask of other numbers in one row says nothing of the others."""
    weights = MASK.astype(float)
    weights[1, 0] = 0.5
    mine = digests_of({"input_ids": IDS, "attention_mask": weights})
    plain = digests_of({"input_ids": IDS, "attention_mask": MASK})
    assert (mine != plain).tolist() == [folder == 1 for folder in range(N)]


def test_complex_numbers_count_with_both_parts():
    row = np.array([[1 + 2j, 3 - 1j]])
    assert digests_of(row) != digests_of(row.conj())
    assert digests_of(row) != digests_of(row.real)
    assert digests_of(row) == digests_of(row.astype(np.complex64))


def test_rows_as_half_precision_rounds_them():
    exact = DRAW.normal(size=(N, 7)).astype(np.float32) * np.float32([1e-3, 1, 1e3, 1e5, 1, 1, 1])
    exact[0] = [1, 2, 3, 4, np.inf, np.nan, 0]  # which no rounding changes
    found = set(rounded_digests_of(exact, digests_of(exact)).tolist())
    for kind in (torch.float16, torch.bfloat16):
        rounded = torch.from_numpy(exact).to(kind).float().numpy()
        assert found >= set(digests_of(rounded)[1:].tolist())
    assert len(found) == 2 * (N - 1)
    named = {"ids": IDS, "x": exact.astype(np.float64)}
    half = digests_of({"ids": IDS, "x": torch.from_numpy(exact).half().numpy()})
    assert set(rounded_digests_of(named, digests_of(named)).tolist()) >= set(half[1:].tolist())
    assert not len(rounded_digests_of(WHOLE, digests_of(WHOLE)))
    assert not len(rounded_digests_of(WHOLE.astype("f4"), digests_of(WHOLE)))


def test_the_first_form_is_still_told():
    row = WHOLE.astype(np.uint8)[3]
    expected = hashlib.blake2b(b":|u1[3, 4, 4];" + row.tobytes()).digest()[:8]
    assert digests_of(WHOLE.astype(np.uint8), form=1)[3] == int.from_bytes(expected, "little")
