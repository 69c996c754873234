"""The pages of latents against plain dense computations in float64, on small shards."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from sae_fast import SparseAutoencoder
from sae_fast.activations import ShardError, open_shards, write_shard
from sae_fast.config import SAEConfig
from sae_fast.evaluation.code_store import CodeStore
from sae_fast.evaluation.contexts import TOP
from sae_fast.evaluation.latents import PageSettings, make_pages
from sae_fast.evaluation.neighbours import top_columns
from sae_fast.evaluation.text_rows import TextRows

D_IN, D_SAE, K = 6, 24, 3
LENGTHS = ((40, 3, 11), (7, 55))  # rows of the documents of each shard
SETTINGS = PageSettings(
    contexts=3, context_tokens=8, intervals=3, samples=2, bins=5, neighbours=4, cofiring_rows=10**6
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Write two shards of several documents with repeated rows, so that activations are equal."""
    directory = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(5)
    document = 0
    for number, lengths in enumerate(LENGTHS):
        rows = torch.randn(sum(lengths), D_IN, generator=generator).half().float()
        rows[5] = rows[30]
        rows[6] = rows[2]
        doc_id = torch.cat([torch.full((n,), document + i) for i, n in enumerate(lengths)])
        position = torch.cat([torch.arange(n) for n in lengths])
        token_ids = torch.randint(0, 50, (sum(lengths),), generator=generator)
        document += len(lengths)
        columns = {"doc_id": doc_id, "position": position, "token_ids": token_ids}
        write_shard(directory / f"train_{number:02d}.h5", rows, **columns)
    return open_shards(directory)


