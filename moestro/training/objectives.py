"""What is learned from a batch: an extension point with five built-in objectives.

An objective turns examples into a batch, says how many units the batch holds before anything runs, and returns losses
as *sums* (``LossTerm``), so that the loop can divide by the units of the whole optimiser step: one batch of eight rows
and eight of one row, on one rank or two, are the same step.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.core.context import LossTerm
from moestro.core.errors import ConfigError
from moestro.core.forward import logits_of, outputs
from moestro.core.registry import method
from moestro.data.dataset import Example, Shape
from moestro.data.packing import IGNORE, packed_labels, pad, positions
from moestro.training.recipe import Head, ObjectiveConfig


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]
Teachers = Mapping[str, nn.Module]
Losses = dict[str, LossTerm]

BLIND_TO_PACKING = frozenset({"gpt_oss"})


class Objective(ABC):
    """Base of all objectives.

    Attributes:
        shape: the examples it eats (``moestro.data.dataset``). head: the task head a Transformers model needs.
    """

    shape: ClassVar[Shape]
    head: ClassVar[Head]

    @abstractmethod
    def collate(self, examples: Sequence[Example], rngs: Sequence[np.random.Generator]) -> Batch:
        """A batch of tensors, rows in the order of the examples; ``rngs[i]`` belongs to example i alone."""

    @abstractmethod
    def targets(self, batch: Batch) -> int:
        """How many targets the batch holds: the unit ``token`` of this objective's losses."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, teachers: Teachers) -> Losses:
        """Losses by name, each a sum over its unit (``token`` means target here)."""

    def rows(self, batch: Batch) -> int:
        """Number of examples in the batch: the unit ``sequence``."""
        return len(next(iter(batch.values())))

    def tokens(self, batch: Batch, *, decoder: bool) -> int | None:
        """Valid tokens a stack sees in one forward: the model's only stack or encoder, or its decoder.

        None: the batch does not tell.
        """
        mask = batch.get("attention_mask")
        ids = batch.get("input_ids")
        if mask is not None:
            return int(mask.sum())
        return None if ids is None else ids.numel()


class Causal(Objective):
    """Next-token prediction on packed sequences; targets are the labels that are not -100, shifted by one."""

    shape = "packed"
    head = "causal"

    def collate(self, examples: Sequence[Example], rngs: Sequence[np.random.Generator]) -> Batch:
        """{input_ids, labels, position_ids}, each [B, S] int64."""
        ids_BS = torch.as_tensor(np.stack([example["input_ids"] for example in examples])).long()
        starts_BS = torch.as_tensor(np.stack([example["starts"] for example in examples]))
        return {
            "input_ids": ids_BS,
            "labels": packed_labels(ids_BS, starts_BS),
            "position_ids": positions(starts_BS),
        }

    def targets(self, batch: Batch) -> int:
        """Labels that are not -100, the first position apart (nothing stands before it)."""
        return int((batch["labels"][:, 1:] != IGNORE).sum())

    def __call__(self, model: nn.Module, batch: Batch, teachers: Teachers) -> Losses:
        """{causal}: cross entropy in nats, summed over targets."""
        labels_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)  # shifting labels spares a copy of the logits
        return {"causal": cross_entropy(logits_of(model, batch), labels_BS)}


