"""Bodies of requests: strict JSON, and values that are checked one by one before anything is made of them."""

import json
import math
from typing import Any


class BadRequest(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP. param: the field that is wrong. code: a word for programs. retry_after: seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


def parse(raw: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8, no NaN, no key twice, numbers and nesting within reason.

    Raises:
        BadRequest: anything else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as error:  # also what is no UTF-8, and numbers with thousands of digits
        raise BadRequest(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


class Fields:
    """The fields of an object, taken one by one; null counts as absent."""

    def __init__(self, body: dict[str, Any], where: str = "") -> None:
        self.body = body
        self.where = where
        self.taken: set[str] = set()

    def name(self, key: str) -> str:
        """The field's name with where it stands."""
        return f"{self.where}.{key}" if self.where else key

    def bad(self, key: str, what: str) -> BadRequest:
        """An error about a field."""
        return BadRequest(f"{self.name(key)}={shown(self.body.get(key))}: {what}", param=self.name(key))

    def get(self, key: str) -> Any:
        """The value, None when absent."""
        self.taken.add(key)
        return self.body.get(key)

    def number(self, key: str, default: float, least: float, most: float, *, above: bool = False) -> float:
        """A finite number in [least, most], or (least, most] when ``above``."""
        value = self.get(key)
        if value is None:
            return default
        right = not isinstance(value, bool) and isinstance(value, int | float)
        if not right or not (least <= value <= most) or (above and value == least) or not math.isfinite(value):
            raise self.bad(key, f"a number {'above' if above else 'from'} {least:g} to {most:g} is wanted")
        return float(value)

    def whole(self, key: str, default: int | None, least: int, most: int) -> int | None:
        """A whole number in [least, most]."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.bad(key, f"a whole number from {least} to {most} is wanted")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(key, "true or false is wanted")
        return value

    def text(self, key: str, most: int, default: str | None = None) -> str | None:
        """A string of at most ``most`` characters."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > most:
            raise self.bad(key, f"a string of at most {most} characters is wanted")
        return whole_text(value, self.name(key))

    def inner(self, key: str) -> "Fields | None":
        """An object."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(key, "an object is wanted")
        return Fields(value, self.name(key))

    def unsupported(self, names: dict[str, tuple[Any, ...]]) -> None:
        """Fields that would change the answer and are not done here; only the given values pass."""
        for key, harmless in names.items():
            value = self.get(key)
            if value is not None and not any(value is h or (value == h and type(value) is type(h)) for h in harmless):
                raise self.bad(key, "not supported by this server")

    def ignored(self, *names: str) -> None:
        """Fields that change nothing here."""
        self.taken.update(names)

    def finish(self) -> None:
        """Refuse whatever was not asked for."""
        for key in self.body:
            if key not in self.taken:
                raise BadRequest(f"unknown field {shown(self.name(key))}", param=self.name(key)[:60])


def whole_text(text: str, name: str) -> str:
    """The same text; half of a surrogate pair (JSON can write one) is no character.

    Raises:
        BadRequest: it holds one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest(f"{name} holds half a character", param=name) from None
    return text
