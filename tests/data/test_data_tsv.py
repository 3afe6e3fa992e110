"""Texts as tokens: columns, labels, lengths, and files that are refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from offramp.data.rows import rows
from offramp.errors import BadData, BadFile, MissingExtra, Notice, UnknownName
from words import library, write_tokenizer

TEXT = "label\tsentence\n0\ta bad film\n1\tgood\n1\ta good film of words\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", library())
    write_tokenizer(tmp_path / "tok")
    (tmp_path / "some.tsv").write_text(TEXT)
    return tmp_path


def spec(file="some.tsv", more="", length=5):
    return f"tsv:{file}?tokenizer=tok&length={length}{more}"


def test_rows_are_tokens_of_one_length(here):
    data = rows(spec())
    batch = next(data.batches(8))
    assert batch.x["input_ids"].tolist() == [[1, 7, 5, 6, 2], [1, 4, 2, 0, 0], [1, 7, 4, 6, 2]]
    assert batch.x["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert {str(part.dtype) for part in batch.x.values()} == {"int64"}
    assert (batch.y.tolist(), data.labels.tolist(), len(data)) == ([0, 1, 1], [0, 1, 1], 3)
    assert next(rows(f"{spec()}[1:2]").batches(8)).x["input_ids"].tolist() == [[1, 4, 2, 0, 0]]
    assert next(rows("tsv:some.tsv?tokenizer=tok/tokenizer.json").batches(1)).x[
        "input_ids"
    ].shape == (1, 128)
    assert (data.name, data.fingerprint) == (spec(), rows(spec()).fingerprint)


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("0\ta bad film\n1\tgood\n", ""),
        ("a bad film\t0\r\ngood\t1\r\n\r\n", ""),
        ("\ufeffcontent\tlabel\na bad film\t0\ngood\t1", ""),
        ("id\tsaid\tkind\n7\ta bad film\t0\n8\tgood\t1\n", "&text=said&label=kind"),
        ("id\tsaid\tkind\n7\ta bad film\t0\n8\tgood\t1\n", "&text=2&label=3"),
        ("7\ta bad film\t0\n8\tgood\t1\n", "&text=2&label=3"),
        ("sentence\tid\tlabel\na bad film\t9\t0\ngood\t8\t1\n", ""),
    ],
)
def test_columns_by_name_by_number_or_by_what_they_hold(here, text, more):
    (here / "t.tsv").write_text(text, encoding="utf-8", newline="")
    batch = next(rows(spec("t.tsv", more)).batches(8))
    assert batch.x["input_ids"].tolist() == [[1, 7, 5, 6, 2], [1, 4, 2, 0, 0]]
    assert batch.y.tolist() == [0, 1]


def test_without_labels_and_splits(here):
    (here / "t.tsv").write_text("sentence\ngood\n")
    assert next(rows(spec("t.tsv")).batches(8)).y is None
    # a quotation mark is a character
    (here / "t.tsv").write_text('say "good\ngood\n', encoding="utf-8")
    assert len(rows(spec("t.tsv"))) == 2
    (here / "dev.tsv").write_text("0\tgood\n")
    (here / "train.tsv").write_text("0\tgood\n1\tbad\n")
    assert len(rows(spec("."))) == 1
    assert len(rows(spec(".").replace("tsv:", "tsv/train:"))) == 2


def test_the_token_that_fills_up(here):
    write_tokenizer(here / "tok", words={"good": 4}, padding={"pad_id": 9})
    assert next(rows(spec()).batches(2)).x["input_ids"][1].tolist() == [1, 4, 2, 9, 9]
    write_tokenizer(here / "tok", words={"good": 4, "<end>": 8})
    with pytest.raises(BadData, match="no token to fill rows up"):
        rows(spec())
    (here / "tok" / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": {"content": "<end>"}})
    )
    assert next(rows(spec()).batches(2)).x["input_ids"][1].tolist() == [1, 4, 2, 8, 8]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("label\tsentence\n0\ta\tb\n", "line 2 .* has 3 columns, the first 2"),
        ("label\tsentence\n0\n", "line 2 .* has 1 columns"),
        (
            "label\tsentence\n0\ta\npositive\tb\n",
            "line 3 .* the label 'positive'; expected integers",
        ),
        ("label\tsentence\n-1\ta\n", "the label '-1'"),
        ("label\tsentence\n0.5\ta\n", "the label '0.5'"),
        ("label\tsentence\n", "no row below its header"),
        ("", "holds no rows"),
        ("a\tb\tc\nd\te\tf\n", "which holds the text is not clear"),
        ("one\0two\n", "zero bytes"),
    ],
)
def test_files_that_are_refused(here, text, says):
    (here / "t.tsv").write_text(text)
    with pytest.raises(BadData, match=says):
        rows(spec("t.tsv"))


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ("tsv:some.tsv", BadData, "no tokenizer; expected tsv:PATH"),
        ("tsv:some.tsv?tokenizer=none", BadFile, "does not exist; expected a tokenizer.json"),
        ("tsv:some.tsv?tokenizer=some.tsv", BadFile, "cannot be read as a tokenizer.json"),
        ("tsv:some.tsv?tokenizer=.", BadData, "save_pretrained"),
        ("tsv:none.tsv?tokenizer=tok", BadFile, "does not exist"),
        ("tsv/dev:some.tsv?tokenizer=tok", BadData, "no split 'dev'"),
        ("tsv/dev:.?tokenizer=tok", BadFile, "dev.tsv does not exist"),
        ("tsv?tokenizer=tok", UnknownName, "tsv"),
        ("tsv@8x8:some.tsv?tokenizer=tok", BadData, "asks for a size"),
        (spec(length="2"), BadData, "expected at least 3"),
        (spec(length="x"), BadData, "number of tokens"),
        (spec(length="0"), BadData, "number of tokens"),
        (spec(more="&text=4"), BadData, "no column '4'"),
        (spec(more="&label=kind"), BadData, "no column 'kind'"),
        (spec(more="&lenght=4"), UnknownName, "length"),
        (spec(more="&length=4"), BadData, "each once"),
        (spec(more="&text="), BadData, "name=value"),
        (spec(more="&quoted=maybe"), BadData, "yes or no"),
        (spec(more="&header=1"), BadData, "yes or no"),
        ("mnist:some?length=4", BadData, "mnist takes none"),
        ("npz:some.npz?length=4", UnknownName, "option of npz"),
        ("npz:place?of=it/x.npz", UnknownName, "option of npz"),
        (f"{spec()}[2:9]", BadData, "3 rows"),
    ],
)
def test_specs_that_are_refused(here, wrong, error, says):
    with pytest.raises(error, match=says):
        rows(wrong)


COMMAS = {
    "a quoted CSV": (
        '"sentence","label"\n"a bad, bad film",0\n"good",1\n',
        "commas between its 2 columns",
    ),
    "a plain CSV": ("sentence,label\nbad,0\ngood,1\n", "commas between its 2 columns"),
    "a CSV without a header": ("bad,0\ngood,1\n", "commas between its 2 columns"),
    "semicolons": ("label;text\n0;bad\n1;good\n", "semicolons between its 2 columns"),
    "doubled marks": (
        'label\tsentence\n1\tgood\n0\t"a ""bad"" film"\n',
        "line 3 .* say tsv:PATH.quoted=yes",
    ),
}


@pytest.mark.parametrize("kind", COMMAS)
def test_other_separators_are_named(here, kind):
    text, says = COMMAS[kind]
    (here / "t.tsv").write_text(text)
    with pytest.raises(BadData, match=says):
        rows(spec("t.tsv"))


def test_texts_with_commas_are_texts(here):
    (here / "t.tsv").write_text("well, good\ngood, bad\n")
    assert len(rows(spec("t.tsv"))) == 2


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ('"label"\t"sentence"\n"0"\t"a bad film"\n"1"\t"good"\n', ""),
        ('label\tsentence\n0\t"a bad film"\n1\tgood\n', "&quoted=yes"),
        ('label\tsentence\r\n0\t"a\nbad film"\r\n1\tgood\r\n', "&quoted=yes"),
    ],
)
def test_quoted_fields(here, text, more):
    (here / "t.tsv").write_text(text, newline="")
    batch = next(rows(spec("t.tsv", more)).batches(8))
    assert batch.x["input_ids"].tolist() == [[1, 7, 5, 6, 2], [1, 4, 2, 0, 0]]
    assert batch.y.tolist() == [0, 1]


def test_marks_that_belong_to_the_text(here):
    (here / "t.tsv").write_text('label\tsentence\n0\t"a ""bad"" film"\n1\tgood\n')
    assert rows(spec("t.tsv", "&quoted=no")).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("label\tsentence\npos\tgood\nneg\tbad\npos\tfilm\n", ""),
        ("kind\tsaid\npos\tgood\nneg\tbad\npos\tfilm\n", "&text=said&label=kind"),
        ("kind\tsaid\npos\tgood\nneg\tbad\npos\tfilm\n", "&text=2&label=1"),
        ("pos\tgood\nneg\tbad\npos\tfilm\n", "&text=2&label=1"),
        ("pos\tgood\nneg\tbad\npos\tfilm\n", "&text=2&label=1&header=no"),
    ],
)
def test_labels_as_text(here, text, more):
    (here / "t.tsv").write_text(text)
    data = rows(spec("t.tsv", more))
    assert (data.labels.tolist(), data.class_names) == ([1, 0, 1], ("neg", "pos"))


def test_labels_as_text_are_those_of_the_training_split(here):
    (here / "train.tsv").write_text("label\tsentence\npos\tgood\nneg\tbad\nodd\tfilm\n")
    (here / "test.tsv").write_text("label\tsentence\npos\tgood\nodd\tbad\n")
    with pytest.warns(Notice, match="test.tsv has no rows of the class 'neg'"):
        data = rows(spec("."))
    assert (data.labels.tolist(), data.class_names) == ([2, 1], ("neg", "odd", "pos"))
    (here / "test.tsv").write_text("label\tsentence\nPos\tgood\nneg\tbad\n")
    with pytest.raises(
        BadData, match="the class 'Pos'; expected the 3 classes of the split 'train'"
    ):
        rows(spec("test.tsv"))
    with pytest.warns(Notice):
        assert rows(spec("test.tsv", "&classes=pos,neg,Pos")).labels.tolist() == [2, 1]


def test_no_labels_found_is_said(here):
    (here / "t.tsv").write_text("id\tsentence\tkind\n1\tgood\tx\n2\tbad\ty\n")
    with pytest.warns(
        Notice, match="no labels found, its other columns are id, kind; name them with label=NAME"
    ):
        assert rows(spec("t.tsv")).labels is None
    (here / "t.tsv").write_text(
        "label\tsentence\n" + "".join(f"name {n}\tgood\n" for n in range(1001))
    )
    with pytest.raises(BadData, match="1001 different labels"):
        rows(spec("t.tsv"))


def test_another_encoding(here):
    (here / "t.tsv").write_bytes("0\tschön\n".encode("latin-1"))
    with pytest.raises(BadFile, match="UTF-8"):
        rows(spec("t.tsv"))


def test_without_the_library(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"offramp\[text\]"):
        rows(spec())


def test_a_real_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    models = tokenizers.models
    pre = tokenizers.pre_tokenizers
    post = tokenizers.processors
    words = {"[PAD]": 3, "[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "good": 4, "film": 5}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre.Whitespace()
    made.post_processor = post.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.tsv").write_text(
        "label\tsentence\n1\ta good film\n0\tgood good good good\n1\t\n"
    )
    batch = next(rows(f"tsv:{tmp_path}/t.tsv?tokenizer={tmp_path}&length=5").batches(4))
    assert batch.x["input_ids"].tolist() == [[1, 0, 4, 5, 2], [1, 4, 4, 4, 2], [1, 2, 3, 3, 3]]
    assert batch.x["attention_mask"].sum(1).tolist() == [5, 5, 2]
    with pytest.raises(BadData, match="expected at least 3"):
        rows(f"tsv:{tmp_path}/t.tsv?tokenizer={tmp_path}&length=2")


def test_a_damaged_tokenizer_is_one_sentence_even_where_its_library_panics(tmp_path):
    """In a process of its own: the library, of Rust, writes a report to standard error by
    itself.
    """
    pytest.importorskip("tokenizers")
    done = subprocess.run(
        [sys.executable, "-c", PANICS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 5
    assert all("cannot be read as a tokenizer.json" in line for line in said), said


PANICS = """
import json, os, sys
from tokenizers import Tokenizer, models, pre_tokenizers, processors
import offramp as off
from offramp.errors import BadFile

words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "film": 5}
whole = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
marks = [("[CLS]", 2), ("[SEP]", 3)]
template = processors.TemplateProcessing
whole.post_processor = template(single="[CLS] $A [SEP]", pair=None, special_tokens=marks)
open("t.tsv", "w").write("0\\ta film\\n1\\tfilm\\n")
panics = json.loads(whole.to_str())
panics["post_processor"]["single"][0]["SpecialToken"]["id"] = "gone"
no_vocabulary = '{"version": "1.0", "model": {"vocab": -1}}'
odd = [json.dumps(panics), "[" * 100_000, "{}", whole.to_str()[:-30], no_vocabulary]
for text in odd:
    open("tokenizer.json", "w").write(text)
    try:
        next(off.rows("tsv:t.tsv?tokenizer=tokenizer.json&length=8").batches(2))
    except BadFile as problem:
        print(problem)
"""