class Masked(Objective):
    """Masked-language modelling (BERT, 1810.04805): 15 % of the tokens are targets, of which 80 % are shown as the mask
    token, 10 % as a random one, 10 % as themselves. Special tokens are never targets.
    """

    shape = "chunks"
    head = "masked"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", share: float = 0.15) -> None:
        if tokenizer.mask_token_id is None:
            raise ConfigError("objective 'masked' needs a tokenizer with a mask token; this one has none")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"objective 'masked': share={share!r} must be a number in (0, 1]")
        self.share = share
        self.mask_id = int(tokenizer.mask_token_id)
        self.pad_id = pad_id(tokenizer)
        self.vocab_size = len(tokenizer)
        self.special = np.asarray(sorted(tokenizer.all_special_ids), dtype=np.int64)

    def collate(self, examples: Sequence[Example], rngs: Sequence[np.random.Generator]) -> Batch:
        """{input_ids, attention_mask, labels}, each [B, S] int64."""
        shown, labels = [], []
        for example, rng in zip(examples, rngs, strict=True):
            ids = np.asarray(example["input_ids"], dtype=np.int64)
            free = np.flatnonzero(~np.isin(ids, self.special))
            count = min(len(free), max(1, round(self.share * len(free))))
            chosen = rng.choice(free, size=count, replace=False)
            label = np.full_like(ids, IGNORE)
            label[chosen] = ids[chosen]
            way = rng.random(count)
            seen = ids.copy()
            seen[chosen[way < 0.8]] = self.mask_id
            replaced = chosen[way >= 0.9]
            seen[replaced] = rng.integers(0, self.vocab_size, size=len(replaced))
            shown.append(seen)
            labels.append(label)
        ids_BS, mask_BS = pad(shown, self.pad_id)
        return {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": pad(labels, IGNORE)[0]}

    def targets(self, batch: Batch) -> int:
        """Masked tokens."""
        return int((batch["labels"] != IGNORE).sum())

    def __call__(self, model: nn.Module, batch: Batch, teachers: Teachers) -> Losses:
        """{masked}: cross entropy in nats, summed over masked tokens."""
        return {"masked": cross_entropy(logits_of(model, batch), batch["labels"])}


class Classification(Objective):
    """One class per row. Text rows are padded; rows of plain numbers (``x``) go to the model as they are."""

    shape = "labels"
    head = "classification"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
        self.pad_id = 0 if tokenizer is None else pad_id(tokenizer)

    def collate(self, examples: Sequence[Example], rngs: Sequence[np.random.Generator]) -> Batch:
        """{input_ids, attention_mask, label} or {x, label}; label is [B] int64."""
        label_B = torch.tensor([int(example["label"]) for example in examples])
        if "input_ids" not in examples[0]:
            return {"x": torch.stack([torch.as_tensor(example["x"]) for example in examples]), "label": label_B}
        ids_BS, mask_BS = pad([example["input_ids"] for example in examples], self.pad_id)
        return {"input_ids": ids_BS, "attention_mask": mask_BS, "label": label_B}

    def targets(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["label"])

    def tokens(self, batch: Batch, *, decoder: bool) -> int | None:
        """Valid tokens; for rows of plain numbers every vector [..., D] is one."""
        if "x" in batch:
            return batch["x"].numel() // batch["x"].shape[-1]
        return super().tokens(batch, decoder=decoder)

    def __call__(self, model: nn.Module, batch: Batch, teachers: Teachers) -> Losses:
        """{classification}: cross entropy in nats, summed over rows."""
        return {"classification": cross_entropy(logits_of(model, batch), batch["label"])}


class SeqToSeq(Objective):
    """Encoder-decoder training with teacher forcing; the decoder sees the target shifted right by its start token."""

    shape = "pairs"
    head = "seq2seq"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", start_id: int | None) -> None:
        self.pad_id = pad_id(tokenizer)
        self.start_id = self.pad_id if start_id is None else start_id

    def collate(self, examples: Sequence[Example], rngs: Sequence[np.random.Generator]) -> Batch:
        """{input_ids, attention_mask [B, S], decoder_input_ids, decoder_attention_mask, labels [B, S']}."""
        ids_BS, mask_BS = pad([example["input_ids"] for example in examples], self.pad_id)
        targets = [np.asarray(example["target_ids"], dtype=np.int64) for example in examples]
        labels_BS, real_BS = pad(targets, IGNORE)
        shown_BS = pad([np.concatenate(([self.start_id], target[:-1])) for target in targets], self.pad_id)[0]
        return {
            "input_ids": ids_BS,
            "attention_mask": mask_BS,
            "decoder_input_ids": shown_BS,
            "decoder_attention_mask": real_BS,
            "labels": labels_BS,
        }

    def targets(self, batch: Batch) -> int:
        """Target tokens."""
        return int((batch["labels"] != IGNORE).sum())

    def tokens(self, batch: Batch, *, decoder: bool) -> int | None:
        """Valid tokens of the encoder or the decoder."""
        key = "decoder_attention_mask" if decoder else "attention_mask"
        return int(batch[key].sum())

    def __call__(self, model: nn.Module, batch: Batch, teachers: Teachers) -> Losses:
        """{seq2seq}: cross entropy in nats, summed over target tokens."""
        return {"seq2seq": cross_entropy(logits_of(model, batch), batch["labels"])}


class Span(Objective):
    """Where an answer begins and ends in a window of its context; the first token of a window means "not here".

    A row costs (CE_start + CE_end) / 2 over its real tokens.
    """

    shape = "spans"
    head = "span"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.pad_id = pad_id(tokenizer)

    def collate(self, examples: Sequence[Example], rngs: Sequence[np.random.Generator]) -> Batch:
        """{input_ids, attention_mask, token_type_ids [B, S], start_positions, end_positions [B]}, int64."""
        ids_BS, mask_BS = pad([example["input_ids"] for example in examples], self.pad_id)
        return {
            "input_ids": ids_BS,
            "attention_mask": mask_BS,
            "token_type_ids": pad([example["token_type_ids"] for example in examples], 0)[0],
            "start_positions": torch.tensor([int(example["start"]) for example in examples]),
            "end_positions": torch.tensor([int(example["end"]) for example in examples]),
        }

    def targets(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["start_positions"])

    def __call__(self, model: nn.Module, batch: Batch, teachers: Teachers) -> Losses:
        """{span}: half the cross entropy of start and end in nats, summed over rows."""
        start_BS, end_BS = span_logits(model, batch)
        start, end = (
            cross_entropy(logits_BS, batch[key]).total
            for logits_BS, key in ((start_BS, "start_positions"), (end_BS, "end_positions"))
        )
        return {"span": LossTerm((start + end) / 2, "token")}


class MethodObjective(Objective):
    """A method's entry ``objective(model, batch, teachers[, config]) -> {name: loss}`` on a built-in's batches.

    A loss may be a LossTerm (a sum, exact under accumulation) or a scalar, taken as a mean over the batch's rows.
    """

    def __init__(self, base: Objective, entry: Callable[..., Mapping[str, Tensor | LossTerm]], config: Any) -> None:
        self.base, self.entry, self.config = base, entry, config
        self.shape, self.head = base.shape, base.head  # type: ignore[misc]
        self.takes_config = "config" in inspect.signature(entry).parameters

    def collate(self, examples: Sequence[Example], rngs: Sequence[np.random.Generator]) -> Batch:
        """As the base."""
        return self.base.collate(examples, rngs)

    def targets(self, batch: Batch) -> int:
        """As the base."""
        return self.base.targets(batch)

    def tokens(self, batch: Batch, *, decoder: bool) -> int | None:
        """As the base."""
        return self.base.tokens(batch, decoder=decoder)

    def __call__(self, model: nn.Module, batch: Batch, teachers: Teachers) -> Losses:
        """The method's losses as sums."""
        more = {"config": self.config} if self.takes_config else {}
        found = self.entry(model, batch, teachers, **more)
        rows = self.rows(batch)
        return {
            name: loss if isinstance(loss, LossTerm) else LossTerm(loss * rows, "sequence")
            for name, loss in found.items()
        }


def make_objective(
    config: ObjectiveConfig, tokenizer: "PreTrainedTokenizerBase | None" = None, model_config: Any = None
) -> Objective:
    """The objective a recipe names.

    Args:
        tokenizer: needed by all but ``causal`` and by classification of plain numbers.
        model_config: its ``decoder_start_token_id`` starts the decoder.

    Raises:
        ConfigError, RegistryError: unknown objective, unfit settings, or a tokenizer is needed.
    """
    if "." in config.method:
        part = method(config.method)
        base = make_objective(ObjectiveConfig(method=config.base), tokenizer, model_config)
        return MethodObjective(base, part.entry("objective"), part.configure(dict(config.config)))
    known = ("causal", "masked", "classification", "seq2seq", "span")
    if config.method not in known:
        raise ConfigError(f"objective {config.method!r}: expected {', '.join(known)} or a method id such as train.x")
    if unknown := sorted(set(config.config) - ({"share"} if config.method == "masked" else set())):
        raise ConfigError(f"objective {config.method!r} has no setting {unknown[0]!r}")
    if config.method == "causal":
        return Causal()
    if config.method == "classification":
        return Classification(tokenizer)
    if tokenizer is None:
        raise ConfigError(f"objective {config.method!r} needs a tokenizer")
    if config.method == "masked":
        return Masked(tokenizer, **config.config)
    if config.method == "span":
        return Span(tokenizer)
    return SeqToSeq(tokenizer, getattr(model_config, "decoder_start_token_id", None))


def span_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of start and end [B, S], float32; -inf at padding. A plain module may return both as one [B, S, 2]."""
    output = outputs(model, batch)
    pair = output.unbind(-1) if isinstance(output, Tensor) else (output.start_logits, output.end_logits)
    start_BS, end_BS = (
        logits_BS.float().masked_fill(batch["attention_mask"] == 0, float("-inf")) for logits_BS in pair
    )
    return start_BS, end_BS


def check_packing(model: nn.Module, batch: Batch) -> None:
    """Raise ConfigError for several documents in a row of a model that would let them see each other.

    Transformers tells packed documents apart by their position ids; its gpt_oss makes its masks without them.
    """
    places_BS = batch.get("position_ids")
    if places_BS is None or getattr(getattr(model, "config", None), "model_type", None) not in BLIND_TO_PACKING:
        return
    if bool((places_BS[:, 1:] == 0).any()):
        raise ConfigError(
            "gpt_oss cannot be trained on packed documents: its attention does not keep them apart; give data whose "
            "sequences lie within one document, or another family"
        )


def cross_entropy(logits: Tensor, labels: Tensor) -> LossTerm:
    """Cross entropy in nats of logits [..., V] against labels [...], summed over the labels that are not -100."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return LossTerm(F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE, reduction="sum"), "token")


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The padding token, or the end token where there is none: padded places are masked and never targets."""
    value = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if value is None:
        raise ConfigError("the tokenizer has neither a padding nor an end token, so rows cannot be padded")
    return int(value)
