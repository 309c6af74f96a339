"""Log probabilities in OpenAI's two shapes. Knows tokens by their ids and bytes, and no engine."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence

from serving.api.replies import ChatTokenLogprob, CompletionLogprobs, PromptLogprob, TopLogprob
from serving.types import TextCodec, TokenLogprob

LEAST = -9999.0  # stands for minus infinity, which JSON does not have


def finite(logprob: float) -> float:
    """A log probability as JSON can hold it."""
    return logprob if math.isfinite(logprob) else LEAST


def token_text(data: bytes) -> str:
    """A token as a text; one that is no whole characters as OpenAI writes it, so that different ones differ."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionLogprobsWriter:
    """`/v1/completions`: four lists side by side. Offsets count characters from the beginning of the choice's text over
    all that one writer has written. The text begins with `text`, the echoed prompt; a first token that does not stand
    in it, such as the model's beginning of text, takes no room."""

    def __init__(self, codec: TextCodec, text: str) -> None:
        self._codec = codec
        self._text = text
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, scores: Sequence[TokenLogprob], first: int | None = None) -> CompletionLogprobs:
        """The lists for the next tokens; `first` is the token before them, the prompt's first, which has no
        probability."""
        lists = CompletionLogprobs()
        if first is not None:
            self._append(lists, first, None, None)
            if not self._text.startswith(lists.tokens[0]):
                self._offset = 0
        for score in scores:
            top = {
                token_text(self._codec.token_bytes(token)): finite(logprob) for token, logprob in reversed(score.top)
            }
            self._append(lists, score.token_id, finite(score.logprob), top)
        return lists

    def _append(
        self, lists: CompletionLogprobs, token: int, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        data = self._codec.token_bytes(token)
        text = token_text(data)
        if data and not 0x80 <= data[0] < 0xC0:  # it begins a character, whether the one before was whole or not
            self._offset += len(self._decoder.decode(b"", final=True))
        lists.tokens.append(text)
        lists.token_logprobs.append(logprob)
        # The token itself is always among them, as with OpenAI.
        lists.top_logprobs.append(None if top is None or logprob is None else {**top, text: logprob})
        lists.text_offset.append(self._offset)
        self._offset += len(self._decoder.decode(data))


def chat_logprobs(codec: TextCodec, scores: Sequence[TokenLogprob]) -> list[ChatTokenLogprob]:
    """`/v1/chat/completions`: an object for each token."""
    return [
        ChatTokenLogprob(
            **_entry(codec, score.token_id, score.logprob).model_dump(),
            top_logprobs=[_entry(codec, token, logprob) for token, logprob in score.top],
        )
        for score in scores
    ]


def _entry(codec: TextCodec, token: int, logprob: float) -> TopLogprob:
    data = codec.token_bytes(token)
    return TopLogprob(token=data.decode("utf-8", "replace"), logprob=finite(logprob), bytes=list(data))


def prompt_logprobs(codec: TextCodec, scores: Sequence[TokenLogprob]) -> list[dict[str, PromptLogprob] | None]:
    """vLLM's shape: null for the first token, then for each token an object by token id, its own always in it."""
    return [None, *(_by_id(codec, score) for score in scores)]


def _by_id(codec: TextCodec, score: TokenLogprob) -> dict[str, PromptLogprob]:
    ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(score.top, 1)]
    return {
        str(token): PromptLogprob(
            logprob=finite(logprob), rank=rank, decoded_token=codec.token_bytes(token).decode("utf-8", "replace")
        )
        for token, logprob, rank in [*ranked, (score.token_id, score.logprob, score.rank)]
    }
