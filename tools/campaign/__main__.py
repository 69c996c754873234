"""Make many random tries to break sae_fast, in a checkout with its environment.

    python tools/campaign NAME                    the long form
    python tools/campaign NAME --short            the short form, which the tests run
    python tools/campaign NAME --tries 500 --seed 7
    python tools/campaign NAME --seed 7 --only 31 repeat one try by its number
    python tools/campaign --list

It prints how many tries ended with each outcome; the exit code is 1 if a try failed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[0:1] = [str(HERE.parent), str(HERE.parent.parent)]

from campaign.frame import Campaign, Failed, Report, run, temporary_folder  # noqa: E402

SHOWN = 20  # most failures printed


def main() -> int:
    """Run a campaign and print its outcomes; return 1 if a try failed."""
    names = sorted(path.stem for path in HERE.glob("*.py") if _is_campaign(path))
    parser = argparse.ArgumentParser(prog="python tools/campaign", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", choices=names)
    parser.add_argument("--list", action="store_true", help="print the names of all campaigns")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--tries", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    if given.list:
        print("\n".join(names))
        return 0
    if given.name is None:
        parser.error("a name is needed")
    campaign: Campaign = importlib.import_module(f"campaign.{given.name}").CAMPAIGN
    tries = given.tries or (campaign.short if given.short else campaign.tries)
    numbers = range(tries) if given.only is None else [given.only]
    start = time.monotonic()
    parent = Path(tempfile.gettempdir())
    with temporary_folder(parent, f"campaign-{given.name}-") as root:
        try:
            report = run(campaign, numbers, given.seed, root, sys.stderr)
        except Failed as failure:
            print(f"{given.name}: {failure}", file=sys.stderr)
            return 1
    _print(given.name, report, given.seed, time.monotonic() - start)
    return 1 if report.failures else 0


def _is_campaign(path: Path) -> bool:
    return "\nCAMPAIGN = " in path.read_text(encoding="utf-8")


def _print(name: str, report: Report, seed: int, seconds: float) -> None:
    passed, failed = report.outcomes.total(), len(report.failures)
    print(f"{name}: {passed + failed:,} tries with seed {seed} in {seconds:.0f} s")
    for outcome, count in report.outcomes.most_common():
        print(f"{count:8,}  {outcome}")
    for number, failure in sorted(report.failures.items())[:SHOWN]:
        print(f"try {number} (python tools/campaign {name} --seed {seed} --only {number}):")
        print("    " + "\n    ".join(failure.splitlines()))
    if failed > SHOWN:
        print(f"... and {failed - SHOWN} more")
    print(f"{passed} passed, {failed} failed")


if __name__ == "__main__":
    sys.exit(main())
