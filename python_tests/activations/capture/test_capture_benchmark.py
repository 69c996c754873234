"""benchmarks.capture runs end to end and finds that stored rows equal the hidden states."""

import json
import sys

import pytest
from small_models import save_model

from benchmarks.capture import main
from benchmarks.support.documentation import documentation_strings


@pytest.mark.slow
def test_capture_writes_speeds_and_finds_no_other_bits(tmp_path, monkeypatch):
    model = str(save_model(tmp_path / "bert", "bert"))
    files = ["--json", str(tmp_path / "result.json"), "--markdown", str(tmp_path / "result.md")]
    sizes = ["--layers", "0", "2", "--tokens", "9000", "--batch-size", "8", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--model", model, *sizes, *files])
    main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["tokens"] >= 9000
    assert result["rounds"] > 1
    for one in result["comparison"].values():
        assert one == {"numbers": result["tokens"] * 16, "different": 0}
    assert result["contestants"]["capture"]["of_ended"] > 0
    assert str(tmp_path) not in (tmp_path / "result.md").read_text()


@pytest.mark.slow
def test_documentation_strings_are_english_and_each_there_once():
    texts = documentation_strings()
    assert len(texts) == len(set(texts)) > 1000
    assert sum(" the " in text for text in texts) > len(texts) // 4
