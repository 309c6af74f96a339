"""lm-evaluation-harness through the server, beside the same sums from transformers. Knows no route.

The task is `facts/`: each choice's score is the sum of the log-probabilities of its tokens after the question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.e2e.clients.process import ClientFailed, run_client

FACTS = Path(__file__).parent / "facts"
TOLERANCE = 1e-3  # nats, of a sum over a choice's tokens
LEAST_ACCURACY = 0.5  # a quarter would be chance

Scores = list[list[float]]


@dataclass(frozen=True)
class Fact:
    """A question, the choices that may follow it, and the number of the right one."""

    question: str
    choices: Sequence[str]
    answer: int


def facts() -> list[Fact]:
    """The rows of the task, in order."""
    return [Fact(**json.loads(line)) for line in (FACTS / "facts.jsonl").read_text().splitlines()]


def harness_scores(
    executable: Path, model: str, tokenizer: Path, folder: Path, environment: Mapping[str, str]
) -> Scores:
    """Each row's scores as lm-evaluation-harness finds them on the server at BASE_URL, run in an empty `folder`.

    Raises `ClientFailed` with its output if it fails.
    """
    arguments = f"model={model},base_url={environment['BASE_URL']}/completions,tokenizer={tokenizer},add_bos_token=True"
    where = f"base_url={environment['BASE_URL']}/completions,max_retries=1"
    arguments = f"model={model},{where},tokenizer={tokenizer},tokenizer_backend=huggingface,add_bos_token=True"
    command = [str(executable), "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "facts"]
    command += ["--include_path", str(FACTS), "--batch_size", "30", "--output_path", str(folder), "--log_samples"]
    output = run_client(command, FACTS, environment)
    found = list(folder.rglob("samples_facts_*.jsonl"))
    if not found:
        raise ClientFailed(output)
    rows = sorted(map(json.loads, found[0].read_text().splitlines()), key=lambda row: int(row["doc_id"]))
    return [[float(score) for score, _ in row["filtered_resps"]] for row in rows]


def direct_scores(folder: Path, rows: Sequence[Fact]) -> Scores:
    """Each row's scores by transformers alone, on the model in `folder` in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [_scores(model, tokenizer, fact) for fact in rows]


@torch.inference_mode()
def _scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fact: Fact) -> list[float]:
    """The row's choices in one batch, filled up on the right, where nothing looks at it."""
    start = len(tokenizer(fact.question).input_ids)
    texts = [f"{fact.question} {choice}" for choice in fact.choices]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    logits = model(**batch).logits[:, start - 1 : -1].log_softmax(-1)
    wanted = batch.input_ids[:, start:]
    found = logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1) * batch.attention_mask[:, start:]
    return [float(score) for score in found.sum(-1)]


def accuracy(scores: Scores, rows: Sequence[Fact]) -> float:
    """The share of rows whose right choice scores highest."""
    right = [row.index(max(row)) == fact.answer for row, fact in zip(scores, rows, strict=True)]
    return sum(right) / len(right)


def largest_difference(first: Scores, second: Scores) -> float:
    """In nats, over all choices of all rows."""
    pairs = zip(first, second, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
