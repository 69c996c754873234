"""Pages of latents as Neuronpedia imports them: lines of JSON, a line for each latent and context.

    OUT/MODEL/LAYER-SET/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
    OUT/MODEL/LAYER-SET/features/batch-0.jsonl.gz …
    OUT/MODEL/LAYER-SET/activations/batch-0.jsonl.gz …

The fields are the ones that Neuronpedia's converter writes. A file has equal bytes whenever it is
written of equal pages: the numbers of contexts are hashes of their places.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sae_fast.atomic_files import replacing
from sae_fast.report.page_source import PageSource
from sae_fast.report.saedashboard import Dashboard

# The creator that Neuronpedia's own converter enters where no account is named.
CREATOR_ID = "clkht01d40000jv08hvalcvly"
_ID_LENGTH = 25
_COMPRESSION = 5  # as Neuronpedia's converter has it
_SAME = (  # fields that SAEDashboard and Neuronpedia have under one name
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
    *("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero"),
    *("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
)


def write_neuronpedia(
    dashboard: Dashboard, out: Path, check: Callable[[], object] = lambda: None
) -> Path:
    """Write the files of an import into a folder, which is made; return the folder of the source.

    Args:
        dashboard: the pages.
        out: the folder that holds the models.
        check: called after each file of latents; it may raise to stop.
    """
    source = dashboard.source
    folder = out / source.model_id / source.source_id
    for name in ("features", "activations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, line in _heads(dashboard).items():
        with replacing(folder / f"{name}.jsonl", flush=False) as temporary:
            temporary.write_text(json.dumps(line) + "\n", encoding="utf-8")
    for number, features in dashboard.batches():
        _write_lines(
            folder / "features" / f"batch-{number}.jsonl.gz",
            (_feature(source, feature) for feature in features),
        )
        _write_lines(
            folder / "activations" / f"batch-{number}.jsonl.gz",
            (
                _activation(source, feature["feature_index"], place, activation)
                for feature in features
                for place, activation in enumerate(feature["activations"])
            ),
        )
        check()
    return folder


def _heads(dashboard: Dashboard) -> dict[str, dict[str, Any]]:
    """Return the lines about release, model, set of sources, and source."""
    source = dashboard.source
    made = {"creatorId": CREATOR_ID, "createdAt": source.created, "visibility": "PUBLIC"}
    return {
        "release": {
            "name": source.release,
            "description": source.release,
            "descriptionShort": source.release,
            "urls": [],
            "creatorNameShort": source.creator,
            "creatorName": source.creator,
            "creatorEmail": None,
            "isNewUi": False,
            "featured": False,
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "defaultUmapSourceIds": [],
            **made,
        },
        "model": {
            "id": source.model_id,
            "instruct": source.model_id.endswith("-it"),
            "displayNameShort": source.model_id,
            "displayName": source.model_id,
            "tlensId": None,
            "dimension": None,
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "inferenceEnabled": False,
            "layers": 0,
            "neuronsPerLayer": 0,
            "owner": "",
            "website": None,
            "updatedAt": source.created,
            **made,
        },
        "sourceset": {
            "modelId": source.model_id,
            "name": source.set_name,
            "description": f"{source.hook}, {dashboard.pages.d_sae:,} latents",
            "creatorName": source.creator,
            "creatorEmail": None,
            "releaseName": source.release,
            "type": "",
            "urls": [],
            "hasDashboards": True,
            "defaultOfModelId": None,
            "defaultRange": 1,
            "defaultShowBreaks": True,
            "showDfa": False,
            "showCorrelated": False,
            "showHeadAttribution": False,
            "showUmap": False,
            **made,
        },
        "source": {
            "id": source.source_id,
            "modelId": source.model_id,
            "setName": source.set_name,
            "dataset": source.dataset,
            "num_prompts": dashboard.n_prompts,
            "num_tokens_in_prompt": dashboard.context_tokens,
            "notes": None,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "inferenceHosts": [],
            "saelensConfig": None,
            "saelensRelease": None,
            "saelensSaeId": None,
            "hfRepoId": None,
            "hfFolderId": None,
            "defaultOfModelId": None,
            "hasUmap": False,
            "hasUmapLogSparsity": False,
            "hasUmapClusters": False,
            **made,
        },
    }


def _feature(source: PageSource, feature: Mapping[str, Any]) -> dict[str, Any]:
    largest = max((max(one["values"]) for one in feature["activations"]), default=0.0)
    return {
        "modelId": source.model_id,
        "layer": source.source_id,
        "index": feature["feature_index"],
        "creatorId": CREATOR_ID,
        "createdAt": source.created,
        "maxActApprox": largest,
        "hasVector": True,
        "vector": feature["vector"],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": largest,
        "hookName": source.hook_name,
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
        "sourceSetName": None,
        **{name: feature[name] for name in _SAME},
    }


def _activation(
    source: PageSource, latent: int, place: int, activation: Mapping[str, Any]
) -> dict[str, Any]:
    values = activation["values"]
    largest = max(values)
    name = f"{source.model_id}/{source.source_id}/{latent}/{place}"
    return {
        "id": ("c" + hashlib.sha256(name.encode()).hexdigest())[:_ID_LENGTH],
        "tokens": activation["tokens"],
        "modelId": source.model_id,
        "layer": source.source_id,
        "index": latent,
        "maxValue": largest,
        "maxValueTokenIndex": values.index(largest),
        "minValue": min(values),
        "values": values,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "creatorId": CREATOR_ID,
        "createdAt": source.created,
        "lossValues": [],
        "logitContributions": None,
        "binContains": activation["bin_contains"],
        "binMax": activation["bin_max"],
        "binMin": activation["bin_min"],
        "qualifyingTokenIndex": activation["qualifying_token_index"],
        "dataIndex": None,
        "dataSource": None,
        "zIndices": None,
        "zValues": None,
    }


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    packed = gzip.compress(text.encode(), compresslevel=_COMPRESSION, mtime=0)
    with replacing(path, flush=False) as temporary:
        temporary.write_bytes(packed)
