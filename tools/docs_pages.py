"""Make the pages of the documentation that come from the code and from committed results.

`mkdocs.yml` names this file as a hook. It adds the tables of flags (from the configuration
dataclasses), the list of ops (from `csrc/ops/schema.cpp`), the tables of `benchmarks/results/`, and
CONTRIBUTING.md, CHANGELOG.md and benchmarks/README.md, so that none of them is written twice.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae_fast.config.command_line import field_texts
from sae_fast.config.setting import Rules, rules_of
from sae_fast.ops.registry import op_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULTS_INTRO = """# Results

Every table states the machine, the versions and the command that made it. The tables are those of
`benchmarks/results/`, where the same numbers are in JSON beside them;
[Benchmarks](../development/benchmarks.md) says how they are measured and how to repeat them.

- **A TopK step** takes dense PyTorch 7 to 8 times as long on AVX-512 VNNI and 10 to 17 times as
  long on AMX, and gather-based PyTorch 3 to 5 and 6 to 10 times as long. With AVX2 kernels, and
  PyTorch held to AVX2 too, dense PyTorch takes 6.7 times as long at d_in 768, d_sae 6144.
- **Memory.** At d_in 2048, d_sae 32768 a step needs 1.8 GiB above the data, against 2.7 GiB in
  dense PyTorch and 3.5 GiB in sparsify; weights and moments alone are 1.5 GiB.
- **Half of all latents active.** A ReLU step then takes dense PyTorch on AMX 1.5 to 1.6 times as
  long in float32, and 0.8 to 1.0 times in bfloat16 autocast; against `--amp bf16` these are 2.6
  to 3.4 and 1.7 to 1.8 times.
- **Quality.** Trained on the same tokens, the held-out FVU equals the FVU of plain PyTorch.

The tables:

"""


class Command(NamedTuple):
    """A command whose flags are the fields of dataclasses."""

    title: str
    line: str
    text: str
    classes: tuple[str, ...]  # module:name


COMMANDS = (
    Command(
        "Train on shards",
        "python -m sae_fast.train --shard-dir DIR",
        "Flags of the run, of the model (`SAEConfig`) and of its training (`TrainConfig`).",
        (
            "sae_fast.train:TrainOptions",
            "sae_fast.config:SAEConfig",
            "sae_fast.config:TrainConfig",
        ),
    ),
    Command(
        "Train straight from a model",
        "python -m sae_fast.train MODEL DATASET",
        "The flags below replace or add to the flags of a training on shards; "
        "see [a model and a dataset](../guide/model.md#train-straight-from-a-model).",
        ("sae_fast.config.model_text:FromModelConfig",),
    ),
    Command(
        "Capture activations",
        "python -m sae_fast.capture MODEL DATASET --out DIR",
        "See [a model and a dataset](../guide/model.md).",
        ("sae_fast.config.model_text:CaptureConfig",),
    ),
    Command(
        "Convert activations",
        "python -m sae_fast.convert_shards SRC DST",
        "See [activations you already have](../guide/your-activations.md).",
        ("sae_fast.convert_shards:ConvertOptions",),
    ),
    Command(
        "Plot runs",
        "python -m sae_fast.plot RUN",
        "See [plots](../guide/runs.md#plots).",
        ("sae_fast.plot:PlotOptions",),
    ),
    Command(
        "Make biographies",
        "python -m sae_fast.biographies --out DIR",
        "See [biographies](../guide/slots.md#biographies).",
        ("sae_fast.biographies:BiographyOptions",),
    ),
    Command(
        "Swap slots",
        "python -m sae_fast.swap CHECKPOINT --data DIR",
        "See [biographies](../guide/slots.md#biographies).",
        ("sae_fast.swap:SwapOptions",),
    ),
)


def pages() -> dict[str, str]:
    """Return the text of every made page by its path below docs/."""
    return {
        "reference/flags.md": flags_page(),
        "reference/ops.md": ops_page(),
        **results_pages(),
        "development/contributing.md": _included("CONTRIBUTING.md"),
        "development/changelog.md": _included("CHANGELOG.md"),
        "development/benchmarks.md": _included("benchmarks/README.md"),
    }


def pictures() -> dict[str, bytes]:
    """Return the committed pictures by their path below docs/."""
    return {f"results/{path.name}": path.read_bytes() for path in sorted(RESULTS.glob("*.png"))}


def flags_page() -> str:
    """Return the tables of the flags of all commands, made from the fields that define them."""
    parts = [
        "# Commands and flags",
        "Every flag is a field of a dataclass, and these tables are made from the fields. Hyphens "
        "and underscores are equal in the name of a flag. A switch `--x` is turned off by "
        "`--no-x`. `--help` prints the flags that most people use, `--help-all` all of them with "
        "these texts. Besides the commands below, "
        "`python -m sae_fast.info` prints versions, kernels and devices, and "
        "`python -m sae_fast.presets` lists the [presets](../guide/presets.md).",
    ]
    for command in COMMANDS:
        parts += [f"## {command.title}", f"`{command.line}`", command.text]
        for place in command.classes:
            kind = _load(place)
            if len(command.classes) > 1:
                parts.append(f"### {_heading(kind)}")
            parts += _flags_tables(kind, 4 if len(command.classes) > 1 else 3)
    return "\n\n".join(parts) + "\n"


def _load(place: str) -> type[Any]:
    """Return the class that MODULE:NAME names; a NAME of Options is the module's own."""
    module, name = place.split(":")
    content = vars(importlib.import_module(module))
    if name == "Options":
        own = [kind for kind in content.values() if getattr(kind, "__module__", "") == module]
        (name,) = (kind.__name__ for kind in own if kind.__name__.endswith(name))
    kind: type[Any] = content[name]
    return kind


