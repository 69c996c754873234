"""Draw the metrics of training runs, also while they go on: `python -m sae_fast.plot RUN`.

One run: RUN/plots/training.png, and RUN/plots/loss_terms.png with a panel for each term of the
loss. With `--out FILE` all panels, of several runs over each other, go into one image.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_fast.command_errors import EXIT_BAD_INPUT, refusal
from sae_fast.config.command_line import CommandLine, of_one, parse
from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import setting
from sae_fast.output_streams import run_command
from sae_fast.report.panels import loss_terms, overview
from sae_fast.report.plot import draw, plot_run
from sae_fast.tensor_files import require_unicode
from sae_fast.training.history import read_history

PROGRAM = "python -m sae_fast.plot"
USAGE = f"{PROGRAM} RUN … [flags]"
KINDS = (".png", ".pdf", ".svg")


@configuration()
@dataclass(frozen=True)
class PlotOptions(ConfigFile):
    """Draw the metrics of a run, or of several over each other."""

    runs: tuple[Path, ...] = setting((), positional=True, metavar="RUN")
    """Directories of runs, or their training_history.json."""
    out: Path | None = setting(None, metavar="FILE")
    """Image to draw everything into, .png, .pdf or .svg; by default two PNGs in RUN/plots."""


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [of_one(PlotOptions, USAGE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse(PlotOptions, arguments, USAGE)
        _check(options)
        paths = _draw_one(options.runs[0]) if options.out is None else [_draw_all(options)]
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
    for path in (*options.runs, *([] if options.out is None else [options.out])):
        require_unicode(path)
    if options.out is not None and options.out.suffix.lower() not in KINDS:
        raise ValueError(f"out must end in {', '.join(KINDS)}, got {options.out}")


def _draw_one(run: Path) -> list[Path]:
    history = read_history(run)
    rows, plots = history.rows, history.directory / "plots"
    paths = [plot_run(rows, plots / "training.png", history.title)]
    if panels := loss_terms(rows):
        title = f"{history.title}: terms of the loss, weighted"
        paths.append(draw({"": rows}, panels, plots / "loss_terms.png", title))
    return paths


def _draw_all(options: PlotOptions) -> Path:
    assert options.out is not None
    histories = [read_history(run) for run in options.runs]
    names = _names([history.place for history in histories])
    runs = {name: history.rows for name, history in zip(names, histories, strict=True)}
    rows = [row for run in runs.values() for row in run]
    title = histories[0].title if len(runs) == 1 else f"{len(runs)} runs"
    return draw(runs, [*overview(rows), *loss_terms(rows)], options.out, title)


def _names(places: Sequence[Path]) -> list[str]:
    """Return names that tell runs apart: their paths without the part that they share."""
    resolved = [place.resolve() for place in places]
    if len(set(resolved)) < len(resolved):
        raise ValueError("runs must be different ones")
    shared = os.path.commonpath([path.parent for path in resolved])
    return [path.relative_to(shared).as_posix() for path in resolved]


if __name__ == "__main__":
    sys.exit(run_command(main))
