"""The short form of every campaign; `make campaign` runs the long ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python
from slow_cases import slow_after

ROOT = Path(__file__).parents[2]
CAMPAIGN = ROOT / "tools" / "campaign"
if not CAMPAIGN.exists():
    pytest.skip("no checkout: the campaigns are not installed", allow_module_level=True)


def campaigns():
    """Return the names of all campaigns; `ops` takes the least time and is the first."""
    command = [sys.executable, CAMPAIGN, "--list"]
    names = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.split()
    return sorted(names, key=lambda name: (name != "ops", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(1, campaigns()))
def test_the_short_form_fails_in_no_try(name):
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = warm_python.run([CAMPAIGN, name, "--short"], cwd=ROOT, env=variables)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1].endswith(" 0 failed")
