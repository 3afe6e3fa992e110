"""Names on shelves, names of the user's, and names that nothing answers to."""

from __future__ import annotations

import sys

import pytest

from offramp._support import find
from offramp.building.factories import make_model
from offramp.errors import InvalidArgument, UnknownName
from offramp.gates.confidence import margin


def test_a_name_on_a_shelf():
    assert find.find("gates", "margin") is margin
    assert find.shelved("gates", "margin") is margin
    assert find.find("exits", "Mean").__module__ == "offramp.exits.whole"


def test_a_name_of_the_user():
    assert find.find("gates", "offramp.gates.confidence:margin") is margin
    assert find.imported("os.path:join").__name__ == "join"
    assert find.imported("offramp.exits.whole:Own.config").__name__ == "config"


def test_a_shelf_alone_never_imports_what_is_the_users():
    with pytest.raises(UnknownName):
        find.shelved("gates", "offramp.gates.confidence:margin")


@pytest.mark.parametrize(
    "wrong", ["no_such_module:a", "os:nothing", ":a", "os:", ".os:a", "..a:b", "os.path"]
)
def test_what_cannot_be_imported(wrong):
    with pytest.raises(InvalidArgument, match="module:attribute"):
        find.imported(wrong)


def test_the_nearest_is_offered():
    with pytest.raises(UnknownName, match=r"no gate .* called 'margn'; did you mean 'margin'"):
        find.find("gates", "margn")
    with pytest.raises(UnknownName, match=r"known: .*margin"):
        find.find("gates", "zzzzz")
    with pytest.raises(UnknownName, match="did you mean 'torch'"):
        find.find_file("engines", "troch")


@pytest.mark.parametrize("name", ["_stage", "torch", "annotations", "__doc__", "Any", ""])
def test_what_is_imported_or_private_is_not_on_the_shelf(name):
    assert name not in find.names("models")
    with pytest.raises(UnknownName):
        find.find("models", name)


@pytest.mark.parametrize("name", ["preprocess", "LeNet", "Block", "CifarResNet"])
def test_what_a_file_does_not_offer_is_not_on_the_shelf(name):
    with pytest.raises(UnknownName, match=f"no model .* called '{name}'"):
        find.find("models", name)
    with pytest.raises(UnknownName):
        make_model(f"offramp:{name}")


def test_every_name_that_is_offered_is_there():
    for shelf in ("augments", "exits", "gates", "layers", "models"):
        for name in find.names(shelf):
            assert callable(find.find(shelf, name))


def test_names():
    assert {"margin", "max_prob", "neg_entropy", "Tempered"} <= set(find.names("gates"))
    assert find.names("gates") == sorted(find.names("gates"))
    assert find.names("nothing") == []


def test_a_file_on_a_shelf():
    assert find.find_file("engines", "torch") is sys.modules["offramp.engines.torch"]
