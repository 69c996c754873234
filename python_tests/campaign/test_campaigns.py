"""The short form of every campaign; `make campaign` runs the long ones."""

import subprocess
import sys
from pathlib import Path

import pytest
from slow_cases import slow_after

ROOT = Path(__file__).parents[2]
CAMPAIGN = ROOT / "tools" / "campaign"
if not CAMPAIGN.exists():
    pytest.skip("no checkout: the campaigns are not installed", allow_module_level=True)


def command(*arguments):
    return subprocess.run(
        [sys.executable, CAMPAIGN, *arguments], capture_output=True, text=True, cwd=ROOT
    )


def campaigns():
    """Return the names of all campaigns; `ops` takes the least time and is the first."""
    names = command("--list").stdout.split()
    return sorted(names, key=lambda name: (name != "ops", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(1, campaigns()))
def test_the_short_form_fails_in_no_try(name):
    done = command(name, "--short")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1].endswith(" 0 failed")
