"""SAELens: `cfg.json` and `sae_weights.safetensors` in one directory.

Version 6 and the versions before it, which are told by `sae_lens_version`; with the training
checkpoints of its batchtopk and matryoshka. W_enc is [D, F]. A topk or batchtopk may select by
pre-activations times decoder norms (`rescale_acts_by_decoder_norm`).

Written are the plain inference forms, and in `metadata.sae_fast` the selection that they stand for,
so that reading them here gives the same dictionary again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.activations.capture.hooks import transformer_lens_name
from sae_fast.interop.dictionary import PlainDictionary, rescale_codes_
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import ORIGIN, OWN, PairOfFiles, Settings, refuse
from sae_fast.interop.hook_names import hook_named_by, origin
from sae_fast.interop.tensor_file import TensorFile, open_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_WRITTEN_VERSION = "6.54.12"  # whose layout is written
_ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "abstopk": "topk",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
# Normalisations of single tokens by their names there and here.
_TOKEN_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
# Settings of the activations by their names in an origin here, and there.
_SETTINGS = {
    "ctx_len": "context_size",
    "prepend_bos": "prepend_bos",
    "head": "hook_head_index",
}
_RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}  # since version 6


class SAELens(PairOfFiles):
    """Dictionaries of SAELens."""

    name = "saelens"
    title = "SAELens"
    can_write = writes_token_norm = True
    config, weights = CONFIG, WEIGHTS

    def read(self, place: Path) -> PlainDictionary:
        """Read a dictionary of version 6 or of an earlier one."""
        directory = self.directory_of(place)
        settings, metadata = _settings(directory / CONFIG)
        kind = settings.text("architecture", "standard")
        if kind not in _ARCHITECTURES:
            raise DictionaryError(
                f"{settings.path}: architecture {kind!r} has no counterpart here; there are "
                f"counterparts of {', '.join(_ARCHITECTURES)}"
            )
        token_norm, remarks = _normalization(settings, kind)
        with open_tensors(directory / WEIGHTS) as file:
            dictionary = _read(file, settings, kind)
        own = metadata.section(OWN)
        told = _origin(metadata, dictionary.transcoder) | own.origin(ORIGIN)
        dictionary = replace(_restored(dictionary, own), token_norm=token_norm)
        return replace(dictionary, origin=told, remarks=remarks)

    def write(self, dictionary: PlainDictionary, directory: Path) -> Path:
        """Write both files in the layout of version 6."""
        kind, threshold = self._kind(dictionary)
        tensors = {
            "W_enc": dictionary.W_enc.t(),
            "W_dec": dictionary.W_dec,
            "b_dec": dictionary.b_dec,
        }
        if kind == "gated":
            tensors["b_gate"] = dictionary.b_enc
            assert dictionary.r_mag is not None
            assert dictionary.b_mag is not None
            tensors |= {"r_mag": dictionary.r_mag, "b_mag": dictionary.b_mag}
        else:
            tensors["b_enc"] = dictionary.b_enc
        if threshold is not None:
            tensors["threshold"] = threshold
        if dictionary.W_skip is not None:
            tensors["W_skip"] = dictionary.W_skip
        hook = str(dictionary.origin.get("hook", ""))
        settings: dict[str, Any] = {
            "architecture": kind,
            "d_in": dictionary.d_in,
            "d_sae": dictionary.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": dictionary.subtract_b_dec,
            "normalize_activations": _normalization_of(dictionary),
            "reshape_activations": "hook_z" if hook.startswith("z.") else "none",
            "metadata": _metadata(dictionary),
        }
        if kind in ("topk", "abstopk"):
            settings |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
        if dictionary.transcoder:
            settings["d_out"] = dictionary.d_out
        return self.write_pair(directory, tensors, settings)

    def _kind(self, dictionary: PlainDictionary) -> tuple[str, Tensor | None]:
        """Return the architecture and the thresholds that express a dictionary."""
        arch, threshold = dictionary.arch, dictionary.threshold
        if not dictionary.use_relu:
            raise refuse(self, "codes without ReLU", "its activations are never negative")
        if arch in ("batch_topk", "matryoshka"):
            if threshold is None:
                raise refuse(
                    self, f"an untrained {arch}", "it selects by a threshold, set in training"
                )
            arch, threshold = "jumprelu", threshold.expand(dictionary.d_sae)
        if arch == "topk" and dictionary.activation == "groupmax":
            raise refuse(self, "activation groupmax", "it has no selection by groups")
        if dictionary.transcoder:
            if arch not in ("relu", "jumprelu"):
                raise refuse(self, f"a transcoder of arch {arch}", "it has relu and jumprelu")
            skip = "" if dictionary.W_skip is None else "skip_"
            return f"{'jumprelu_' if arch == 'jumprelu' else ''}{skip}transcoder", threshold
        if arch == "topk":
            return "topk" if dictionary.activation == "topk" else "abstopk", None
        return {"relu": "standard"}.get(arch, arch), threshold


def _settings(path: Path) -> tuple[Settings, Settings]:
    """Return the settings as version 6 names them, and the metadata."""
    settings = Settings.read(path)
    metadata = settings.section("metadata")
    version = settings.text("sae_lens_version") or metadata.text("sae_lens_version")
    if version is not None and _major(path, version) >= 6:
        return settings, metadata
    content = {_RENAMED.get(name, name): settings.value(name) for name in settings.names()}
    activation = content.get("activation_fn", "relu")
    given = settings.section("activation_fn_kwargs")
    if activation == "topk" and "k" in given:
        content |= {"architecture": "topk", "k": given.value("k")}
    elif activation not in ("relu", "topk", None):
        raise DictionaryError(f"{path}: activation_fn {activation!r} is not read")
    normalization = content.get("normalize_activations")
    if isinstance(normalization, bool):
        normalization = "expected_average_only_in" if normalization else "none"
        content["normalize_activations"] = normalization
    older = Settings(path, content)
    return older, older


def _major(path: Path, version: str) -> int:
    first = version.split(".")[0]
    if not first.isdigit() or len(first) > 4:
        raise DictionaryError(f"{path}: sae_lens_version {version[:40]!r} is no version")
    return int(first)


def _normalization(settings: Settings, architecture: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the normalisation of single tokens, and a remark on a scale that is not in the file.

    Raises DictionaryError for an unknown one, and for a transcoder's of single tokens.
    """
    kind = settings.text("normalize_activations", "none")
    if kind in _TOKEN_NORMS:
        if architecture.endswith("transcoder"):
            raise DictionaryError(
                f"{settings.path}: normalize_activations {kind!r} of a transcoder has no "
                "counterpart here"
            )
        return _TOKEN_NORMS[kind], ()
    if kind not in ("none", "expected_average_only_in", "covariance_whitening"):
        raise DictionaryError(f"{settings.path}: normalize_activations {kind!r} is not known")
    if kind == "none":
        return None, ()
    return None, (
        f"normalize_activations is {kind!r} in {settings.path}: the weights are taken as they are, "
        "as SAELens takes them; where its training has not folded the scale in, activations must "
        "be scaled first",
    )


