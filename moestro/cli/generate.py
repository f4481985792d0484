"""`moestro generate`: continue a prompt, token by token on standard output."""

import sys
from typing import TYPE_CHECKING, Any

import typer


if TYPE_CHECKING:
    import torch

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def generate(
        model: str = typer.Argument(help="A folder, a GGUF file, wheel:NAME or a hub id."),
        prompt: str = typer.Option(..., "--prompt", help="The text to continue; - reads standard input."),
        max_tokens: int = typer.Option(128, "--max-tokens", min=1, help="Tokens to write at most."),
        temperature: float = typer.Option(0.0, "--temperature", min=0.0, help="0: always the likeliest token."),
        top_p: float = typer.Option(1.0, "--top-p", min=0.0, max=1.0, help="Draw from this much of the probability."),
        top_k: int = typer.Option(0, "--top-k", min=0, help="Draw from this many likeliest tokens; 0: from all."),
        seed: int = typer.Option(0, "--seed", min=0, help="Of the draws; equal seeds give equal texts."),
        chat: bool = typer.Option(False, "--chat", help="Put the prompt into the model's chat template."),
        dtype: str = typer.Option("float32", "--dtype", help="Compute in this type; auto: the checkpoint's."),
    ) -> None:
        """Continue a prompt with Transformers' generation; the same seed gives the same text."""
        from moestro.core.errors import ConfigError

        if temperature == 0 and (top_p < 1 or top_k > 0):
            raise ConfigError(
                "--top-p and --top-k shape draws, and at --temperature 0 nothing is drawn; set it above 0"
            )
        if top_p == 0:
            raise ConfigError("--top-p 0 leaves no token to draw from; it must be above 0")
        text = sys.stdin.read() if prompt == "-" else prompt
        _write(
            *_open(model, dtype),
            text,
            chat=chat,
            seed=seed,
            settings={
                "max_new_tokens": max_tokens,
                "do_sample": temperature > 0,
                **({"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}),
            },
        )


def _open(ref: str, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers.utils import logging

    from moestro.core.errors import LoadError
    from moestro.data.tokens import open_tokenizer
    from moestro.models.load import load
    from moestro.models.refs import resolve

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    files = resolve(ref)
    model = load(ref, dtype=dtype)
    if not model.can_generate():
        raise LoadError(f"{ref}: {type(model).__name__} does not write text; it needs a language-model head")
    return model, open_tokenizer(files.folder)


def _write(model: Any, tokenizer: Any, text: str, *, chat: bool, seed: int, settings: dict[str, Any]) -> None:
    """Continue ``text`` on standard output, each word as soon as it is complete.

    Raises:
        ConfigError: nothing to begin with, no chat template, or more tokens than the model has positions for.
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    ids = _encode(tokenizer, text, chat=chat)
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        _check_length(ids.shape[1], settings["max_new_tokens"], positions)
    kept = model.generation_config
    ends = kept.eos_token_id if kept.eos_token_id is not None else tokenizer.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    pad = next((i for i in (kept.pad_token_id, tokenizer.pad_token_id, first_end, 0) if i is not None), 0)
    # A fresh one: the model's own may ask for draws of its own, which the flags are to decide.
    model.generation_config = GenerationConfig(
        bos_token_id=kept.bos_token_id,
        eos_token_id=ends,
        pad_token_id=pad,
        decoder_start_token_id=kept.decoder_start_token_id,
        **settings,
    )
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer)


def _encode(tokenizer: Any, text: str, *, chat: bool) -> "torch.Tensor":
    """Token ids [1, S] of the prompt."""
    import torch

    from moestro.core.errors import ConfigError
    from moestro.data.sources import HALF_CHARACTER

    if HALF_CHARACTER.search(text):  # what Python makes of bytes that it cannot read
        raise ConfigError("the prompt holds bytes that are not UTF-8 text")
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template; leave --chat out")
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ConfigError("the prompt holds no token and the model has none to begin a text with; give --prompt a text")
    return torch.tensor([ids])


def _check_length(prompt: int, more: int, positions: int) -> None:
    from moestro.core.errors import ConfigError

    if prompt + more > positions:
        room = positions - prompt
        way = f"set --max-tokens {room} or less" if room > 0 else "shorten the prompt"
        raise ConfigError(
            f"{prompt} tokens of prompt and --max-tokens {more} are more than the model's {positions} positions; {way}"
        )
