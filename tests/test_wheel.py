"""The wheel is built, installs, and has all that the package needs to run."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import offramp

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    sources = (ROOT / "src").rglob("*")
    files = set()
    for file in sources:
        if file.is_file() and "__pycache__" not in file.parts:
            files.add(str(file.relative_to(ROOT / "src")))
    assert {name for name in files if not name.endswith(".pyc")} <= inside
    assert not any(name.startswith("tests/") for name in inside)


@pytest.mark.slow
def test_the_wheel_installs_and_runs(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True, system_site_packages=False)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=900)
    packages = next(Path(entry) for entry in sys.path if entry.endswith("site-packages"))
    (next((environment / "lib").glob("python3*")) / "site-packages" / "borrowed.pth").write_text(
        f"{packages}\n"
    )
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import offramp; print(offramp.__version__, offramp.__file__)"
    said = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=alone, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith(offramp.__version__)
    assert str(environment) in said.stdout
    command = [environment / "bin" / "offramp", "--help"]
    help_page = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert help_page.returncode == 0, help_page.stderr
    assert "calibrate" in help_page.stdout