def _normalization_of(dictionary: PlainDictionary) -> str:
    """Return the name that the normalisation of a dictionary has there."""
    names = {ours: theirs for theirs, ours in _TOKEN_NORMS.items()}
    return "none" if dictionary.token_norm is None else names[dictionary.token_norm]


def _read(file: TensorFile, settings: Settings, kind: str) -> PlainDictionary:
    d_in, d_sae = settings.needed_size("d_in"), settings.needed_size("d_sae")
    is_transcoder = kind.endswith("transcoder")
    d_out = settings.needed_size("d_out") if is_transcoder else d_in
    subtracts = not is_transcoder and settings.flag("apply_b_dec_to_input", True)
    tensors: dict[str, Any] = {
        "W_enc": file.read("W_enc", shape=(d_sae, d_in), transposed=True),
        "W_dec": file.read("W_dec", shape=(d_sae, d_out)),
        "b_dec": file.read("b_dec", shape=(d_out,)),
        "b_enc": file.read("b_gate" if kind == "gated" else "b_enc", shape=(d_sae,)),
    }
    if kind == "gated":
        tensors |= {name: file.read(name, shape=(d_sae,)) for name in ("r_mag", "b_mag")}
    if "jumprelu" in kind:
        tensors["threshold"] = _thresholds(file, d_sae)
    if kind in ("batchtopk", "matryoshka_batchtopk"):
        tensors["threshold"] = file.read("topk_threshold", shape=()).clamp_min(0)
    if "skip" in kind:
        tensors["W_skip"] = file.read("W_skip", shape=(d_out, d_in))
    arch, k = _ARCHITECTURES[kind], None
    if arch in ("topk", "batch_topk"):
        k = settings.needed_size("k")
    prefixes = None
    if kind == "matryoshka_batchtopk":
        prefixes, arch = _prefixes(settings, d_sae), "matryoshka"
    dictionary = PlainDictionary(
        arch,
        subtract_b_dec=subtracts,
        transcoder=is_transcoder,
        k=k,
        prefixes=prefixes,
        activation="abs_topk" if kind == "abstopk" else "topk",
        **tensors,
    )
    if arch in ("topk", "batch_topk", "matryoshka") and settings.flag(
        "rescale_acts_by_decoder_norm", False
    ):
        norms = torch.linalg.vector_norm(dictionary.W_dec, dim=1)
        dictionary = rescale_codes_(dictionary, norms.clamp_min(1e-8))
        if dictionary.threshold is not None:  # of the weighted values already
            dictionary = replace(dictionary, threshold=tensors["threshold"])
    return _with_factor(dictionary, file, settings)


