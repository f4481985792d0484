"""Objectives: what a batch is, what counts as a target, and the loss as a sum over them."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.core.context import LossTerm
from moestro.core.errors import ConfigError, RegistryError
from moestro.core.forward import logits_of
from moestro.data.tokens import byte_tokenizer
from moestro.testing.training import packed
from moestro.training.objectives import (
    Causal,
    Classification,
    Masked,
    MethodObjective,
    SeqToSeq,
    make_objective,
)
from moestro.training.recipe import ObjectiveConfig


def rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(i) for i in range(count)]


class Table(nn.Module):
    """Logits from the token alone."""

    def __init__(self, vocabulary: int = 300) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


def test_causal_counts_what_it_learns() -> None:
    data = packed().sources["data"]
    batch = Causal().collate([data[0], data[1]], rngs(2))
    model = Table().requires_grad_(False)
    term = Causal()(model, batch, {})["causal"]
    wanted, count = 0.0, 0
    for row in (0, 1):
        for place in range(1, 6):
            if not data[row]["starts"][place]:
                logprobs = model.table[int(data[row]["input_ids"][place - 1])].log_softmax(-1)
                wanted -= float(logprobs[int(data[row]["input_ids"][place])])
                count += 1
    assert Causal().targets(batch) == count < 10
    assert float(term.total) == pytest.approx(wanted, rel=1e-5)
    assert term.unit == "token"
    assert Causal().tokens(batch, decoder=False) == 12


def test_masking_is_the_examples_own_and_has_the_right_shares() -> None:
    tokenizer = byte_tokenizer()
    objective = Masked(tokenizer)
    special = set(tokenizer.all_special_ids)
    rng = np.random.default_rng(0)
    examples = [{"input_ids": rng.integers(0, 259, size=rng.integers(20, 60))} for _ in range(200)]
    batch = objective.collate(examples, rngs(200))
    again = objective.collate(examples[5:7], [np.random.default_rng(5), np.random.default_rng(6)])
    width = again["labels"].shape[1]
    assert torch.equal(again["labels"], batch["labels"][5:7, :width])
    assert torch.equal(again["input_ids"], batch["input_ids"][5:7, :width])

    chosen = batch["labels"] != -100
    assert objective.targets(batch) == int(chosen.sum())
    assert not (chosen & (batch["attention_mask"] == 0)).any()
    ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(e["input_ids"]) for e in examples], batch_first=True)
    assert torch.equal(batch["labels"][chosen], ids[chosen])
    assert not set(ids[chosen].tolist()) & special
    free = sum(int((~np.isin(e["input_ids"], list(special))).sum()) for e in examples)
    assert abs(int(chosen.sum()) / free - 0.15) < 0.01
    shown = batch["input_ids"][chosen]
    masked = (shown == tokenizer.mask_token_id).float().mean()
    same = (shown == ids[chosen]).float().mean()
    error = 4 * (0.16 / int(chosen.sum())) ** 0.5
    assert abs(masked - 0.8) < error
    assert abs(same - 0.1) < error
    unchosen = ~chosen & (batch["attention_mask"] == 1)
    assert torch.equal(batch["input_ids"][unchosen], ids[unchosen])


def test_classification_of_text_and_of_numbers() -> None:
    objective = Classification(byte_tokenizer())
    batch = objective.collate([{"input_ids": [5, 6], "label": 1}, {"input_ids": [7], "label": 0}], rngs(2))
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert objective.targets(batch) == 2
    assert objective.tokens(batch, decoder=False) == 3

    rows = [{"x": torch.tensor([1.0, 2.0]), "label": 1}, {"x": torch.tensor([0.0, 3.0]), "label": 0}]
    digits = Classification()
    numbers = digits.collate(rows, rngs(2))

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    term = digits(Net(), numbers, {})["classification"]
    wanted = F.cross_entropy(torch.tensor([[2.0, 4.0], [0.0, 6.0]]), torch.tensor([1, 0]), reduction="sum")
    assert float(term.total) == pytest.approx(float(wanted))
    assert digits.tokens(numbers, decoder=False) == 2


def test_seq2seq_equals_transformers_own_loss() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=1)
    model = T5ForConditionalGeneration(config).eval()
    objective = make_objective(ObjectiveConfig(method="seq2seq"), byte_tokenizer(), config)
    assert isinstance(objective, SeqToSeq)
    rows = [{"input_ids": [5, 6, 7], "target_ids": [8, 9, 10, 11]}, {"input_ids": [5], "target_ids": [12]}]
    batch = objective.collate(rows, rngs(2))
    with torch.no_grad():
        term = objective(model, batch, {})["seq2seq"]
        own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert float(term.total) / objective.targets(batch) == pytest.approx(float(own.loss), rel=1e-5)
    assert (objective.tokens(batch, decoder=False), objective.tokens(batch, decoder=True)) == (4, 5)


def test_only_named_inputs_are_passed() -> None:
    seen: list[set[str]] = []

    class Wrapper(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(set(kwargs))
            return torch.zeros(1)

    batch = {"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1, 2), "position_ids": torch.zeros(1, 2)}
    logits_of(Wrapper(), batch)
    assert seen == [{"input_ids", "position_ids"}]
    logits_of(Table(), {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "labels": torch.zeros(1, 2)})


def test_a_methods_objective_joins_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro.core import registry
    from moestro.core.config import Config

    class Settings(Config):
        scale: float = 1.0

    module = ModuleType("fake")
    module.Config = Settings  # type: ignore[attr-defined]
    module.objective = lambda model, batch, teachers, config: {  # type: ignore[attr-defined]
        "mean": torch.tensor(2.0) * config.scale,
        "sum": LossTerm(torch.tensor(3.0), "token"),
    }
    sys.modules["fake"] = module
    monkeypatch.setattr("moestro.training.objectives.method", lambda method_id: registry.Method(method_id, module))
    try:
        made = make_objective(ObjectiveConfig(method="adapt.fake", config={"scale": 5}), byte_tokenizer())
        assert isinstance(made, MethodObjective)
        data = packed().sources["data"]
        batch = made.collate([data[0], data[1]], rngs(2))
        losses = made(Table(), batch, {})
        assert (float(losses["mean"].total), losses["mean"].unit) == (20.0, "sequence")
        assert losses["sum"].unit == "token"
        assert (made.shape, made.head) == ("packed", "causal")
        with pytest.raises(ConfigError, match="unknown key 'scal'"):
            make_objective(ObjectiveConfig(method="adapt.fake", config={"scal": 5}), byte_tokenizer())
    finally:
        del sys.modules["fake"]


def test_bad_objectives() -> None:
    with pytest.raises(ConfigError, match="expected causal, masked, classification, seq2seq, span or a method id"):
        make_objective(ObjectiveConfig(method="casual"))
    with pytest.raises(RegistryError, match="no method"):
        make_objective(ObjectiveConfig(method="train.none"))
    with pytest.raises(ConfigError, match="no setting 'x'"):
        make_objective(ObjectiveConfig(method="causal", config={"x": 1}))
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        make_objective(ObjectiveConfig(method="masked"))
    for share in (2, "x", None, True):
        with pytest.raises(ConfigError, match=f"share={share!r} must be a number"):
            make_objective(ObjectiveConfig(method="masked", config={"share": share}), byte_tokenizer())
    plain = byte_tokenizer()
    plain.mask_token = None
    with pytest.raises(ConfigError, match="needs a tokenizer with a mask token"):
        Masked(plain)
