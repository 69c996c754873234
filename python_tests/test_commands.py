"""`python -m sae_fast` and the console script: the commands, their help, completion by TAB."""

import contextlib
import importlib
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import sae_fast
from sae_fast.__main__ import COMMANDS, main
from sae_fast.completion import script
from sae_fast.config.evaluate import EvaluateConfig

COMPLETE = """
{script}
COMP_WORDS=({words})
COMP_CWORD=$(({count} - 1))
_sae_fast
echo "${{COMPREPLY[@]}}"
"""


def test_without_arguments_all_commands_are_listed(capsys):
    assert main([]) == 0
    listed = re.findall(r"^  (\w+) ", capsys.readouterr().out, re.M)
    assert listed == list(COMMANDS)
    folder = Path(sae_fast.__file__).parent
    commands = [
        path.stem for path in folder.glob("*.py") if "\ndef main(" in path.read_text("utf-8")
    ]
    commands += [path.parent.name for path in folder.glob("*/__main__.py")]
    assert sorted([*COMMANDS, "__main__"]) == sorted(commands)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_every_command_has_help(name, flag, capsys):
    with contextlib.suppress(SystemExit):
        assert main([name.replace("_", "-"), flag]) == 0
    text = capsys.readouterr().out
    assert f"python -m sae_fast.{name}" in text
    assert max(map(len, text.splitlines())) <= 100
    if flag == "--help":
        assert len(text.splitlines()) <= 60


def test_the_command_is_the_module(capsys):
    assert main(["train", "--k", "x"]) == 2
    assert capsys.readouterr().err == "error: --k must be a whole number, got 'x'\n"


def test_a_long_flag_has_its_text_on_a_line_of_its_own(capsys):
    with contextlib.suppress(SystemExit):
        main(["latents", "--help"])
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("  --write {saedashboard,neuronpedia,delphi}")
    assert lines[at + 1] == " " * 29 + "write the pages for other programs too"


@pytest.mark.parametrize(
    "line",
    [*(f"{name} --help" for name in COMMANDS), "train m d --help", "train --k x", "capture -h"],
)
def test_help_and_wrong_flags_import_no_torch(line):
    program = (
        "import sys\n"
        "from sae_fast.__main__ import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    assert not {'torch', 'numpy', 'h5py'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *line.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_no_flag_takes_an_empty_name_or_path(name):
    # Path("") is the current directory, into which --out "$UNSET" would write.
    lines = importlib.import_module(f"sae_fast.{name}").command_lines()
    tried = 0
    for line in lines:
        for flag in line.flags():
            kinds = typing.get_args(flag.value_kind) or (flag.value_kind,)
            if not {str, Path} & set(kinds) or flag.name in line.refused:
                continue
            words = [""] if flag.rules.positional else [flag.spellings[0], ""]
            with pytest.raises(ValueError, match=r"must be a (name|path), not an empty string"):
                line.read(words)
            tried += 1
    assert tried or name == "info"


def test_an_empty_path_is_refused_in_one_line(capsys):
    assert main(["evaluate", "a", "--out", "", "--shard-dir", "b"]) == 2
    told = capsys.readouterr().err
    assert told == "error: --out must be a path, not an empty string, got ''\n"


def test_an_empty_path_is_refused_in_a_file_of_settings_too():
    with pytest.raises(ValueError, match=r"^out must be a path or null, got ''$"):
        EvaluateConfig(out="")
    with pytest.raises(ValueError, match=r"^saes must be a list of values, each a path, got "):
        EvaluateConfig(saes=["a", ""])


@pytest.fixture(scope="module", name="bash")
def bash_script():
    return script("bash", COMMANDS)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("sae-fast tr", "train"),
        ("sae-fast train --arch ba", "batch_topk"),
        ("sae-fast train --learning", "--learning-rate"),
        ("sae-fast train --no-fu", "--no-fused"),
        ("sae-fast train --shard-dir x", ""),
        ("sae-fast train m d --wandb-log-f", "--wandb-log-frequency"),
        ("sae-fast capture m d --dtype bf", "bfloat16"),
        ("sae-fast train --pin --keep-i", "--keep-in-memory"),
        ("sae-fast convert_shards --help-", "--help-all"),
    ],
)
def test_bash_completes_commands_flags_and_values(bash, words, completed):
    line = COMPLETE.format(script=bash, words=words, count=len(words.split()))
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == completed
