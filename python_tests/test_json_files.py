"""JSON is read strictly: other text is refused in one line that names file and field."""

import json
import os
import sys

import pytest

from sae_fast.command_errors import one_line
from sae_fast.config import RunConfig, SAEConfig
from sae_fast.json_files import JSONError, parse_json, read_json, shown
from sae_fast.training.metrics import MetricsLog

DEEP = "[" * 10_000 + "]" * 10_000
BAD = [
    ('{"a": NaN}', "a: NaN is no finite number of 64 bits"),
    ('{"a": {"b": [1, -Infinity]}}', r"a\.b\[1\]: -Infinity is no finite number"),
    ('{"a": 1e999}', "a: 1e999 is no finite number"),
    ('{"a": %s}' % ("9" * 400), r"a: 9{20}\.\.\. is no finite number of 64 bits"),
    ('{"a": 18446744073709551616}', "a: 18446744073709551616 is no finite number"),
    ('{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
    (DEEP, "nested more than 64 levels deep"),
    ("[" * 100 + "]" * 100, "nested more than 64 levels deep"),
    ('{"a": "\\ud800"}', r"a: '\\ud800' is not Unicode"),
    ('{"a": 1', "not a JSON file"),
    (b"\xff\xfe{}", "not a JSON file"),
    ("", "not a JSON file"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_is_not_plain_finite_json_is_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(JSONError, match=message) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "value", [0, 2**64 - 1, -(2**63), 1.5, "ä", None, True, [], {"a": [{"b": "x"}]}]
)
def test_plain_json_is_read_as_python_reads_it(value):
    text = json.dumps(value)
    assert parse_json(text) == parse_json(b"\xef\xbb\xbf" + text.encode()) == value


def test_pipe_and_device_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(JSONError, match="is no regular file"):
            read_json(path)


def test_file_above_the_limit_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2, 3]")
    with pytest.raises(JSONError, match="is larger than 8 bytes"):
        read_json(tmp_path / "x.json", max_bytes=8)


def test_long_values_are_shown_shortened():
    sys.set_int_max_str_digits(640)
    try:
        assert shown(10**5000) == "a number of 16,610 bits"
    finally:
        sys.set_int_max_str_digits(4300)
    assert len(shown("x" * 10**6)) < 100
    assert len(shown(list(range(10**5)))) < 100


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, "1e400"])
def test_configuration_refuses_numbers_without_an_end(number, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"sae": {"l1_penalty_coeff": NUMBER}}'.replace("NUMBER", number))
    with pytest.raises(ValueError, match=r"sae\.l1_penalty_coeff: .* no finite number"):
        RunConfig.load(path)


def test_configuration_in_python_refuses_them_as_well():
    with pytest.raises(ValueError, match="l1_penalty_coeff must be a finite number"):
        SAEConfig(l1_penalty_coeff=10**400)


def test_message_about_a_long_value_stays_short(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"d_in": 8, "k": 2, "answer_labels": "y" * 10_000}))
    with pytest.raises(ValueError, match="answer_labels belongs to arch slots") as caught:
        SAEConfig.load(path)
    assert len(str(caught.value)) < 1500
    line = one_line(ValueError("x\n" * 10**6))
    assert line.startswith("error: x x")
    assert len(line) < 2000


def test_message_about_many_unknown_keys_stays_short(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({f"key{number}" + "x" * 500: 1 for number in range(1000)}))
    with pytest.raises(ValueError, match="and 995 more") as caught:
        RunConfig.load(path)
    assert len(str(caught.value)) < 1000


GOOD = '{"step": 1, "tokens": 8}\n'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"step": 2, "to', "not a JSON file"),
        ('{"step": ' + "9" * 400 + "}", r"step: 9+\.\.\. is no finite number"),
        (DEEP, "nested more than 64 levels deep"),
        ("\0\0\0", "not a JSON file"),
    ],
)
def test_row_that_is_no_json_is_where_a_kill_struck_unless_more_follow(row, message, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(GOOD + row + "\n")
    log = MetricsLog(path)
    assert log.rows == [{"step": 1, "tokens": 8}]
    path.write_text(GOOD + row + "\n" + GOOD)
    for read in (lambda: log.rows, lambda: log.rewind(5)):
        with pytest.raises(JSONError, match=f"line 2: {message}"):
            read()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"step": null, "tokens": 1}', "step is None"),
        ('{"step": "2", "tokens": 1}', "step is '2'"),
        ('{"step": [2], "tokens": 1}', r"step is \[2\]"),
        ('{"step": true, "tokens": 1}', "step is True"),
        ('{"step": 2, "fvu": {}}', "fvu is {}"),
        ('{"tokens": 1}', "a row lacks step"),
    ],
)
def test_row_with_a_wrong_value_is_named(row, message, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(GOOD + row + "\n")
    with pytest.raises(JSONError, match=f"metrics.jsonl: line 2: {message}"):
        MetricsLog(path).rewind(5)
