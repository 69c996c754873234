"""The page that a repository of a dictionary shows: what it is, its figures, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sae_fast.markdown import markdown_table

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder


def model_card(
    sae: SparseAutoencoder, name: str, to: str, figures: Mapping[str, Any] | None = None
) -> str:
    """Return a page in Markdown with the head that the Hugging Face hub reads.

    Args:
        sae: the model.
        name: of the repository, owner/name, and the subfolder.
        to: the format of its files.
        figures: numbers and texts by name, such as the metrics of an evaluation.
    """
    config, origin = sae.config, sae.origin
    head: dict[str, Any] = {
        "library_name": "sae_lens" if to == "saelens" else "sae_fast",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability"],
    }
    if "model" in origin:
        head["base_model"] = origin["model"]
    place = " of ".join(str(origin[key]) for key in ("hook", "model") if key in origin)
    kind = "transcoder" if config.transcoder else "sparse autoencoder"
    facts: dict[str, Any] = {"architecture": config.arch, "d_in": config.d_in}
    if config.transcoder:
        facts["d_out"] = config.d_out
    facts["d_sae"] = config.d_sae
    if config.k is not None:
        facts["k"] = config.k
    if config.activation != "topk":
        facts["activation"] = config.activation
    facts |= _flat(origin)
    call = f'SparseAutoencoder.from_pretrained("{name}")'
    parts = [
        "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items()) + "\n---",
        f"# A {kind}{f' of {place}' if place else ''}",
        markdown_table(["what", "value"], [(key, str(value)) for key, value in facts.items()]),
    ]
    if figures:
        shown = [(key, _shown(value)) for key, value in figures.items()]
        parts += ["## Figures", markdown_table(["figure", "value"], shown)]
    parts += [
        "## Use",
        f"```python\nfrom sae_fast import SparseAutoencoder\n\nsae = {call}\n"
        "code = sae.encode(activations)  # raw activations of the hook point above\n```",
        "`expected_codes.safetensors` has rows with the codes that the files must give; "
        "`python -m sae_fast.verify DIR` compares them.",
    ]
    return "\n\n".join(parts) + "\n"


def _flat(origin: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return an origin in one level, with "target" before the names of targets."""
    facts: dict[str, Any] = {}
    for key, value in origin.items():
        if isinstance(value, dict):
            facts |= _flat(value, f"{before}target " if key == "targets" else before)
        else:
            facts[f"{before}{key}"] = value
    return facts


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
