"""Capture activations: `python -m sae_fast.capture MODEL DATASET --layers 3 5 --out DIR`.

The command runs a transformers model over a dataset and writes a folder of shards for each hook
point. After a kill at any moment the same command continues after the last whole shard. Under
torchrun each process writes the shards of its batches.
"""

from __future__ import annotations

import functools
import inspect
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sae_fast.command_errors import one_line, refusal
from sae_fast.command_frame import run_resumable
from sae_fast.config.command_line import CommandLine
from sae_fast.config.model_text import CaptureConfig
from sae_fast.config.output import OutputConfig
from sae_fast.distributed.environment import launched
from sae_fast.log_output import CommandOutput, has_log_file
from sae_fast.output_streams import run_command
from sae_fast.progress_bar import progress_bar
from sae_fast.training.signals import StopOnSignal, run_program

if TYPE_CHECKING:
    from sae_fast.activations.capture.directory import CaptureDirectory
    from sae_fast.activations.capture.plan import Capture
    from sae_fast.activations.capture.runner import CaptureResult

PROGRAM = "python -m sae_fast.capture"
USAGE = f"{PROGRAM} MODEL DATASET --out DIR [flags]"
SECONDS_BETWEEN_LINES = 5.0


@functools.cache
def command_line() -> CommandLine:
    """Return the command line of the command."""
    sections = {"capture": CaptureConfig, "output": OutputConfig}
    return CommandLine(USAGE, inspect.getdoc(CaptureConfig) or "", sections)


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [command_line()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 2 for bad input, 128 and its number after a signal."""
    words = sys.argv[1:] if arguments is None else arguments
    return run_resumable(lambda stop, output: _run(words, stop, output), _refusal)


def _run(words: Sequence[str], stop: StopOnSignal, output: CommandOutput) -> None:
    config, shown = parse_arguments(words)
    output.configure(quiet=shown.quiet, log_file=shown.log_file)
    _capture(config, stop, output)


def parse_arguments(arguments: Sequence[str]) -> tuple[CaptureConfig, OutputConfig]:
    """Return the capture that a command line asks for, and its output.

    Raises ValueError naming a wrong flag.
    """
    given = command_line().read(arguments)
    config, output = CaptureConfig(**given["capture"]), OutputConfig(**given["output"])
    if config.model is None or config.dataset is None or config.out is None:
        raise ValueError(
            f"MODEL, DATASET and --out must be given: {PROGRAM} MODEL DATASET --layers 3 --out DIR"
        )
    return config, output


def _refusal(error: Exception) -> str:
    """Return the line of an error, with what helps where the memory of a GPU is used up."""
    if "torch" in sys.modules:  # which neither help nor a wrong flag imports
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            return f"{one_line(error)}: a smaller --batch-size or --ctx-len needs less"
    return refusal(error)


def _capture(config: CaptureConfig, stop: StopOnSignal, output: CommandOutput) -> None:
    from sae_fast.activations.capture.directory import HELDOUT, CaptureDirectory
    from sae_fast.activations.capture.plan import made_with, open_capture
    from sae_fast.activations.capture.runner import CaptureRun
    from sae_fast.activations.capture.storage_type import with_storage_type
    from sae_fast.activations.remote import check_writable

    assert config.out is not None
    if config.copy_to is not None:
        check_writable(config.copy_to)
    rank, world_size, local_rank, _ = launched()
    started = time.monotonic()
    capture = open_capture(config, local_rank)
    hooks = tuple(hook.name for hook in capture.hooked.hooks)
    with CaptureDirectory(config.out, hooks, rank, world_size) as directory:
        device = str(capture.model.device)
        capture = with_storage_type(capture, directory)
        recipe = capture.recipe(world_size)
        directory.prepare(recipe, made_with(device))
        done = directory.progress()
        if done.complete and directory.finish():
            output.say(f"{config.out} is complete: {done.rows:,} tokens, nothing to do")
            _copy(config, output)
            return
        total = _announce(capture, directory, output)
        rows = done.rows if done.part != HELDOUT else 0
        with _ProgressBar(total, rows, output) as progress:
            run = CaptureRun(
                capture,
                directory,
                recipe,
                stop=lambda: stop.received is not None,
                report=progress.report,
            )
            result = run.run()
        is_finished = not result.stopped and directory.finish()
    seconds = time.monotonic() - started
    _conclude(result, capture, progress.rows, seconds, progress.seconds, output)
    if is_finished:
        _copy(config, output)


def _copy(config: CaptureConfig, output: CommandOutput) -> None:
    """Copy a finished capture to where it is asked for, if anywhere."""
    from sae_fast.activations.remote import copy_to

    if config.copy_to is None or config.out is None:
        return
    count = copy_to(config.out, config.copy_to)
    output.say(f"copied {count:,} files to {config.copy_to}")


def _announce(capture: Capture, directory: CaptureDirectory, output: CommandOutput) -> int:
    """Print what will be captured and the disk space it needs; return the rows of this rank."""
    from sae_fast.activations.capture.documents import Kind
    from sae_fast.activations.capture.runner import check_space, needed_bytes

    config, sequences = capture.config, capture.batches.config
    done = directory.progress()
    rows, is_estimate = capture.expected_rows()
    rows_all = rows + config.heldout_tokens
    left = max(0, rows_all - (done.rows + done.heldout_rows) * directory.world_size)
    needed = needed_bytes(capture, left)
    about = "about " if is_estimate else ""
    at_most = "at most " if config.compression != "none" else ""
    if directory.rank == 0:
        hooks = ", ".join(f"{name} ({width})" for name, width in capture.widths.items())
        count = capture.batches.documents.count
        kind = "image" if capture.batches.documents.kind is Kind.IMAGES else "document"
        documents = f"a stream of {kind}s" if count is None else f"{count:,} {kind}s"
        how = "packed" if sequences.pack else f"one {kind} each"
        output.say(
            f"capturing {hooks} of {config.model} over {documents} in sequences of "
            f"{sequences.ctx_len} tokens, {how}"
        )
        if done.rows or done.heldout_rows:
            output.say(f"continuing after {done.rows:,} tokens in {done.shards} shards")
        free = check_space(directory, needed)
        output.say(
            f"{about}{left:,} tokens need {about}{at_most}{needed / 1e9:,.2f} GB "
            f"of {free / 1e9:,.2f} GB free in {directory.path}"
        )
    return rows_all // directory.world_size


def _conclude(
    result: CaptureResult,
    capture: Capture,
    captured: int,
    seconds: float,
    running: float,
    output: CommandOutput,
) -> None:
    empty = f", {result.empty:,} documents without text skipped" if result.empty else ""
    heldout = f" and {result.heldout_rows:,} held-out" if result.heldout_rows else ""
    verb = "stopped: the same command continues after" if result.stopped else "captured"
    rank, world_size, *_ = launched()
    who = f"rank {rank}: " if world_size > 1 else ""
    output.say(
        f"{who}{verb} {result.rows:,}{heldout} tokens of {len(capture.widths)} hook points "
        f"({captured:,} of them in {seconds:.1f} s, {captured / max(running, 1e-9):,.0f} "
        f"tokens/s{empty})"
    )
    limit = capture.config.max_tokens
    if limit is not None and not result.stopped and result.rows < limit and world_size == 1:
        output.say(f"the dataset has no more, {limit:,} were asked for")


class _ProgressBar:
    """A progress bar of the tokens, or a line every few seconds without a terminal."""

    def __init__(self, total: int, done: int, output: CommandOutput) -> None:
        self.rows = 0
        self.seconds = 0.0
        self._total = total
        self._done = done
        self._started = self._last_line = time.monotonic()
        self._output = output
        shown = not output.is_quiet
        self._bar = progress_bar(
            total=total, initial=done, unit="tok", unit_scale=True, shown=shown
        )

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started
        self._bar.close()

    def report(self, rows: int) -> None:
        """Count rows that have been captured."""
        self.rows += rows
        self._bar.update(rows)
        now = time.monotonic()
        is_told = self._bar.disable or has_log_file()
        if is_told and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = self.rows / (now - self._started)
            line = f"{self._done + self.rows:,} of {self._total:,} tokens, {rate:,.0f} tokens/s"
            if self._bar.disable and not self._output.is_quiet:
                print(line, file=sys.stderr)
            self._output.note(line)


if __name__ == "__main__":
    run_program(lambda: run_command(main))
