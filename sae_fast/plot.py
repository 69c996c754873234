"""Draw the metrics of training runs, also while they run: `python -m sae_fast.plot RUN`.

One run: RUN/plots/training.png, and RUN/plots/loss_terms.png with a panel for each term of the
loss. The directory of a sweep draws its runs over each other. With `--out FILE` all panels, of any
number of runs, go into one image. `--front` draws runs that are complete as points over L0 and
held-out FVU.

Modules that need torch are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_fast.command_errors import EXIT_BAD_INPUT, refusal
from sae_fast.config.command_line import CommandLine, of_one, parse
from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import setting
from sae_fast.output_streams import run_command
from sae_fast.report.front import Point, draw_front
from sae_fast.report.names import distinct_names
from sae_fast.report.panels import loss_terms, overview
from sae_fast.report.plot import draw, plot_run

if TYPE_CHECKING:
    from sae_fast.training.history import History

PROGRAM = "python -m sae_fast.plot"
USAGE = f"{PROGRAM} RUN … [flags]"
KINDS = (".png", ".pdf", ".svg")


@configuration()
@dataclass(frozen=True)
class PlotOptions(ConfigFile):
    """Draw the metrics of a run, or of several over each other, or the front of L0 and FVU."""

    runs: tuple[Path, ...] = setting((), positional=True, metavar="RUN")
    """Directories of runs or sweeps, or a run's training_history.json."""
    out: Path | None = setting(None, metavar="FILE")
    """Image to draw everything into, .png, .pdf or .svg; by default PNGs in RUN/plots."""
    front: bool = setting(False)
    """Draw one point a run, its L0 and its FVU on held-out rows, of the runs that are complete."""


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [of_one(PlotOptions, USAGE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse(PlotOptions, arguments, USAGE)
        _check(options)
        paths = _draw(options)
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    for path in paths:
        print(path)
    return 0


def _check(options: PlotOptions) -> None:
    if not options.runs:
        raise ValueError(f"runs must be given: {PROGRAM} RUN")
    if options.out is None and len(options.runs) > 1:
        raise ValueError("out must be given with several runs: --out FILE.png")
    if options.out is not None and options.out.suffix.lower() not in KINDS:
        raise ValueError(f"out must end in {', '.join(KINDS)}, got {options.out}")
    from sae_fast.tensor_files import require_unicode

    for path in (*options.runs, *([] if options.out is None else [options.out])):
        require_unicode(path)


def _draw(options: PlotOptions) -> list[Path]:
    histories = _histories(options.runs)
    is_single = len(histories) == 1
    title = histories[0].title if is_single else f"{len(histories)} runs"
    plots = (histories[0].directory if is_single else options.runs[0]) / "plots"
    if options.front:
        return [_draw_front(histories, options.out or plots / "front.png")]
    if options.out is None and is_single:
        return _draw_one(histories[0], plots)
    names = distinct_names([history.place for history in histories], "runs")
    runs = {name: history.rows for name, history in zip(names, histories, strict=True)}
    rows = [row for run in runs.values() for row in run]
    if options.out is not None:
        return [draw(runs, [*overview(rows), *loss_terms(rows)], options.out, title)]
    paths = [draw(runs, overview(rows), plots / "training.png", title)]
    if terms := loss_terms(rows):
        paths.append(draw(runs, terms, plots / "loss_terms.png", _of_terms(title)))
    return paths


def _histories(places: Sequence[Path]) -> list[History]:
    """Return what the runs have logged; runs of a sweep that have logged nothing are left out."""
    from sae_fast.training.history import NothingLoggedError, find_runs, read_history

    histories: list[History] = []
    for place in places:
        first_error: NothingLoggedError | None = None
        count = len(histories)
        for run in find_runs(place):
            try:
                histories.append(read_history(run))
            except NothingLoggedError as error:
                first_error = first_error or error
        if len(histories) == count and first_error is not None:
            raise first_error
    return histories


def _draw_one(history: History, plots: Path) -> list[Path]:
    rows = history.rows
    paths = [plot_run(rows, plots / "training.png", history.title)]
    if terms := loss_terms(rows):
        paths.append(draw({"": rows}, terms, plots / "loss_terms.png", _of_terms(history.title)))
    return paths


def _of_terms(title: str) -> str:
    return f"{title}: terms of the loss, weighted"


def _draw_front(histories: Sequence[History], path: Path) -> Path:
    from sae_fast.training.history import heldout_result

    names = distinct_names([history.place for history in histories], "runs")
    points = []
    for name, history in zip(names, histories, strict=True):
        if (result := heldout_result(history)) is None:
            print(f"warning: {name} is not complete and left out", file=sys.stderr)
        else:
            points.append(Point(history.kind, *result))
    if not points:
        raise ValueError("front needs runs that are complete: none has a training_history.json")
    count = f"{len(points)} runs" if len(points) > 1 else names[0]
    return draw_front(points, path, count)


if __name__ == "__main__":
    sys.exit(run_command(main))
