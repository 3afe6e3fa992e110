"""The gallery: the right rows, proved to be the recorded ones."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch

import offramp as off
from offramp.data.rows import digests_of, rows
from offramp.errors import BadData
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace
from offramp.reporting.gallery import PICTURES, data_uri, gallery
from offramp.reporting.view import view_of
from reported import images, made

Image = pytest.importorskip("PIL.Image")

PLAN = Plan.by_hand({"small": 5.0})


def picture(uri: str) -> np.ndarray:
    """The pixels of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


def numbers(part: str) -> list[int]:
    """The rows of a group, from the texts of its pictures."""
    return [int(piece.split(":")[0]) for piece in part.split('alt="row ')[1:]]


def test_it_shows_the_surest_that_left_and_the_least_sure_that_stayed() -> None:
    trace = made()
    scores = trace.columns["score/small"]
    exits = trace.replay(PLAN).exit
    _, first, _, ended = gallery(view_of(trace, PLAN), images(300))
    left = np.flatnonzero(exits == 0)
    stayed = np.flatnonzero(exits == 2)
    assert numbers(first) == left[np.argsort(-scores[left])][:PICTURES].tolist()
    assert numbers(ended) == stayed[np.argsort(scores[stayed])][:PICTURES].tolist()
    uri = first.split('src="')[1].split('"')[0]
    assert (picture(uri)[::12, ::12] == images(300)[numbers(first)[0]].transpose(1, 2, 0)).all()


def test_rows_are_found_in_a_selection_and_in_a_stream() -> None:
    trace = made()
    x = images(300)
    whole = gallery(view_of(trace, PLAN), x)
    assert gallery(view_of(trace, PLAN), (x[at : at + 64] for at in range(0, 300, 64))) == whole
    half = rows(x).select(slice(100, 300, 2))
    assert gallery(view_of(trace[100:300:2], PLAN), half) == gallery(
        view_of(trace[100:300:2], PLAN), x
    )
    with pytest.raises(BadData, match="not among the rows"):
        gallery(view_of(trace, PLAN), half)


def test_other_data_is_refused() -> None:
    view = view_of(made(), PLAN)
    with pytest.raises(BadData, match="not the row of that number"):
        gallery(view, images(300)[::-1])
    with pytest.raises(BadData, match="not among the rows"):
        gallery(view, images(300)[:50])
    with pytest.raises(BadData, match=r"ended before row|not among"):
        gallery(view, iter([images(300)[:50]]))


@pytest.mark.parametrize("x", [np.zeros((300, 7), np.float32), np.zeros((300, 8, 8), np.uint8)])
def test_what_is_no_image_is_refused(x: np.ndarray) -> None:
    trace = made()
    other = Trace({**trace.columns, "digest": digests_of(x)}, trace.header)
    with pytest.raises(BadData, match=r"the gallery needs images.*Leave data out"):
        gallery(view_of(other, PLAN), x)
    with pytest.raises(BadData, match=r"the gallery needs images.*Leave data out"):
        gallery(view_of(trace, PLAN), {"pixels": images(300), "mask": images(300)})


def test_pictures_are_enlarged_reduced_and_stretched() -> None:
    digit = (np.arange(64, dtype=np.uint8) % 17).reshape(1, 8, 8)
    shown = picture(data_uri(digit))
    assert shown.shape == (96, 96)
    assert (shown[::12, ::12] == digit[0].astype(int) * 255 // 16).all()
    assert max(picture(data_uri(np.zeros((3, 500, 250), np.uint8))).shape) == 224
    assert picture(data_uri(np.zeros((1, 8, 8), np.uint8))).max() == 0


def test_a_plan_under_which_none_left_or_none_stayed() -> None:
    trace = made()
    assert (
        "No row left here" in gallery(view_of(trace, Plan.by_hand({"small": 1e6})), images(300))[1]
    )
    assert (
        "No row went to the end"
        in gallery(view_of(trace, Plan.by_hand({"small": -1e6})), images(300))[3]
    )


class Columns(off.Gate):
    """Scores that are means of some columns of pixels."""

    def __init__(self, *columns: int) -> None:
        super().__init__()
        self.columns = columns

    def score(self, seen):
        pixels = seen.features.float()[:, 0] / 256  # [B, H, W]
        scores = pixels.mean(1)[:, list(self.columns)]
        return scores[:, 0] if len(self.columns) == 1 else scores

    def config(self):
        return {"name": "tests:Columns", "columns": list(self.columns)}


class Mean(torch.nn.Module):
    """Three logits: the means of the channels, turned by a number."""

    def __init__(self, turn: int) -> None:
        super().__init__()
        self.order = [(channel - turn) % 3 for channel in range(3)]
        self.mix = torch.nn.Linear(3, 3)
        torch.nn.init.eye_(self.mix.weight)

    def forward(self, x):
        return self.mix(x.float().mean((2, 3))[:, self.order])


class Plus(torch.nn.Module):
    def forward(self, x):
        return x.float() + 1


def test_a_fork_has_a_group_for_each_way() -> None:
    x = torch.as_tensor(images(200))
    arms = {name: Mean(number).eval() for number, name in enumerate(("a", "b", "c"))}
    net = off.route([off.Fork("size", arms, Columns(0, 1))], example=x[:2])
    trace = off.record(net, x, timed=False, progress=False)
    plan = Plan.by_hand({"size": (0.52, 0.51)})
    parts = gallery(view_of(trace, plan), x)
    exits = trace.replay(plan).exit
    scores = np.stack([trace.columns[f"score/size@{route}"] for route in (0, 1)], 1)
    for number, name in enumerate("abc"):
        here = np.flatnonzero(exits == number)
        key = -scores[here, number] if number < 2 else scores[here].max(1)
        assert f"At size took {name}" in parts[2 * number]
        assert (
            numbers(parts[2 * number + 1])
            == here[np.argsort(key, kind="stable")][:PICTURES].tolist()
        )


def test_settings_of_a_dial_show_the_fewest_and_the_most_stages() -> None:
    x = torch.as_tensor(images(120))
    steps = []
    for number in range(5):
        arms = {f"none{number}": [], f"unit{number}": Plus().eval()}
        steps.append(off.Fork(f"skip{number}", arms, Columns(number)))
    net = off.route([*steps, ("head", Mean(0).eval())], example=x[:2])
    trace = off.record(net, x, settings=[0.5], timed=False, progress=False)
    plan = Plan.by_hand(dict.fromkeys(net.topology.gates, 0.5))
    _, fewest, _, most = gallery(view_of(trace, plan), x)
    ran = trace.replay(plan).ran.sum(1)
    assert ran[numbers(fewest)].tolist() == sorted(ran)[:PICTURES]
    assert ran[numbers(most)].tolist() == sorted(ran)[::-1][:PICTURES]
