"""Rows of arrays, data sets and iterables: the same rows, numbers and digests whatever holds
them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

from offramp.data.rows import digests_of, fingerprint_of, rows
from offramp.errors import BadData, InvalidArgument

N = 23
X = np.random.default_rng(0).integers(0, 256, (N, 3, 4, 4), dtype=np.uint8)
Y = np.random.default_rng(1).integers(0, 5, N)


class Items(Dataset):
    """A map-style data set over any sequence."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


class Unending(IterableDataset):
    def __iter__(self):
        return iter([(torch.from_numpy(x), int(y)) for x, y in zip(X, Y, strict=True)])


def pairs(size):
    return [(X[at : at + size], Y[at : at + size]) for at in range(0, N, size)]


def tensors():
    return TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))


def images():
    from PIL import Image

    return Items(
        [(Image.fromarray(x.transpose(1, 2, 0)), int(y)) for x, y in zip(X, Y, strict=True)]
    )


def gather(data, size):
    batches = list(data.batches(size))
    assert [len(batch) for batch in batches] == [min(size, N - at) for at in range(0, N, size)]
    return [
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("x", "y", "row", "digest")
    ]


FORMS = {
    "arrays": lambda: rows(X, Y),
    "pair": lambda: rows((X, Y)),
    "tensors": lambda: rows(torch.from_numpy(X), torch.from_numpy(Y)),
    "channels last": lambda: rows(torch.from_numpy(X).to(memory_format=torch.channels_last), Y),
    "float labels": lambda: rows(X, Y.astype(np.float32)),
    "dataset": lambda: rows(tensors()),
    "dataset of pairs": lambda: rows(Items([(x, y) for x, y in zip(X, Y, strict=True)])),
    "dataset of images": lambda: rows(images()),
    "loader": lambda: rows(DataLoader(tensors(), batch_size=5)),
    "iterable data set": lambda: rows(Unending()),
    "loader of an iterable": lambda: rows(DataLoader(Unending(), batch_size=4)),
    "list": lambda: rows(pairs(6)),
    "list with an empty batch": lambda: rows([(X[:0], Y[:0]), *pairs(6)]),
    "generator": lambda: rows(pair for pair in pairs(9)),
    "rows": lambda: rows(rows(X, Y)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_every_form_gives_the_same_rows(form, size):
    x, y, row, digest = gather(FORMS[form](), size)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    assert y.dtype == row.dtype == np.int64
    assert digest.dtype == np.uint64
    np.testing.assert_array_equal(row, np.arange(N))
    np.testing.assert_array_equal(digest, digests_of(X))


@pytest.mark.parametrize("form", FORMS)
def test_selection_keeps_the_numbers_of_the_source(form):
    data = FORMS[form]().select(slice(2, 20, 3)).select(slice(1, None))
    (batch,) = data.batches(50)
    assert batch.row.tolist() == [5, 8, 11, 14, 17]
    np.testing.assert_array_equal(batch.x, X[batch.row])
    np.testing.assert_array_equal(batch.y, Y[batch.row])
    assert data.name.endswith("[2:20:3][1:]")


def test_the_fingerprint_is_that_of_a_full_pass():
    data = rows(X, Y)
    assert data.fingerprint == fingerprint_of(digests_of(X)) == rows(pairs(6)).fingerprint
    assert len(data.fingerprint) == 16
    assert data.fingerprint != rows(X[::-1], Y).fingerprint
    assert data.select(slice(0, 5)).fingerprint == fingerprint_of(digests_of(X[:5]))


def test_a_generator_gives_one_pass():
    data = rows(pair for pair in pairs(9))
    assert data.one_pass
    assert data.length is None
    with pytest.raises(BadData, match="unknown before a full pass"):
        len(data)
    with pytest.raises(BadData, match="only once"):
        _ = data.fingerprint
    gather(data, 4)
    assert data.fingerprint == rows(X).fingerprint
    with pytest.raises(BadData, match="walked already"):
        data.batches(4)


@pytest.mark.parametrize("selection", [np.array([3, 1]), [0, 1], 5, "0:5", None])
def test_rows_are_selected_by_a_slice(selection):
    with pytest.raises(InvalidArgument, match=r"selection must be a slice.*take\(positions\)"):
        rows(X, Y).select(selection)


def test_what_is_known_without_a_pass():
    data = rows(X, Y).select(slice(10, 20))
    assert (len(data), data.has_len, data.can_take, data.one_pass) == (10, True, True, False)
    np.testing.assert_array_equal(data.labels, Y[10:20])
    assert repr(data) == "<Rows: 10 rows of array[10:20]>"
    assert rows(tensors()).labels is None
    assert len(rows(pairs(6))) == len(rows(DataLoader(tensors(), batch_size=5))) == N
    assert len(rows(DataLoader(tensors(), batch_size=5, drop_last=True))) == 20
    assert rows(pair for pair in pairs(6)).select(slice(0, 4)).length == 4


def test_take_gives_rows_by_position():
    batch = rows(X, Y).select(slice(2, None, 2)).take(np.array([3, 0, 3]))
    assert batch.row.tolist() == [8, 2, 8]
    np.testing.assert_array_equal(batch.x, X[[8, 2, 8]])
    with pytest.raises(BadData, match="positions must be"):
        rows(X).take(np.array([N]))
    with pytest.raises(BadData, match="is a stream"):
        rows(pairs(5)).take(np.array([0]))


def test_named_arrays_and_no_labels():
    data = rows({"ids": Y, "mask": X.astype(bool)}, Y)
    (batch,) = data.select(slice(4, 6)).batches(9)
    assert set(batch.x) == {"ids", "mask"}
    np.testing.assert_array_equal(batch.x["ids"], Y[4:6])
    streamed = list(rows([{"ids": Y[:9]}, {"ids": Y[9:]}]).batches(10))
    assert [len(batch) for batch in streamed] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate([batch.x["ids"] for batch in streamed]), Y)
    assert streamed[0].y is None
    items = Items([{"ids": torch.tensor([1, row])} for row in range(4)])
    assert next(rows(items).batches(4)).x["ids"].tolist() == [[1, 0], [1, 1], [1, 2], [1, 3]]
    assert next(rows(Items([1.5, 2.5])).batches(2)).x.tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    "selection",
    [
        slice(0, N + 1),
        slice(N, None),
        slice(5, 5),
        slice(7, 3),
        slice(-5, None),
        slice(0, 9, 0),
        slice(0.0, 2),
    ],
)
def test_bad_selections_tell_how_many_rows_there_are(selection):
    with pytest.raises(BadData, match=f"{N} rows"):
        rows(X).select(selection)


