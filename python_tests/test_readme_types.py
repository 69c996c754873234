"""The Python snippets of the README pass mypy in its strict mode."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[1]
if not (ROOT / "README.md").exists():
    pytest.skip("no checkout: the README is not installed", allow_module_level=True)


@pytest.mark.slow
def test_snippets_of_the_readme_pass_mypy(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)
    assert snippets
    files = [tmp_path / f"snippet_{number}.py" for number in range(len(snippets))]
    for file, snippet in zip(files, snippets, strict=True):
        file.write_text(snippet, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
