"""`POST /v1/embeddings`: the mean of a text's last hidden states, as the base model or an adapter computes them.

The vectors are what the causal model makes of a text, averaged over its tokens, beginning of text included, and not
scaled to unit length.
"""

from __future__ import annotations

import base64
import struct
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from serving.api.body import json_body
from serving.api.context import ApiContext, CallerOf, Context, Record, RequestRecord, UntilAnswered
from serving.api.generate import ADAPTER_HEADER, admit
from serving.api.openapi import request_body
from serving.api.prepare import Prepared, Row, encode_prompt, fit
from serving.api.resolve import pin_adapter
from serving.api.rows import Rows, unless_disconnected
from serving.api.sampling import or_default
from serving.api.schemas import EmbeddingBody
from serving.types import Caller, SamplingParams

router = APIRouter(tags=["generation"])


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingReply, openapi_extra=request_body(EmbeddingBody))
async def create_embeddings(
    request: Request,
    body: Annotated[EmbeddingBody, Depends(json_body(EmbeddingBody))],
    context: Context,
    caller: CallerOf,
    record: Record,
    stack: UntilAnswered,
) -> Response:
    """The mean of each input's last hidden states, not scaled to unit length."""
    prepared = await context.threads.run(caller.tenant, _prepare, context, caller, body)
    rows = await admit(context, caller, record, prepared, stack)
    vectors = await unless_disconnected(request, _collect(rows, record))
    data = [Embedding(index=index, embedding=_encoded(body, vector)) for index, vector in enumerate(vectors)]
    usage = EmbeddingUsage(prompt_tokens=record.prompt_tokens, total_tokens=record.prompt_tokens)
    reply = EmbeddingReply(data=data, model=body.model, usage=usage)
    return JSONResponse(reply.model_dump(), headers={ADAPTER_HEADER: record.adapter or ""})


def _prepare(context: ApiContext, caller: Caller, body: EmbeddingBody) -> Prepared:
    rows = []
    for text in body.input:
        tokens = encode_prompt(context, text, or_default(body.add_special_tokens, True), "input")
        tokens = tokens[-or_default(body.truncate_prompt_tokens, 0) :]
        fit(context.card, len(tokens), 0, "input", 0)
        rows.append(Row(tuple(tokens), SamplingParams(max_tokens=0), pooled=True))
    pin = pin_adapter(context.catalog, caller.tenant, context.card.base_id, body.model, body.adapter_id)
    return Prepared(tuple(rows), pin, limit_param="input")


async def _collect(rows: Rows, record: RequestRecord) -> list[tuple[float, ...]]:
    vectors: list[tuple[float, ...]] = [()] * len(rows)
    async for index, event in rows.events():
        record.count(event)
        vectors[index] = event.embedding
    return vectors


def _encoded(body: EmbeddingBody, vector: tuple[float, ...]) -> list[float] | str:
    if body.encoding_format != "base64":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
