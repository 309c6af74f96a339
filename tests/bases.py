"""The base models that every test of the method runs on, tiny and random, with inputs and a loss for each.

Dropout is off everywhere: two models with the same weights must give the same answers while they train. Weights start
smaller than in `support`, and adapters add less than the answers themselves: what is compared here must not differ by
more than rounding, which larger ones amplify.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM, RobertaConfig, RobertaForSequenceClassification

from tests.support import VOCAB_SIZE, tiny_model

BASES = ("llama", "qwen3", "gemma3", "gpt2", "opt", "roberta", "linears")
LABELS = 3
INIT = 0.05


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.linear(x).relu()
        return y


class Linears(nn.Module):
    """A plain module: no configuration, no transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        for block in self.blocks:
            hidden = block(hidden)
        y: Tensor = self.last(hidden)
        return y


def make_base(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base model in eval mode: the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "opt":
            opt = OPTConfig(
                vocab_size=VOCAB_SIZE, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64, init_std=INIT, dropout=0.0,
            )  # fmt: skip
            model: nn.Module = OPTForCausalLM(opt)
        elif name == "roberta":
            roberta = RobertaConfig(
                vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64, initializer_range=INIT, num_labels=LABELS,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )  # fmt: skip
            model = RobertaForSequenceClassification(roberta)
        elif name == "linears":
            model = Linears()
        elif name == "gpt2":
            model = tiny_model(name, initializer_range=INIT, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        else:
            model = tiny_model(name, initializer_range=INIT)
    return model.eval().to(dtype)


def hyperparameters(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments that make an adapter whose effect shows, for ours and for PEFT's configuration alike."""
    targets = {
        "gpt2": ["c_attn", "c_fc"],
        "opt": ["q_proj", "out_proj", "fc1"],
        "roberta": ["query", "value", "output.dense"],
        "linears": ["first", "linear"],
    }
    values: dict[str, Any] = {
        "r": 3,
        "num_vectors": 20,
        "vector_length": 16,
        "topk": 2,
        "target_modules": targets.get(name, ["q_proj", "v_proj", "down_proj"]),
        "init_vector_bank_bound": 0.3,
        "init_logits_std": 1.0,
        "fan_in_fan_out": name == "gpt2",
        "task_type": {"roberta": "SEQ_CLS", "linears": None}.get(name, "CAUSAL_LM"),
    }
    return {**values, **changes}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of a forward of four rows."""
    generator = torch.Generator().manual_seed(1)
    if name == "linears":
        return {"x": torch.randn(4, 5, 32, generator=generator).to(dtype)}
    return {"input_ids": torch.randint(3, VOCAB_SIZE, (4, 12), generator=generator)}


def outputs(name: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits, or the plain module's answer, of `inputs`."""
    result = model(**inputs(name, dtype))
    tensor: Tensor = result if name == "linears" else result.logits
    return tensor


def loss(name: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """A loss that every part of the model has a share in."""
    found = outputs(name, model, dtype).float()
    if name == "linears":
        return F.mse_loss(found, torch.ones_like(found))
    if name == "roberta":
        return F.cross_entropy(found, torch.arange(4) % LABELS)
    ids = inputs(name)["input_ids"]
    return F.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
