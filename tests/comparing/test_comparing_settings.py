"""A settings file: what it says, and every way in which it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from made_up import DIGITS, contents, file_of
from offramp.comparing.comparing import measure
from offramp.comparing.reading import read_settings
from offramp.comparing.settings import Method
from offramp.errors import BadFile, InvalidArgument, OfframpError, UnknownName

HINGE = '[method.hinge]\nrecipe = "hinge"\n'


def test_flags_are_shared_and_a_method_may_say_otherwise(tmp_path: Path) -> None:
    static = '[method.plain]\nstatic = true\nmodel = "offramp:digits_small"\nseeds = [4]\n'
    parts = '[method.parts]\nparts = 3\nexit = "branch"\nwith = ["epochs=2"]\n'
    found = read_settings(
        file_of(tmp_path, HINGE, static, parts, shared=DIGITS + 'weights = "w.pt"\n')
    )
    hinge, plain, cut = found.methods
    assert (hinge.recipe, hinge.at, hinge.seeds, hinge.weights, hinge.batch_size) == (
        *("hinge", "stem,blocks.0", (0, 1, 2), "w.pt"),
        50,
    )
    assert (plain.weights, plain.seeds, plain.scores) == (
        None,
        (4,),
        ("own",),
    )  # weights are of the shared model
    assert (cut.at, cut.parts, cut.arguments) == (None, 3, ("epochs=2",))
    assert found.budgets == (0.7, 1.0)
    assert found.budgets[found.shown] == 0.7
    assert hinge.cuts == ("stem", "blocks.0")


def test_what_is_shared_about_places_gives_way_to_a_methods_own(tmp_path: Path) -> None:
    auto = 'at = "auto"\nlabelled = "digits[200:400]"\nparts = 3\n'
    by_name = '[method.named]\nat = "stem"\nexit-of = ["stem=mlp"]\n'
    again = '[method.again]\nat = "auto"\n'
    shared = DIGITS.replace('at = "stem,blocks.0"\n', auto)
    hinge, named, once_more = read_settings(
        file_of(tmp_path, HINGE, by_name, again, shared=shared)
    ).methods
    assert (hinge.auto, hinge.cuts, hinge.parts) == (True, (), 3)
    assert hinge.training == ("digits[0:200]", "digits[200:400]")
    assert (named.auto, named.labelled, named.parts, named.training) == (False, None, None, ())
    assert named.exits == {"stem": "mlp"}
    assert (once_more.auto, once_more.parts, once_more.training) == (
        True,
        None,
        ("digits[200:400]",),
    )
    shared = DIGITS + 'exit-of = ["stem=mlp"]\n'
    hinge, deeper = read_settings(
        file_of(tmp_path, HINGE, "[method.deeper]\nparts = 3\n", shared=shared)
    ).methods
    assert hinge.exits == {"stem": "mlp", "blocks.0": "linear_grid"}
    assert deeper.exits == "linear_grid"


@pytest.mark.parametrize(
    ("table", "shared", "error", "says"),
    [
        ("= 3", "", BadFile, "must be TOML, got a file that cannot be read"),
        ("", "", InvalidArgument, "must have a table for each method"),
        ("method = 3", "", InvalidArgument, "must have a table for each method"),
        ("[method]\nhinge = 3", "", InvalidArgument, "must have a table for each method"),
        (HINGE, "batchsize = 3", UnknownName, "did you mean 'batch-size'"),
        (HINGE, "batch_size = 3", UnknownName, "did you mean 'batch-size'"),
        (
            HINGE + "recipes = 'joint'",
            "",
            UnknownName,
            r"flag in \[method.hinge\] .*did you mean 'recipe'",
        ),
        (HINGE + "budgets = [1.0]", "", UnknownName, "flag in"),
        (HINGE, "parts = '3'", InvalidArgument, "parts must be a whole number, got '3'"),
        (HINGE, "seeds = 3", InvalidArgument, "seeds must be a list of whole numbers, got 3"),
        (HINGE, "seeds = [true]", InvalidArgument, "must be a list of whole numbers"),
        (HINGE, "at-most = 'low'", InvalidArgument, "must be a number"),
        (HINGE, "static = 1", InvalidArgument, "must be true or false"),
        (HINGE, "example = 3", InvalidArgument, "must be a text"),
        (HINGE, "gates = ['own', 3]", InvalidArgument, "must be a list of texts"),
        (
            HINGE,
            "parts = 3",
            InvalidArgument,
            "exactly one of --at and --parts must be given, got --at stem,blocks.0 and --parts 3",
        ),
        (HINGE, "gates = []", InvalidArgument, "the gates of"),
        (HINGE, "gates = ['margin', 'margin']", InvalidArgument, "each once"),
        (HINGE, "seeds = []", InvalidArgument, "the seeds of"),
        (HINGE, "seeds = [0, 0]", InvalidArgument, "each once"),
        (HINGE, "seeds = [-1]", InvalidArgument, "of at least 0"),
        ("['method'.'a b']\nrecipe = 'hinge'", "", InvalidArgument, "got 'a b'"),
        ("['method'.'../up']\nrecipe = 'hinge'", "", InvalidArgument, "got '../up'"),
        (HINGE, "static = true", InvalidArgument, "must have a method that is cut"),
        (HINGE + "[method.stack]\nmembers = ['hing']", "", UnknownName, "did you mean 'hinge'"),
        (
            HINGE + "[method.one]\nmembers = ['hinge']\n[method.two]\nmembers = ['one']",
            "",
            InvalidArgument,
            "members of .*must not be ladders, got 'one'",
        ),
        (
            HINGE + "[method.two]\nstart = 'three'",
            "",
            InvalidArgument,
            "an earlier method that is not a ladder .hinge.",
        ),
        (
            "[method.two]\nstart = 'hinge'\n" + HINGE,
            "",
            InvalidArgument,
            "an earlier method that is not a ladder .none.",
        ),
        (
            HINGE + "[method.two]\nstart = 'hinge'\nmodel = 'offramp:lenet'",
            "",
            InvalidArgument,
            "must have start or a model",
        ),
        (
            HINGE,
            "labelled = 'digits[200:300]'",
            InvalidArgument,
            "--labelled must be given with --at auto",
        ),
        (HINGE, "length = ['input_ids']", InvalidArgument, "must be a text"),
        (HINGE, "exit-of = 'stem=mlp'", InvalidArgument, "must be a list of texts"),
        (HINGE, "exit-of = ['stem']", InvalidArgument, r"method.hinge\] .*must be NAME=VALUE"),
        (
            HINGE,
            "exit-of = ['head=mlp']",
            InvalidArgument,
            r"method.hinge\] .*--exit-of must name a module of --at .* got head",
        ),
        (HINGE, "wall-clock-budget = 0.5", InvalidArgument, "must be one of the budgets"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(
    tmp_path: Path, table: str, shared: str, error: type[OfframpError], says: str
) -> None:
    with pytest.raises(error, match=says):
        read_settings(file_of(tmp_path, table, shared=f"{DIGITS}{shared}\n"))


@pytest.mark.parametrize(
    ("gone", "put", "says"),
    [
        ("train = ", "", "so it must have rows that train"),
        ("test = ", "", "must have test"),
        ("calibration = ", "", "must have calibration"),
        ("model = ", "", "must have a model"),
        ("at = ", "", "exactly one of --at and --parts must be given, got none"),
        ("at = ", "at = 'auto'", "--labelled must be given with --at auto"),
        (
            "at = ",
            "at = 'auto'\nlabelled = 'digits[200:300]'\nparts = 1",
            "--parts must be at least 2",
        ),
        (
            "at = ",
            "at = 'auto'\nlabelled = 'digits[200:300]'\nexit-of = ['stem=mlp']",
            "a module of --at .auto",
        ),
        (
            "at = ",
            "at = 'auto'\nlabelled = 'digits[200:300]'\nexit-of = ['auto=mlp']",
            "a module of --at .auto",
        ),
        ("budgets = ", "budgets = []", "must be shares"),
        ("budgets = ", "budgets = [0.0, 1.0]", "above 0"),
        ("budgets = ", "budgets = [0.5, 0.5]", "each once"),
    ],
)
def test_a_file_that_lacks_something_is_refused(
    tmp_path: Path, gone: str, put: str, says: str
) -> None:
    lines = [line for line in DIGITS.splitlines() if not line.startswith(gone)]
    with pytest.raises(InvalidArgument, match=says):
        read_settings(file_of(tmp_path, HINGE, shared="\n".join([*lines, put])))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(BadFile, match="does not exist"):
        read_settings("nowhere.toml")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("recipe = 'hing'", "'hinge'"),
        ("recipe = 'joint'\nwith = ['epoch=2']", "called 'epoch'"),
        ("recipe = 'joint'\nwith = ['epochs']", "NAME=VALUE"),
        ("gates = ['own', 'margn']", "'margin'"),
        ("gate = 'max_prb'", "'max_prob'"),
        ("exit = 'linear_gird'", "'linear_grid'"),
        ("exit = 'strided?widht=3'", "'width'"),
        ("exit-of = ['stem=linear_gird']", "'linear_grid'"),
        ("length = 'input_ids'", "length must name inputs"),
        ("model = 'offramp:digits_larg'", "'digits_large'"),
        ("model = 'digits_large'", "must be offramp:NAME"),
        ("model = 'made_up:nothing'", "cannot import"),
        ("preprocess = 'units'", "must be none, unit, imagenet"),
        ("augment = 'crop_flp'", "'crop_flip'"),
        ("at = 'stem,block.0'", "got 'block.0'"),
    ],
)
def test_names_that_stand_for_nothing_are_refused_before_anything_is_trained(
    tmp_path: Path, flags: str, says: str
) -> None:
    later = f"[method.later]\n{flags}\n"
    with pytest.raises(InvalidArgument, match=rf"\[method.later\].*{says}"):
        measure(file_of(tmp_path, HINGE, later), tmp_path / "out", progress=False)
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("flag", "error"),
    [
        ("risk = 'errr'", UnknownName),
        ("engine = 'torhc'", UnknownName),
        ("weights = 'nowhere.pt'", BadFile),
    ],
)
def test_so_are_names_that_all_methods_share(
    tmp_path: Path, flag: str, error: type[OfframpError]
) -> None:
    with pytest.raises(error):
        measure(
            file_of(tmp_path, HINGE, shared=f"{DIGITS}{flag}\n"), tmp_path / "out", progress=False
        )
    assert not contents(tmp_path / "out")


def test_what_means_nothing_to_a_network_is_no_part_of_it() -> None:
    cut = Method("cut", model="made_up:net", at="stem", recipe="hinge", train="digits")
    assert {"at", "train", "seed"} <= cut.asked(3).keys()
    plain = Method("plain", model="made_up:net", at="stem", train="digits", static=True)
    assert {"at", "train"}.isdisjoint(plain.asked(3))
    assert Method("stack", members=("a", "b"), at="stem").asked(3) == {
        "members": ["a", "b"],
        "gate": "margin",
    }


FORKED = '[method.forked]\nskip = "blocks.*"\nrecipe = "gumbel"\n'


def test_forks_take_the_place_of_cuts(tmp_path: Path) -> None:
    sized = '[method.sized]\nsizes = "4,8"\n'
    unrolled = "[method.unrolled]\nunrolled = true\nsettings = [0.9, 0.5]\n"
    _, skipping, sized_, halting = read_settings(
        file_of(tmp_path, HINGE, FORKED, sized, unrolled)
    ).methods
    assert [skipping.forks, sized_.forks, halting.forks] == [True, True, True]
    assert (skipping.at, skipping.cuts, skipping.auto) == (None, (), False)
    assert halting.settings == (0.9, 0.5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('sizes = "4,8"', "must have one of skip, sizes, unrolled"),
        ('at = "stem"', "must have skip or at, got both"),
        ("static = true", "must have skip or static, got both"),
        ('gates = ["margin"]', "must be 'own'"),
    ],
)
def test_what_forks_do_not_take(tmp_path: Path, more: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        read_settings(file_of(tmp_path, HINGE, FORKED + more + "\n"))
    with pytest.raises(InvalidArgument, match="settings belong to skip, sizes or unrolled"):
        read_settings(file_of(tmp_path, HINGE + "settings = [0.5]\n"))
