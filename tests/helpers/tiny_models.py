"""A tiny model of every family, with any head, and a batch for every head: made from configs, without a network."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

VOCAB_SIZE, NUM_LABELS, PAD, IGNORED = 64, 5, 0, -100
ROWS, LENGTH, TARGET_LENGTH, CHOICES, SIDE, SAMPLES = 4, 10, 6, 3, 8, 60

HEADS = {
    "masked-lm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "multiple-choice": AutoModelForMultipleChoice,
    "image-classification": AutoModelForImageClassification,
    "audio-classification": AutoModelForAudioClassification,
}

#: Settings of a family beyond those of a text model, by the `model_type` of its config. Settings that scale or
#: bound the logits are far from 1: a loss that forgets them must differ.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"hidden_dim": 32},
    "roberta": {},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "electra": {"embedding_size": 8},
    "modernbert": {"global_attn_every_n_layers": 1, "cls_token_id": 1, "sep_token_id": 2},
    "albert": {"embedding_size": 8},
    "gpt2": {"n_inner": 32},
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "mixtral": {
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    },
    "t5": {"d_kv": 8, "d_ff": 32, "decoder_start_token_id": PAD, "tie_word_embeddings": True},
    "bart": {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "decoder_start_token_id": 2,
        "init_std": 0.3,
    },
    "m2m_100": {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "decoder_start_token_id": 2,
        "init_std": 0.3,
    },
    "vit": {"image_size": SIDE, "patch_size": 4},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "layer_type": "basic"},
    "wav2vec2": {
        "conv_dim": [8, 8],
        "conv_kernel": [4, 3],
        "conv_stride": [3, 2],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 8,
        "mask_time_prob": 0.0,
    },
}


def tiny_model(family: str, head: str, layers: int = 2, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Make a model with random nonzero weights, and without dropout unless `settings` have one.

    Args:
        family: A key of `FAMILIES`.
        head: A key of `HEADS`.
        layers: Number of layers (of stages of a ResNet; of encoder and decoder each).
        seed: Seed of the weights.
        **settings: More settings of the config.
    """
    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 2 if head == "question-answering" else NUM_LABELS,
        "initializer_range": 0.3,
    }
    if "encoder_ffn_dim" in FAMILIES[family]:
        config |= {"encoder_layers": layers, "decoder_layers": layers}
    if family == "resnet":
        config |= {"depths": [layers, 1]}
    config = AutoConfig.for_model(family, **{**config, **FAMILIES[family], **settings})
    config.update({name: 0.0 for name in config.to_dict() if "drop" in name and name not in settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HEADS[head].from_config(config)
        # Biases start at zero, and norms at one: a loss that forgets them would be right.
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.requires_grad or name == "final_logits_bias":
                tensor.data.add_(0.1 * torch.randn_like(tensor))
    return model.train()


def tiny_batch(head: str, rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    """Make a batch of random inputs, padded at the right, with some ignored labels.

    Args:
        head: A key of `HEADS`.
        rows: Number of rows.
        seed: Seed of the values.
    """
    make = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, NUM_LABELS, (rows,), generator=make)
    if head == "image-classification":
        return {"pixel_values": torch.randn(rows, 3, SIDE, SIDE, generator=make), "labels": labels}
    if head == "audio-classification":
        return {"input_values": torch.randn(rows, SAMPLES, generator=make), "labels": labels}
    if head == "multiple-choice":
        flat = tiny_text(rows * CHOICES, make)
        batch = {name: value.unflatten(0, (rows, CHOICES)) for name, value in flat.items()}
        return {**batch, "labels": labels % CHOICES}
    batch = tiny_text(rows, make)
    mask = batch["attention_mask"].bool()
    random = torch.randint(3, VOCAB_SIZE, mask.shape, generator=make)
    if head == "question-answering":
        ends = mask.sum(-1) - 1
        return {**batch, "start_positions": ends // 3, "end_positions": ends}
    if head == "seq2seq-lm":
        labels = random[:, :TARGET_LENGTH].masked_fill(~mask[:, LENGTH - TARGET_LENGTH :], IGNORED)
        return {name: batch[name] for name in ("input_ids", "attention_mask")} | {"labels": labels}
    if head == "causal-lm":
        prompt = torch.arange(LENGTH) < torch.arange(rows)[:, None] % 3
        labels = batch["input_ids"].masked_fill(prompt | ~mask, IGNORED)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    scored = mask & (torch.rand(mask.shape, generator=make) < 0.4)
    labels = random if head == "masked-lm" else random % NUM_LABELS
    return {**batch, "labels": labels.masked_fill(~scored, IGNORED)}


def tiny_text(rows: int, make: torch.Generator) -> dict[str, Tensor]:
    """Token ids of texts of different lengths, at least 4, the first as long as all columns."""
    lengths = torch.randint(4, LENGTH + 1, (rows, 1), generator=make)
    lengths[0] = LENGTH
    mask = torch.arange(LENGTH) < lengths
    return {
        "input_ids": torch.randint(3, VOCAB_SIZE, mask.shape, generator=make).masked_fill(~mask, PAD),
        "attention_mask": mask.long(),
        "token_type_ids": mask.long() * (torch.arange(LENGTH) > 2),
    }


def rows_of(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch as the examples of a data set."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
