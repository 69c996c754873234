"""The table of formats in the documentation says what the tests of this folder show."""

from pathlib import Path

import pytest
from plain_models import KINDS
from test_foreign import FOREIGN, MADE, REFUSED, name_of, place_of
from test_writing import REFUSED as NOT_WRITTEN

from sae_fast import SparseAutoencoder, interop

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "convert.md"
if not PAGE.exists():
    pytest.skip("no checkout: the documentation is not installed", allow_module_level=True)
# The code that made the files of each folder of `foreign/`, or computed what is expected of them.
PROOF = {
    "saelens": "sae-lens 6.54.12",
    "sparsify": "eai-sparsify 1.3.3",
    "dictionary_learning": "dictionary-learning 0.1.0",
    "circuit_tracer": "circuit-tracer 0.5.0",
    "openai": "sparse_autoencoder of OpenAI",
    "openmoss": "llamascopium 2.0.0b34",
    "saev": "saev at 3d73f1f",
    "releases": "the loaders of sae-lens 6.54.12",
}


def described(config):
    """Return a kind of dictionary in words."""
    name = config.arch if config.activation == "topk" else config.activation
    if config.normalizes_tokens:
        name = f"{name} with {config.normalize_activations}"
    if config.skip_connection:
        return f"{name} skip transcoder"
    return f"{name} transcoder" if config.transcoder else name


def rows():
    """Return a row of the table for each format, from what is read and written."""
    read, proof = {}, {}
    for directory in MADE:
        if name_of(directory) in REFUSED:
            continue
        place = place_of(directory)
        known = interop.recognise(place)
        kind = described(SparseAutoencoder.from_pretrained(place).config)
        read.setdefault(known.name, set()).add(kind)
        proof[known.name] = PROOF[directory.relative_to(FOREIGN).parts[0]]
    for known in interop.FORMATS:
        written = "no"
        if known.can_write:
            names = [kind for kind in KINDS if kind not in NOT_WRITTEN[known.name]]
            written = ", ".join(name for name in names if "without" not in name)
        kinds = ", ".join(sorted(read[known.name]))
        yield f"| {known.title} | {kinds} | {written} | {proof[known.name]} |"


def test_the_table_is_what_is_read_and_written():
    table = list(rows())
    assert [line for line in PAGE.read_text().splitlines() if line in table] == table
