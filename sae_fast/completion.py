"""Completion by TAB of the command `sae-fast` in bash and zsh: `sae-fast completion bash`.

The script holds the words of all commands, made from the fields as the flags are, so that a TAB
starts no Python. Keep it in a file, for bash ~/.local/share/bash-completion/completions/sae-fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from sae_fast.config.command_line import CommandLine, Flag

_SCRIPT = """_sae_fast() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    if [ "$COMP_CWORD" = 1 ]; then words="{commands}"
    else case ${{COMP_WORDS[1]}} in
{cases}
    esac; fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _sae_fast sae-fast
"""
_ZSH = "autoload -Uz bashcompinit && bashcompinit\n"
SHELLS = {"bash": _SCRIPT, "zsh": _ZSH + _SCRIPT}


def script(shell: str, commands: Iterable[str]) -> str:
    """Return the script that completes these commands, modules of sae_fast, in a shell."""
    names = list(commands)
    cases = "\n".join(f"        {name}) {_case(name)} ;;" for name in names)
    return SHELLS[shell].format(commands=" ".join(names), cases=cases)


def _case(name: str) -> str:
    """Return the choice of words after a command, by the word before the one that is typed."""
    module = importlib.import_module(f"sae_fast.{name}")
    lines: list[CommandLine] = module.command_lines()
    every = {flag.name: flag for line in lines for flag in line.flags()}
    flags = [flag for flag in every.values() if not flag.rules.positional]
    cases = [
        f"{_either([flag])}) words={_quoted(flag.choices)} ;;" for flag in flags if flag.choices
    ]
    if others := [flag for flag in flags if not flag.choices and not flag.is_switch]:
        cases.append(f"{_either(others)}) ;;")  # the shell completes names of files
    own = ("--help", "--help-all", "--version")
    words = [*(spelling for flag in flags for spelling in flag.spellings), *own]
    return f"case $before in {' '.join(cases)} *) words={_quoted(words)} ;; esac"


def _either(flags: Iterable[Flag]) -> str:
    return "|".join(spelling for flag in flags for spelling in flag.spellings)


def _quoted(words: Iterable[str]) -> str:
    return f'"{" ".join(words)}"'
