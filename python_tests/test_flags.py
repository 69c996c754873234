"""Errors of a command line: one line with the flag, the values it accepts and the given one."""

import os
import subprocess
import sys

import pytest

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.fields import field_names
from sae_fast.flags import _NAMED_OTHERWISE
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


def test_names_of_other_trainers_lead_to_fields_that_there_are():
    known = {*field_names(SAEConfig), *field_names(TrainConfig)}
    assert set(_NAMED_OTHERWISE.values()) <= known
    assert not _NAMED_OTHERWISE.keys() & known
