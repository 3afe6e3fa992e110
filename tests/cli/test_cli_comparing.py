"""`offramp compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from typed import contents, offramp

pytest.importorskip("sklearn")
pytest.importorskip("plotly")

METHODS = """
title = "Digits, small"
train = "digits[0:60]"
calibration = "digits[700:800]"
test = "digits[800:900]"
model = "offramp:digits_small"
at = "2"
exit = "linear"
seeds = [0]
budgets = [0.1, 9.0]

[method.convex]
recipe = "cross_entropy"
with = ["regularizer=0.01"]
gates = ["own", "max_prob"]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("methods.toml").write_text(METHODS)
    return Path("methods.toml")


def test_compare_writes_a_page_and_spreadsheets_and_goes_on_where_it_was(file, as_json):
    told = as_json("compare", file, "-o", "out")
    assert told["files"] == ["out/index.html", "out/results.csv", "out/curves.csv"]
    assert "<h1>Digits, small</h1>" in Path("out/index.html").read_text()
    assert told["budgets"] == [0.1, 9.0]
    assert told["unit_macs"] == 2432
    assert told["accuracy"].keys() == {"convex", "convex, max_prob"}
    for cheap, dear in told["accuracy"].values():
        assert cheap is None
        assert 0 <= dear <= 1
    before = contents(Path("out/convex-0"))
    again = offramp("compare", file, "-o", "out")
    assert (again.exit_code, again.stderr.count("\n")) == (0, 2)  # nothing is trained again
    assert "of which 1 are in out already and are kept" in again.stderr
    assert "Was its model ever trained?" in again.stderr  # it was not
    assert "convex, max_prob" in again.stdout
    assert "written: out/index.html, out/results.csv, out/curves.csv" in " ".join(
        again.stdout.split()
    )
    assert contents(Path("out/convex-0")) == before


TEXTS = """
train = "tsv:bits.tsv?tokenizer=tok&length=9[0:20]"
calibration = "tsv:bits.tsv?tokenizer=tok&length=9[20:40]"
test = "tsv:bits.tsv?tokenizer=tok&length=12[40:60]"
model = "texts:encoder"
at = "blocks.0, blocks.1"
exit = "linear_masked"
exit-of = ["blocks.1=linear"]
length = "input_ids, attention_mask"
seeds = [0]
budgets = [9.0]

[method.texts]
recipe = "cross_entropy"
with = ["regularizer=0.01"]
"""


@pytest.mark.slow
def test_texts_of_two_lengths_and_two_kinds_of_exits(sentences, as_json):
    # no two alike
    bits = (" ".join("good" if n >> bit & 1 else "bad" for bit in range(6)) for n in range(60))
    Path("bits.tsv").write_text(
        "\n".join(["label\tsentence", *(f"{n % 3}\t{text}" for n, text in enumerate(bits))])
    )
    Path("texts.toml").write_text(TEXTS)
    told = as_json("compare", "texts.toml", "-o", "out")
    assert 0 <= told["accuracy"]["texts"][0] <= 1
    made = json.loads(Path("out/texts-0/network/network.json").read_text())
    assert made["rungs"][0]["length"] == ["x/input_ids", "x/attention_mask"]
    Path("texts.toml").write_text(TEXTS.replace('length = "input_ids, attention_mask"', ""))
    refused = offramp("compare", "texts.toml", "-o", "other")
    assert (refused.exit_code, "must have shape (9,)" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[0:60]", "[0:701]", "1 of the 100 calibration rows"),
        ("[800:900]", "[799:900]", "1 of the 101 test rows"),
        ("cross_entropy", "cross_entrop", "did you mean 'cross_entropy'"),
        ("regularizer=", "regulaliser=", "did you mean 'regularizer'"),
        ("budgets", "budget", "did you mean 'budgets'"),
        ('at = "2"', 'at = "two"', "got 'two'"),
        (
            'at = "2"',
            'at = "2"\nexit-of = ["5=mlp"]',
            "--exit-of must name a module of --at (2), got 5",
        ),
        ('at = "2"', 'at = "auto"\nlabelled = "digits[0:701]"', "1 of the 100 calibration rows"),
        ("title = ", "title", "must be TOML, got a file that cannot be read"),
    ],
)
def test_what_is_refused_before_anything_is_trained(file, old, new, says):
    file.write_text(METHODS.replace(old, new))
    done = offramp("compare", file, "-o", "out")
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.splitlines()[-1].startswith("offramp: ")
    assert says in done.stderr
    assert not Path("out").exists()


def test_a_folder_that_cannot_be_written(file):
    done = offramp("compare", file, "-o", "methods.toml")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "cannot write methods.toml" in done.stderr


def test_ctrl_c_says_how_to_go_on(file, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("offramp.comparing.cells.fit", interrupted)
    done = offramp("compare", file, "-o", "out")
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == (
        "offramp: interrupted; the same command goes on from the files in out"
    )
