"""Models of Hugging Face's transformers, small, from configurations with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.models import wake
from tests.zoo.operators import declare_operators_of_torchvision
from tests.zoo.specimen import IWRM, MTL, Kind, Specimen, check

os.environ.setdefault("HF_HUB_OFFLINE", "1")
declare_operators_of_torchvision()
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: tox run -e zoo brings it"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

VOCABULARY = 40
B = 3

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
CAUSAL = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
IMAGES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}


def _field(name: str) -> Callable[..., Tensor]:
    def outputs(model: nn.Module, *inputs: Tensor) -> Tensor:
        names = ["input_ids", "decoder_input_ids"]
        if inputs[0].is_floating_point():
            names = ["pixel_values"]
        found: Tensor = getattr(model(**dict(zip(names, inputs, strict=False))), name)
        return found

    return outputs


def _tokens(length: int = 7) -> Tensor:
    return torch.randint(1, VOCABULARY, (B, length))


def _image() -> Tensor:
    return torch.randn(B, 3, 16, 16)


Entry = tuple[str, str, dict[str, Any], str, tuple[Callable[[], Tensor], ...]]

# Name: the model, its configuration, the field of its output, its inputs.
MODELS: dict[str, Entry] = {
    "bert": ("BertForMaskedLM", "BertConfig", SMALL, "logits", (_tokens,)),
    "bert_classifier": (
        "BertForSequenceClassification",
        "BertConfig",
        SMALL,
        "logits",
        (_tokens,),
    ),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SMALL, "logits", (_tokens,)),
    "albert": (
        "AlbertForMaskedLM",
        "AlbertConfig",
        SMALL | {"embedding_size": 8},
        "logits",
        (_tokens,),
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 16,
        },
        "logits",
        (_tokens,),
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
        "logits",
        (_tokens,),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
        "logits",
        (_tokens,),
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16},
        "logits",
        (_tokens,),
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        "logits",
        (_tokens,),
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", CAUSAL, "logits", (_tokens,)),
    "llama_tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        CAUSAL | {"tie_word_embeddings": True},
        "logits",
        (_tokens,),
    ),
    "qwen": ("Qwen3ForCausalLM", "Qwen3Config", CAUSAL, "logits", (_tokens,)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", CAUSAL, "logits", (_tokens,)),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        CAUSAL
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            # Grouped products of matrices exist for float32 and below only.
            "experts_implementation": "eager",
        },
        "logits",
        (_tokens,),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
        },
        "logits",
        (_tokens, lambda: _tokens(4)),
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
        },
        "logits",
        (_tokens, lambda: _tokens(4)),
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4},
        "logits",
        (_tokens,),
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGES, "logits", (_image,)),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", IMAGES, "logits", (_image,)),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "hidden_sizes": [8, 16],
            "num_attention_heads": [1, 2],
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 8,
        },
        "logits",
        (_image,),
    ),
}

# These compute norms, rotations or masks in float32 whatever their precision: the weighted sum of
# their plain rows differs from a plain weighted pass by 1e-8 as well.
FLOAT32_INSIDE = {"bloom", "gemma", "llama", "llama_tied", "mamba", "mixtral", "qwen", "t5"}


def _specimen(name: str) -> Specimen:
    model, config, arguments, field, inputs = MODELS[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**arguments)).eval()
    wake(built)
    return Specimen(built, tuple(make() for make in inputs), outputs=_field(field))


@pytest.mark.parametrize("kind", [IWRM, MTL], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", MODELS)
def test_in_float64_all_digits_are_right(name: str, kind: Kind) -> None:
    tolerance = 1e-6 if name in FLOAT32_INSIDE else 1e-12
    check(_specimen(name).to(torch.float64), kind, tolerance)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_float32_is_near_the_rows_of_float64(name: str) -> None:
    specimen = _specimen(name)
    check(specimen, IWRM, 1e-5, specimen.to(torch.float64))