def _with_factor(
    dictionary: PlainDictionary, file: TensorFile, settings: Settings
) -> PlainDictionary:
    """Return a dictionary whose codes are multiplied before decoding, as older files may ask."""
    names = ("finetuning_scaling_factor", "scaling_factor")
    if not any(name in file for name in names):
        return dictionary
    factor = file.read(*names, shape=(dictionary.d_sae,))
    if bool((factor == 1).all()):
        return dictionary
    if not settings.flag(names[0], False):
        raise DictionaryError(
            f"{file.path}: has factors for codes, and {settings.path} says by {names[0]} that they "
            "are not used"
        )
    return replace(dictionary, W_dec=dictionary.W_dec.mul_(factor[:, None]))


def _thresholds(file: TensorFile, d_sae: int) -> Tensor:
    if "threshold" not in file and "log_threshold" in file:
        return file.read("log_threshold", shape=(d_sae,)).exp()
    return file.read("threshold", shape=(d_sae,)).clamp_min(0)  # after ReLU nothing is below


def _prefixes(settings: Settings, d_sae: int) -> tuple[int, ...]:
    widths = settings.value("matryoshka_widths")
    known = isinstance(widths, list) and all(
        isinstance(width, int) and 0 < width <= d_sae for width in widths
    )
    if not known:
        raise DictionaryError(f"{settings.path}: matryoshka_widths must be a list of sizes")
    return tuple(sorted({*widths, d_sae}))


def _origin(metadata: Settings, is_transcoder: bool) -> dict[str, Any]:
    """Return the origin that the metadata of SAELens state."""
    model, excluded = metadata.text("model_name"), metadata.value("exclude_special_tokens")
    settings = {name: metadata.value(theirs) for name, theirs in _SETTINGS.items()}
    settings = {name: value for name, value in settings.items() if isinstance(value, int)}
    told = origin(
        model,
        metadata.text("hook_name"),
        revision=metadata.section("model_from_pretrained_kwargs").text("revision"),
        dataset=metadata.text("dataset_path"),
        special_tokens="excluded" if excluded else None if excluded is None else "kept",
        settings=settings or None,
    )
    if is_transcoder and metadata.text("hook_name_out"):
        told["targets"] = origin(model, metadata.text("hook_name_out"))
    return told


def _metadata(dictionary: PlainDictionary) -> dict[str, Any]:
    told = dictionary.origin
    metadata: dict[str, Any] = {
        "sae_lens_version": _WRITTEN_VERSION,
        "sae_lens_training_version": None,
        "model_name": told.get("model"),
        "hook_name": transformer_lens_name(hook) if (hook := hook_named_by(told)) else None,
        "dataset_path": told.get("dataset"),
    }
    if isinstance(settings := told.get("settings"), dict):
        metadata |= {
            theirs: settings[name] for name, theirs in _SETTINGS.items() if name in settings
        }
    targets = told.get("targets")
    if isinstance(targets, dict) and (hook := hook_named_by(targets)):
        metadata["hook_name_out"] = transformer_lens_name(hook)
    own: dict[str, Any] = {"arch": dictionary.arch, ORIGIN: told}
    if dictionary.k is not None:
        own["k"] = dictionary.k
    if dictionary.prefixes is not None:
        own["prefixes"] = list(dictionary.prefixes)
    metadata[OWN] = own
    return metadata


def _restored(dictionary: PlainDictionary, own: Settings) -> PlainDictionary:
    """Return the dictionary as it was before it was written, where the file says how."""
    arch, threshold = own.text("arch"), dictionary.threshold
    if arch not in ("batch_topk", "matryoshka") or dictionary.arch != "jumprelu":
        return dictionary
    if threshold is None or bool((threshold != threshold[0]).any()):
        return dictionary  # thresholds were changed since
    prefixes = own.value("prefixes") if arch == "matryoshka" else None
    if prefixes is not None:
        prefixes = _prefixes(Settings(own.path, {"matryoshka_widths": prefixes}), dictionary.d_sae)
    return replace(
        dictionary,
        arch=arch,
        k=own.needed_size("k"),
        threshold=threshold[0].clone(),
        prefixes=prefixes,
    )