def make_sae(arch="topk", **settings):
    config = SAEConfig(arch=arch, d_in=D_IN, d_sae=D_SAE, **settings)
    sae = SparseAutoencoder(config)
    sae.initialize_(torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.b_enc[7] = -100  # never fires
        sae.b_enc[8] = -1.5  # fires rarely
        sae.W_dec[9] = sae.W_dec[10]  # equal cosines
        sae.W_enc[11] = sae.W_enc[10]
    return sae.eval()


def pages_of(sae, shards, place, block_rows=16, settings=SETTINGS, max_rows=None):
    place.mkdir(exist_ok=True)
    text = TextRows(shards, settings.context_tokens, max_rows)
    store = CodeStore(place, sae, text, block_rows)
    return make_pages(store, sae.W_dec, settings), text


@pytest.fixture(scope="module")
def plain(shards):
    """Return all rows as the shards hold them, their columns, and their dense code in float64."""
    x, doc, token = [], [], []
    for shard in shards.shards:
        import h5py

        with h5py.File(shard.path) as file:
            x.append(torch.from_numpy(file["activations"][:]).double())
            doc += file["doc_id"][:].tolist()
            token += file["token_ids"][:].tolist()
    sae = make_sae("topk", k=K)
    x = torch.cat(x)
    pre = (x - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    code = torch.zeros_like(pre)
    # float32 decides ties between equal latents as the lower index, float64 does as well
    order = torch.sort(pre, dim=1, descending=True, stable=True).indices[:, :K]
    code.scatter_(1, order, pre.gather(1, order).clamp_min(0))
    return code.detach(), doc, token


@pytest.fixture(scope="module")
def pages(shards, tmp_path_factory):
    return pages_of(make_sae("topk", k=K), shards, tmp_path_factory.mktemp("codes"))[0]


def test_firing_rates_largest_and_mean_are_those_of_the_dense_code(pages, plain):
    code, _, _ = plain
    fires = code > 0
    assert pages.rows == len(code) == sum(map(sum, LENGTHS))
    assert pages.fired.tolist() == fires.sum(0).tolist()
    assert pages.fired[7] == 0
    np.testing.assert_allclose(pages.largest, code.amax(0), rtol=1e-5)
    mean = code.sum(0) / fires.sum(0).clamp_min(1)
    np.testing.assert_allclose(pages.mean, mean, rtol=1e-5, atol=1e-9)


def test_histograms_count_every_activation_once(pages, plain):
    code, _, _ = plain
    for latent in range(D_SAE):
        values = code[:, latent][code[:, latent] > 0].numpy()
        edges = np.linspace(0, max(values.max(initial=0), 1e-9), SETTINGS.bins + 1)
        assert pages.histogram[latent].tolist() == np.histogram(values, edges)[0].tolist()


def expected_contexts(values, doc):
    """Return the rows of the top contexts of one latent by plain loops over lists."""
    peaks = []
    for document in dict.fromkeys(doc):
        rows = [row for row, owner in enumerate(doc) if owner == document]
        for start in range(0, len(rows), SETTINGS.context_tokens):
            cell = rows[start : start + SETTINGS.context_tokens]
            best = max(cell, key=lambda row: (values[row], -row))
            if values[best] > 0:
                peaks.append(best)
    peaks.sort(key=lambda row: (-values[row], row))
    chosen = []
    for row in peaks:
        near = [
            other
            for other in chosen
            if doc[other] == doc[row] and abs(other - row) < SETTINGS.context_tokens
        ]
        if not near:
            chosen.append(row)
    return chosen[: SETTINGS.contexts]


def test_top_contexts_are_the_largest_peaks_that_are_apart(pages, plain):
    code, doc, _ = plain
    values = code.float().double()
    for latent in range(D_SAE):
        found = [
            int(pages.contexts.rows[piece])
            for piece in pages.contexts.of(latent)
            if pages.contexts.intervals[piece] == TOP
        ]
        assert found == expected_contexts(values[:, latent].tolist(), doc), latent


def test_contexts_hold_the_value_of_every_token_and_stay_in_their_document(pages, plain):
    code, doc, _ = plain
    contexts, shown = pages.contexts, set()
    for piece in range(len(contexts.rows)):
        row, latent = int(contexts.rows[piece]), int(contexts.latents[piece])
        rows = range(int(contexts.begins[piece]), int(contexts.ends[piece]))
        assert row in rows
        assert {doc[other] for other in rows} == {doc[row]}
        before, after = row - rows.start, rows.stop - 1 - row
        assert before == 5 or rows.start == doc.index(doc[row])
        last = len(doc) - doc[::-1].index(doc[row])
        assert after == 2 or rows.stop == last
        wanted = {n: float(code[r, latent]) for n, r in enumerate(rows) if code[r, latent] > 0}
        assert contexts.entries(piece) == pytest.approx(wanted, rel=1e-5)
        if contexts.intervals[piece] == TOP:
            assert not shown & {(latent, other) for other in rows}, "contexts overlap"
            shown |= {(latent, other) for other in rows}


def test_samples_are_of_their_interval_and_as_many_as_there_are(pages, plain):
    code, _, _ = plain
    contexts = pages.contexts
    drawn = {}
    for piece in np.flatnonzero(contexts.intervals != TOP):
        key = int(contexts.latents[piece]), int(contexts.intervals[piece])
        drawn.setdefault(key, []).append(int(contexts.rows[piece]))
    for latent in range(D_SAE):
        values = code[:, latent]
        share = values / values.max().clamp_min(1e-9)
        interval = (share * SETTINGS.intervals).long().clamp_max(SETTINGS.intervals - 1)
        for number in range(SETTINGS.intervals):
            inside = set(((interval == number) & (values > 0)).nonzero().flatten().tolist())
            rows = drawn.get((latent, number), [])
            assert len(rows) == min(SETTINGS.samples, len(inside))
            assert len(set(rows)) == len(rows)
            assert set(rows) <= inside


def test_other_seeds_draw_other_samples(pages, shards, tmp_path):
    other, _ = pages_of(
        make_sae("topk", k=K), shards, tmp_path / "codes", settings=replace(SETTINGS, seed=1)
    )
    assert sorted(other.contexts.rows) != sorted(pages.contexts.rows)


def test_cofiring_neighbours_are_the_largest_correlations(pages, plain):
    code, _, _ = plain
    fires = (code > 0).double()
    assert pages.cofiring_rows == len(code)
    assert pages.cofiring_fired.tolist() == pages.fired.tolist()
    together = fires.T @ fires
    mean = fires.mean(0)
    covariance = together / len(code) - mean[:, None] * mean
    deviation = (mean * (1 - mean)).sqrt()
    phi = covariance / (deviation[:, None] * deviation).clamp_min(1e-12)
    for latent in range(D_SAE):
        others = [j for j in range(D_SAE) if j != latent and phi[latent, j] > 1e-6]
        others.sort(key=lambda j: (-np.float32(phi[latent, j].item()), j))
        count = min(len(others), SETTINGS.neighbours)
        values = [phi[latent, j].item() for j in others[:count]]
        np.testing.assert_allclose(pages.cofiring_phi[latent, :count], values, atol=1e-6)
        for place, other in enumerate(pages.cofiring_latents[latent]):
            if place >= count:
                assert other == -1
            else:
                assert phi[latent, other] == pytest.approx(values[place], abs=1e-6)
                assert pages.cofiring_counts[latent, place] == together[latent, other]


@pytest.mark.parametrize("name", ["token_ids", "doc_id", "position"])
def test_numbers_beside_the_rows_that_are_not_whole_are_refused(tmp_path, name):
    path = tmp_path / "train.h5"
    with h5py.File(path, "w") as file:
        file["activations"] = np.ones((9, 4), np.float32)
        file[name] = np.full(9, 0.5)
    with pytest.raises(ShardError) as refusal:
        TextRows(open_shards([path], verify=False), 4)
    assert str(refusal.value) == f"{path}: {name} holds float64; whole numbers are needed"


def test_tokens_of_some_shards_only_are_warned_of(tmp_path, caplog):
    position = torch.arange(9)
    write_shard(tmp_path / "train_0.h5", torch.eye(9), position=position, token_ids=position)
    write_shard(tmp_path / "train_1.h5", torch.eye(9) + 1, position=position)
    text = TextRows(open_shards(tmp_path, verify=False), 4)
    assert set(text.columns) == {"position"}
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'train_1.h5'}: no token_ids, which other shards have: it is left out"
    ]


