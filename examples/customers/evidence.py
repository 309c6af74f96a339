"""What the four demo adapters have learnt, on text that none of them was trained on.

    python -m examples.customers.evidence [--adapters FOLDER] [--model demo] [--rows N] [--plot FILE.png] [--answers]

prints two Markdown tables for the customers it finds in FOLDER (the shipped adapters unless given): the loss of each
customer's held-out text, in nats a token, on the base model and on every adapter; and the share of greedy answers to
the held-out messages which pass the customer's style check (`styles.py`) and which end by themselves, of the own
adapter and of the base model. All in float32. --plot draws the losses of the training runs; --answers prints every
answer with what is wrong with it.

Exits with 1 unless each customer's own adapter is the best of its row, `LEAST_GAIN` below the base model there and
`LEAST_MEAN_GAIN` on average, and `LEAST_IN_STYLE` of its answers are in style and `LEAST_ENDED` end by themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.customers.styles import STYLES
from serving.demo import ADAPTERS
from serving.engine import Engine
from serving.types import EngineSettings, GenerationRequest, Message, SamplingParams
from vblora import VBLoRAModel
from vblora.data import Row, read_rows
from vblora.integrations.base_models import load_base_model
from vblora.loss import evaluate_loss
from vblora.record import REPORT_FILE

DATA = Path(__file__).parent
BASE = "base"
DTYPE = "float32"
MAX_TOKENS = 96
LEAST_GAIN = 0.15
LEAST_MEAN_GAIN = 0.25
LEAST_IN_STYLE = 0.70
LEAST_ENDED = 0.90

Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Answer:
    """What one model says to one held-out message; `fault` is what the style check found, None if nothing."""

    message: str
    text: str
    ended: bool
    fault: str | None


def held_out(customer: str, rows: int | None) -> list[Row]:
    return read_rows(DATA / f"{customer}.heldout.jsonl")[:rows]


def measure_losses(model: str, adapters: Path, customers: Sequence[str], rows: int | None) -> Table:
    """customer → column → nats a token of its held-out text; the columns are the base model and every adapter."""
    base = load_base_model(model, dtype=DTYPE)
    adapted = VBLoRAModel.from_pretrained(base.model, adapters / customers[0], customers[0])
    for customer in customers[1:]:
        adapted.load_adapter(adapters / customer, customer)
    table: Table = {}
    for customer in customers:
        text = held_out(customer, rows)
        with adapted.disable_adapter():
            table[customer] = {BASE: evaluate_loss(adapted, base.tokenizer, text)}
        for name in customers:
            adapted.set_adapter(name, inference_mode=True)
            table[customer][name] = evaluate_loss(adapted, base.tokenizer, text)
    return table


def ask(model: str, adapters: Path, customers: Sequence[str], rows: int | None) -> dict[str, dict[str, list[Answer]]]:
    """customer → own adapter and base model → greedy answers to its held-out messages, from the serving engine."""
    engine = Engine.from_settings(EngineSettings(model=model, dtype=DTYPE))
    try:
        return {
            customer: {
                name: _ask(engine, customer, revision, rows)
                for name, revision in ((customer, engine.load_adapter(adapters / customer)), (BASE, None))
            }
            for customer in customers
        }
    finally:
        engine.close()


def _ask(engine: Engine, customer: str, revision: str | None, rows: int | None) -> list[Answer]:
    messages = [row.values["messages"][0]["content"] for row in held_out(customer, rows)]
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    requests = [
        GenerationRequest(
            request_id=f"{customer}-{number}",
            tenant="evidence",
            prompt_token_ids=tuple(engine.codec.encode_chat([Message("user", message)])),
            sampling=sampling,
            revision=revision,
        )
        for number, message in enumerate(messages)
    ]
    return [
        Answer(message, answer.text.strip(), answer.finish_reason == "stop", STYLES[customer](answer.text))
        for message, answer in zip(messages, engine.generate(requests), strict=True)
    ]


def in_style(answers: Sequence[Answer]) -> float:
    return statistics.mean(answer.fault is None for answer in answers)


def ended(answers: Sequence[Answer]) -> float:
    return statistics.mean(answer.ended for answer in answers)


def loss_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row for each customer, its smallest loss in bold, and how far the own one is below the base's."""
    columns = [BASE, *table]
    lines = [f"| held-out text of | {' | '.join(columns)} | own against base |", f"|---|{'---|' * (len(columns) + 1)}"]
    for customer, losses in table.items():
        best = min(losses.values())
        cells = [f"**{losses[name]:.3f}**" if losses[name] == best else f"{losses[name]:.3f}" for name in columns]
        lines.append(f"| {customer} | {' | '.join(cells)} | −{gain(losses, customer):.0%} |")
    return "\n".join(lines)


