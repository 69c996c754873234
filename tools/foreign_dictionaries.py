"""Make dictionaries with the libraries themselves, for python_tests/interop, and check ours there.

Run in an environment that has the library of a group, with torch, for each group:

    python tools/foreign_dictionaries.py make GROUP python_tests/interop/foreign
    python tools/foreign_dictionaries.py check GROUP DIRECTORY

`make` writes small dictionaries of random weights with the library's own code, and beside each of
them `expected.safetensors` with rows x, the code and the reconstruction that the library computes.
`check` loads what `python_tests/interop/write_all.py DIRECTORY` wrote, with the library's own code,
and compares codes and reconstructions with the ones written there; it exits 1 where they differ.

Groups: saelens (with the releases that its loaders read), sparsify, dictionary_learning,
circuit_tracer, openai, openmoss, saev.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D_IN, D_SAE, N_ROWS, K = 8, 24, 6, 3
EXPECTED = "expected.safetensors"
CLOSE = 1e-5


def rows() -> Tensor:
    """Return the rows that are encoded."""
    return torch.randn(N_ROWS, D_IN) * 2 + 0.5


def keep(out: Path, x: Tensor, code: Tensor, x_hat: Tensor) -> None:
    """Write what a library computes of some rows."""
    parts = {"x": x, "code": code, "x_hat": x_hat}
    save_file({name: part.detach().float().contiguous() for name, part in parts.items()},
              out / EXPECTED)  # fmt: skip


def fill(module: torch.nn.Module) -> None:
    """Give all parameters of a module random values, and thresholds positive ones."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.4)
            if "threshold" in name:
                parameter.abs_()


# ---- SAELens, and the releases that it reads ------------------------------------------------


def make_saelens(out: Path) -> None:
    sae_lens = importlib.import_module("sae_lens")

    shared: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    metadata = {
        "model_name": "gpt2-small",
        "hook_name": "blocks.3.hook_resid_post",
        "dataset_path": "some/text",
    }
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "standard": ("StandardSAE", {}),
        "standard_without_subtraction": ("StandardSAE", {"apply_b_dec_to_input": False}),
        "topk": ("TopKSAE", {"k": K}),
        "topk_by_norms": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "abstopk": ("AbsTopKSAE", {"k": K}),
        "jumprelu": ("JumpReLUSAE", {}),
        "gated": ("GatedSAE", {}),
        "transcoder": ("Transcoder", {"d_out": D_IN + 2, "apply_b_dec_to_input": False}),
        "skip_transcoder": ("SkipTranscoder", {"d_out": D_IN, "apply_b_dec_to_input": False}),
        "jumprelu_transcoder": (
            "JumpReLUTranscoder",
            {"d_out": D_IN, "apply_b_dec_to_input": False},
        ),
        "jumprelu_skip_transcoder": (
            "JumpReLUSkipTranscoder",
            {"d_out": D_IN, "apply_b_dec_to_input": False},
        ),
    }
    for name, (kind, own) in cases.items():
        make: Any = getattr(sae_lens, f"{kind}Config")
        config = make(**shared, **own, metadata=sae_lens.saes.sae.SAEMetadata(**metadata))
        sae = getattr(sae_lens, kind)(config)
        fill(sae)
        sae.save_model(out / name)
        x = rows()
        code = sae.encode(x)
        x_hat = sae(x) if "skip" in name else sae.decode(code)
        keep(out / name, x, code, x_hat)
    _make_saelens_trained(out, sae_lens, shared)
    _make_saelens_older(out, sae_lens, shared)
    by_token: dict[str, tuple[str, dict[str, Any]]] = {
        "topk_layer_norm": ("TopKSAE", {"k": K, "normalize_activations": "layer_norm"}),
        "standard_constant_norm": (
            "StandardSAE",
            {"normalize_activations": "constant_norm_rescale"},
        ),
    }
    for name, (kind, own) in by_token.items():
        config = getattr(sae_lens, f"{kind}Config")(**shared, **own)
        sae = getattr(sae_lens, kind)(config)
        fill(sae)
        sae.save_model(out / name)
        x = rows()
        code = sae.encode(x)
        keep(out / name, x, code, sae.decode(code))


