"""Tokens to text while they come: whole characters only, and nothing of a stop string, wherever tokens cut it."""

from collections.abc import Callable, Sequence


_HALF = "\ufffd"
_LONGEST_WAIT = 16


class TextStream:
    """The text of one sequence.

    Args:
        decode: token ids -> text. stops: strings that end the text; they are not part of it.

    Attributes:
        stopped: a stop string was met; nothing is written any more.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stops = tuple(stops)
        self.stopped = False
        self._ids: list[int] = []
        self._start = 0
        self._read = 0
        self._held = ""

    def push(self, token: int) -> str:
        """What may be shown after one more token; "" while a character or a possible stop string is unfinished."""
        self._ids.append(token)
        return self._show(self._decoded(final=False))

    def end(self) -> str:
        """What was held back."""
        return self._show(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        """Characters that became whole. Decoders look at neighbours (spaces), so some tokens before are decoded too."""
        before = self.decode(self._ids[self._start : self._read])
        after = self.decode(self._ids[self._start :])
        unfinished = after.endswith(_HALF) and len(self._ids) - self._read < _LONGEST_WAIT
        if unfinished and not final:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _show(self, piece: str, final: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = 0 if final else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that could begin ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
