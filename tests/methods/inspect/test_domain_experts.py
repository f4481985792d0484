"""inspect.domain_experts: whose an expert is, and what goes with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moestro
from moestro.core.errors import ConfigError
from moestro.core.inputs import MeterInputs
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.report import Report
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.data.tokens import byte_tokenizer
from moestro.methods.inspect import domain_experts as subject
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model


MONET = {"axis": 6, "heads": 2, "expert_size": 4, "top_k": 2, "group_size": 2}
IDS = {"low": [[3, 9, 4, 27, 1, 12], [5, 5, 30, 2, 8, 17]], "high": [[60, 71, 90, 64, 55, 83]]}


def monet_model(**changes: object) -> nn.Module:
    model = adopt(tiny_model("llama", **changes))
    swap(model, "train.monet", MONET)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name or "product_keys" in name:
                parameter.normal_(std=0.4)
    return model.eval()


def hashed_model() -> nn.Module:
    """Experts are chosen by token id."""
    model = adopt(tiny_model("llama"))
    router = {"method": "train.hash_router", "config": {"vocabulary": 97}}
    swap(model, "train.moe", {"num_experts": 12, "expert_size": 8, "router": router})
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            for parameter in layer.parameters():
                parameter.normal_(std=0.4)
    return model.eval()


def domains() -> dict[str, list[dict[str, Tensor]]]:
    return {name: [{"input_ids": torch.tensor(rows)}] for name, rows in IDS.items()}


def routings(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[tuple[str, object, Tensor]]:
    with torch.no_grad(), session(collect=True) as opened:
        model(**batch)
    for ctx in opened.take():
        for site, routing in ctx.routings.items():
            yield site, routing, ctx.tokens.valid_T


def report(model: nn.Module, **config: object) -> Report:
    use = method("inspect.domain_experts")
    batches = [{**batch, "domain": name} for name, found in domains().items() for batch in found]
    found: Report = use.entry("measure")(MeterInputs(model=model, batches=batches), use.configure(config))
    return found


# -- which experts ------------------------------------------------------------------------------------------------


def test_an_expert_belongs_where_it_weighs_twice_as_much_as_anywhere_else() -> None:
    score = torch.tensor([[0.4, 0.1, 0.3, 0.0, 0.2], [0.2, 0.5, 0.2, 0.0, 0.0], [0.1, 0.3, 0.2, 0.0, 0.0]])
    assert subject.assign_domains(score).tolist() == [0, -1, -1, -1, 0]
    assert subject.assign_domains(score, 1.5).tolist() == [0, 1, 0, -1, 0]
    pairs = torch.stack([torch.eye(2), torch.ones(2, 2)])
    assert subject.assign_domains(pairs).tolist() == [[-1, 1], [1, -1]]


def test_scores_of_pairs_are_mean_products_over_heads_without_padding() -> None:
    model = monet_model()
    batch = {
        "input_ids": torch.tensor([[0, 0, 8, 4, 2], [7, 9, 17, 3, 11]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    found = subject.expert_scores(model, {"only": [batch, batch]})
    dense = {}
    for site, routing, valid_T in routings(model, batch):
        g = torch.zeros(10, 12).index_put((routing.token_N, routing.expert_N), routing.weight_N)
        dense[site] = g[valid_T].view(8, 2, 6).double()
    sites = {site.rpartition(".")[0] for site in dense}
    assert found.keys() == sites
    for site in sites:
        expected = torch.zeros(6, 6, dtype=torch.float64)
        for t in range(8):
            for h in range(2):
                expected += torch.outer(dense[f"{site}.first"][t, h], dense[f"{site}.second"][t, h]) / 8
        torch.testing.assert_close(found[site][0], expected, atol=1e-6, rtol=1e-5)
        assert float(found[site].sum()) == pytest.approx(2.0, rel=1e-5)  # every head gives 1


def test_scores_of_plain_experts_are_mean_weights() -> None:
    model = hashed_model()
    (batch,) = domains()["low"]
    found = subject.expert_scores(model, {"low": [batch]})
    for site, routing, _ in routings(model, batch):
        expected = torch.zeros(12, dtype=torch.float64)
        for expert, weight in zip(routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True):
            expected[expert] += weight / 12
        torch.testing.assert_close(found[site][0], expected, atol=1e-6, rtol=1e-6)


def test_random_masks_take_as_many_of_each_layer_and_follow_the_seed() -> None:
    masks = {"a": torch.rand(6, 6) > 0.7, "b": torch.zeros(5, dtype=torch.bool)}
    one, two = subject.random_masks(masks, 1), subject.random_masks(masks, 2)
    assert {site: int(mask.sum()) for site, mask in one.items()} == {"a": int(masks["a"].sum()), "b": 0}
    assert not torch.equal(one["a"], two["a"])
    assert torch.equal(one["a"], subject.random_masks(masks, 1)["a"])


# -- without them -------------------------------------------------------------------------------------------------


def test_masked_pairs_are_gone_inside_and_back_afterwards() -> None:
    model = monet_model()
    (batch,) = domains()["low"]
    site, there = next(iter(subject.pair_layers(model).items()))
    there[5, 5] = False  # masked before: stays so
    before = model(**batch).logits
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[:3] = True
    with subject.masked(model, {site: mask}):
        inside = model(**batch).logits
    assert torch.equal(model(**batch).logits, before)
    with pytest.raises(RuntimeError), subject.masked(model, {site: mask}):
        raise RuntimeError
    assert torch.equal(model(**batch).logits, before)
    model.get_submodule(site).mask(mask)
    assert torch.equal(model(**batch).logits, inside)
    assert not torch.allclose(inside, before, atol=1e-3)


def test_masked_plain_experts_give_nothing_and_their_weight_goes_to_nobody() -> None:
    model = hashed_model()
    (batch,) = domains()["low"]
    site = next(iter(mixture_layers(model)))
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[0, 4, 7]] = True
    with torch.no_grad(), subject.masked(model, {site: mask}):
        found = model(**batch).logits
    with torch.no_grad():
        for projection in ("gate_up_proj", "down_proj"):  # an expert of zeros answers 0
            model.get_submodule(site).bank.get_parameter(projection)[mask] = 0
        torch.testing.assert_close(found, model(**batch).logits, atol=1e-6, rtol=1e-6)


def test_what_capacity_dropped_does_not_come_back() -> None:
    given = Routing.from_topk(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), num_experts=3)
    edit = subject.Without({"here": torch.tensor([False, True, False])})
    given = given.replace(kept_N=torch.tensor([False, True, True, True]))
    assert edit.on_routing("here", given, None, None).kept_N.tolist() == [False, False, False, True]
    assert edit.on_routing("there", given, None, None) is given


def test_the_loss_is_transformers_own_and_leaves_padding_out() -> None:
    model = monet_model()
    ids = torch.tensor([[8, 4, 2, 30, 11]])
    padded = {
        "input_ids": torch.tensor([[0, 0, 8, 4, 2, 30, 11]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]]),
    }
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert subject.loss(model, [{"input_ids": ids}]) == pytest.approx(expected, rel=1e-5)
    assert subject.loss(model, [padded]) == pytest.approx(expected, rel=1e-5)


def test_selectivity_by_hand() -> None:
    assert subject.selectivity(torch.tensor([0.6, 0.1, 0.3]), 0) == pytest.approx(3.0)
    assert subject.selectivity(torch.tensor([-0.2, 0.5, 0.1]), 1) == pytest.approx(500.0)  # the others got better


# -- the report ---------------------------------------------------------------------------------------------------


def test_experts_that_only_one_domain_uses_cost_the_others_exactly_nothing() -> None:
    model = hashed_model()
    found = report(model)
    tables = {name: mixture_layers(model)[name].router for name in mixture_layers(model)}
    used = {name: {site: set() for site in tables} for name in IDS}
    for name, (batch,) in domains().items():
        for site, routing, _ in routings(model, batch):
            used[name][site] |= set(routing.expert_N.tolist())
    alone = [len(used["low"][site] - used["high"][site]) for site in tables]
    assert min(alone) > 0
    rows = {row[0]: row for row in found.tables["experts"].rows}
    strict = report(model, ratio=1e9)  # only experts that the other domain never uses
    assert [row[1] for row in strict.tables["experts"].rows] == alone
    assert all(row[1] + row[2] <= row[3] == 12 for row in rows.values())
    change = {(row[0], row[1]): row[2:] for row in strict.tables["loss change"].rows}
    assert change["low", "own"][1] == change["high", "own"][0] == 0.0
    assert abs(change["low", "own"][0]) > 1e-3
    assert strict.numbers["low: loss change, own masked"] == change["low", "own"][0]
    listed = [row for row in strict.tables["most used"].rows if row[0] == "high"]
    assert listed
    assert {int(row[2]) for row in listed if row[1] == next(iter(tables))} <= used["high"][next(iter(tables))]
    assert [row[3] for row in listed] == sorted((row[3] for row in listed), reverse=True)
    assert all(row[4] == 0.0 for row in listed)


def test_the_matrix_of_a_product_key_model_is_what_masking_measures() -> None:
    model = monet_model()
    found = report(model, listed=3)
    scores = subject.expert_scores(model, domains())
    for place, name in enumerate(IDS):
        masks = {site: subject.assign_domains(score) == place for site, score in scores.items()}
        assert found.numbers[f"{name}: experts"] == sum(int(mask.sum()) for mask in masks.values()) > 0
        before = [subject.loss(model, batches) for batches in domains().values()]
        for site, mask in masks.items():
            model.get_submodule(site).mask(mask)
        after = [subject.loss(model, batches) for batches in domains().values()]
        for there in subject.pair_layers(model).values():
            there.fill_(True)
        row = next(row for row in found.tables["loss change"].rows if row[:2] == [name, "own"])
        assert row[2:] == pytest.approx([b - a for a, b in zip(before, after, strict=True)], abs=1e-6)
    assert len(found.tables["most used"].rows) == 6


def test_domains_come_from_labels_from_batches_or_from_further_sources(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    config = subject.Config(name="code")

    def groups(batches: list[dict[str, object]], **changes: object) -> dict[str, int]:
        given = MeterInputs(name=str(tmp_path / "model"), batches=batches)
        found = subject.group_domains(given, config.model_copy(update=changes))
        assert all("domain" not in batch for batches in found.values() for batch in batches)
        return {name: len(batches) for name, batches in found.items()}

    assert groups([{"input_ids": ids}] * 3) == {"0": 1, "1": 1, "2": 1}
    assert groups([{"input_ids": ids, "domain": "a"}, {"input_ids": ids}, {"input_ids": ids}]) == {"a": 1, "code": 2}
    model = monet_model(vocab_size=259)
    moestro.save(model, tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("x" * 700)
    assert groups([{"input_ids": ids}], against={"more": str(tmp_path / "text.txt")}) == {"code": 1, "more": 2}
    with pytest.raises(ConfigError, match="1 domains; 2 to 16 are compared"):
        groups([{"input_ids": ids, "domain": "a"}])
    with pytest.raises(ConfigError, match="17 domains"):
        groups([{"input_ids": ids}] * 17)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no mixture layer"):
        report(adopt(tiny_model("llama")))
    with pytest.raises(ConfigError, match="greater than 1"):
        subject.Config(ratio=1.0)
