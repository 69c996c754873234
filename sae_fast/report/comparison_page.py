"""The report of a comparison of dictionaries: what they share, and how exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sae_fast import __version__
from sae_fast.evaluation.comparison import Comparison
from sae_fast.evaluation.dictionary import sampled_cosines
from sae_fast.report.charts import Series
from sae_fast.report.page import Page, Row
from sae_fast.report.panels import Row as MetricsRow
from sae_fast.report.run_charts import cosine_chart, curves, evaluated, front_chart

_DEFINITIONS = {
    "PW-MCC": "mean cosine of the latents that are matched one to one (arXiv:2505.20254)",
    "shared": "share of a dictionary's latents whose partner has a cosine of at least this",
}
_MOST_CHARTS = 12  # pairs, and dictionaries, whose cosines are drawn
_CURVES = 4  # charts of trainings


def comparison_page(
    comparison: Comparison, picture: bytes, runs: Mapping[str, Sequence[MetricsRow]]
) -> Page:
    """Return the report of a comparison.

    Args:
        comparison: of two dictionaries or more.
        picture: the heatmaps, a PNG.
        runs: by the name of a dictionary that was read from a run, the rows of its metrics.jsonl.
    """
    names = comparison.names
    sizes = ", ".join(f"{name}: {d.d_sae:,} latents" for name, d in comparison.dictionaries.items())
    page = Page(f"Comparison of {len(names)} dictionaries", [sizes, f"sae_fast {__version__}"])
    page.heading("Shared latents")
    rows = [Row("mean PW-MCC", (f"{comparison.mean_pw_mcc():.4f}",), _DEFINITIONS["PW-MCC"])]
    for name in names:
        for threshold in comparison.thresholds:
            share = comparison.shared_by_all(name, threshold)
            text = f"latents of {name} with such a partner in every other dictionary"
            rows.append(Row(f"shared by all at {threshold:g}: {name}", (f"{share:.2%}",), text))
    page.table(["figure", "value"], rows)
    page.heading("Pairs")
    headings = ["pair", "PW-MCC"]
    headings += [f"{side} shared at {t:g}" for t in comparison.thresholds for side in ("a", "b")]
    lines = []
    for pair in comparison.pairs:
        shares = [
            f"{comparison.shared(one, other, threshold):.2%}"
            for threshold in comparison.thresholds
            for one, other in ((pair.a, pair.b), (pair.b, pair.a))
        ]
        cells = (f"{pair.matching.mean():.4f}", *shares)
        lines.append(Row(f"a: {pair.a}, b: {pair.b}", cells))
    page.table(headings, lines)
    page.paragraph(f"shared: {_DEFINITIONS['shared']}")
    page.heading("Matched cosines")
    page.charts(
        cosine_chart(
            comparison.partners(pair.a, pair.b)[1],
            f"{pair.a} and {pair.b}",
            "cosine of a latent and its partner",
            "latents without a partner are left out",
        )
        for pair in comparison.pairs[:_MOST_CHARTS]
    )
    page.heading(
        "Largest cosines",
        "Of a latent with the other latents of its dictionary.",
    )
    page.charts(
        cosine_chart(sampled_cosines(dictionary.directions), name)
        for name, dictionary in list(comparison.dictionaries.items())[:_MOST_CHARTS]
    )
    if runs:
        page.heading("Trainings", "What the trainings of these dictionaries logged.")
        evaluations = {name: evaluated(rows) for name, rows in runs.items()}
        series = [Series(found, name, "points") for name, found in evaluations.items() if found]
        charts = [front_chart(series, "a point for each evaluation on held-out rows")]
        page.charts([*(charts if series else []), *curves(runs)[:_CURVES]])
    page.heading("Overview")
    page.picture(picture, "Heatmaps of the figures, and how the matched cosines are distributed.")
    return page
