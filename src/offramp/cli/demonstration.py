"""A demo without a download: train two small nets, certify a plan, measure it, and write a page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from offramp._support.files import WEIGHTS_MARK, document_mark, write_tensors
from offramp._support.replacement import require_own_file, require_writable
from offramp.building.cutting import ladder
from offramp.building.factories import make_model, preprocess_of
from offramp.building.saving import FOLDER, save
from offramp.calibration.calibrating import calibrate
from offramp.data.rows import Batch, rows
from offramp.networks.network import Network
from offramp.plans.evaluation import Evaluation
from offramp.plans.plan import Plan
from offramp.reporting.frame import MARK
from offramp.reporting.page import report
from offramp.runtime.benching import Bench, bench
from offramp.runtime.recording import record

# The names of the models, and their epochs of training.
MEMBERS = {"digits_small": 20, "digits_large": 10}
TRAINING = "digits[0:700]"
# Every second of the held-out rows each, so that both halves have the same distribution.
CALIBRATION = "digits[700:1797:2]"
TEST = "digits[701:1797:2]"
RISK = "disagreement"
AT_MOST = 0.03
BATCH_SIZE = 32


@dataclass(frozen=True)
class Story:
    """The results of the demo; its files are in `folder`."""

    folder: Path
    report: Path
    plan: Plan
    evaluation: Evaluation
    bench: Bench

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "folder": str(self.folder),
            "report": str(self.report),
            "plan": str(self.plan),
            "at_most": AT_MOST,
            "evaluation": asdict(self.evaluation),
            "bench": self.bench.to_json(),
        }


def demo(
    folder: str | Path, *, say: Callable[[str], None] = lambda text: None, repeats: int = 9
) -> Story:
    """Train, ladder, record, calibrate, check, run and report on scikit-learn's digits.

    Everything runs on one thread.

    Args:
        folder: where all files are written.
        say: called with each step, as the command that would do it.
        repeats: how often everything is timed.

    Raises:
        MissingExtra: scikit-learn or Plotly is not installed.
        BadFile: the folder has another file in the place of one of the demo's.
    """
    path = Path(folder)
    require_own(path)
    with one_thread():
        network = train(path, say)
        say(f"offramp record {path}/network '{CALIBRATION}' -o {path}/calibration.npz")
        calibration = record(network, CALIBRATION)
        calibration.save(path / "calibration.npz")
        say(f"offramp record {path}/network '{TEST}' -o {path}/test.npz")
        test = record(network, TEST)
        test.save(path / "test.npz")
        say(
            f"offramp calibrate {path}/calibration.npz --risk {RISK} --at-most {AT_MOST} -o "
            f"{path}/plan.json"
        )
        plan = calibrate(calibration, risk=RISK, at_most=AT_MOST)
        plan.save(path / "plan.json")
        say(f"offramp check {path}/plan.json {path}/test.npz")
        evaluation = test.evaluate(plan)
        say(f"offramp bench {path}/network {path}/plan.json '{TEST}' --threads 1")
        timed = bench(network, plan, all_of(TEST).x, batches=(1, 64), repeats=repeats)
        say(
            f"offramp report {path}/test.npz {path}/plan.json --data '{TEST}' -o {path}/report.html"
        )
        page = report(test, plan, path / "report.html", data=TEST)
    return Story(path, page, plan, evaluation, timed)


def require_own(path: Path) -> None:
    """Raise BadFile, before the work, if a file or folder of the same name is not the demo's."""
    require_writable(path, folder=True)
    FOLDER.require_own(path / "network")
    for name in MEMBERS:
        require_own_file(path / f"{name}.safetensors", WEIGHTS_MARK, "weights file")
    for name in ("calibration.npz", "test.npz"):
        require_own_file(path / name, document_mark("trace"), "trace")
    require_own_file(path / "plan.json", document_mark("plan"), "plan")
    require_own_file(path / "report.html", MARK, "page")


def train(path: Path, say: Callable[[str], None] = lambda text: None) -> Network:
    """Train the two nets of the demo and stack them.

    Args:
        path: the folder where the weights and the network are written.
        say: called with each step, as a command.

    Returns:
        The network.
    """
    batch = all_of(TRAINING)
    models: dict[str, tuple[nn.Module, nn.Module | None]] = {}
    command = "offramp ladder"
    for name, epochs in MEMBERS.items():
        say(f"# train {name} on {TRAINING}")
        torch.manual_seed(0)
        model = make_model(f"offramp:{name}")
        preprocess = preprocess_of(f"offramp:{name}")
        assert preprocess is not None
        models[name] = (fit(model, preprocess, batch, epochs=epochs), preprocess)
        write_tensors(path / f"{name}.safetensors", model.state_dict())
        command += f" --model offramp:{name} --weights {path}/{name}.safetensors"
    say(f"{command} -o {path}/network")
    sources = {name: f"offramp:{name}" for name in models}
    network = ladder(models, sources=sources).eval()
    save(network, path / "network")
    return network


def fit(
    model: nn.Module, preprocess: nn.Module, batch: Batch, *, epochs: int, seed: int = 0
) -> nn.Module:
    """Plain training by AdamW on one-cycle learning rates; returns the model in eval mode."""
    x = preprocess(torch.as_tensor(batch.x))
    y = torch.as_tensor(batch.y)
    rng = np.random.default_rng(seed)
    batches = -(-len(x) // BATCH_SIZE)  # in an epoch, rounded up
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for index in np.array_split(rng.permutation(len(x)), batches):
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def all_of(spec: str) -> Batch:
    """Every row of a data spec in one batch."""
    source = rows(spec)
    return source.take(np.arange(len(source)))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: nets as small as these lose time on a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
