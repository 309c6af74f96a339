"""Request bodies: their fields, ranges and defaults. Validators see the server's `Caps`; nothing here knows a model.

Sizes that depend on the base model (context, vocabulary) are checked in `prepare.py`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.api.fields import (
    CHAT_UNSUPPORTED,
    COMPLETION_UNSUPPORTED,
    EMBEDDING_UNSUPPORTED,
    TOKENIZE_UNSUPPORTED,
    RequestModel,
)
from serving.api.messages import ChatMessage, ToolChoice, ToolDefinition
from serving.api.sampling import SamplingBody, or_default
from serving.api.structures import ResponseFormat
from serving.api.values import Choices, Count, Prompts, TokenId, Top, at_most, fault
from serving.types import ChatOptions, Structure


class StreamOptions(BaseModel):
    """`include_usage` asks for a last chunk with the counts of tokens."""

    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool | None = Field(None, description="End with a chunk of the counts of tokens.")
    continuous_usage_stats: Literal[False] | None = Field(None, description="Not supported.")


class GenerationBody(SamplingBody):
    """What the two generating routes of OpenAI's older kind share."""

    n: Choices | None = Field(None, description="Choices for each prompt.")
    max_tokens: Count | None = Field(
        None, description="Most tokens to generate; 0 only scores the prompt, with echo or prompt_logprobs."
    )
    max_completion_tokens: Count | None = Field(None, description="The newer name of max_tokens, which wins.")
    prompt_logprobs: Top | None = Field(
        None, description="Log probabilities of the prompt's tokens, with so many of the likeliest ones."
    )
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")

    @property
    def requested_tokens(self) -> int | None:
        """The most tokens to generate, None where the request leaves it open."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def choices(self) -> int:
        """Choices for each prompt."""
        return or_default(self.n, 1)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens to tell of at each of the prompt's, None for nothing at all."""
        return self.prompt_logprobs

    @property
    def told(self) -> int | None:
        """The same for generated tokens."""
        return None

    @property
    def structure(self) -> tuple[Structure, str] | None:
        if self.response_format is not None and (structure := self.response_format.structure()):
            return structure
        return super().structure

    @model_validator(mode="after")
    def _one_structure(self) -> GenerationBody:
        if self.structured_outputs is not None and self.response_format and self.response_format.structure():
            raise fault("structured_outputs", "response_format and structured_outputs cannot be combined")
        return self


