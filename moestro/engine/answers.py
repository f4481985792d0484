"""What clients are told: completions and chat completions, whole and in chunks."""

import math
import secrets
import time
from collections.abc import Iterable
from typing import Any

from moestro.engine.protocol import Asked
from moestro.engine.requests import Piece, Request
from moestro.engine.sampler import Choice
from moestro.engine.vocabulary import Vocabulary


class Answers:
    """Builds the objects of one request.

    Args:
        asked: what was asked. model: its name. vocabulary: to show tokens.
    """

    def __init__(self, asked: Asked, model: str, vocabulary: Vocabulary) -> None:
        self.asked = asked
        self.vocabulary = vocabulary
        kind = "chat.completion" if asked.chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "moestro": {"decoding": asked.decoder.name, "exact": asked.decoder.exact},
        }

    def whole(self, pieces: list[list[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """All choices; ``pieces`` of each."""
        choices: list[dict[str, Any]] = []
        for index, parts in enumerate(pieces):
            text = "".join(part.text for part in parts)
            body: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text}} if self.asked.chat else {"text": text}
            )
            logprobs = self._logprobs(parts, 0)
            choices.append({"index": index, **body, "logprobs": logprobs, "finish_reason": parts[-1].finish})
        return {**self.head, "choices": choices, "usage": usage}

    def chunk(self, index: int, parts: list[Piece], offset: int, first: bool) -> dict[str, Any]:
        """News of one choice. offset: characters it told before. first: nothing was told before."""
        text = "".join(part.text for part in parts)
        body: dict[str, Any]
        if self.asked.chat:
            role = {"role": "assistant"} if first else {}
            body = {"delta": {**role, "content": text} if text or first else {}}
        else:
            body = {"text": text}
        choice = {
            "index": index, **body, "logprobs": self._logprobs(parts, offset), "finish_reason": parts[-1].finish,
        }  # fmt: skip
        return self._chunk([choice])

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk that carries counts only."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}

    def _logprobs(self, parts: Iterable[Piece], offset: int) -> dict[str, Any] | None:
        if self.asked.sampling.logprobs is None:
            return None
        told = [(part.choice, part.text) for part in parts]
        if self.asked.chat:
            return {"content": [self._entry(choice) for choice, _ in told if choice is not None]}
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for choice, text in told:
            if choice is not None:
                found["tokens"].append(self.vocabulary.show(choice.token))
                found["token_logprobs"].append(_finite(choice.logprob))
                found["top_logprobs"].append({self.vocabulary.show(t): _finite(v) for t, v in choice.top})
                found["text_offset"].append(offset)
            offset += len(text)
        return found

    def _entry(self, choice: Choice) -> dict[str, Any]:
        def one(token: int, value: float | None) -> dict[str, Any]:
            text = self.vocabulary.show(token)
            return {"token": text, "logprob": _finite(value), "bytes": list(text.encode())}

        return {**one(choice.token, choice.logprob), "top_logprobs": [one(t, v) for t, v in choice.top]}


def usage(requests: list[Request], n: int) -> dict[str, Any]:
    """Counts of tokens; a prompt counts once for all its choices."""
    prompts = sum(len(request.prompt) for request in requests[::n])
    written = sum(len(request.tokens) - len(request.prompt) for request in requests)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": written,
        "total_tokens": prompts + written,
        "prompt_tokens_details": {"cached_tokens": sum(request.cached for request in requests[::n])},
    }


def _finite(value: float | None) -> float | None:
    """JSON knows no infinity: a closed token is shown as -9999."""
    return value if value is None or math.isfinite(value) else -9999.0
