"""Small random models of common architectures, and tokenizers of a few words."""

import torch
from torch import nn

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away", "."]
SPECIAL = ["[PAD]", "[UNK]", "<s>", "</s>", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
CONTEXT = 32
LAYERS = 3

_SHAPE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
CAUSAL = {
    "gpt2": {
        "vocab_size": len(VOCABULARY),
        "n_positions": CONTEXT,
        "n_embd": 16,
        "n_layer": LAYERS,
        "n_head": 2,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "llama": _SHAPE,
    "gpt_neox": _SHAPE,
    "gemma": {**_SHAPE, **_GROUPED},
    "gemma2": {**_SHAPE, **_GROUPED},
    "qwen2": {**_SHAPE, "num_key_value_heads": 1},
    "qwen3": {**_SHAPE, **_GROUPED},
    "opt": {**_SHAPE, "ffn_dim": 32, "word_embed_proj_dim": 16},
}
MASKED = {
    "bert": _SHAPE,
    "roberta": {**_SHAPE, "max_position_embeddings": CONTEXT + 1},  # positions begin at 1
    "distilbert": {
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": CONTEXT,
        "dim": 16,
        "hidden_dim": 32,
        "n_layers": LAYERS,
        "n_heads": 2,
        "pad_token_id": 0,
    },
}

# Models with an encoder of two blocks and a decoder of three, which begins with the token 2.
_T5 = {
    "vocab_size": len(VOCABULARY),
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": LAYERS,
    "num_heads": 2,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
    "eos_token_id": 3,
}
_BART = {
    "vocab_size": len(VOCABULARY),
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "forced_eos_token_id": 5,
}
PAIRED = {"t5": _T5, "bart": _BART, "umt5": _T5}

_EYE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_DINO = {**_EYE, "mlp_ratio": 2, "layerscale_value": 0.5}
_READER = {**_SHAPE, "num_hidden_layers": 2}
# Models that read images of 16 x 16 in patches of 4 x 4.
SEEING = {
    "clip": {"vision_config": _EYE, "text_config": _READER, "projection_dim": 8},
    "clip_vision_model": _EYE,
    "siglip": {"vision_config": _EYE, "text_config": _READER},
    "dinov2": _DINO,
    "dinov2_with_registers": {**_DINO, "num_register_tokens": 2},
    "vit": _EYE,
}

# Sizes by the names in most configurations of transformers.
TRANSFORMER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


def make_network(name, seed=0, **settings):
    """Make a network with random weights and a language-model head; settings of transformers."""
    import transformers

    kinds = (
        transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModelForMaskedLM
    )
    config = transformers.AutoConfig.for_model(name, **{**CAUSAL, **MASKED}[name] | settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = kinds.from_config(config).eval()
        with torch.no_grad():
            for module in network.modules():  # norms other than one, and biases other than zero
                if isinstance(module, nn.LayerNorm):
                    module.weight.normal_(1, 0.1)
                    module.bias.normal_(0, 0.1)
    return network


def make_encoder_decoder(name, *, head=True, **settings):
    """Make a model with an encoder and a decoder; settings of transformers."""
    import transformers

    config = transformers.AutoConfig.for_model(name, **PAIRED[name] | settings)
    kind = transformers.AutoModelForSeq2SeqLM if head else transformers.AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind.from_config(config).eval()
        for weight in network.parameters():  # T5 begins with weights too small to tell apart
            weight.data.add_(0.1 * torch.randn_like(weight))
    if head:
        network.generation_config.pad_token_id = 0
    return network


def make_image_model(name):
    """Make a model that reads images, and its image processor, with random weights."""
    import transformers

    config = transformers.AutoConfig.for_model(name, **SEEING[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.AutoModel.from_config(config).eval()
        for weight in network.parameters():
            weight.data.add_(0.1 * torch.randn_like(weight))
    size = {"height": 16, "width": 16}
    return network, transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)


def save_image_model(directory, name):
    """Write a model that reads images as a user's folder of it."""
    for part in make_image_model(name):
        part.save_pretrained(directory)
    return directory


def make_tokenizer(causal, *, bos="<s>", eos="</s>"):
    """Make a tokenizer of words, for a decoder, or for an encoder with [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_max_length": CONTEXT}
    if causal:
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **special
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        **special,
    )


def save_model(directory, name, seed=0, **settings):
    """Write network and tokenizer as a user's folder of a model."""
    make_network(name, seed, **settings).save_pretrained(directory)
    make_tokenizer(name in CAUSAL).save_pretrained(directory)
    return directory
