"""The directory of the biographies.

biographies.json (people, answers, vocabulary, and what was measured), model/ (as transformers
writes it) and for every layer chosen layer_L/ with train_00.h5, heldout_00.h5 and manifest.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from sae_fast.activations import ShardMetadata, ShardWriter, write_manifest
from sae_fast.atomic_files import write_json
from sae_fast.ground_truth.biographies.language_model import BiographyModel
from sae_fast.ground_truth.biographies.text import Biographies, Sentence
from sae_fast.json_files import parse_json, read_regular

BIOGRAPHIES = "biographies.json"
MODEL = "model"
FORMAT_VERSION = 1
TRAIN, HELD_OUT = "train_00.h5", "heldout_00.h5"


def layer_directory(directory: Path, layer: int) -> Path:
    """Return the directory with the shards of a layer."""
    return directory / f"layer_{layer}"


def layer_of(path: Path) -> int | None:
    """Return the layer whose shards a directory holds, by its name."""
    match = re.fullmatch(r"layer_(\d+)", path.name)
    return None if match is None else int(match[1])


def prepare(directory: Path) -> None:
    """Make the directory; raise ValueError where it holds anything."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"out: {directory} is there already and not empty, name another")
    directory.mkdir(parents=True, exist_ok=True)


def save(directory: Path, model: BiographyModel, measured: dict[str, Any]) -> None:
    """Write the language model and what it knows."""
    model.save(directory / MODEL)
    content = {
        "format_version": FORMAT_VERSION,
        **model.biographies.to_dict(),
        "measured": measured,
    }
    write_json(directory / BIOGRAPHIES, content)


def load(directory: Path) -> BiographyModel:
    """Read the files that `save` wrote; raise OSError or ValueError, naming the file."""
    path = directory / BIOGRAPHIES
    try:
        content = parse_json(read_regular(path))
        version = content["format_version"]
        biographies = Biographies.from_dict(content)
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory}: no biographies, it has no {BIOGRAPHIES}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of biographies ({error!r})") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format version {version}, this release reads {FORMAT_VERSION}")
    return BiographyModel.load(directory / MODEL, biographies)


def write_shards(directory: Path, model: BiographyModel, layers: Sequence[int]) -> list[Path]:
    """Write the activations of these layers, one row a sentence; return their directories.

    A row has its labels/relation, labels/answer (among the answers of all relations),
    labels/entity and labels/template; doc_id is the number of the sentence, token_ids and position
    are of the last token of the prompt.
    """
    folders = [layer_directory(directory, layer) for layer in layers]
    for folder in folders:
        folder.mkdir()
    for name, heldout in ((TRAIN, False), (HELD_OUT, True)):
        sentences = model.biographies.sentences(heldout=heldout)
        with ExitStack() as stack:
            writers = {
                layer: stack.enter_context(
                    ShardWriter(folder / name, dtype="float32", metadata=_metadata(layer))
                )
                for layer, folder in zip(layers, folders, strict=True)
            }
            for layer, rows, columns in _rows(model, sentences, layers):
                labels = {key: columns[key] for key in ("relation", "answer", "entity", "template")}
                others = {key: columns[key] for key in ("token_ids", "doc_id", "position")}
                writers[layer].append(rows, labels=labels, **others)
    for folder in folders:
        write_manifest(folder)
    return folders


def _rows(
    model: BiographyModel, sentences: Sequence[Sentence], layers: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
    """Yield the activations [n, D] of one layer, and columns [n], part by part."""
    prompts = model.prompts(sentences)
    columns = {**label_columns(model.biographies, sentences), "position": prompts.last}
    columns["token_ids"] = prompts.tokens[torch.arange(len(prompts)), prompts.last]
    columns["doc_id"] = torch.arange(len(prompts))
    for part, by_layer in model.activations(prompts, layers):
        for layer, rows in by_layer.items():
            yield layer, rows, {key: column[part] for key, column in columns.items()}


def label_columns(
    biographies: Biographies, sentences: Sequence[Sentence]
) -> dict[str, torch.Tensor]:
    """Return what sentences are about, [N] int64 each: entity, relation, template, answer."""
    rows = [
        (
            item.entity,
            item.relation,
            item.template,
            biographies.answer_label(item.entity, item.relation),
        )
        for item in sentences
    ]
    names = ("entity", "relation", "template", "answer")
    return dict(zip(names, torch.tensor(rows).unbind(1), strict=True))


def _metadata(layer: int) -> ShardMetadata:
    return ShardMetadata(
        model="GPT-2 trained on synthetic biographies",
        hook=f"transformer.h.{layer}",
        layer=layer,
        tokenizer="words",
        dataset=BIOGRAPHIES,
        special_tokens="one row a prompt: its last token",
    )
