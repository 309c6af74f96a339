"""Text ↔ tokens of the base model, chat template included. Knows no requests."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from serving.engine.chat import TOOLS_IN_TEMPLATE, describe_tools, function_of, plain_turn, turn
from serving.engine.vocabulary import Vocabulary
from serving.errors import InvalidValue
from serving.types import ChatOptions, Message

NO_OPTIONS = ChatOptions()


class ModelCodec:
    """`serving.types.TextCodec` over a transformers tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._taken = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of `text`, with the model's own beginning of text unless told otherwise."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_chat(self, messages: Sequence[Message], options: ChatOptions = NO_OPTIONS) -> list[int]:
        """Tokens of a chat up to where the model's answer begins, or goes on.

        Tools and calls go to the template if it writes them as this server reads them; else they are described in the
        first message. Raises `InvalidValue` when the model has no chat template, or its template refuses.
        """
        template = self._tokenizer.chat_template
        if not template:
            raise InvalidValue("the model has no chat template: use /v1/completions", param="messages")
        native = TOOLS_IN_TEMPLATE in str(template)
        turns = [(turn if native else plain_turn)(message) for message in messages]
        if options.tools and not native:
            turns[0]["content"] = f"{describe_tools(options.tools)}\n\n{turns[0]['content']}"
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                tools=[function_of(tool) for tool in options.tools] if options.tools and native else None,
                tokenize=False,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                **self._template_arguments(options),
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidValue(f"the chat template refuses these messages: {error}", param="messages") from error
        return self.encode(str(text), add_special_tokens=False)

    def _template_arguments(self, options: ChatOptions) -> dict[str, Any]:
        arguments: dict[str, Any] = json.loads(options.template_arguments or "{}")
        for name in arguments:
            if name in self._taken:
                raise InvalidValue(f"chat_template_kwargs may not set {name}", param=f"chat_template_kwargs.{name}")
        return arguments

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`, which must lie in the vocabulary."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, which need not be whole characters."""
        return self._vocabulary.token_bytes(token_id)