def test_decoder_neighbours_are_the_largest_cosines_equal_ones_by_number(pages):
    rows = make_sae("topk", k=K).W_dec.detach().double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    cosines = rows @ rows.T
    cosines.fill_diagonal_(-2)
    for latent in range(D_SAE):
        order = torch.sort(cosines[latent], descending=True, stable=True)
        np.testing.assert_allclose(
            pages.decoder_cosines[latent], order.values[: SETTINGS.neighbours], atol=1e-6
        )
        assert len(set(pages.decoder_latents[latent]) - {latent}) == SETTINGS.neighbours
    # Latents 9 and 10 are equally near to every other latent.
    assert pages.decoder_latents[9][0] == 10
    assert pages.decoder_latents[10][0] == 9
    for latent in set(range(D_SAE)) - {9, 10}:
        found = pages.decoder_latents[latent].tolist()
        if 9 in found and 10 in found:
            assert found.index(10) == found.index(9) + 1
        assert not (10 in found and 9 not in found)


def flat(pages):
    parts = {**vars(pages), **vars(pages.contexts)}
    return {name: value for name, value in parts.items() if isinstance(value, np.ndarray)}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["topk", "batch_topk", "relu", "jumprelu"])
def test_blocks_of_any_size_give_the_same_bits(arch, shards, tmp_path):
    sae = make_sae(arch, **({"k": K} if "topk" in arch else {}))
    if arch == "batch_topk":
        sae.threshold.fill_(0.5)
        sae.threshold_updates.fill_(1)
    wanted = flat(pages_of(sae, shards, tmp_path / "0")[0])
    for number, rows in enumerate((16, 1, 37, 1000), 1):
        found = flat(pages_of(sae, shards, tmp_path / str(number), rows)[0])
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{name}, {rows} rows")


def test_codes_that_are_there_are_not_encoded_again_and_damaged_ones_are(shards, tmp_path):
    sae = make_sae("topk", k=K)
    wanted = flat(pages_of(sae, shards, tmp_path)[0])
    files = sorted(tmp_path.iterdir())
    assert len(files) > 5
    files[1].unlink()
    files[3].write_bytes(files[3].read_bytes()[:100])
    before = files[0].stat().st_mtime_ns
    found = flat(pages_of(sae, shards, tmp_path)[0])
    assert sorted(tmp_path.iterdir()) == files
    assert files[0].stat().st_mtime_ns == before
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_max_rows_takes_the_first_rows(shards, plain, tmp_path):
    code, _, _ = plain
    pages, _ = pages_of(make_sae("topk", k=K), shards, tmp_path, max_rows=58)
    assert pages.rows == 58
    assert pages.fired.tolist() == (code[:58] > 0).sum(0).tolist()
    assert pages.contexts.ends.max() <= 58


def test_rows_that_are_left_out_are_in_no_context(plain, tmp_path):
    rows = torch.randn(60, D_IN, generator=torch.Generator().manual_seed(1))
    rows[20] = torch.inf
    import h5py

    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["activations"] = rows.numpy()
        file["doc_id"] = np.zeros(60, np.int32)
        file["position"] = np.arange(60, dtype=np.int32)
    shards = open_shards(tmp_path, skip_nonfinite=True)
    pages, text = pages_of(make_sae("topk", k=K), shards, tmp_path / "codes")
    assert pages.rows == 59
    contexts = pages.contexts
    assert not ((contexts.begins <= 20) & (contexts.ends > 20)).any()
    assert text.numbers("token_ids", np.arange(3)).tolist() == [-1] * 3


def test_equal_scores_are_ordered_by_column():
    scores = torch.randint(-2, 3, (200, 12), generator=torch.Generator().manual_seed(0)) / 2
    scores[0] = -0.0
    scores[0, 5] = 0.0
    values, columns = top_columns(scores, 4)
    wanted = scores.double().sort(dim=1, descending=True, stable=True)
    assert columns.tolist() == wanted.indices[:, :4].tolist()
    assert values.tolist() == wanted.values[:, :4].tolist()
