"""help() of a configuration shows every setting with its text, type and default."""

import ast
import inspect
import pydoc
import textwrap

import pytest

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.fields import field_names, field_texts


@pytest.mark.parametrize("config", [SAEConfig, TrainConfig])
def test_help_shows_every_setting_with_its_text(config):
    shown = " ".join(pydoc.render_doc(config, renderer=pydoc.plaintext).replace("|", " ").split())
    texts = field_texts(config)
    assert list(texts) == field_names(config)
    for name, text in texts.items():
        assert f" {name}: " in shown
        assert " ".join(text.replace("|", " ").split()) in shown, name


def test_help_names_kind_and_default():
    lines = [line.strip() for line in pydoc.getdoc(SAEConfig).splitlines()]
    assert lines[0].startswith("The model: architecture, sizes, ")
    assert "k: a whole number or null; default None" in lines


def test_instances_have_the_documentation_of_their_class():
    assert SAEConfig(d_in=4, d_sae=8, k=2).__doc__ == SAEConfig.__doc__


@pytest.mark.parametrize("config", [SAEConfig, TrainConfig])
def test_other_names_of_settings_are_declared_for_type_checkers(config):
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    (block,) = (node for node in definition.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    assert [line.target.id for line in block.body] == list(config.aliases)
