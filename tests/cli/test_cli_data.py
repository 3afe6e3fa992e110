"""Data, weights and models of a user's own at the command line: what is said, and the flags to
paste.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from offramp.data.rows import rows
from typed import TEST, offramp

PAIR = ("--model", "offramp:digits_small", "--model", "offramp:digits_large")


def test_how_weights_were_found_is_one_line(workdir):
    weights = load_file("digits_small.safetensors")
    torch.save(
        {"state_dict": {f"model.{name}": value for name, value in weights.items()}}, "w.ckpt"
    )
    done = offramp("ladder", *PAIR, "--weights", "w.ckpt", "--weights", "-", "-o", "new")
    assert done.exit_code == 0, done.output
    said = (
        "offramp: w.ckpt: the weights are those under 'state_dict', the prefix 'model.' of "
        "their names was taken off\n"
    )
    assert done.stderr == said
    torch.save(
        {"model": weights, "model_ema": {name: value + 1 for name, value in weights.items()}},
        "w.pt",
    )
    done = offramp("ladder", *PAIR, "--weights", "w.pt", "--weights", "-", "-o", "new2")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "model, model_ema. Choose one, such as w.pt?key=model_ema" in done.stderr
    done = offramp("ladder", *PAIR, "--weights", "w.pt?key=model", "--weights", "-", "-o", "new2")
    assert done.exit_code == 0, done.output


def test_a_notice_about_data_is_one_line_and_said_once(workdir):
    np.savez("a.npz", x=np.zeros((5, 1, 8, 8), np.uint8), kind=np.arange(5))
    done = offramp("record", "network", "npz:a.npz", "-o", "n.npz", "--no-timed")
    assert done.exit_code == 0, done.output
    notices = [line for line in done.stderr.splitlines() if "no labels found" in line]
    assert notices == [
        "offramp: a.npz: no labels found, it also holds kind; name them with npz:PATH?y=NAME"
    ]
    done = offramp("record", "network", "npz:a.npz?y=kind", "-o", "n.npz", "--no-timed", "--json")
    assert '"labelled": true' in done.stdout


@pytest.mark.parametrize(
    ("typed", "flags"),
    [
        (
            [
                "--model",
                "users_own:flat",
                "--model",
                "users_own:flat",
                "--preprocess",
                "users_own:scaled",
                "--preprocess",
                "unit",
            ],
            "--model flat=users_own:flat --model flat-2=users_own:flat --preprocess-of "
            "flat=users_own:scaled",
        ),
        (
            [
                "--model",
                "offramp:digits_small",
                "--model",
                "users_own:flat",
                "--preprocess",
                "auto",
                "--preprocess",
                "users_own:Scaled",
            ],
            "--model flat=users_own:flat --preprocess-of flat=users_own:Scaled",
        ),
        (
            [
                "--model",
                "users_own:flat",
                "--model",
                "offramp:digits_large",
                "--preprocess",
                "unit",
                "--preprocess",
                "auto",
                "--gate",
                "users_own:spread",
            ],
            "--model flat=users_own:flat --gate-of flat=users_own:spread",
        ),
        (
            [
                "--model",
                "offramp:digits_small",
                "--model",
                "offramp:digits_large",
                "--preprocess",
                "users_own:scaled",
                "--preprocess",
                "auto",
            ],
            "--model digits_small=offramp:digits_small --preprocess-of "
            "digits_small=users_own:scaled",
        ),
    ],
)
def test_all_flags_to_give_again_stand_in_one_line_and_work(workdir, typed, flags):
    done = offramp("ladder", *typed, "-o", "own")
    assert done.exit_code == 0, done.output
    words = ["record", "own", TEST, "-o", "n.npz", "--no-timed"]
    done = offramp(*words)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.strip().endswith(f"give again, with every command on this network: {flags}")
    done = offramp(*words, *flags.split())
    assert done.exit_code == 0, done.output
    part = flags.split()[:2]
    done = offramp(*words, *part)  # what was given already is in the line too
    assert done.exit_code == 2
    assert done.stderr.strip().endswith(flags)


def test_bytes_for_a_model_of_floats_name_the_option(workdir):
    bare = [
        "--model",
        "users_own:flat",
        "--model",
        "users_own:flat",
        "--preprocess",
        "none",
        "--preprocess",
        "none",
    ]
    done = offramp("ladder", *bare, "--example", "digits[0:2]", "-o", "own")
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "these rows are uint8 and the model takes floats" in done.stderr
    assert "--preprocess imagenet at the command line; 'unit' divides by 255" in done.stderr
    done = offramp("cut", "users_own:flat", "--example", "digits[0:2]", "--at", "0", "-o", "own")
    assert done.exit_code == 2
    assert "--preprocess imagenet" in done.stderr
    better = [word.replace("none", "unit") for word in bare]
    assert offramp("ladder", *better, "--example", "digits[0:2]", "-o", "own").exit_code == 0


def test_photos_of_several_sizes_for_a_model_that_knows_its_own(workdir):
    Image = pytest.importorskip("PIL.Image")
    for number, size in enumerate([(30, 20), (20, 30)]):
        folder = Path("photos") / "ab"[number]
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(folder / "x.png")
    done = offramp("inspect", "offramp:resnet20", "--example", "imagefolder:photos")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "read them with imagefolder:photos?resize=32&crop=32" in done.stderr
    assert rows("imagefolder:photos?resize=32&crop=32").take(np.array([0, 1])).x.shape == (
        2,
        3,
        32,
        32,
    )