def test_a_stream_too_short_for_its_selection():
    with pytest.raises(BadData, match="ended after 23 rows"):
        list(rows(pair for pair in pairs(6)).select(slice(20, 30)).batches(5))
    with pytest.raises(BadData, match="ended after 0 rows"):
        list(rows(iter([])).batches(5))


BAD_LABELS = {
    "negative": (np.where(np.arange(N) % 9 == 4, -1, Y), "-1 at rows 4, 13, 22;"),
    "nan": (np.where(np.arange(N) == 7, np.nan, Y), "nan at row 7;"),
    "fraction": (Y + 0.5, "rows 0, 1, 2 and 20 more"),
    "infinite": (np.where(np.arange(N) == 0, np.inf, Y), "inf at row 0"),
    "too large": (np.full(N, 2**63, dtype=np.uint64), "expected integers"),
    "one-hot": (np.eye(5)[Y], "argmax"),
    "too few": (Y[:-1], "one class index per row"),
    "text": (Y.astype(str), "dtype"),
    "objects": (np.array([None] * N), "dtype object"),
    "a list too short": ([1] * (N - 1), "22 for 23 rows"),
    "a list of lists": ([[1, 2]] * N, "a list with a list at place 0"),
    "a list of arrays": ([np.arange(2)] * N, r"a list with \[2\] at place 0"),
    "a list of texts": (
        ["cat", "dog"] * 11 + ["cat"],
        "'cat'; expected class numbers .*names.index",
    ),
    "a row of labels": (Y[None], r"hand over y\[0\]"),
    "one-hot in floats": (np.eye(5, dtype=np.float32)[Y], r"one-hot, take y.argmax\(1\)"),
    "probabilities": (np.full((N, 4), 0.25), "these are probabilities"),
    "several columns": (np.stack([Y, Y], 1), "choose one column"),
    "one column of fractions": (Y[:, None] + 0.5, "expected integers of at least 0"),
    "a scalar": (np.int64(3)[...], "there are one for 23 rows"),
}


