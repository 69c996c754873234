"""A probe finds whether a model is causal, independent of its name, and where its blocks are."""

import pytest
import torch
import transformers
from small_models import CAUSAL, MASKED, TRANSFORMER, make_network, make_tokenizer

from sae_fast.activations.capture import find_blocks
from sae_fast.activations.capture.language_model import load_language_model, loaded_language_model
from sae_fast.activations.capture.probe import probe_tokens, sees_later_tokens

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def llava():
    text, vision = (
        {**TRANSFORMER, "model_type": "llama"},
        {**VISION, "model_type": "clip_vision_model"},
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=39)
    return transformers.LlavaForConditionalGeneration(config)


def mistral3():
    text = {**TRANSFORMER, "model_type": "mistral", "head_dim": 16}
    vision = {**VISION, "model_type": "pixtral"}
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=39
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def qwen_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TRANSFORMER, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": 32},
        image_token_id=39,
        video_token_id=38,
        vision_start_token_id=37,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma_embedding():
    config = transformers.Gemma3TextConfig(
        **TRANSFORMER, head_dim=16, use_bidirectional_attention=True
    )
    return transformers.Gemma3TextModel(config)


def xlm():
    config = transformers.XLMConfig(
        vocab_size=40, emb_dim=32, n_layers=2, n_heads=2, max_position_embeddings=64, n_langs=1
    )
    return transformers.XLMWithLMHeadModel(config)


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TRANSFORMER, num_local_experts=4)
    )


@pytest.mark.parametrize(
    ("make", "causal"),
    [
        (llava, True),
        (mistral3, True),
        (qwen_vl, True),
        (mixtral, True),
        (gemma_embedding, False),
        (xlm, False),
    ],
)
def test_causal_or_not_is_found_whatever_the_model_is_called(tmp_path, make, causal):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    make_tokenizer(True).save_pretrained(tmp_path)
    assert load_language_model(str(tmp_path)).causal == causal


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_the_probe_agrees_with_what_small_models_are(name):
    network, tokenizer = make_network(name), make_tokenizer(name in CAUSAL)
    tokens = probe_tokens(network, tokenizer, None)
    assert sees_later_tokens(network, tokens) == (name in MASKED)


def test_a_network_in_training_is_probed_without_dropout_and_left_in_training():
    network = make_network("gpt2").train()
    assert loaded_language_model(network, make_tokenizer(True)).causal
    assert all(module.training for module in network.modules())


def test_experts_that_round_differently_do_not_make_a_model_look_ahead():
    class Rounding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(40, 16)
            self.blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])

        def forward(self, input_ids, attention_mask=None):
            rows = self.embed(input_ids)
            rows = rows * (1 + 1e-7 * input_ids[:, -1:, None])
            return self.blocks[1](self.blocks[0](rows))

    assert sees_later_tokens(Rounding(), torch.arange(7, 16)[None]) is False


def test_blocks_are_those_of_the_text_where_a_tower_of_pictures_has_as_many():
    assert find_blocks(qwen_vl()).path == "model.language_model.layers"
