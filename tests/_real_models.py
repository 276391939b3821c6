"""Architectures from the transformers library, tiny and untrained: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library looks

import torch
import transformers
from _models import WORDS, Live, Program, adamw
from torch import Tensor, nn
from torch.optim import lr_scheduler

transformers.logging.set_verbosity_error()

CLASSES = 5
_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=4,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=WORDS, num_key_value_heads=1, max_position_embeddings=4, **_SMALL
    )
    return transformers.LlamaForCausalLM(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=4, **_SMALL)
    return transformers.BertForMaskedLM(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_dropout_prob=0.1, num_labels=CLASSES, **_SMALL
    )
    return transformers.ViTForImageClassification(config)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return transformers.ResNetForImageClassification(config)


def _words(tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens, "labels": tokens}


def _masked_words(tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens, "labels": tokens, "attention_mask": (tokens > 1).long()}


def _pictures(tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(int((tokens * tokens.new_tensor([1, 11, 121])).sum()))
    pictures = torch.randn(len(targets), 3, 16, 16, generator=drawn)
    return {"pixel_values": pictures, "labels": targets % CLASSES}


@dataclass(frozen=True)
class RealModel:
    build: Callable[[], nn.Module]
    arguments: Callable[[Tensor, Tensor], dict[str, Tensor]]  # of forward, from a batch

    def program(self, **settings: Any) -> Program:
        """AdamW with three param groups, clipping, and a learning rate that changes each step."""
        return Program(
            model=self.build,
            optimizer=adamw,
            scheduler=lambda base: lr_scheduler.CosineAnnealingLR(base, T_max=7),
            loop=partial(_iteration, self),
            **settings,
        )

    def backward(self, live: Live) -> None:
        live.zero_grad()
        live.loss = live.model(**self.arguments(*next(live.data))).loss
        live.loss.backward()


def _iteration(real: RealModel, live: Live) -> None:
    real.backward(live)
    nn.utils.clip_grad_norm_(live.model.parameters(), 1.0)
    live.step()
    assert live.scheduler is not None
    live.scheduler.step()


REAL_MODELS = {
    "GPT-2": RealModel(_gpt2, _words),
    "Llama": RealModel(_llama, _words),
    "BERT": RealModel(_bert, _masked_words),
    "ViT": RealModel(_vit, _pictures),
    "ResNet": RealModel(_resnet, _pictures),
}
