"""Run `python -m sae_fast.ground_truth NAME`."""

from sae_fast.ground_truth.command import main
from sae_fast.output_streams import run_command
from sae_fast.training.signals import run_program

if __name__ == "__main__":
    run_program(lambda: run_command(main))
