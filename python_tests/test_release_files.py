"""Files about the project itself: versions agree, and the files they name exist."""

import importlib.util
import re
from pathlib import Path

import pytest

import sae_fast

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
if not (ROOT / "CITATION.cff").exists():
    pytest.skip("no checkout: these files are not installed", allow_module_level=True)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_all_files_give_one_version():
    in_metadata = re.search(r'^version = "(.+)"', text_of("pyproject.toml"), flags=re.M)[1]
    newest = re.findall(r"^## \[(\d.+?)\]", text_of("CHANGELOG.md"), flags=re.M)[0]
    cited = yaml.safe_load(text_of("CITATION.cff"))["version"]
    assert [in_metadata, newest, cited] == [sae_fast.__version__] * 3


def test_all_files_give_one_licence():
    assert text_of("LICENSE").startswith("MIT License\n")
    assert 'license = "MIT"' in text_of("pyproject.toml")
    assert yaml.safe_load(text_of("CITATION.cff"))["license"] == "MIT"


def test_every_extra_is_named_where_it_is_missed():
    text = text_of("pyproject.toml")
    section = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, flags=re.M | re.S)[1]
    extras = set(re.findall(r"^(\w+) = \[", section, flags=re.M)) - {"dev", "docs"}
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("sae_fast/**/*.py"))
    assert set(re.findall(r"pip install 'sae_fast\[(\w+)\]'", sources)) == extras


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github").rglob("*.y*ml")), ids=lambda path: path.name
)
def test_workflows_and_forms_are_yaml_and_call_targets_that_exist(path):
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text)["name"]
    called = re.findall(r"\brun: make ([a-z-]+)", text)
    targets = re.findall(r"^([\w -]+):", text_of("Makefile"), flags=re.M)
    known = {name for line in targets for name in line.split()}
    assert set(called) <= known


def test_every_hook_is_local_and_has_a_program():
    (repository,) = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    names = {hook["entry"].split()[0] for hook in repository["hooks"]}
    assert names == {"ruff", "clang-format", "python", "mypy"}


def test_large_files_are_refused_but_for_the_demo(tmp_path):
    spec = importlib.util.spec_from_file_location("large_files", ROOT / "tools/large_files.py")
    large_files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(large_files)
    big, small = tmp_path / "big.bin", tmp_path / "small.bin"
    big.write_bytes(bytes(large_files.LIMIT + 1))
    small.write_bytes(bytes(large_files.LIMIT))
    assert large_files.too_large([str(big), str(small)]) == [f"{big}: 500 kB"]
    assert large_files.too_large(["examples/activations/train_00.h5"]) == []
