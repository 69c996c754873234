"""Make the pages of the documentation that come from the code and from committed results.

`mkdocs.yml` names this file as a hook. It adds the tables of flags (from the command lines of the
commands), the list of ops (from `csrc/ops/schema.cpp`), the tables of `benchmarks/results/`, and
CONTRIBUTING.md, CHANGELOG.md and benchmarks/README.md, so that none of them is written twice.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae_fast.config.command_line import CommandLine, Flag
from sae_fast.config.setting import Rules
from sae_fast.ops.registry import op_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULTS_INTRO = """# Results

Every table states the machine, the versions and the command that made it. They lie in
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
    """A command line of a module of sae_fast, which is called by `line`.

    Attributes:
        title: the heading.
        module: the name below sae_fast.
        text: one sentence on the command.
        number: the place of the command line among the command lines of the module.
        sections: the sections of flags that are shown; empty: all.
    """

    title: str
    module: str
    text: str
    number: int = 0
    sections: tuple[str, ...] = ()

    def line(self) -> CommandLine:
        """Return the command line with its flags."""
        module = importlib.import_module(f"sae_fast.{self.module}")
        lines: list[CommandLine] = module.command_lines()
        return lines[self.number]


COMMANDS = (
    Command(
        "Train on shards",
        "train",
        "Flags of the run, of the model (`SAEConfig`) and of its training (`TrainConfig`).",
    ),
    Command(
        "Train straight from a model",
        "train",
        "The flags below replace or add to the flags of a training on shards; "
        "see [a model and a dataset](../guide/model.md#train-straight-from-a-model).",
        number=1,
        sections=("text",),
    ),
    Command("Capture activations", "capture", "See [a model and a dataset](../guide/model.md)."),
    Command(
        "Convert activations",
        "convert_shards",
        "See [activations you already have](../guide/your-activations.md).",
    ),
    Command("Measure dictionaries", "evaluate", "See [evaluate](../guide/evaluate.md)."),
    Command("Pages of latents", "latents", "See [look at your latents](../guide/latents.md)."),
    Command("Compare dictionaries", "compare", "See [compare](../guide/compare.md)."),
    Command(
        "Score on superposition",
        "ground_truth",
        "See [known answers](../guide/ground-truth.md#superposition).",
    ),
    Command(
        "Score on modular addition",
        "ground_truth",
        "See [known answers](../guide/ground-truth.md#modular-addition).",
        number=1,
    ),
    Command(
        "Score on a state machine",
        "ground_truth",
        "See [known answers](../guide/ground-truth.md#state-machine).",
        number=2,
    ),
    Command(
        "Score on a circuit",
        "ground_truth",
        "See [known answers](../guide/ground-truth.md#circuit).",
        number=3,
    ),
    Command(
        "Score on biographies",
        "ground_truth",
        "See [known answers](../guide/ground-truth.md#biographies).",
        number=4,
    ),
    Command("Convert dictionaries", "convert", "See [convert](../guide/convert.md)."),
    Command("Verify dictionaries", "verify", "See [convert](../guide/convert.md)."),
    Command("Plot runs", "plot", "See [plots](../guide/runs.md#plots)."),
    Command("Make biographies", "biographies", "See [biographies](../guide/slots.md#biographies)."),
    Command("Swap slots", "swap", "See [biographies](../guide/slots.md#biographies)."),
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
    paths = [*sorted(RESULTS.glob("*.png")), *sorted(RESULTS.glob("ground_truth/*/*.png"))]
    return {f"results/{path.relative_to(RESULTS)}": path.read_bytes() for path in paths}


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
        line = command.line()
        usage = line.usage.splitlines()[0].removesuffix(" [flags]")
        parts += [f"## {command.title}", f"`{usage}`", command.text]
        sections = command.sections or tuple(line.sections)
        level = 4 if len(sections) > 1 else 3
        for section in sections:
            if len(sections) > 1:
                parts.append(f"### {line.sections[section].title}")
            flags = [flag for flag in line.flags() if flag.section == section]
            title = line.sections[section].title if len(sections) > 1 else ""
            parts += _flags_tables(flags, title, level)
    return "\n\n".join(parts) + "\n"


def _flags_tables(flags: Iterable[Flag], title: str, level: int) -> Iterator[str]:
    """Yield the tables of flags, each with the heading it has in `--help-all`."""
    lines: list[str] = []
    for flag in flags:
        heading = flag.rules.heading
        if heading == title:  # it is the heading of the section
            heading = ""
        if heading and lines:
            yield "\n".join(lines)
            lines = []
        if heading:
            yield f"{'#' * level} {heading}"
        lines = lines or ["| flag | values | default | meaning |", "|---|---|---|---|"]
        name = flag.rules.metavar if flag.rules.positional else flag.spellings[0]
        values = describe_type(flag.kind)
        if _has_range(flag.rules):
            values += f", {flag.rules.range}"
        text = flag.text + _condition(flag.rules)
        text = text.replace("[", "\\[")  # two pairs of brackets would be a link
        cells = (f"`{name}`", values, _default(flag.default), text)
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
    names = {bool: "switch", int: "whole number", float: "number", str: "text", Path: "path"}
    return names.get(kind, str(kind))


def _default(value: object) -> str:
    if value is None or value == ():
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
    for path in sorted(RESULTS.glob("ground_truth/*/results.md")):  # pictures are in their text
        name, text = path.relative_to(RESULTS).as_posix(), path.read_text("utf-8")
        made[f"results/{name}"] = text
        lines.append(f"- [{text.splitlines()[0].lstrip('# ')}]({name}): `{name}`")
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
