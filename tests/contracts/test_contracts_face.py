"""The contracts stand in one place, are the same objects as everywhere, and importing them loads
nothing.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import offramp
from offramp import contracts


def test_every_name_is_the_object_that_the_package_uses():
    for name in contracts.__all__:
        home = importlib.import_module(f"offramp.{contracts._HOMES[name]}")
        assert getattr(contracts, name) is getattr(home, name)
        assert name in contracts.__doc__
        if name in offramp.__all__:
            assert getattr(offramp, name) is getattr(contracts, name)
    assert set(dir(contracts)) == set(contracts.__all__)


def test_what_users_subclass_is_there():
    assert {"Engine", "Exit", "Gate", "Layer", "Phase", "Recipe", "Risk"} <= set(contracts.__all__)
    with pytest.raises(AttributeError, match="it has Engine"):
        _ = contracts.nothing


def test_importing_it_loads_no_torch():
    code = (
        "import json, sys, offramp.contracts; print(json.dumps([m for m in ('torch', "
        "'numpy') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