def _heading(kind: type[Any]) -> str:
    return {"SAEConfig": "The model", "TrainConfig": "The training"}.get(kind.__name__, "The run")


def _flags_tables(kind: type[Any], level: int) -> Iterator[str]:
    """Yield the tables of a configuration's flags, each with the heading it has in `--help`."""
    texts = field_texts(typing.cast(Any, kind))
    hints = typing.get_type_hints(kind, include_extras=True)
    rules = rules_of(kind)
    lines: list[str] = []
    for item in dataclasses.fields(kind):
        rule = rules[item.name]
        if rule.heading and lines:
            yield "\n".join(lines)
            lines = []
        if rule.heading:
            yield f"{'#' * level} {rule.heading}"
        if item.name not in texts:  # a nested configuration
            continue
        lines = lines or ["| flag | values | default | meaning |", "|---|---|---|---|"]
        flag = f"`--{item.name.replace('_', '-')}`"
        if rule.positional or "Positional" in str(hints[item.name]):
            flag = f"`{rule.metavar or item.name.upper()}`"
        values = describe_type(hints[item.name])
        if _has_range(rule):
            values += f", {rule.range}"
        cells = (flag, values, _default(item), texts[item.name] + _condition(rule))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if lines:
        yield "\n".join(lines)


def _has_range(rule: Rules) -> bool:
    bounds = (rule.above, rule.at_least, rule.at_most, rule.below)
    return any(bound is not None for bound in bounds) or bool(rule.must)


def _condition(rule: Rules) -> str:
    """Return the sentences on architectures and needs of a setting."""
    arch = f" *Architectures: {', '.join(rule.arch)}.*" if rule.arch else ""
    needs = f" *Needs {rule.needs.needs}.*" if rule.needs else ""
    return arch + needs


