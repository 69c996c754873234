"""Reports in one file: what they show, that they load nothing, and a browser's view of them."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluation.comparison import compare
from sae_fast.evaluation.concepts import ConceptPass
from sae_fast.evaluation.core import LOG_DENSITIES, core_metrics
from sae_fast.evaluation.dictionary import dictionary_metrics
from sae_fast.evaluation.excerpts import AFTER, BEFORE, excerpts
from sae_fast.evaluation.sampled_latents import SampledLatents
from sae_fast.report.charts import Chart, Series
from sae_fast.report.comparison_page import comparison_page
from sae_fast.report.evaluation import Evaluation
from sae_fast.report.evaluation_page import evaluation_page
from sae_fast.report.page import Page, Row
from sae_fast.report.run_charts import cosine_chart, density_chart, density_counts, front_chart
from sae_fast.report.training_page import LatentFigures, training_page
from sae_fast.training.metrics import ROW_NAMES

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = "<img src=x onerror=alert(1)>"
ROWS = [
    {"step": n, "tokens": 100 * n, "loss": 5 / n, "fvu": 1 / n, "l0": 8.0, "dead_fraction": 0.0}
    | ({"heldout_fvu": 1.1 / n, "heldout_l0": 9.0 - n / 10} if n % 2 == 0 else {})
    for n in range(1, 11)
]


def _evaluation(name: str = "first", training: Sequence[Any] = ()) -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(d_in=8, d_sae=24, k=3)).eval()
    sae.initialize_(generator)
    rows = torch.randn(200, 8, generator=generator)
    columns = {"token_ids": torch.arange(200) % 6, "doc_id": torch.arange(200) // 50}
    watch = ConceptPass(24, columns, None, top=4, probe_rows=0)
    found = Evaluation(name, sae, "place", {"rows": 200}, training=training)
    found.add_core(core_metrics(sae, rows.split(64), watch=watch))
    found.add_concepts(watch.result(), {1: " the", 2: HOSTILE, 3: "line\n"})
    section, latents = dictionary_metrics(sae)
    found.add({"misc_metrics": section})
    found.latents |= latents
    return found


def _loads_nothing(html: str) -> None:
    assert "default-src 'none'" in html
    assert "<script" not in html
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    assert "url(" not in html


def test_the_report_of_an_evaluation_has_figures_charts_and_contexts() -> None:
    html = evaluation_page([_evaluation(training=ROWS), _evaluation("second")]).html()
    _loads_nothing(html)
    assert "<code>explained_variance</code><small>1 − Σ |e|² / Σ |y − mean(y)|²" in html
    assert html.count("<svg") == 1 + 2 * 2 + 4
    assert HOSTILE not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "line↵" in html
    for heading in ("Latents at a glance", "Metrics", "Top latents, second", "Training"):
        assert f">{heading}</h2>" in html


def test_excerpts_stay_within_the_document_and_begin_with_the_strongest() -> None:
    evaluation = _evaluation()
    concepts = evaluation.concepts
    purity = concepts.purity["token"]
    tokens, documents = concepts.columns["token_ids"], concepts.columns["doc_id"]
    for latent in range(24):
        found = excerpts(purity, latent, concepts.columns, {}, 9)
        values = [item.activation for item in found]
        assert values == sorted(values, reverse=True)
        if values:
            largest = float(evaluation.latents["max_activation"][latent])
            assert values[0] == pytest.approx(largest, rel=1e-6)
        for item, row in zip(found, purity.strongest[latent].tolist(), strict=False):
            first = row - item.place
            last = first + len(item.texts)
            assert item.texts == [f" {token}" for token in tokens[first:last].tolist()]
            assert len(documents[first:last].unique()) == 1
            begins = first == 0 or documents[first - 1] != documents[row]
            ends = last == 200 or documents[last] != documents[row]
            assert begins or item.place == BEFORE
            assert ends or last - row - 1 == AFTER


def test_the_report_of_a_training_has_its_figures_curves_and_settings() -> None:
    summary = {"steps": 10, "tokens": 1000, "seconds": 2.0, "warnings": ["<b>careful</b>"]}
    summary |= {"final_heldout_fvu": 0.11, "final_loss": 0.5, "final_l1_loss": 0.0}
    evaluation = _evaluation()
    texts = {1: " the", 2: HOSTILE}
    sample = SampledLatents(200, evaluation.latents, evaluation.concepts, texts)
    figures = LatentFigures(torch.rand(50), torch.rand(50), sample)
    page = training_page("a run", ROWS, summary, {"sae": {"k": 3, "d_out": None}}, figures)
    html = page.html()
    _loads_nothing(html)
    assert "Warning: &lt;b&gt;careful&lt;/b&gt;" in html
    assert html.index("heldout_fvu</code>") < html.index("<code>loss</code>")
    assert "l1_loss" not in html
    assert "<code>k</code>" in html
    assert "d_out" not in html
    assert html.count("<svg") >= 4 + 3
    assert "Top latents on 200 held-out rows" in html
    assert html.count('<div class="latent">') == 12
    assert "&lt;img src=x onerror=alert(1)&gt;" in html


def test_every_figure_of_a_training_has_a_definition() -> None:
    axis = {"step", "tokens", "epoch"}
    heldout = ("fvu", "ordinary_fvu", "explained_variance_overall", "l0", "ce", "ce_model", "kl")
    names = {*SAEConfig().term_coefficients, *ROW_NAMES, "mean_threshold", "objective"} - axis
    names |= {f"heldout_{name}" for name in heldout} | {"averaged_heldout_fvu"}
    summary = {"steps": 1, "tokens": 1, "seconds": 1.0, "warnings": []}
    summary |= {f"final_{name}": 1.0 for name in names}
    html = training_page("a run", ROWS, summary, {}, LatentFigures(None, torch.rand(5))).html()
    assert set(re.findall(r"<code>(\w+)</code><small>[^<]+<", html)) == names


def test_the_report_of_a_comparison_has_its_pairs_and_the_heatmap() -> None:
    torch.manual_seed(0)
    a = torch.randn(12, 6)
    comparison = compare({"a": a, "b": a + 0.3 * torch.randn(12, 6)})
    html = comparison_page(comparison, b"PNG", {"a": ROWS}).html()
    _loads_nothing(html)
    assert f"{comparison.mean_pw_mcc():.4f}" in html
    assert 'src="data:image/png;base64,UE5H"' in html
    for heading in ("Matched cosines", "Largest cosines", "Trainings"):
        assert f">{heading}</h2>" in html
    assert html.count("<svg") == 1 + 2 + 1 + 4


def test_charts_place_numbers_where_they_are() -> None:
    linear = Chart("t", "x", "y", [Series([(0.0, 0.0), (10.0, 100.0)])]).svg()
    # 3 % of the axis is left at both ends: of 354 and 200 units.
    assert f'd="M{54 + 354 * 0.03 / 1.06:.1f} {210 - 200 * 0.03 / 1.06:.1f}L' in linear
    assert ">100</text>" in linear
    points = [(1.0, 1.0), (1000.0, 2.0)]
    logarithmic = Chart("t", "x", "y", [Series(points)], may_be_logarithmic=(True, True)).svg()
    assert ">10</text>" in logarithmic
    constant = Chart("t", "x", "y", [Series([(1.0, 5.0), (2.0, 5.0)])]).svg()
    assert "nan" not in constant
    single = Chart("t", "x", "y", [Series([(0.0, 0.0)])]).svg()
    assert "<circle" in single


def test_long_numbers_keep_clear_of_the_name_of_their_axis() -> None:
    def begin_of_numbers(points: list[tuple[float, float]]) -> list[float]:
        html = Chart("t", "x", "FVU", [Series(points, "a", "points")]).svg()
        numbers = re.findall(r'<text x="(\d+)" y="[\d.]+" text-anchor="end">([^<]+)<', html)
        return [int(end) - 6.5 * len(text) for end, text in numbers]

    assert min(begin_of_numbers([(32, 0.25722), (32, 0.25756)])) > 14
    assert min(begin_of_numbers([(32, 0.2), (32, 0.3)])) > 14
    assert min(begin_of_numbers([(32, 1234567.0), (32, 1234577.0)])) > 14


def test_points_without_a_value_are_left_out() -> None:
    series = Series([(1.0, float("nan")), (2.0, 3.0)], kind="points", names=["a", "b"])
    chart = Chart("t", "x", "y", [series]).svg()
    assert chart.count("<circle") == 1
    assert "<title>b</title>" in chart
    nothing = front_chart([Series([(1.0, float("nan"))], kind="points")], "")
    assert nothing.svg() == '<p class="soft">There is no value to draw.</p>'


def test_histograms_count_every_latent() -> None:
    rates = torch.tensor([1.0, 0.5, 1e-3, 0.0, 1e-9])
    counts = density_counts(rates)
    assert sum(counts) == 4
    assert len(counts) == len(LOG_DENSITIES) - 1
    heights = [height for _, height in density_chart(counts, "t").series[0].points]
    assert sum(heights) == 4
    cosines = cosine_chart(torch.tensor([-0.2, 0.3, 1.0, torch.nan]), "t")
    assert sum(height for _, height in cosines.series[0].points) == 3


def test_the_front_is_the_line_that_no_point_surpasses() -> None:
    chart = front_chart([Series([(1.0, 0.5), (2.0, 0.6)]), Series([(3.0, 0.2)])], "")
    assert chart.series[-1].points == [(1.0, 0.5), (3.0, 0.2)]
    assert chart.series[-1].kind == "line"
    alone = front_chart([Series([(1.0, 0.5)], kind="points")], "")
    assert len(alone.series) == 1


def test_an_axis_has_the_digits_that_tell_its_numbers_apart() -> None:
    def texts(low: float, high: float) -> list[str]:
        svg = Chart("t", "x", "y", [Series([(low, 0.0), (high, 1.0)])]).svg()
        return re.findall(r'y="226" text-anchor="middle">([^<]*)<', svg)

    assert texts(31.95, 32.05) == ["31.95", "32.00", "32.05"]
    assert texts(0.4578, 0.4578 + 1e-8) == ["0.4574", "0.4576", "0.4578", "0.4580", "0.4582"]
    assert texts(0.0, 60_000.0) == ["0", "20k", "40k", "60k"]
    assert texts(10_000.0, 10_200.0) == ["10.00k", "10.05k", "10.10k", "10.15k", "10.20k"]
    assert texts(1e-5, 4e-5) == ["1e-5", "2e-5", "3e-5", "4e-5"]
    for low, high in ((1e-5, 1.1e-5), (0.43, 0.44), (-3.0, -1.0), (1e6, 1.001e6)):
        found = texts(low, high)
        assert len(set(found)) == len(found) >= 2


def test_checkpoints_of_a_run_have_one_colour_and_their_steps() -> None:
    checkpoints = [_evaluation(f"checkpoints-step-0000000{n}") for n in (1, 2)]
    for number, item in enumerate(checkpoints):
        item.place = f"runs/topk/checkpoints/step-0000000{number + 1}"
        item.metrics["sparsity"]["l0"] += 10 * number
    run = _evaluation("other", ROWS)
    html = evaluation_page([*checkpoints, run]).html()
    assert html.count('class="key rings"') == 2
    assert ">step 1</text>" in html
    assert ">step 2</text>" in html
    # The evaluations of a training have the colour of its dictionary.
    assert 'class="key points" style="color:var(--c1)"></span>other during its training' in html


def test_names_that_would_cover_each_other_are_left_out() -> None:
    points = [(0.0, 0.0), (0.01, 0.0), (1.0, 1.0)]
    series = Series(points, "all", "rings", ["first", "second", "third"], are_written=True)
    chart = Chart("t", "x", "y", [series]).svg()
    assert ">first</text>" in chart
    assert ">second</text>" not in chart
    assert "<title>second</title>" in chart
    assert ">third</text>" in chart


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_a_report_without_errors_or_requests(tmp_path: Path) -> None:
    path = evaluation_page([_evaluation(training=ROWS)]).write(tmp_path / "report.html")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    flags += (f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0")
    flags += (f"--log-net-log={tmp_path / 'net.json'}", "--window-size=390,800")
    assert BROWSER is not None
    shown = subprocess.run(
        [BROWSER, *flags, f"file://{path}"], capture_output=True, text=True, check=True, timeout=120
    )
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert shown.stdout.count("<svg") == path.read_text().count("<svg")
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown.stdout


def test_a_table_escapes_what_it_shows() -> None:
    page = Page("<t>", ["<l>"])
    page.heading("<h>", "<about>")
    page.table(["<a>", "<b>"], [Row("<n>", ("<c>",), "<d>")])
    html = page.html()
    for letter in ("t", "l", "h", "about", "a", "n", "c", "d"):
        assert f"&lt;{letter}&gt;" in html
    assert not re.search(r"<(t|l|n|d|about)>", html)
