"""The loss of a causal language model on training data, without ever holding all of its logits.

Knows transformers' models by the attributes it reads; not adapters, optimizers or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vblora.data import Batch, Example, Row, Tokenizer, collate, encode
from vblora.model import VBLoRAModel

HEAD_CHUNK = 128


def evaluate_loss(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[Row | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> float:
    """The loss in nats a labelled token over all rows (as in data files) of a causal LM, adapted or not.

    Raises `DataError` for a bad row.
    """
    located = [row if isinstance(row, Row) else Row(row, f"row {number}") for number, row in enumerate(rows, 1)]
    examples = [encode(row, tokenizer, max_length) for row in located]
    return mean_loss(model, examples, pad_token(tokenizer), batch_size)


@torch.no_grad()
def mean_loss(model: nn.Module, examples: Sequence[Example], pad_token_id: int, batch_size: int) -> float:
    """The loss in nats a labelled token over all examples, the model in eval mode."""
    was_training = model.training
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    total, count = 0.0, 0
    for first in range(0, len(ordered), batch_size):
        loss, labels = batch_loss(model, collate(ordered[first : first + batch_size], pad_token_id))
        total, count = total + loss.item(), count + labels
    model.train(was_training)
    return total / count


def batch_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """(Summed cross entropy, number of labels). Logits are made for labelled positions only, a chunk at a time."""
    causal: Any = model.model if isinstance(model, VBLoRAModel) else model
    batch = batch.to(causal.device)
    hidden = causal.base_model(use_cache=False, **batch.inputs).last_hidden_state
    labelled = batch.labels != -100
    return head_loss(causal, hidden[labelled], batch.labels[labelled]), int(labelled.sum())


def head_loss(model: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy of the output layer on `hidden` (n, d) against `labels` (n,).

    Never holds more than a chunk of logits: each chunk's gradient with respect to its hidden states is taken at once,
    and handed to autograd as that of a linear function. An output layer that is trained itself gets all at once.
    """
    output: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in output.parameters()):
        return F.cross_entropy(logits(model, hidden).float(), labels, reduction="sum")
    total = torch.zeros((), device=hidden.device)
    gradients = []
    for states, targets in zip(torch.split(hidden, HEAD_CHUNK), torch.split(labels, HEAD_CHUNK), strict=True):
        states = states.detach().requires_grad_(torch.is_grad_enabled())
        loss = F.cross_entropy(logits(model, states).float(), targets, reduction="sum")
        total += loss.detach()
        if states.requires_grad:
            gradients.append(torch.autograd.grad(loss, states)[0])
    if not gradients:
        return total
    linear = (hidden * torch.cat(gradients)).float().sum()
    return linear + (total - linear).detach()


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The logits of a causal LM from the last hidden states, with the scaling that its configuration asks for."""
    output_embeddings: Callable[[], nn.Module] = model.get_output_embeddings  # type: ignore[assignment]
    result: Tensor = output_embeddings()(hidden)
    scale, divisor, cap = (
        getattr(model.config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    result = result * scale if scale else result
    result = result / divisor if divisor else result
    return torch.tanh(result / cap) * cap if cap else result


def pad_token(tokenizer: Any) -> int:
    """Padding is masked and never labelled: any token does."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return int(tokenizer.eos_token_id if pad is None else pad)
