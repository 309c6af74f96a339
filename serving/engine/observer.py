"""An observer for engines that nobody watches."""

from __future__ import annotations

from serving.types import FinishReason, StepReport


class SilentObserver:
    """An `EngineObserver` that nobody listens to."""

    def on_admitted(self, waited_seconds: float) -> None: ...
    def on_first_token(self, seconds: float) -> None: ...
    def on_next_token(self, seconds: float) -> None: ...
    def on_finished(
        self,
        tenant: str,
        reason: FinishReason,
        seconds: float,
        prompt_tokens: int,
        cached_tokens: int,
        generated_tokens: int,
    ) -> None: ...
    def on_step(self, step: StepReport) -> None: ...
    def on_compose(self, seconds: float) -> None: ...
