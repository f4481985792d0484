"""The letters that end a tensor's name and say its shape, so ``weight_TK`` is one weight a token and slot.

Every name in ``core``, ``ops``, ``surgery`` and ``methods`` uses them; ``LETTERS`` is the legend, and a repository
test holds the names in signatures to it.
"""

from typing import Final


LETTERS: Final[dict[str, str]] = {
    "B": "rows of a batch (sequences)",
    "S": "positions of a sequence in this forward",
    "T": "tokens of this forward: B * S, flattened row by row",
    "D": "model width at the site's input",
    "O": "width at the site's output",
    "I": "inner width of one expert",
    "J": "width of the up projection: 2 I when gated (gate rows first), else I",
    "E": "real experts",
    "C": "choices of a router: E real experts, then the null experts",
    "K": "slots of a token",
    "N": "assignments: (token, expert, weight) triples",
    "G": "groups of experts",
    "L": "layers",
    "H": "attention heads",
    "R": "rank of a low-rank factor",
    "V": "vocabulary",
}
