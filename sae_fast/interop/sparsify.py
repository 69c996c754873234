"""sparsify: `cfg.json` and `sae.safetensors` in a directory for each hook point.

Rows of encoder.weight and W_dec are latents. ReLU stands before the selection of k, which gives the
same code as after it. b_dec is subtracted unless the dictionary is a transcoder.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sae_fast.interop.dictionary import PlainDictionary, with_subtraction
from sae_fast.interop.format import ORIGIN, OWN, PairOfFiles, Settings, refuse
from sae_fast.interop.hook_names import layer_of
from sae_fast.interop.tensor_file import open_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_UNIT = 1e-4  # how far the norm of a row may be from 1 and be called 1


class Sparsify(PairOfFiles):
    """Dictionaries of EleutherAI's sparsify."""

    name = "sparsify"
    title = "sparsify"
    can_write = True
    config, weights = CONFIG, WEIGHTS

    def read(self, place: Path) -> PlainDictionary:
        """Read a sparse autoencoder, transcoder or skip transcoder."""
        directory = self.directory_of(place)
        settings = Settings.read(directory / CONFIG)
        settings.must_be("activation", "topk", "groupmax", None)
        settings.must_be("signed", False, None, because="codes here are not signed by this setting")
        d_in, k = settings.needed_size("d_in"), settings.needed_size("k")
        d_sae = _d_sae(settings, d_in)
        is_transcoder = settings.flag("transcode", False)
        with open_tensors(directory / WEIGHTS) as file:
            dictionary = PlainDictionary(
                "topk",
                W_enc=file.read("encoder.weight", shape=(d_sae, d_in)),
                b_enc=file.read("encoder.bias", shape=(d_sae,)),
                W_dec=file.read("W_dec", shape=(d_sae, d_in)),
                b_dec=file.read("b_dec", shape=(d_in,)),
                W_skip=file.read("W_skip", shape=(d_in, d_in)) if "W_skip" in file else None,
                subtract_b_dec=not is_transcoder,
                transcoder=is_transcoder or "W_skip" in file,
                k=k,
                activation=settings.text("activation", "topk") or "topk",
                origin=_origin(directory) | settings.section(OWN).origin(ORIGIN),
            )
        # With a skip connection and without `transcode` b_dec is subtracted there.
        return with_subtraction(dictionary, False) if dictionary.transcoder else dictionary

    def write(self, dictionary: PlainDictionary, directory: Path) -> Path:
        """Write both files as version 1.3 does."""
        if dictionary.arch != "topk" or dictionary.activation not in ("topk", "groupmax"):
            what = f"arch {dictionary.arch}"
            if dictionary.arch == "topk":
                what = f"activation {dictionary.activation}"
            raise refuse(self, what, "it selects the k largest values of each token")
        if dictionary.d_out != dictionary.d_in:
            sizes = f"{dictionary.d_in} inputs and {dictionary.d_out} outputs"
            raise refuse(self, sizes, "both widths must be equal")
        dictionary = with_subtraction(dictionary, not dictionary.transcoder)
        norms = torch.linalg.vector_norm(dictionary.W_dec, dim=1)
        is_unit = bool(((norms - 1).abs() <= _UNIT).all())
        settings = {
            "activation": dictionary.activation,
            "expansion_factor": max(dictionary.d_sae // dictionary.d_in, 1),
            "normalize_decoder": is_unit,
            "num_latents": dictionary.d_sae,
            "k": dictionary.k,
            "multi_topk": False,
            "skip_connection": dictionary.W_skip is not None,
            "transcode": dictionary.transcoder,
            "d_in": dictionary.d_in,
            OWN: {ORIGIN: dictionary.origin},
        }
        tensors = {
            "encoder.weight": dictionary.W_enc,
            "encoder.bias": dictionary.b_enc,
            "W_dec": dictionary.W_dec,
            "b_dec": dictionary.b_dec,
        }
        if dictionary.W_skip is not None:
            tensors["W_skip"] = dictionary.W_skip
        return self.write_pair(directory, tensors, settings)


def _d_sae(settings: Settings, d_in: int) -> int:
    """Return num_latents, or where it is 0 the expansion factor times d_in."""
    if settings.value("num_latents") not in (None, 0):
        return settings.needed_size("num_latents")
    return d_in * settings.needed_size("expansion_factor")


def _origin(directory: Path) -> dict[str, str | int]:
    """Return the hook point, by which sparsify names the directory, or the directory above it."""
    name = directory.name
    if name.startswith("seed") and name[4:].isdigit():
        name = directory.parent.name
    layer = layer_of(name)
    return {} if layer is None else {"hook": name, "layer": layer}
