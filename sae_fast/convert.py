"""Convert dictionaries between libraries: `python -m sae_fast.convert SRC DST --to saelens`.

What is written is read again and compared with the plain formula on rows that are written with it;
`python -m sae_fast.verify DST` repeats that at any time.

Modules that need torch are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sae_fast.command_errors import EXIT_BAD_INPUT, refusal
from sae_fast.config.command_line import CommandLine, of_one, parse
from sae_fast.config.convert import ConvertConfig
from sae_fast.output_streams import run_command

PROGRAM = "python -m sae_fast.convert"
USAGE = f"{PROGRAM} SRC DST [flags]"


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [of_one(ConvertConfig, USAGE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for bad input."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        config = parse(ConvertConfig, arguments, USAGE)
        run(config)
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def run(config: ConvertConfig) -> None:
    """Convert a dictionary, check what was written, and print a line on it.

    Raises FileNotFoundError or ValueError, in one line that names what is wrong.
    """
    from sae_fast.autoencoder import SparseAutoencoder

    if not config.source or config.destination is None:
        raise ValueError(f"source and destination must be given: {PROGRAM} SRC DST")
    sae = SparseAutoencoder.from_pretrained(
        config.source, subfolder=config.subfolder, revision=config.revision
    )
    agreement = sae.export(config.destination, config.to)
    print(f"{config.destination}: {sae!r} as {config.to}; {agreement}")


if __name__ == "__main__":
    sys.exit(run_command(main))
