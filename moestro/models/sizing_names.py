"""What a tensor is, from its name: the stack and layer it belongs to, its part, its expert.

Names may be those of a hub checkpoint (one tensor an expert), of a Transformers module (stacked experts), or of a model
in Moestro's form; the family's tables know the first two.
"""

import re
from dataclasses import dataclass
from typing import Any

from moestro.models.sizing import Part
from moestro.models.spec import FamilySpec, Get, StackSpec


_NORM = re.compile(r"norm", re.IGNORECASE)
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|shared|wte|wpe|\w*embeddings?)\.")
_ONCE = ("pooler",)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs. ``stack`` and ``layer`` are None outside blocks; ``expert`` is None for stacked ones."""

    part: Part
    stack: str | None = None
    layer: int | None = None
    expert: int | None = None


class Names:
    """Sorts the tensor names of one model.

    Args:
        spec: the family, or None for a module of no known family, whose parts are then told by common words alone.
        config: the model's config; it says which layers are mixtures.
    """

    def __init__(self, spec: FamilySpec | None, config: Any = None) -> None:
        self.spec = spec
        self.heads = spec.heads if spec is not None else ("lm_head", "score", "classifier", "head")
        self._stacks = [_StackNames(spec, stack, config) for stack in spec.stacks] if spec is not None else []
        patterns = spec.ignored if spec is not None else ()
        self._ignored = re.compile("|".join(patterns)) if patterns else None

    def ignored(self, name: str) -> bool:
        """The family leaves the tensor out, as Transformers does."""
        return self._ignored is not None and self._ignored.search(name) is not None

    def place(self, name: str) -> Place:
        """Where the tensor belongs."""
        for stack in self._stacks:
            found = stack.place(name)
            if found is not None:
                return found
        return Place(self._outside(name))

    def _outside(self, name: str) -> Part:
        words = name.split(".")
        if words[0] in self.heads or words[0] in _ONCE or (len(words) > 1 and words[1] in _ONCE):
            return "norm" if _NORM.search(".".join(words[:-1])) else "head"
        if _NORM.search(".".join(words[:-1])):
            return "norm"
        if _EMBEDDING.search(name):
            return "embedding"
        return "dense" if self.spec is None else "other"

    @staticmethod
    def once(name: str) -> bool:
        """The tensor is used once a sequence, not for every token."""
        return any(f"{word}." in name for word in _ONCE)


class _StackNames:
    """The names inside the blocks of one stack."""

    def __init__(self, spec: FamilySpec, stack: StackSpec, config: Any) -> None:
        block = stack.sites["block"][0]
        owner = f"{stack.attribute}." if stack.attribute else ""
        pattern = re.escape(owner + block).replace(r"\{layer\}", r"(\d+)")
        self._block = re.compile(rf"(?:^|\.){pattern}\.(.+)$")
        self.name = stack.name
        self._attention = tuple(_inside(path, block) for path in stack.sites.get("attention", ()))
        self._mixture_layers = frozenset(spec.moe_layers(config, stack.name)) if config is not None else frozenset()
        self._ffn = [_inside(stack.mlp, block)]
        if spec.ffn.split:
            self._ffn.append(spec.ffn.down)
        self._rules: list[tuple[re.Pattern[str], Part]] = []
        if spec.moe is not None:
            self._read_layouts(spec, block)

    def _read_layouts(self, spec: FamilySpec, block: str) -> None:
        assert spec.moe is not None
        self._ffn += [_inside(layout.block, block) for layout in spec.moe.layouts if layout.block is not None]
        for layout in spec.moe.layouts:
            for rule in layout.rules:
                for source in rule.sources:
                    pattern = re.escape(source).replace(r"\{expert\}", r"(?P<expert>\d+)")
                    self._rules.append((re.compile(rf"{pattern}$"), _part_of(rule.target)))
            for disk, ours in layout.moves:
                self._rules.append((re.compile(re.escape(disk)), _part_of(ours)))

    def place(self, name: str) -> Place | None:
        """The place of a tensor inside a block of this stack, else None."""
        match = self._block.search(name)
        if match is None:
            return None
        layer, rest = int(match[1]), match[2]
        for ffn in self._ffn:
            if rest.startswith(f"{ffn}."):
                part, expert = self._feed_forward(layer, rest.removeprefix(f"{ffn}."))
                return Place(part, self.name, layer, expert)
        if _NORM.search(rest.rpartition(".")[0]):
            return Place("norm", self.name, layer)
        part = "attention" if any(rest.startswith(f"{path}.") for path in self._attention) else "other"
        return Place(part, self.name, layer)

    def _feed_forward(self, layer: int, rest: str) -> tuple[Part, int | None]:
        if layer not in self._mixture_layers:
            return "dense", None
        for pattern, part in self._rules:
            match = pattern.match(rest)
            if match is not None:
                expert = match.groupdict().get("expert")
                return part, None if expert is None else int(expert)
        return "other", None


def _inside(path: str, block: str) -> str:
    return path.removeprefix(block).removeprefix(".")


def _part_of(target: str) -> Part:
    """The part of a tensor from its name under a MoELayer."""
    word = target.partition(".")[0]
    return "experts" if word == "bank" else "router" if word == "router" else "shared"


def has_language_head(config: Any) -> bool:
    """Whether the model that ``config`` describes ends in logits over the vocabulary."""
    names = Get(config)("architectures", default=None) or ["ForCausalLM"]
    return any(word in names[0] for word in ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration", "PreTraining"))
