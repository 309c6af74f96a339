"""Text ↔ tokens of the base model, chat template included. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from serving.errors import InvalidValue
from serving.types import Message


class ModelCodec:
    """`serving.types.TextCodec` over a transformers tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of `text`, with the model's own beginning of text unless told otherwise."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a chat up to where the model's answer begins.

        Raises `InvalidValue` when the model has no chat template, or its template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidValue("the model has no chat template: use /v1/completions", param="messages")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidValue(f"the chat template refuses these messages: {error}", param="messages") from error
        return self.encode(str(text), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`, which must lie in the vocabulary."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
