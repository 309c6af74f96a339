"""Whether the texts of a benchmark's sides are as likely as they should be, before their speed counts.

The reference is the base model in float32, with a text's adapter: transformers' forward through `VBLoRAModel`, not the
engine. A side's `regret` is how many nats a token it loses to the reference's own greedy choice after the same tokens,
and may be 0.02; the reference's greedy text has none. `nats` of whole texts are told too, and the greedy text's: after
one near tie they are of different stories, which differ by more than 0.02 either way.
Run as a process of its own: `python -m benchmarks.scoring JOB`, a file of JSON with `model`, `prompt` (token ids) and
`sides`, a list of [seed of the adapter or null, token ids] for each.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from benchmarks.workload import random_adapter, random_content, started_engine
from serving.types import EngineSettings, GenerationRequest, SamplingParams
from vblora import VBLoRAModel
from vblora.checkpoint import write_adapter
from vblora.compact import SlotLayout
from vblora.integrations.base_models import load_base_model

TOLERANCE = 0.02

Seed = int | None
Tokens = tuple[int, ...]
Row = tuple[Seed, Tokens]


class Loss(NamedTuple):
    """Means over a text's tokens, in nats: -log p, and log p of the likeliest token less log p of the text's."""

    nats: float
    regret: float


def greedy_texts(model: str, prompt: Tokens, seeds: Iterable[Seed], length: int) -> dict[Seed, Tokens]:
    """The float32 engine's own greedy texts of `length` tokens, for each adapter by its seed."""
    engine = started_engine(EngineSettings(model=model, dtype="float32"))
    sampling = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
    revisions = {seed: None if seed is None else engine.load_adapter(random_adapter(engine, seed)) for seed in seeds}
    rows = [
        GenerationRequest(f"r{row}", "default", prompt, sampling, revision)
        for row, revision in enumerate(revisions.values())
    ]
    answers = engine.generate(rows)
    engine.close()
    return {seed: answer.token_ids for seed, answer in zip(revisions, answers, strict=True)}


@torch.inference_mode()
def losses(model: Any, prompt: Tokens, texts: Sequence[Tokens]) -> list[Loss]:
    """The losses of each text after the prompt; the texts are of one length."""
    tokens = torch.tensor([[*prompt, *text] for text in texts])
    length = len(texts[0])
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    chosen = logits.gather(-1, tokens[:, -length:, None]).squeeze(-1)
    nats, regret = logits.logsumexp(-1) - chosen, logits.amax(-1) - chosen
    return [Loss(*pair) for pair in zip(nats.mean(-1).tolist(), regret.mean(-1).tolist(), strict=True)]


def losses_of_texts(model: str, prompt: Tokens, texts: Mapping[Seed, Sequence[Tokens]]) -> dict[Row, Loss]:
    """The losses of every text under the reference with its adapter."""
    base = load_base_model(model, dtype="float32").model
    shapes = SlotLayout.from_model(base).modules
    found: dict[Row, Loss] = {}

    def add(scored: Any, seed: Seed) -> None:
        for text, loss in zip(texts[seed], losses(scored, prompt, texts[seed]), strict=True):
            found[seed, text] = loss

    if None in texts:
        add(base, None)
    adapted: VBLoRAModel | None = None
    for seed in (seed for seed in texts if seed is not None):
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(folder, random_content(shapes, seed))
            if adapted is None:
                adapted = VBLoRAModel.from_pretrained(base, folder, str(seed))
            else:
                adapted.load_adapter(folder, str(seed))
                adapted.set_adapter(str(seed))
        add(adapted, seed)
    return found


def score(job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each side: regret and nats a token, and the nats of the reference's greedy texts for the same requests."""
    prompt = tuple(job["prompt"])
    sides = {side: [(seed, tuple(text)) for seed, text in rows] for side, rows in job["sides"].items()}
    rows = [row for side in sides.values() for row in side]
    greedy = greedy_texts(job["model"], prompt, dict.fromkeys(seed for seed, _ in rows), len(rows[0][1]))
    texts: dict[Seed, list[Tokens]] = {seed: [text] for seed, text in greedy.items()}
    for seed, text in dict.fromkeys(rows):
        if text not in texts[seed]:
            texts[seed].append(text)
    found = losses_of_texts(job["model"], prompt, texts)
    return {
        side: {
            "regret": fmean(found[row].regret for row in of_side),
            "nats": fmean(found[row].nats for row in of_side),
            "greedy_nats": fmean(found[seed, greedy[seed]].nats for seed, _ in of_side),
            "same_as_greedy": fmean(text == greedy[seed] for seed, text in of_side),
        }
        for side, of_side in sides.items()
    }


if __name__ == "__main__":
    print(json.dumps(score(json.loads(Path(sys.argv[1]).read_text()))))