def gain(losses: Mapping[str, float], customer: str) -> float:
    """How far the own adapter's loss lies below the base model's, as a share of that."""
    return 1 - losses[customer] / losses[BASE]


def style_table(answers: Mapping[str, Mapping[str, Sequence[Answer]]]) -> str:
    """Markdown: a row for each customer."""
    lines = ["| customer | in style | ends by itself | the base: in style | ends by itself |", "|---|---|---|---|---|"]
    for customer, of in answers.items():
        shares = [share(of[name]) for name in (customer, BASE) for share in (in_style, ended)]
        lines.append(f"| {customer} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    return "\n".join(lines)


def shortcomings(losses: Table, answers: Mapping[str, Mapping[str, Sequence[Answer]]]) -> list[str]:
    """What is not as good as the constants above demand, in words."""
    found = []
    for customer, row in losses.items():
        if row[customer] > min(row.values()):
            found.append(f"{customer}: another adapter is better on its text")
        if gain(row, customer) < LEAST_GAIN:
            found.append(f"{customer}: {gain(row, customer):.1%} below the base's loss, not {LEAST_GAIN:.1%}")
    if (mean := statistics.mean(gain(row, customer) for customer, row in losses.items())) < LEAST_MEAN_GAIN:
        found.append(f"{mean:.1%} below the base's loss on average, not {LEAST_MEAN_GAIN:.1%}")
    for customer, of in answers.items():
        if (share := in_style(of[customer])) < LEAST_IN_STYLE:
            found.append(f"{customer}: {share:.1%} of the answers in style, not {LEAST_IN_STYLE:.1%}")
        if (share := ended(of[customer])) < LEAST_ENDED:
            found.append(f"{customer}: {share:.1%} of the answers end by themselves, not {LEAST_ENDED:.1%}")
    return found


def plot(adapters: Path, customers: Sequence[str], target: Path) -> None:
    """Draw the training loss of every customer, step by step and as the mean of `window` steps."""
    from matplotlib.figure import Figure  # of the extra `train`

    window = 10
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for number, customer in enumerate(customers):
        losses: list[float] = json.loads((adapters / customer / REPORT_FILE).read_text())["report"]["losses"]
        means = [statistics.mean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)]
        axes.plot(losses, color=f"C{number}", alpha=0.25, linewidth=0.8)
        axes.plot(means, color=f"C{number}", label=customer)
    axes.set(xlabel="step", ylabel="training loss, nats a token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="the folder of the adapters' folders")
    parser.add_argument("--model", default="demo", help="the base model (default demo)")
    parser.add_argument("--rows", type=int, help="held-out rows a customer (default all)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the training losses")
    parser.add_argument("--answers", action="store_true", help="print every answer")
    options = parser.parse_args()
    customers = [name for name in sorted(STYLES) if (options.adapters / name).is_dir()]
    if not customers:
        parser.error(f"{options.adapters} holds no adapter of {', '.join(sorted(STYLES))}")
    if options.plot:
        plot(options.adapters, customers, options.plot)
    losses = measure_losses(options.model, options.adapters, customers, options.rows)
    print(loss_table(losses), end="\n\n", flush=True)
    answers = ask(options.model, options.adapters, customers, options.rows)
    print(style_table(answers))
    if options.answers:
        _print_answers(answers)
    short = shortcomings(losses, answers)
    for line in short:
        print(f"not good enough: {line}", file=sys.stderr)
    return 1 if short else 0


def _print_answers(answers: Mapping[str, Mapping[str, Sequence[Answer]]]) -> None:
    for customer, of in answers.items():
        for name, said in of.items():
            print(f"\n{customer}'s messages, answered by {name}")
            for answer in said:
                verdict = answer.fault or ("in style" if answer.ended else "in style, but cut")
                print(f"- {answer.message}\n  → {answer.text!r} ({verdict})")


if __name__ == "__main__":
    sys.exit(main())
