"""Errors of a command line: one line with the flag, the values it accepts and the given one."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_fast.__main__ import main
from sae_fast.capture import parse_arguments as parse_capture
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.command_line import parse
from sae_fast.config.fields import ConfigFile, configuration, field_names
from sae_fast.config.model_text import DEFAULT_K, SAE_DEFAULTS, TRAIN_DEFAULTS
from sae_fast.config.setting import rules_of, setting
from sae_fast.config.train import LARGEST_BATCH
from sae_fast.train import parse_arguments


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lrr 1", "unknown flag --lrr (did you mean --lr?)"),
        (
            "--spasity-penalty l0",
            "unknown flag --spasity-penalty (did you mean --sparsity-penalty?",
        ),
        ("--qqqqqq=1", "unknown flag --qqqqqq"),
        ("--output-dir x", "unknown flag --output-dir (did you mean --checkpoint-dir?)"),
        ("--steps 5", "unknown flag --steps (did you mean --max-steps?)"),
        ("--l1-coefficient 5", "(did you mean --l1-penalty-coeff?)"),
        ("--arch TopK", "--arch must be one of 'topk', 'batch_topk', "),
        ("--arch TopK", "got 'TopK' (did you mean 'topk'?)"),
        ("--slots-mode both", "'joint', 'separate_activation', 'separate_value', got 'both'"),
        ("--arch", "--arch must be one of 'topk', "),
        ("--k 1.5", "--k must be a whole number, got '1.5'"),
        ("--k=x", "--k must be a whole number, got 'x'"),
        ("--k 3 4", "--k must be a whole number, one value, got '3 4'"),
        ("--d-sae", "--d-sae must be a whole number, one value, got none"),
        ("--lr 1e-3x", "--learning-rate must be a finite number, got '1e-3x'"),
        ("--betas 0.9", "--betas must be 2 values, got '0.9'"),
        ("--betas 0.9 x", "--betas must be a finite number, got 'x'"),
        (
            "--arch matryoshka --matryoshka-prefixes 64,128",
            "must be a whole number, got '64,128': values are separated by spaces",
        ),
        ("--matryoshka-prefixes", "--matryoshka-prefixes needs values, got none"),
        ("--no-fused yes", "--no-fused takes no value, got 'yes'"),
        ("topk --k 3", "unexpected 'topk': a flag begins with --"),
        ("--k 0", "k must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_named_with_the_remedy(flags, message):
    with pytest.raises(ValueError, match=r".*") as refusal:
        parse_arguments(flags.split())
    assert message in str(refusal.value)
    assert "──" not in str(refusal.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--k None --d-sae=8 --betas 0.9 0.99 --transcoder --no-fused --use-amp",
        "--arch matryoshka --matryoshka-prefixes 4 8 --d-sae 8 --input-dim 4",
        "--l1-penalty-coeff=1e-3 --decay_fraction 0 --seed 3",
    ],
)
def test_what_is_right_is_taken(flags):
    parse_arguments(flags.split())


def test_a_terminal_without_box_characters_gets_the_same_lines():
    command = (
        "from sae_fast.train import main\n"
        "for flags in ('--k -3', '--sparsity-norm-p 7 --arch relu'):\n"
        "    assert main(flags.split()) == 2"
    )
    found = set()
    for encoding in ("utf-8", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
        done = subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stderr)
    (lines,) = found
    assert len(lines.splitlines()) == 2
    assert all(line.startswith("error: ") for line in lines.splitlines())
    assert "---" not in lines


def test_names_of_other_trainers_are_those_of_one_setting_and_of_no_field():
    known = {*field_names(SAEConfig), *field_names(TrainConfig)}
    rules = {**rules_of(SAEConfig), **rules_of(TrainConfig)}
    elsewhere = [name for each in rules.values() for name in each.elsewhere]
    assert len(elsewhere) == len(set(elsewhere)) > 20
    assert not known & set(elsewhere)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("train m d --seed 3", "--seed is for training on shards, here give --init_seeds"),
        ("train m d --shard_dir x", "--shard_dir is for training on shards: MODEL computes"),
        ("train m d e --k 3", "unexpected 'e': MODEL and DATASET, then flags"),
        ("train m --k 3", "MODEL DATASET, got 'm' alone"),
        ("train m d --batch_size x", "--batch_size must be a whole number, got 'x'"),
        ("capture m d --layer 3", "unknown flag --layer (did you mean --layers?)"),
        ("capture m d --layers 3,5", "got '3,5': values are separated by spaces"),
        ("capture m d --out", "--out must be a path, one value, got none"),
        ("capture m d e --out x", "unexpected 'e': a flag begins with --"),
        ("convert_shards a b --dtype f16", "--dtype must be one of 'float16', 'bfloat16', 'fl"),
        ("plot a --output x", "unknown flag --output (did you mean --out?)"),
        ("presets --measure", "--measure must be a string, one value, got none"),
        ("trian --k 3", "unknown command 'trian': train, capture"),
    ],
)
def test_every_command_names_a_mistake_with_the_remedy(flags, message, capsys):
    assert main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@configuration()
@dataclasses.dataclass(frozen=True)
class Example(ConfigFile):
    """An example."""

    place: Path | None = setting(None, positional=True, metavar="PLACE")
    """A place."""
    rest: tuple[str, ...] = setting((), positional=True, metavar="REST")
    """Others."""
    pair: tuple[int, float] = setting((1, 2.0))
    """Two."""
    switch: bool = setting(True)
    """Whether."""
    number: int | None = setting(3, at_least=1, bare="7")
    """How many."""


def read(line):
    return parse(Example, line.split(), "example").given


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("", {}),
        ("a", {"place": Path("a")}),
        ("a --pair 1 2 b", {"place": Path("a"), "pair": (1, 2.0), "rest": ("b",)}),
        ("--switch false a", {"switch": False, "place": Path("a")}),
        ("--no-switch a", {"switch": False, "place": Path("a")}),
        ("--no_switch=False", {"switch": True}),
        ("--number=4 a b c", {"number": 4, "place": Path("a"), "rest": ("b", "c")}),
        ("--number None --number 5", {"number": 5}),
    ],
)
def test_a_flag_takes_as_many_words_as_its_setting_and_the_rest_has_places(line, given):
    assert read(line) == given


def test_ranges_hold_on_the_command_line_as_in_files():
    with pytest.raises(ValueError, match="number must be at least 1, got 0"):
        read("--number 0")


@pytest.mark.parametrize("flag", ["--batch-tokens", "--batch_tokens", "--batch-size"])
def test_a_batch_of_shards_is_a_number_of_tokens(flag):
    assert parse_arguments([flag, "64"]).train.batch_size == 64
    assert parse_arguments([flag, "64"]).train.batch_tokens == 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --batch-sequences 4", "a batch of shards has --batch-tokens tokens"),
        ("train --batch-tokens x", "--batch-tokens must be a whole number, got 'x'"),
        ("train m d --batch-tokens 64", "a batch has --batch-sequences sequences of --ctx-len"),
        ("train m d --batch-sequences x", "--batch-sequences must be a whole number, got 'x'"),
        ("capture m d --batch-sequences x", "--batch-sequences must be a whole number, got 'x'"),
        ("train --batch-tokens 4 --config x --verify no", "must be one of 'off', 'lazy', 'full'"),
    ],
)
def test_a_batch_says_its_unit(line, message, capsys):
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_a_capture_takes_sequences_by_either_name():
    for flag in ("--batch-sequences", "--batch-size"):
        given, _ = parse_capture(["m", "d", "--out", "o", flag, "7"])
        assert given.batch_size == given.batch_sequences == 7


def test_help_tells_of_defaults_that_depend_on_the_mode(capsys):
    for place in ([], ["m", "d"]):
        with pytest.raises(SystemExit):
            main(["train", *place, "--help"])
    on_shards, from_model = capsys.readouterr().out.split("usage: ")[1:]
    for name, value in {**SAE_DEFAULTS, **TRAIN_DEFAULTS, "k": DEFAULT_K}.items():
        assert f"{name} {value}" in " ".join(on_shards.split())
    words = " ".join(from_model.split())
    for told in ("default here: 192; on shards: 32", "default here: 32; on shards: 8"):
        assert told in words
    with pytest.raises(SystemExit):
        main(["train", "m", "d", "--help-all"])
    full = " ".join(capsys.readouterr().out.split())
    shards = TrainConfig.defaults()
    assert f"on shards {shards['checkpoint_every']} by default" in full
    assert f"batch_tokens, by default at most {LARGEST_BATCH}" in full
    assert f"on shards the default is seed {shards['seed']}" in full.replace("On", "on")
    assert f"on shards: {shards['dead_percentage_threshold']}" in full
