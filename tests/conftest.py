"""`--data DIR`, the count of skipped tests on the last line, and the small things that many tests
share.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# of programs that tests start, beside other workers' tests
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from offramp.networks import trained
from offramp.networks.network import Network
from offramp.plans.trace import Trace
from small import ladder_of, trace_of

# Shells start programs in the background with Ctrl-C ignored, and programs that tests start would
# inherit that: those that a test interrupts would run for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        metavar="DIR",
        help="a folder with cifar10/*.parquet, mnist/ and "
        "weights/cifar10_resnet{20,32,56}.safetensors",
    )


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of `--data`; without it the test is skipped."""
    given = request.config.getoption("--data")
    if given is None:
        pytest.skip("needs real data: pytest --data=DIR")
    path = Path(given).resolve()
    if not (path / "cifar10").is_dir():
        pytest.skip(f"{path} holds no cifar10/")
    return path


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and hasattr(reporter, "stats"):
        skipped = len(reporter.stats.get("skipped", []))
        reporter.write_line(f"skipped tests: {skipped}")


@pytest.fixture(autouse=True)
def nothing_trained() -> None:
    """No test knows what another one trained: many use the same seeded models."""
    trained._LIVING.clear()
    trained._VALUES.clear()


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Graphs that tests keep on disk, and no graph of the user's."""
    path = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(path)
    yield path / "offramp"
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def two() -> Network:
    """A ladder of two members on rows [B, 4], three classes."""
    return ladder_of(2)


@pytest.fixture
def three() -> Network:
    """A ladder of three members on rows [B, 4], three classes."""
    return ladder_of(3)


@pytest.fixture
def trace() -> Trace:
    """A made-up labelled trace of 600 rows, three exits, five classes."""
    return trace_of(600)
