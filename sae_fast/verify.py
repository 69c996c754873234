"""Check converted dictionaries: `python -m sae_fast.verify DIR …`.

`convert` and `SparseAutoencoder.export` write rows with the codes that they must give. Here the
files are read again, and the codes computed from them are compared with these.

Modules that need torch are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sae_fast.command_errors import EXIT_BAD_INPUT, refusal
from sae_fast.config.command_line import CommandLine, of_one, parse
from sae_fast.config.convert import VerifyConfig
from sae_fast.output_streams import run_command

PROGRAM = "python -m sae_fast.verify"
USAGE = f"{PROGRAM} DIR …"
EXIT_DIFFERENT = 1


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [of_one(VerifyConfig, USAGE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 1 where codes differ, 2 for bad input."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        config = parse(VerifyConfig, arguments, USAGE)
        return run(config)
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT


def run(config: VerifyConfig) -> int:
    """Check all directories and print a line on each; return the worst exit code of them."""
    from sae_fast.autoencoder import expected_codes
    from sae_fast.autoencoder.foreign import local_place

    if not config.directories:
        raise ValueError(f"a directory must be given: {PROGRAM} DIR")
    exit_code = 0
    for directory in config.directories:
        try:
            places = expected_codes.places_in(local_place(directory))
        except Exception as error:
            print(refusal(error), file=sys.stderr)
            exit_code = EXIT_BAD_INPUT
            continue
        exit_code = max(exit_code, *map(_verify, places))
    return exit_code


def _verify(place: Path) -> int:
    """Check one dictionary and print a line on it; return the exit code."""
    from sae_fast.autoencoder import SparseAutoencoder, expected_codes
    from sae_fast.autoencoder.interchange import to_plain

    try:
        sae = SparseAutoencoder.from_pretrained(place)
        agreement = expected_codes.check(to_plain(sae), sae, place)
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{place}: {'equal' if agreement.holds else 'DIFFERENT'}; {agreement}")
    return 0 if agreement.holds else EXIT_DIFFERENT


if __name__ == "__main__":
    sys.exit(run_command(main))
