"""Recipes with arguments: one way in Python and at the command line, and every argument on a
page.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import offramp as off
from offramp._support.find import files
from offramp.errors import InvalidArgument, UnknownName
from offramp.fitting.describing import arguments, described
from offramp.fitting.training import recipe_of
from small import cut_of, images_of


def test_arguments_in_the_name_beside_it_and_in_an_object_are_one():
    written = recipe_of("joint?epochs=3&rate=0.01")
    beside = recipe_of("joint", epochs=3, rate=0.01)
    assert vars(written) == vars(beside)
    assert vars(recipe_of("joint?epochs=3", rate=0.01)) == vars(beside)


def test_what_is_given_twice_or_unknown_is_refused():
    with pytest.raises(InvalidArgument, match="epochs must appear once"):
        recipe_of("joint?epochs=3", epochs=4)
    with pytest.raises(UnknownName, match="epochs"):
        recipe_of("joint?epoch=3")
    with pytest.raises(InvalidArgument, match="NAME=VALUE"):
        recipe_of("joint?epochs")


def test_fit_takes_the_arguments_of_its_recipe():
    net = cut_of()
    data = (images_of(20), torch.arange(20) % 3)
    history = off.fit(net, data, recipe="joint", epochs=1, backbone=False, progress=False)
    assert len(history.epochs) == 1
    with pytest.raises(UnknownName, match="argument of the recipe"):
        off.fit(net, data, recipe="joint", epoch=1, progress=False)


@pytest.mark.parametrize("name", files("recipes"))
def test_every_recipe_says_its_arguments(name):
    text = described(name)
    for argument in arguments(name):
        assert f"{argument.name} " in text
        assert argument.kind


def test_the_page_is_up_to_date():
    path = Path(__file__).parents[2] / "docs" / "generate" / "recipes.py"
    spec = importlib.util.spec_from_file_location("recipes_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), (
        "run: python docs/generate/recipes.py"
    )