class CompletionBody(GenerationBody):
    """`POST /v1/completions`. Without `max_tokens` up to 16 tokens are generated."""

    unsupported = COMPLETION_UNSUPPORTED

    prompt: Prompts
    add_special_tokens: bool | None = Field(None, description="Begin texts as the model expects; true without it.")
    echo: bool | None = Field(None, description="The answer begins with the prompt.")
    logprobs: Top | None = Field(
        None, description="Log probabilities of generated tokens (with echo of the prompt's too), with so many others."
    )

    @property
    def scored(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        given = [top for top in (echoed, self.prompt_logprobs) if top is not None]
        return max(given, default=None)

    @property
    def told(self) -> int | None:
        return self.logprobs


Messages = Annotated[list[ChatMessage], Field(min_length=1)]
Tools = Annotated[list[ToolDefinition], at_most("tools")]
TemplateArguments = Annotated[dict[str, Any] | None, Field(description="Further variables of the chat template.")]


class ChatPrompt(RequestModel):
    """How messages become a prompt."""

    tools: Tools | None = None
    add_generation_prompt: bool | None = Field(None, description="Begin the assistant's answer; true without it.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message instead of answering.")
    chat_template_kwargs: TemplateArguments = None

    @property
    def offered(self) -> list[ToolDefinition]:
        """The tools that may be called."""
        return self.tools or []

    def options(self) -> ChatOptions:
        """How the template is to be applied."""
        going_on = bool(self.continue_final_message)
        arguments = json.dumps(self.chat_template_kwargs) if self.chat_template_kwargs else None
        return ChatOptions(
            tools=tuple(tool.tool() for tool in self.offered),
            add_generation_prompt=or_default(self.add_generation_prompt, not going_on),
            continue_final_message=going_on,
            template_arguments=arguments,
        )

    @model_validator(mode="after")
    def _begin_or_go_on(self) -> ChatPrompt:
        if self.add_generation_prompt and self.continue_final_message:
            raise fault(
                "continue_final_message", "add_generation_prompt and continue_final_message cannot both be true"
            )
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise fault("tools", "tools must have different names")
        return self


class ChatBody(GenerationBody, ChatPrompt):
    """`POST /v1/chat/completions`. Without `max_tokens` the answer may fill the rest of the context."""

    unsupported = CHAT_UNSUPPORTED

    messages: Messages
    logprobs: bool | None = Field(None, description="Log probabilities of generated tokens.")
    top_logprobs: Top | None = Field(None, description="With so many of the likeliest ones; only with logprobs.")
    tool_choice: ToolChoice | None = Field(None, description="`auto` without it, where there are tools.")
    parallel_tool_calls: bool | None = Field(None, description="Whether several calls may be made; true without it.")

    @property
    def told(self) -> int | None:
        return or_default(self.top_logprobs, 0) if self.logprobs else None

    @property
    def named(self) -> str | None:
        """The one function that must be called, if it is named."""
        return self.tool_choice.function.name if self.tool_choice and self.tool_choice.function else None

    @property
    def offered(self) -> list[ToolDefinition]:
        """The tools that may be called."""
        if self.tool_choice is not None and self.tool_choice.type == "none":
            return []
        return [tool for tool in self.tools or () if self.named in (None, tool.function.name)]

    @property
    def structure(self) -> tuple[Structure, str] | None:
        answer = super().structure
        if not self.offered:
            return answer
        functions = [tool.tool() for tool in self.offered]
        rule = {
            "tools": [{"name": function.name, "parameters": json.loads(function.parameters)} for function in functions],
            "required": self.tool_choice is not None and self.tool_choice.must_call,
            "parallel": self.named is None and or_default(self.parallel_tool_calls, True),
            "answer": None if answer is None else json.loads(answer[0].text or '{"type": "object"}'),
        }
        return Structure("tools", json.dumps(rule, ensure_ascii=False)), "tools"

    @model_validator(mode="after")
    def _what_belongs_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("top_logprobs", "top_logprobs may only be set when logprobs is true")
        if self.tool_choice is not None and self.tool_choice.must_call and not self.tools:
            raise fault("tool_choice", "tool_choice may only be set when tools are given")
        if self.tools and self.named and not self.offered:
            raise fault("tool_choice.function.name", f"{self.named} is none of the tools")
        if self.offered and self.structured_outputs is not None:
            raise fault("structured_outputs", "structured_outputs cannot be combined with tools")
        return self


class TokenizeBody(ChatPrompt):
    """`POST /tokenize`: either a `prompt` or the `messages` of a chat."""

    unsupported = TOKENIZE_UNSUPPORTED

    model: str | None = None
    prompt: str | None = Field(None, examples=["The lighthouse keeper"])
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Begin a text as the model expects; true without it.")
    return_token_strs: bool | None = Field(None, description="Give the tokens as texts too.")


class EmbeddingBody(RequestModel):
    """`POST /v1/embeddings`. Each input gets a vector."""

    unsupported = EMBEDDING_UNSUPPORTED

    model: str = Field(description="The base model, or an adapter as in the other routes.", examples=["saltspoke"])
    adapter_id: str | None = Field(None, description="Which adapter answers, whatever `model` says.")
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Numbers, or the base64 of little-endian 32-bit floats."
    )
    add_special_tokens: bool | None = Field(None, description="Begin texts as the model expects; true without it.")
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Only so many of an input's last tokens are used."
    )
    user: str | None = Field(None, description="Accepted and not used.")


class DetokenizeBody(RequestModel):
    """`POST /detokenize`."""

    model: str | None = Field(None, description="Only has to exist: adapters share the base's tokenizer.")
    tokens: list[TokenId] = Field(description="Special ones are written out.", examples=[[2, 818, 171]])


class ActivateBody(RequestModel):
    """Which revision the bare name shall mean."""

    revision: str = Field(description="One of the adapter's revisions.", examples=["0f1e2d3c4b5a6978"])


class SetAdapterBody(RequestModel):
    """``name`` follows activation, ``name@revision`` pins, null unsets."""

    adapter: str | None = Field(description="What requests use that name no adapter.", examples=["saltspoke"])


class LoadAdapterBody(RequestModel):
    """vLLM's body."""

    lora_name: str = Field(description="Name of the shared adapter.", examples=["saltspoke"])
    lora_path: str = Field(
        description="A folder under one of the server's adapter roots.", examples=["/srv/adapters/saltspoke"]
    )
    load_inplace: bool | None = Field(None, description="Replace an adapter already loaded under that name.")


class UnloadAdapterBody(RequestModel):
    """vLLM's body."""

    lora_name: str = Field(description="Name of the shared adapter.", examples=["saltspoke"])
