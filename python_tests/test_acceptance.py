"""tools/acceptance.py: the code meets every goal, and each measure sees what it counts."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "tools" / "acceptance.py").exists():
    pytest.skip("no checkout: the tools are not installed", allow_module_level=True)


@pytest.fixture(name="acceptance")
def tool(monkeypatch):
    """Import the tool."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("acceptance")


@pytest.mark.slow
def test_every_goal_is_met(acceptance):
    missed = [str(one) for one in (measure() for measure in acceptance.MEASURES) if not one.is_met]
    assert missed == []


@pytest.fixture(name="package")
def small_package(acceptance, tmp_path, monkeypatch):
    """Put a small package with every fault in the place of the measured one."""
    folder = tmp_path / "sae_fast"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text(
        '"""One."""\nfrom sae_fast.two import f\n\n\ndef g(x):\n'
        '    """Whether it is."""\n    return getattr(x, "a", None)\n'
    )
    (folder / "two.py").write_text('import sae_fast.one\nTABLE = ("k", *("lr", "seed", "d_sae"))\n')
    monkeypatch.setattr(acceptance, "ROOT", tmp_path)
    monkeypatch.setattr(acceptance, "PACKAGE", folder)
    return folder


def test_a_circle_is_found(acceptance, package):
    assert acceptance.circles().value == 1
    assert "sae_fast.one" in acceptance.circles().places[0]


def test_a_guessed_attribute_is_found(acceptance, package):
    assert acceptance.guessed_attributes().places == ["one.py:7"]


def test_a_table_of_settings_is_found(acceptance, package):
    (package / "two.py").write_text(
        'A = ("k", *("seed", "d_sae"))\nB = {"k": 1, "seed": 2, "d_sae": 3}\nC = ("k", "seed")\n'
        'D = ("k", "seed", "other")\n'
    )
    places = acceptance.tables_of_settings().places
    assert places == ["two.py:1: k, seed, d_sae", "two.py:2: k, seed, d_sae"]


def test_a_docstring_without_a_verb_is_found(acceptance, package):
    assert acceptance.verbs().places == ["one.py:5: g"]
    assert acceptance.verbs().value == 0
    assert not acceptance.verbs().is_met


def test_a_missing_link_of_the_map_is_found(acceptance, package, tmp_path):
    (tmp_path / "loop.py").write_text("while not (self.is_done")
    (tmp_path / "README.md").write_text("## Where to look\n[loop](loop.py)\n## More\n[x](y.py)\n")
    assert acceptance.map_of_the_readme().places == ["the loss", "the update"]