def _make_saelens_trained(out: Path, sae_lens: Any, shared: dict[str, Any]) -> None:
    """Write checkpoints of trainings, and what they become for inference."""
    own: dict[str, dict[str, Any]] = {
        "batchtopk": {"k": K},
        "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [6, 12, D_SAE]},
    }
    kinds = {
        "batchtopk": "BatchTopKTrainingSAE",
        "matryoshka_batchtopk": "MatryoshkaBatchTopKTrainingSAE",
    }
    for name, settings in own.items():
        sae = getattr(sae_lens, kinds[name])(
            getattr(sae_lens, f"{kinds[name]}Config")(**shared, **settings)
        )
        fill(sae)
        sae.topk_threshold.fill_(0.8)
        sae.save_model(out / f"{name}_in_training")
        sae.save_inference_model(out / f"{name}_for_inference")
        loaded = sae_lens.SAE.load_from_disk(out / f"{name}_for_inference")
        x = rows()
        code = loaded.encode(x)
        for ending in ("in_training", "for_inference"):
            keep(out / f"{name}_{ending}", x, code, loaded.decode(code))


def _make_saelens_older(out: Path, sae_lens: Any, shared: dict[str, Any]) -> None:
    """Write files as versions before 6 have them, which SAELens converts when it reads them."""
    cases: dict[str, dict[str, Any]] = {
        "older_standard": {"activation_fn_str": "relu", "hook_point": "blocks.1.hook_resid_pre"},
        "older_topk": {
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": K},
            "hook_name": "blocks.2.hook_mlp_out",
            "normalize_activations": False,
        },
        "older_jumprelu": {"architecture": "jumprelu", "hook_name": "blocks.2.hook_resid_post"},
    }
    for name, own in cases.items():
        tensors = {
            "W_enc": torch.randn(D_IN, D_SAE) * 0.4,
            "b_enc": torch.randn(D_SAE) * 0.4,
            "W_dec": torch.randn(D_SAE, D_IN) * 0.4,
            "b_dec": torch.randn(D_IN) * 0.4,
        }
        if "jumprelu" in name:
            tensors["threshold"] = torch.rand(D_SAE)
        (out / name).mkdir()
        save_file(tensors, out / name / "sae_weights.safetensors")
        content = {**shared, "model_name": "gpt2-small", **own}
        (out / name / "cfg.json").write_text(json.dumps(content))
        sae = sae_lens.SAE.load_from_disk(out / name)
        x = rows()
        code = sae.encode(x)
        keep(out / name, x, code, sae.decode(code))


