"""Many adapters over few slots and little memory: every request runs on its own adapter's weights and on nothing else.

The requests go the way of a server's: a name, the catalog, a pin, the engine. The quiet run is another engine, which
has one request and one adapter at a time.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from serving.adapters.catalog import Catalog
from serving.adapters.registry import Registry
from serving.adapters.storage.folder import open_folder
from serving.engine import Engine
from serving.engine.streams import Generation
from serving.store.database import open_database, sqlite_url
from serving.types import Caller, GenerationRequest, SamplingParams
from tests.integration.engine.conftest import tiny_engine
from tests.support import random_adapter, tiny_model
from vblora.batched import AdapterSlots
from vblora.checkpoint import CONFIG_FILE, WEIGHTS_FILE, AdapterCheckpoint, write_adapter

ADAPTERS, REQUESTS, AT_ONCE = 1000, 500, 16
SLOTS = 8 + 1  # slot 0 is no adapter's
MEMORY = 16 * 2**10  # bytes: for the bank and about ten adapters
NEAR = 1e-4  # between the two best logits, where rounding may decide
OPERATOR = Caller("boss", frozenset({"operator"}))
MODEL = tiny_model()
BANK = torch.rand(24, 8, generator=torch.Generator().manual_seed(0)) - 0.5


def adapter(number: int) -> AdapterCheckpoint:
    """One of many that share a bank, of ranks 2, 4 and 8: of two buckets."""
    return random_adapter(MODEL, rank=(2, 4, 8)[number % 3], seed=number, bank=BANK)


@dataclass(frozen=True)
class Shop:
    """An engine and a catalog over it."""

    engine: Engine
    catalog: Catalog

    def add(self, number: int, content: int | None = None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), adapter(number if content is None else content))
            files = (Path(folder) / CONFIG_FILE).read_bytes(), (Path(folder) / WEIGHTS_FILE).read_bytes()
        self.catalog.add(OPERATOR, f"a{number}", *files, shared=True)

    @contextmanager
    def pinned(self, number: int | None, request: GenerationRequest) -> Iterator[GenerationRequest]:
        """The request on an adapter, which is held meanwhile."""
        if number is None:
            yield request
            return
        pin = self.catalog.pin(request.tenant, f"a{number}")
        try:
            yield replace(request, revision=pin.content_hash)
        finally:
            pin.release()

    def answer(self, number: int | None, request: GenerationRequest) -> Generation:
        with self.pinned(number, request) as ready:
            return self.engine.generate([ready])[0]


@contextmanager
def shop(folder: Path, **settings: int) -> Iterator[Shop]:
    engine = tiny_engine(**settings)
    engine.start()
    database = open_database(sqlite_url(folder / "registry.db"))
    with closing(engine):
        yield Shop(
            engine,
            Catalog(
                Registry(database, "tiny"), open_folder(folder / "revisions"), engine.residency, engine.layout.compact
            ),
        )
    database.dispose()


@contextmanager
def quiet() -> Iterator[Callable[[int | None, GenerationRequest], Generation]]:
    """Answers requests one at a time, with nothing else in memory, in a slot or in the cache."""
    engine = tiny_engine()
    engine.start()

    def solo(number: int | None, request: GenerationRequest) -> Generation:
        revision = None if number is None else engine.load_adapter(adapter(number))
        sampling = replace(request.sampling, logprobs=2)
        alone = replace(request, revision=revision, sampling=sampling, cache_salt=request.request_id)
        (answer,) = engine.generate([alone])
        if revision is not None:
            engine.residency.retire(revision)
        return answer

    with closing(engine):
        yield solo


def request(index: int, tenant: str, prompt: Sequence[int], max_tokens: int) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return GenerationRequest(f"r{index}", tenant, tuple(prompt), params)


def mixed_work() -> list[tuple[int | None, GenerationRequest]]:
    """A few adapters that many ask for, many that few ask for, and the base model; long and short, of three tenants."""
    chance = random.Random(7)
    work: list[tuple[int | None, GenerationRequest]] = []
    for index in range(REQUESTS):
        number = chance.choice([None, chance.randrange(4), chance.randrange(4), *(chance.randrange(ADAPTERS),) * 7])
        prompt = [chance.randrange(3, 300) for _ in range(chance.choice([2, 5, 9, 20, 40]))]
        work.append((number, request(index, chance.choice(["ann", "bob", "cid"]), prompt, chance.choice([4, 8, 12]))))
    return work


def near_ties(answers: Sequence[Generation], solos: Sequence[Generation]) -> int:
    """How many answers differ from their solo run; each may only where two tokens were as good."""
    count = 0
    for answer, solo in zip(answers, solos, strict=True):
        assert answer.finish_reason == "length"
        pairs = enumerate(zip(answer.token_ids, solo.token_ids, strict=True))
        first = next((index for index, (ours, alone) in pairs if ours != alone), None)
        if first is not None:
            (_, best), (_, second) = solo.logprobs[first].top
            assert best - second <= NEAR
            count += 1
    return count


def assert_slots_hold_their_content(engine: Engine) -> int:
    """Every slot is zeros, or what its revision composes to and nothing beside it; how many hold something."""
    tables, fresh = engine.runner.slots.tables, AdapterSlots(engine.layout, 2)
    known = {slot: content for content, slot in engine._core.slots._slot_of.items() if content in engine.residency}
    for slot in range(SLOTS):
        if slot in known:
            fresh.fill(1, engine.residency.get(known[slot]))
        for bucket, table in tables.items():
            if slot in known:
                assert torch.equal(table[slot], fresh.tables[bucket][1])
            else:
                assert not table[slot].any()
    return len(known)


def test_a_thousand_adapters_over_eight_slots_answer_as_each_does_alone(tmp_path: Path) -> None:
    """Seen to fail where a slot that changes hands keeps what it held."""
    work = mixed_work()
    with shop(tmp_path, adapter_slots=SLOTS, adapter_memory_bytes=MEMORY, max_batch_size=AT_ONCE) as busy:
        for number in range(ADAPTERS):
            busy.add(number)
        assert len(busy.catalog) == ADAPTERS
        before = busy.engine.residency.stats().evictions
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda one: busy.answer(*one), work))
        memory, slots = busy.engine.residency.stats(), busy.engine.stats().slot_evictions
        assert memory.evictions - before > REQUESTS / 2
        assert slots > 0
        assert memory.bytes + memory.bank_bytes <= MEMORY
        busy.answer(None, request(REQUESTS, "ann", [5], 1))  # a step takes what left memory out of the slots
        assert assert_slots_hold_their_content(busy.engine) > 0
        for content in list(busy.engine.residency._residents):
            busy.engine.residency.retire(content)
        busy.answer(None, request(REQUESTS + 1, "ann", [5], 1))
        assert assert_slots_hold_their_content(busy.engine) == 0
    with quiet() as solo:
        solos = [solo(*one) for one in work]
    assert near_ties(answers, solos) <= REQUESTS / 100
    assert len({solo.token_ids for solo in solos}) > 0.9 * REQUESTS  # else a wrong adapter would not show


def test_two_streams_do_not_notice_what_comes_and_goes_beside_them(tmp_path: Path) -> None:
    """A slot for one adapter more, which two others want at a time, and memory for none. The streams' own adapters are
    deleted, and replaced, while they run. Seen to fail where a slot in use is given away."""
    streams = [(number, request(number, "ann", [3 + number, 20, 50], 150)) for number in (0, 1)]
    with shop(tmp_path, adapter_slots=4, adapter_memory_bytes=1) as busy, ThreadPoolExecutor(4) as pool:
        for number in range(12):
            busy.add(number)
        began = [busy.catalog.pin("ann", f"a{number}").content_hash for number, _ in streams]
        answers: list[Generation] = []
        others = 0
        while others <= 20:  # once, unless the machine has other work
            running = [
                pool.submit(busy.engine.generate, [replace(wanted, request_id=f"{number}{others}", revision=content)])
                for (number, wanted), content in zip(streams, began, strict=True)
            ]
            while not all(future.done() for future in running):
                pair = [(2 + (others + more) % 10, request(100 + others + more, "bob", [7, 8], 2)) for more in (0, 1)]
                list(pool.map(lambda one: busy.answer(*one), pair))
                others += 2
                if others == 6:
                    busy.catalog.delete(OPERATOR, "a0")
                    busy.catalog.delete(OPERATOR, "a1")
                    busy.add(1, content=50)
            answers += [future.result()[0] for future in running]
        assert busy.engine.stats().slot_evictions + busy.engine.residency.stats().evictions > 20
    with quiet() as solo:
        solos = [solo(*one) for one in streams]
    assert near_ties(answers, solos * (len(answers) // 2)) == 0
    assert answers[0].token_ids != answers[1].token_ids