def describe_type(kind: Any) -> str:
    """Return the values that a field of this type takes, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(part) for part in arguments if part is not type(None))
    if origin is tuple:
        parts = [describe_type(part) for part in arguments if part is not Ellipsis]
        return f"list of {parts[0]}" if Ellipsis in arguments else " and ".join(parts)
    if origin is typing.Annotated:
        return describe_type(arguments[0])
    names = {bool: "switch", int: "whole number", float: "number", str: "text", Path: "path"}
    return names.get(kind, str(kind))


def _default(item: dataclasses.Field[Any]) -> str:
    value = item.default
    if value is None or value is dataclasses.MISSING or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(f"`{part:g}`" for part in value)
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`"


def ops_page() -> str:
    """Return the list of the ops with their contracts, from csrc/ops/schema.cpp."""
    source = (ROOT / "csrc" / "ops" / "schema.cpp").read_text("utf-8")
    head, body = source.split("STABLE_TORCH_LIBRARY(sae_fast, m) {")
    intro = _comment_text(head.split("#include")[0].splitlines())
    parts = [
        "# Ops",
        "The ops are registered as `torch.ops.sae_fast.*`. This page is made from the comments of "
        "`csrc/ops/schema.cpp` and from `sae_fast/ops/registry.py`. Each op has kernels for the "
        "CPU and for CUDA, and a definition in plain PyTorch in `sae_fast/ops/reference/`, which "
        "is the fallback without compiled kernels and the oracle of the tests.",
        intro,
        "`opaque` stands for a packed copy that only the compiled op reads.",
        _escaped_outside_code(op_table()),
    ]
    for comment, quoted in re.findall(r"((?:  //.*\n)+)  m\.def\(\s*((?:\s*\".*\"\s*)+)\);", body):
        schema = "".join(json.loads(part) for part in re.findall(r"\"(?:[^\"\\]|\\.)*\"", quoted))
        name = schema.split("(")[0]
        parts += [f"## {name}", _comment_text(comment.splitlines()), _code(_wrapped(schema))]
    return "\n\n".join(parts) + "\n"


def _comment_text(lines: list[str]) -> str:
    """Return the text of comment lines; indented lines become a block of code."""
    text = [line.strip().removeprefix("//").removeprefix(" ") for line in lines if "//" in line]
    parts: list[str] = []
    for is_table, group in itertools.groupby(text, key=lambda line: line.startswith("  ")):
        part = "\n".join(group)
        parts.append(_code(textwrap.dedent(part)) if is_table else _escaped(part))
    return "\n\n".join(parts)


def _escaped_outside_code(text: str) -> str:
    parts = text.split("`")
    parts[::2] = [part.replace("*", "\\*").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]*_<>])", r"\\\1", text)


def _code(text: str) -> str:
    return f"```text\n{text}\n```"


def _wrapped(schema: str) -> str:
    """Return a schema with one argument on a line where it is long."""
    if len(schema) <= 96:
        return schema
    name, rest = schema.split("(", 1)
    arguments, result = rest.split(") -> ", 1)
    listed = ",\n    ".join(re.split(r", (?=Tensor|int|str|float|bool)", arguments))
    return f"{name}(\n    {listed}\n) -> {result}"


def results_pages() -> dict[str, str]:
    """Return a page for each committed table of results, and their list."""
    made, lines = {}, []
    for path in sorted(RESULTS.glob("*.md")):
        text = path.read_text("utf-8")
        text = re.sub(r"(?m)^([^-|\s].*)\n(?=- )", r"\1\n\n", text)  # a list needs an empty line
        picture = path.with_suffix(".png")
        if picture.exists():
            text += f"\n![{text.splitlines()[0].lstrip('# ')}]({picture.name})\n"
        made[f"results/{path.name}"] = text
        lines.append(f"- [{text.splitlines()[0].lstrip('# ')}]({path.name}): `{path.name}`")
    return {**made, "results/index.md": RESULTS_INTRO + "\n".join(lines) + "\n"}


def _included(name: str) -> str:
    """Return a page of the repository; its links to files of the repository become plain text."""
    text = (ROOT / name).read_text("utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text)


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages and pictures; MkDocs calls this when it has listed the files."""
    from mkdocs.structure.files import File

    made: dict[str, str | bytes] = {**pages(), **pictures()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files