def make_releases(out: Path) -> None:
    """Write releases by their documented layouts, and what SAELens's loaders make of them."""
    sae_lens = importlib.import_module("sae_lens")
    loaders: Any = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")

    W_enc, W_dec = torch.randn(D_IN, D_SAE) * 0.4, torch.randn(D_SAE, D_IN) * 0.4
    b_enc, b_dec = torch.randn(D_SAE) * 0.4, torch.randn(D_IN) * 0.4
    threshold = torch.rand(D_SAE)
    linear = {
        "encoder.weight": W_enc.t().contiguous(),
        "encoder.bias": b_enc,
        "decoder.weight": W_dec.t().contiguous(),
        "decoder.bias": b_dec,
    }

    def expect(place: Path, loader: str, folder: str, scale: float = 1.0, **overrides: Any) -> None:
        """Keep what SAELens computes of a release that is on this disk."""
        root = place if place.is_dir() else place.parent
        loaders.hf_hub_download = lambda repo_id=None, filename=None, subfolder=None, **_: str(
            out.joinpath(*[part for part in (subfolder, filename) if part])
        )
        loaders.get_safetensors_tensor_shapes = lambda _, filename: {
            key: list(value.shape) for key, value in load_file(out / filename).items()
        }
        repository = overrides.pop("repository", "owner/name")
        arguments = (repository, folder, "cpu", False, {"dtype": "float32", **overrides})
        config, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](*arguments)
        config = loaders.handle_config_defaulting(config)
        kind = sae_lens.SAE.get_sae_class_for_architecture(config["architecture"])
        settings = sae_lens.SAE.get_sae_config_class_for_architecture(config["architecture"])
        sae = kind(settings.from_dict(config))
        state = {key: value.float().contiguous() for key, value in state.items()}
        sae.load_state_dict(state)
        if scale != 1.0:
            sae.fold_activation_norm_scaling_factor(scale)
        x = rows()
        code = sae.encode(x)
        x_hat = sae(x) if "skip" in config["architecture"] else sae.decode(code)
        keep(root, x, code / scale, x_hat)

    place = out / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_10"
    place.mkdir(parents=True)
    arrays = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    numbers: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
    np.savez(place / "params.npz", **numbers, threshold=threshold.numpy())
    expect(
        place,
        "gemma_2",
        str(place.relative_to(out)),
        repository="google/gemma-scope-2b-pt-res",
        d_in=D_IN,
        d_sae=D_SAE,
    )

    place = out / "gemma-scope-2-270m-pt" / "transcoder" / "layer_3_width_16k_l0_small_affine"
    place.mkdir(parents=True)
    params = {key.lower(): value for key, value in arrays.items()} | {"threshold": threshold}
    params["affine_skip_connection"] = torch.randn(D_IN, D_IN) * 0.2
    save_file(params, place / "params.safetensors")
    (place / "config.json").write_text(
        json.dumps(
            {
                "architecture": "jump_relu",
                "model_name": "google/gemma-3-270m",
                "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
                "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
                "affine_connection": True,
            }
        )
    )
    expect(place, "gemma_3", str(place.relative_to(out)))

    place = out / "Llama3_1-8B-Base-L15R-8x"
    (place / "checkpoints").mkdir(parents=True)
    save_file(linear, place / "checkpoints" / "final.safetensors")
    norm = 17.0
    (place / "hyperparams.json").write_text(
        json.dumps(
            {
                "act_fn": "jumprelu",
                "jump_relu_threshold": 0.3,
                "d_model": D_IN,
                "d_sae": D_SAE,
                "expansion_factor": 3,
                "norm_activation": "dataset-wise",
                "dataset_average_activation_norm": {"in": norm, "out": norm},
                "apply_decoder_bias_to_pre_encoder": False,
                "use_decoder_bias": True,
                "use_glu_encoder": False,
                "sparsity_include_decoder_norm": True,
                "top_k": 50,
                "hook_point_in": "blocks.15.hook_resid_post",
                "hook_point_out": "blocks.15.hook_resid_post",
                "dtype": "torch.bfloat16",
            }
        )
    )
    expect(place, "llama_scope", place.name, scale=math.sqrt(D_IN) / norm)

    place = out / "Llama-Scope-R1-Distill" / "L15R"
    place.mkdir(parents=True)
    save_file(
        linear | {"log_jumprelu_threshold": threshold.log()}, place / "sae_weights.safetensors"
    )
    (place / "config.json").write_text(
        json.dumps(
            {
                "d_model": D_IN,
                "expansion_factor": 3,
                "hook_point_in": "blocks.15.hook_resid_post",
                "hook_point_out": "blocks.15.hook_resid_post",
            }
        )
    )
    expect(place, "llama_scope_r1_distill", str(place.relative_to(out)))

    place = out / "goodfire" / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    place.parent.mkdir()
    torch.save({key.replace(".", "_linear."): value for key, value in linear.items()}, place)
    repository = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19"
    shutil.copy(place, out / place.name)  # where the loader looks for it, by the name alone
    expect(place, "goodfire", place.name, repository=repository, d_in=D_IN, d_sae=D_SAE)
    (out / place.name).unlink()

    place = out / "qresearch" / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    place.parent.mkdir()
    torch.save(linear, place)
    expect(place, "deepseek_r1", str(place.relative_to(out)), d_in=D_IN, d_sae=D_SAE)

    place = out / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / "layer4.sae.pt"
    place.parent.mkdir()
    torch.save({**arrays, "W_enc": W_enc.t().contiguous(), "W_dec": W_dec.t().contiguous()}, place)
    expect(
        place,
        "qwen_scope",
        str(place.relative_to(out)),
        repository=f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}",
        d_in=D_IN,
        d_sae=D_SAE,
    )


