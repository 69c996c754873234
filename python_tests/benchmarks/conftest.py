"""Makes the benchmarks importable, which are not part of the installed package."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture
def tiny():
    from benchmarks.support.problem import parse_size

    return parse_size("64x32x128x4")
