"""Compare dictionaries of several trainings: `python -m sae_fast.compare A B …`.

The latents of every two are matched one to one by the cosine of their decoder directions. Printed
are the mean matched cosine (PW-MCC) and the shares of latents that both have. With `--out DIR` it
writes compare.json and compare.md with the figures, latents.csv and latents.json with a row a
latent, compare.png with heatmaps, and all of it in report.html.

Modules that need torch are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from sae_fast.command_errors import EXIT_BAD_INPUT, check_out, refusal
from sae_fast.config.command_line import CommandLine, of_one, parse
from sae_fast.config.compare import CompareConfig
from sae_fast.output_streams import run_command

if TYPE_CHECKING:
    from sae_fast.evaluation.comparison import Comparison, Dictionary

PROGRAM = "python -m sae_fast.compare"
USAGE = f"{PROGRAM} SAE SAE … [flags]"


def command_lines() -> list[CommandLine]:
    """Return the command line of the command, for completion."""
    return [of_one(CompareConfig, USAGE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for bad input."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        config = parse(CompareConfig, arguments, USAGE)
        if len(config.saes) < 2:
            raise ValueError(f"two dictionaries or more must be given: {PROGRAM} SAE SAE")
        if config.out is not None:
            check_out(config.out)
        comparison = run(config)
        print(comparison.table())
        print(f"mean PW-MCC {comparison.mean_pw_mcc():.4f}")
        _write(config, comparison)
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def run(config: CompareConfig) -> Comparison:
    """Read the dictionaries and compare them.

    Raises FileNotFoundError or ValueError, in one line that names what is wrong.
    """
    import torch

    from sae_fast.evaluation.comparison import Dictionary, compare
    from sae_fast.report.names import distinct_names

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    names = distinct_names(config.saes, "dictionaries")
    sources = {name: Dictionary.read(place) for name, place in zip(names, config.saes, strict=True)}
    _warn_of_origins(sources)
    _warn_of_copies(dict(zip(map(str, config.saes), sources.values(), strict=True)))
    return compare(
        sources,
        thresholds=config.thresholds,
        absolute=config.absolute,
        exact_below=config.exact_below,
        neighbours=config.neighbours,
    )


def _warn_of_origins(dictionaries: Mapping[str, Dictionary]) -> None:
    """Print a warning for the first two dictionaries of activations of different places."""
    from sae_fast.activations import origin_difference

    for (a, one), (b, other) in itertools.combinations(dictionaries.items(), 2):
        if difference := origin_difference(one.origin, other.origin):
            print(f"warning: {a} and {b} are of other activations: {difference}", file=sys.stderr)
            return


def _warn_of_copies(dictionaries: Mapping[str, Dictionary]) -> None:
    """Print a warning for every two dictionaries with equal directions, by their places."""
    import torch

    for (a, one), (b, other) in itertools.combinations(dictionaries.items(), 2):
        if torch.equal(one.directions, other.directions):
            text = f"warning: {a} and {b} are one dictionary: their decoder rows are equal"
            print(text, file=sys.stderr)


def _write(config: CompareConfig, comparison: Comparison) -> None:
    if config.out is None:
        return
    from sae_fast.atomic_files import write_json, write_text
    from sae_fast.report.comparison_page import comparison_page
    from sae_fast.report.overlap import draw_overlap
    from sae_fast.report.page import REPORT
    from sae_fast.training.history import read_history

    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    figures = {"cosine": "absolute" if config.absolute else "signed", **comparison.to_dict()}
    places = dict(zip(comparison.names, map(str, config.saes), strict=True))
    for dictionary in figures["dictionaries"]:
        dictionary["path"] = places[dictionary["name"]]
    write_json(out / "compare.json", figures)
    write_json(out / "latents.json", comparison.latents())
    texts = {"compare.md": f"{comparison.table()}\n", "latents.csv": comparison.latents_csv()}
    for name, text in texts.items():
        write_text(out / name, text)
    runs = {}
    for name, place in zip(comparison.names, config.saes, strict=True):
        with suppress(OSError, ValueError):  # only a run has a history
            runs[name] = read_history(place).rows
    picture = draw_overlap(comparison, out / "compare.png")
    report = comparison_page(comparison, picture.read_bytes(), runs).write(out / REPORT)
    print(out)
    print(f"report: {report}")


if __name__ == "__main__":
    sys.exit(run_command(main))
