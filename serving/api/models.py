"""`GET /v1/models`, `GET /v1/models/{id}`, `POST /tokenize`, `POST /detokenize`: the model as a thing to ask about."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from serving.api.body import json_body
from serving.api.context import After, ApiContext, CallerOf, Context, Limit
from serving.api.logprobs import token_text
from serving.api.openapi import request_body
from serving.api.prepare import check_token_ids
from serving.api.replies import DetokenizeReply, ModelEntry, ModelList, TokenizeReply
from serving.api.resolve import parse_model, pin_adapter
from serving.api.schemas import DetokenizeBody, TokenizeBody
from serving.errors import InvalidValue, ModelNotFound
from serving.types import MAX_PAGE, Caller

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(context: Context, caller: CallerOf, limit: Limit = MAX_PAGE, after: After = None) -> ModelList:
    """The base model, and the adapters that the caller may use, by name."""
    card = context.card
    beyond_base = None if after == card.base_id else after
    found = await context.threads.run(caller.tenant, context.catalog.list, caller.tenant, limit + 1, beyond_base)
    entries = [ModelEntry.of_adapter(card, info, info.name, info.active_revision) for info in found]
    return ModelList.of(entries if after is not None else [ModelEntry.of_base(card), *entries], limit)


@router.get("/v1/models/{model:path}")
async def get_model(model: str, context: Context, caller: CallerOf) -> ModelEntry:
    """One of them, under any name that the `model` field of a request takes."""
    return await context.threads.run(caller.tenant, _entry, context, caller, model)


@router.post("/tokenize", openapi_extra=request_body(TokenizeBody))
async def tokenize(
    body: Annotated[TokenizeBody, Depends(json_body(TokenizeBody))], context: Context, caller: CallerOf
) -> TokenizeReply:
    """The tokens of a text, or of a chat up to where the answer begins."""
    tokens = await context.threads.run(caller.tenant, _tokens, context, caller, body)
    texts = [token_text(context.codec.token_bytes(token)) for token in tokens] if body.return_token_strs else None
    return TokenizeReply(count=len(tokens), max_model_len=context.card.max_model_len, tokens=tokens, token_strs=texts)


@router.post("/detokenize", openapi_extra=request_body(DetokenizeBody))
async def detokenize(
    body: Annotated[DetokenizeBody, Depends(json_body(DetokenizeBody))], context: Context, caller: CallerOf
) -> DetokenizeReply:
    """The text of tokens, special ones included."""
    return DetokenizeReply(prompt=await context.threads.run(caller.tenant, _text, context, caller, body))


def _entry(context: ApiContext, caller: Caller, model: str) -> ModelEntry:
    ref = parse_model(model, context.card.base_id)
    if ref is None:
        return ModelEntry.of_base(context.card)
    info = context.catalog.get(caller.tenant, ref.name)
    revision = ref.revision or info.active_revision
    if revision not in {entry.revision for entry in info.revisions}:
        raise ModelNotFound(f"The model {model!r} does not exist.")
    return ModelEntry.of_adapter(context.card, info, model, revision)


def _tokens(context: ApiContext, caller: Caller, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidValue("give either prompt or messages", param="prompt")
    if body.messages is not None and body.add_special_tokens:
        raise InvalidValue("add_special_tokens does not apply to messages", param="add_special_tokens")
    if body.messages is not None:
        tokens = context.codec.encode_chat([message.message() for message in body.messages], body.options())
    else:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        tokens = context.codec.encode(body.prompt or "", add_special_tokens=special)
    _check_model(context, caller, body.model)
    return tokens


def _text(context: ApiContext, caller: Caller, body: DetokenizeBody) -> str:
    check_token_ids(context.card, body.tokens, "tokens")
    _check_model(context, caller, body.model)
    return context.codec.decode(body.tokens, skip_special_tokens=False)


def _check_model(context: ApiContext, caller: Caller, model: str | None) -> None:
    """Adapters share the base's tokenizer, so the model only has to exist."""
    if model is not None and model != context.card.base_id:
        pin = pin_adapter(context.catalog, caller.tenant, context.card.base_id, model, None)
        if pin is not None:
            pin.release()
