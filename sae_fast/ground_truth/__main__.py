"""Run `python -m sae_fast.ground_truth NAME`."""

import sys

from sae_fast.ground_truth.command import main
from sae_fast.output_streams import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