@pytest.mark.parametrize("which", BAD_LABELS)
def test_bad_labels_are_refused_by_row(which):
    labels, message = BAD_LABELS[which]
    with pytest.raises(BadData, match=message):
        rows(X, labels)


class Frame:
    """A data frame as pandas makes it, as far as it is known: columns by name, and `to_numpy`."""

    def __init__(self, **columns):
        self.columns = list(columns)
        self.parts = {name: np.asarray(values) for name, values in columns.items()}
        self.shape = len(next(iter(self.parts.values()))), len(columns)

    def __getitem__(self, name):
        return Series(self.parts[name])

    def __iter__(self):
        return iter(self.columns)

    def to_numpy(self):
        return np.array([[*row] for row in zip(*self.parts.values(), strict=True)], dtype=object)


class Series:
    def __init__(self, values):
        self.values = np.asarray(values)
        self.shape = self.values.shape

    def __iter__(self):
        return iter(self.values)

    def to_numpy(self):
        return self.values


LABELS = {
    "a column of integers": Y[:, None],
    "a column of whole floats": Y[:, None].astype(float),
    "a column in torch": torch.tensor(Y)[:, None],
    "a list": Y.tolist(),
    "a list of NumPy integers": list(Y),
    "a list of tensors": list(torch.tensor(Y)),
    "a list of tensors [1]": list(torch.tensor(Y)[:, None]),
    "a Series": Series(Y),
    "a nullable Series": Series(Y.astype(object)),
    "a DataFrame of one column": Frame(kind=Y),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_in_the_forms_that_people_have(kind):
    for data in (rows(X, LABELS[kind]), rows((X, LABELS[kind])), rows(({"x": X}, LABELS[kind]))):
        assert data.labels.tolist() == Y.tolist()
        assert data.labels.dtype == np.int64


def test_labels_of_one_column_in_batches_and_items():
    (batch,) = rows([(X, Y[:, None])]).batches(N)
    assert batch.y.tolist() == Y.tolist()
    (batch,) = rows(Items([(x, torch.tensor([y])) for x, y in zip(X, Y, strict=True)])).batches(N)
    assert batch.y.tolist() == Y.tolist()


def test_data_frames():
    numbers = np.arange(N) / 2
    flags = Y > 2
    data = rows((Frame(a=numbers, b=flags, c=Y), Series(Y)))
    (batch,) = data.batches(N)
    np.testing.assert_array_equal(batch.x, np.stack([numbers, flags, Y], 1))
    assert batch.y.tolist() == Y.tolist()
    assert next(rows(Frame(a=numbers)).batches(3)).x.tolist() == [[0.0], [0.5], [1.0]]
    assert next(rows({"a": Series(numbers), "b": Frame(c=Y)}).batches(2)).x["b"].shape == (2, 1)
    with pytest.raises(BadData, match=r"columns \['city'\] are no numbers"):
        rows(Frame(a=numbers, city=["x"] * N))
    for given in (Frame(a=numbers, Label=Y), (Frame(a=numbers, Label=Y), Series(Y))):
        with pytest.raises(BadData, match=r"df.drop\(columns='Label'\), df\['Label'\]"):
            rows(given)


def test_x_and_labels_in_a_list_are_no_batches():
    for labels in (Y, Y[:, None], torch.tensor(Y)):
        with pytest.raises(BadData, match=r"as the tuple \(x, y\)"):
            rows([X, labels])
    assert len(rows([Y, Y])) == 2 * N
    assert len(rows([X, X])) == 2 * N


def test_bad_labels_in_a_stream_and_a_dataset_name_the_row():
    with pytest.raises(BadData, match="at row 12"):
        list(
            rows(
                (X[at : at + 5], Y[at : at + 5] - 9 * (at == 10) * (np.arange(5) == 2))
                for at in (0, 5, 10)
            ).batches(5)
        )
    with pytest.raises(BadData, match="at row 1"):
        list(rows(Items([(X[0], 0), (X[1], -3)])).batches(5))


BAD_DATA = {
    "number": (3, "got a int"),
    "text array": (np.array(["a", "b"]), "dtype"),
    "objects": (np.array([{}, []], dtype=object), "dtype object"),
    "complex": (np.ones(3, dtype=complex), "dtype complex"),
    "dates": (np.array(["2020-01-01"], dtype="datetime64[D]"), "dtype"),
    "scalar": (np.float32(1)[...], "expected"),
    "no rows": (X[:0], "0 rows"),
    "empty rows": (np.ones((3, 0)), "empty axis"),
    "uneven dict": ({"a": X, "b": X[1:]}, "different lengths"),
    "empty dict": ({}, "without names"),
    "bfloat16": (torch.ones(3, dtype=torch.bfloat16), "x.float"),
    "sparse": (torch.eye(3).to_sparse(), "dense tensor"),
}


@pytest.mark.parametrize("which", BAD_DATA)
def test_bad_data_is_refused(which):
    data, message = BAD_DATA[which]
    with pytest.raises(BadData, match=message):
        rows(data)


BAD_STREAMS = {
    "shapes differ": ([X[:5], X[5:, :, :2]], r"row 5 is uint8 \[3, 2, 4\]"),
    "types differ": ([X[:5], X[5:].astype(np.float32)], "float32"),
    "labels stop": ([(X[:5], Y[:5]), X[5:]], "no labels"),
    "labels start": ([X[:5], (X[5:], Y[5:])], "has labels"),
    "three parts": ([(X, Y, Y)], "3 parts; expected x or .*several inputs into a dict"),
    "plain lists": (
        ([[1.0, 2.0]] * 5, [0] * 5),
        "5 parts; expected x or .*these are plain lists: make arrays",
    ),
    "text": (["abc"], "is a str"),
}


@pytest.mark.parametrize("which", BAD_STREAMS)
def test_bad_batches_are_refused(which):
    batches, message = BAD_STREAMS[which]
    with pytest.raises(BadData, match=message):
        list(rows(iter(batches)).batches(4))


def test_bad_items_name_their_row():
    broken = {0: X[0], 1: X[1]}
    cases = [
        ([X[0], X[1, :2]], "row 1 is"),
        ([(X[0], 1), X[1]], "row 1 has no labels"),
        ([(X[0], "cat")], "row 0's label is a str"),
        ([(X[0], torch.tensor([1, 2]))], "one class index per row"),
    ]
    for items, message in cases:
        with pytest.raises(BadData, match=message):
            list(rows(Items(items)).batches(4))

    class Broken(Items):
        def __len__(self):
            return 3

    with pytest.raises(BadData, match=r"row 2 of the Dataset failed \(KeyError"):
        list(rows(Broken(broken)).batches(4))
    with pytest.raises(BadData, match="row 2 is"):
        list(rows(Items([X[0], X[1], X[2, :2]])).batches(2))


def test_a_failing_iterable_names_its_batch():
    def failing():
        yield X[:3]
        raise RuntimeError("disk on fire")

    with pytest.raises(BadData, match=r"batch 1 could not be made .*disk on fire"):
        list(rows(failing()).batches(2))


def test_loaders_that_change_the_order_are_refused():
    class Mine(torch.utils.data.BatchSampler):
        pass

    data = tensors()
    shuffled = [
        DataLoader(data, batch_size=4, shuffle=True),
        DataLoader(data, batch_size=None, shuffle=True),
        DataLoader(data, sampler=WeightedRandomSampler(torch.ones(N), N)),
        DataLoader(data, batch_sampler=Mine(range(N), 4, False)),
    ]
    for loader in shuffled:
        with pytest.raises(BadData, match="shuffle=False"):
            rows(loader)


def test_bad_batch_sizes_and_stray_labels():
    for size in (0, -1, 2.0, True, None):
        with pytest.raises(BadData, match="batch size"):
            rows(X).batches(size)
    with pytest.raises(BadData, match="labels came beside"):
        rows((X, Y), Y)