def check_saelens(directory: Path) -> list[str]:
    sae_lens = importlib.import_module("sae_lens")

    wrong = []
    for place in sorted((directory / "saelens").iterdir()):
        sae = sae_lens.SAE.load_from_disk(place)
        expected = load_file(place / EXPECTED)
        code = sae.encode(expected["x"])
        x_hat = sae(expected["x"]) if "W_skip" in sae.state_dict() else sae.decode(code)
        wrong += differences(place, expected, code, x_hat)
    return wrong


# ---- sparsify -------------------------------------------------------------------------------


def make_sparsify(out: Path) -> None:
    sparsify = importlib.import_module("sparsify")

    cases: dict[str, dict[str, Any]] = {
        "layers.3": {"num_latents": D_SAE},
        "h.4.mlp": {"expansion_factor": 3, "activation": "groupmax"},
        "layers.5.mlp": {"num_latents": D_SAE, "transcode": True, "skip_connection": True},
    }
    for name, settings in cases.items():
        sae = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(k=K, **settings))
        fill(sae)
        sae.save_to_disk(out / name)
        x = rows()
        code, x_hat = _of_sparsify(sae, x)
        keep(out / name, x, code, x_hat)


def _of_sparsify(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    encoded = sae.encode(x)
    code = torch.zeros(len(x), sae.num_latents)
    code.scatter_(1, encoded.top_indices.long(), encoded.top_acts)
    x_hat = sae.decode(encoded.top_acts, encoded.top_indices)
    return code, x_hat if sae.W_skip is None else x_hat + x @ sae.W_skip.mT


def check_sparsify(directory: Path) -> list[str]:
    sparsify = importlib.import_module("sparsify")

    wrong = []
    for place in sorted((directory / "sparsify").iterdir()):
        expected = load_file(place / EXPECTED)
        sae = sparsify.SparseCoder.load_from_disk(place)
        wrong += differences(place, expected, *_of_sparsify(sae, expected["x"]))
    return wrong


# ---- dictionary_learning --------------------------------------------------------------------


def _dictionary_learning() -> dict[str, Any]:
    """Return the classes, without importing the package, which needs nnsight."""
    _as_package("dictionary_learning")
    plain = importlib.import_module("dictionary_learning.dictionary")
    names = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder")
    classes = {name: getattr(plain, name) for name in names}
    _as_package("dictionary_learning.trainers")
    for module, name in (
        ("top_k", "AutoEncoderTopK"),
        ("batch_top_k", "BatchTopKSAE"),
        ("matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE"),
    ):
        found = importlib.import_module(f"dictionary_learning.trainers.{module}")
        classes[name] = getattr(found, name)
    return classes


def _as_package(name: str) -> None:
    """Let the modules of a package be imported, without running its __init__."""
    relative = Path(*name.split("."))
    place = next(Path(p) / relative for p in sys.path if (Path(p) / relative).is_dir())
    package = types.ModuleType(name)
    package.__path__ = [str(place)]
    sys.modules.setdefault(name, package)


def make_dictionary_learning(out: Path) -> None:
    classes = _dictionary_learning()
    further: dict[str, tuple[Any, ...]] = {
        "AutoEncoderTopK": (K,),
        "BatchTopKSAE": (K,),
        "MatryoshkaBatchTopKSAE": (K, [6, 6, 12]),
    }
    for name, kind in classes.items():
        sae = kind(D_IN, D_SAE, *further.get(name, ()))
        fill(sae)
        if "TopK" in name:
            sae.threshold.fill_(0.7)
        place = out / name
        place.mkdir()
        torch.save(sae.state_dict(), place / "ae.pt")
        trainer = {
            "dict_class": name,
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "layer": 3,
            "lm_name": "EleutherAI/pythia-70m-deduped",
            "submodule_name": "resid_post_layer_3",
        }
        content = {"trainer": trainer, "buffer": {"ctx_len": 128}}
        (place / "config.json").write_text(json.dumps(content))
        x = rows()
        code = sae.encode(x)
        keep(place, x, code, sae.decode(code))


def check_dictionary_learning(directory: Path) -> list[str]:
    classes = _dictionary_learning()
    wrong = []
    for place in sorted((directory / "dictionary_learning").iterdir()):
        trainer = json.loads((place / "config.json").read_text())["trainer"]
        kind = classes[trainer["dict_class"]]
        given = {"normalize_decoder": False} if trainer["dict_class"] == "AutoEncoder" else {}
        sae = kind.from_pretrained(str(place / "ae.pt"), **given)
        expected = load_file(place / EXPECTED)
        code = sae.encode(expected["x"])
        wrong += differences(place, expected, code, sae.decode(code))
    return wrong


# ---- circuit-tracer -------------------------------------------------------------------------


def _circuit_tracer() -> tuple[Any, Any]:
    for name in ("circuit_tracer", "circuit_tracer.transcoder", "circuit_tracer.utils"):
        _as_package(name)
    utils: Any = sys.modules["circuit_tracer.utils"]
    utils.get_default_device = lambda: torch.device("cpu")
    module = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder")
    return module, importlib.import_module("circuit_tracer.transcoder.activation_functions")


def make_circuit_tracer(out: Path) -> None:
    module, activations = _circuit_tracer()
    cases = {
        "relu": (torch.nn.functional.relu, False),
        "jumprelu_skip": (activations.JumpReLU(torch.rand(D_SAE)), True),
    }
    for name, (activation, has_skip) in cases.items():
        transcoder = module.SingleLayerTranscoder(
            D_IN, D_SAE, activation, 2, has_skip, device=torch.device("cpu"), dtype=torch.float32
        )
        fill(transcoder)
        (out / name).mkdir()
        transcoder.to_safetensors(str(out / name / "layer_2.safetensors"))
        (out / name / "config.yaml").write_text(
            "model_name: google/gemma-2-2b\nmodel_kind: transcoder_set\n"
            "feature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\n"
            "scan: some-name\n"
        )
        x = rows()
        code = transcoder.encode(x)
        keep(out / name, x, code, transcoder.decode(code, x))


def check_circuit_tracer(directory: Path) -> list[str]:
    module, _ = _circuit_tracer()
    wrong = []
    for place in sorted((directory / "circuit_tracer").iterdir()):
        (path,) = place.glob("layer_*.safetensors")
        layer = int(path.stem.split("_")[1])
        transcoder = module.load_relu_transcoder(
            str(path), layer, lazy_encoder=False, lazy_decoder=False
        )
        expected = load_file(place / EXPECTED)
        code = transcoder.encode(expected["x"])
        x_hat = transcoder.decode(code, expected["x"])
        wrong += differences(place, expected, code, x_hat)
    return wrong


# ---- OpenAI, OpenMOSS -----------------------------------------------------------------------


def make_openai(out: Path) -> None:
    _as_package("sparse_autoencoder")
    model = importlib.import_module("sparse_autoencoder.model")
    for name, activation in (("relu", torch.nn.ReLU()), ("topk", model.TopK(K))):
        sae = model.Autoencoder(D_SAE, D_IN, activation, normalize=name == "topk")
        fill(sae)
        (out / name).mkdir()
        torch.save(sae.state_dict(), out / name / "3.pt")
        x = rows()
        code, info = sae.encode(x)
        keep(out / name, x, code, sae.decode(code, info))


def make_openmoss(out: Path) -> None:
    for package in ("llamascopium", "llamascopium.models", "llamascopium.utils"):
        _as_package(package)
    module = importlib.import_module("llamascopium.models.sae")

    cases: dict[str, dict[str, Any]] = {
        "relu": {"act_fn": "relu"},
        "jumprelu": {"act_fn": "jumprelu"},
        "topk": {"act_fn": "topk", "top_k": K},
        "relu_token_wise": {"act_fn": "relu", "norm_activation": "token-wise"},
    }
    for name, settings in cases.items():
        config = module.SAEConfig(
            hook_point_in="blocks.3.hook_resid_post",
            hook_point_out="blocks.3.hook_resid_post",
            d_model=D_IN,
            expansion_factor=3,
            dtype=torch.float32,
            device="cpu",
            **settings,
        )
        sae = module.SparseAutoEncoder(config)
        fill(sae)
        sae.set_dataset_average_activation_norm({"blocks.3.hook_resid_post": 5.0})
        sae.save_pretrained(str(out / name))
        config.save_hyperparameters(out / name)
        x = rows()
        scale = sae.compute_norm_factor(x, "blocks.3.hook_resid_post")
        code = sae.encode(x * scale)
        by_token = "norm_activation" in settings  # codes stay in units of the token
        keep(out / name, x, code if by_token else code / scale, sae.decode(code) / scale)


def make_saev(out: Path) -> None:
    for package in ("saev", "saev.nn"):
        _as_package(package)
    package_itself: Any = sys.modules["saev"]
    package_itself.__version__ = "at 3d73f1f"
    module = importlib.import_module("saev.nn.modeling")
    for name, activation in (
        ("relu", module.Relu()),
        ("batch_topk", module.BatchTopK(top_k=K)),
        ("topk", module.TopK(top_k=K)),
    ):
        config = module.SparseAutoencoderConfig(d_model=D_IN, d_sae=D_SAE, activation=activation)
        sae = module.SparseAutoencoder(config)
        fill(sae)
        if name == "batch_topk":
            sae.activation.threshold.fill_(0.6)
        sae.eval()
        module.dump(out / name / "sae.pt", sae)
        x = rows()
        code = sae.encode(x).f_x
        keep(out / name, x, code, sae.decode(code)[:, -1])


# ---- the command ----------------------------------------------------------------------------


def differences(place: Path, expected: dict[str, Tensor], code: Tensor, x_hat: Tensor) -> list[str]:
    """Return a line for each result that differs from the expected one."""
    lines = []
    for name, found in (("code", code), ("x_hat", x_hat)):
        off = float((found - expected[name]).abs().max())
        print(f"{place.parent.name}/{place.name}: {name} off by {off:.1e}")
        if not off <= CLOSE * max(1.0, float(expected[name].abs().max())):
            lines.append(f"{place}: {name} is off by {off:g}")
    return lines


MAKERS: dict[str, tuple[Callable[[Path], None], ...]] = {
    "saelens": (make_saelens,),
    "releases": (make_releases,),
    "sparsify": (make_sparsify,),
    "dictionary_learning": (make_dictionary_learning,),
    "circuit_tracer": (make_circuit_tracer,),
    "openai": (make_openai,),
    "openmoss": (make_openmoss,),
    "saev": (make_saev,),
}
CHECKERS = {
    "saelens": check_saelens,
    "sparsify": check_sparsify,
    "dictionary_learning": check_dictionary_learning,
    "circuit_tracer": check_circuit_tracer,
}


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    if len(arguments) != 3 or arguments[0] not in ("make", "check"):
        print(__doc__)
        return 2
    command, group, place = arguments[0], arguments[1], Path(arguments[2])
    torch.manual_seed(0)
    with torch.no_grad():
        if command == "check":
            wrong = CHECKERS[group](place)
            print("\n".join(wrong) or f"{group}: all equal")
            return 1 if wrong else 0
        out = place / group
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for make in MAKERS[group]:
            make(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
