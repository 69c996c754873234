"""List the commands of sae_fast: `python -m sae_fast`, or `sae-fast` where it is installed.

`sae-fast train …` runs `python -m sae_fast.train …`, and each other command runs its
module. `sae-fast completion bash` prints a script that completes commands, flags and their values.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from sae_fast.command_errors import EXIT_BAD_INPUT
from sae_fast.config.command_line import version
from sae_fast.output_streams import run_command
from sae_fast.training.signals import run_program

# Each is a module of sae_fast with a function `main`.
COMMANDS = {
    "train": "train sparse autoencoders, on shards or on a model",
    "capture": "write the activations of a model as shards",
    "convert_shards": "turn activations that other programs saved into shards",
    "evaluate": "measure dictionaries on rows, and inside the language model",
    "latents": "write a page on every latent, to look at in a browser",
    "compare": "match the latents of dictionaries, such as several seeds",
    "ground_truth": "score dictionaries on tasks whose right answer is known",
    "convert": "turn dictionaries of one library into dictionaries of another",
    "verify": "check that converted dictionaries still give their codes",
    "plot": "draw the metrics of runs",
    "presets": "list settings for well-known models, with the memory they need",
    "info": "print versions, kernels and what runs on this machine",
    "biographies": "make labelled activations of made-up biographies",
    "swap": "swap relation slots of a model trained on biographies",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, or list all; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        return 0
    if words[0] == "--version":
        print(version())
        return 0
    name = words[0].replace("-", "_")
    if name == "completion":
        return _print_completion(words[1:])
    if name not in COMMANDS:
        print(f"error: unknown command {words[0]!r}: {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    command: Callable[[Sequence[str]], int] = importlib.import_module(f"sae_fast.{name}").main
    return command(words[1:])


def _print_completion(shells: Sequence[str]) -> int:
    from sae_fast.completion import SHELLS, script

    if len(shells) != 1 or shells[0] not in SHELLS:
        print(f"error: usage: sae-fast completion {'|'.join(SHELLS)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(script(shells[0], COMMANDS), end="")
    return 0


def listing() -> str:
    """Return the commands with a line on each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sae-fast COMMAND [flags], or python -m sae_fast.COMMAND [flags]",
            "",
            *lines,
            "",
            "COMMAND --help shows the flags that most people use, COMMAND --help-all all of them.",
            "--version prints the version, `sae-fast info` also versions and kernels around it.",
            "Completion by TAB in bash or zsh: the script that `sae-fast completion bash` prints.",
        ]
    )


def program() -> NoReturn:
    """Run the console script `sae-fast`."""
    run_program(lambda: run_command(main))


if __name__ == "__main__":
    program()
