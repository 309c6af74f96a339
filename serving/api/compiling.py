"""What answers must match is compiled before a request goes on, apart from all other work. Knows no engine.

Compiling may take seconds, and one structure is compiled at a time. Requests that wait for it hold no thread, so that
they hold up nobody who wants none; of each tenant one waits for that turn, so that nobody waits for more than one of
another's. A structure that was compiled before does not wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from anyio import fail_after, to_thread

from serving.api.context import ApiContext
from serving.api.sampling import SamplingBody
from serving.api.schemas import ChatBody
from serving.errors import InvalidValue, Overloaded
from serving.types import Caller, Structure

WAIT_SECONDS = 30
RETRY_AFTER_SECONDS = 1


async def compile_structures(context: ApiContext, caller: Caller, body: SamplingBody) -> None:
    """Raises `InvalidValue` for what answers cannot be made to match, `Overloaded` when too many wait."""
    new = [entry for entry in _bounded(context, _of(body)) if not context.structures.known(entry[0])]
    if not new:
        return
    try:
        with fail_after(WAIT_SECONDS):
            async with context.compiling.turn(caller.tenant) as limiter:
                for structure, param in new:
                    await to_thread.run_sync(context.structures.check, structure, param, limiter=limiter)
    except TimeoutError as error:
        raise Overloaded("too many structures wait to be compiled", retry_after=RETRY_AFTER_SECONDS) from error


def _of(body: SamplingBody) -> Iterator[tuple[Structure, str]]:
    """The structures of a request with the fields that hold them: first each tool's, so that a fault names its tool."""
    for index, tool in enumerate(body.offered if isinstance(body, ChatBody) else ()):
        yield Structure("json_schema", tool.tool().parameters), f"tools.{index}.function.parameters"
    if body.structure is not None:
        yield body.structure


def _bounded(context: ApiContext, structures: Iterable[tuple[Structure, str]]) -> Iterator[tuple[Structure, str]]:
    limit = context.caps.structure_bytes
    for structure, param in structures:
        if len(structure.text) > limit:
            message = f"{param}: at most {limit} characters are allowed, got {len(structure.text)}"
            raise InvalidValue(message, param=param)
        yield structure, param
