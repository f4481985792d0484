"""Text to tokens and back by a model folder's files, with the ``tokenizers`` package alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError, LoadError


_LARGEST = 64 << 20


@dataclass
class Vocabulary:
    """A tokenizer and what a server needs to know of it.

    Attributes:
        tokenizer: ``tokenizers.Tokenizer``. ends: tokens that end a text. start: the token of an empty prompt.
        template: the chat template, None when the model has none. special: names such as ``bos_token`` -> text.
    """

    tokenizer: Any
    ends: frozenset[int]
    start: int | None = None
    template: str | None = None
    special: dict[str, str] | None = None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; ``special`` adds what the tokenizer puts around a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def show(self, token: int) -> str:
        """The text of one token, special ones by name."""
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text


def open_vocabulary(folder: str | Path, config: dict[str, Any] | None = None) -> Vocabulary:
    """The vocabulary of a model folder, from tokenizer.json and the small files beside it.

    Args:
        config: the model's config, for its end tokens.

    Raises:
        LoadError: no tokenizer.json, or a damaged file.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise LoadError(f"{folder} has no tokenizer.json; a server needs it to read and write text")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare exceptions
        raise LoadError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    settings = _json(folder / "tokenizer_config.json")
    special = {name: _text(value) for name, value in settings.items() if name.endswith("_token") and _text(value)}
    ends: set[int] = set()
    for source in (_json(folder / "generation_config.json"), config or _json(folder / "config.json")):
        value = source.get("eos_token_id")
        ends |= {number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)}
    if (named := tokenizer.token_to_id(special.get("eos_token", ""))) is not None:
        ends.add(named)
    start = tokenizer.token_to_id(special.get("bos_token", ""))
    return Vocabulary(tokenizer, frozenset(ends), start, _template(folder, settings), special)


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path)
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _text(value: Any) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise LoadError(f"{path} is larger than {_LARGEST} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path}: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds no object")
    return value


def chat_values(vocabulary: Vocabulary, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """What a chat template is given.

    Raises:
        ConfigError: the model has no template.
    """
    if vocabulary.template is None:
        raise ConfigError("this model has no chat template; use /v1/completions")
    return {"messages": messages, "add_generation_prompt": True, "tools": None, **(vocabulary.special or {})}
