"""BAM: what each model gives, what is averaged, and when nothing changes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM

from moestro import surgery
from moestro.cli import main
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.layer import mixture_layers
from moestro.core.plan import ExpertPlan, Plan
from moestro.core.registry import method
from moestro.core.session import session
from moestro.methods.train.mixture_of_attention import MixtureOfAttention
from moestro.models.load import load
from moestro.models.save import save
from moestro.models.swap import swap
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import assert_untouched, ids, logits, mixture, snapshot


BAM = method("convert.bam")


def grown(model: Any, seed: int) -> Any:
    """A specialist, as far as weights tell."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return other


def family_of(family: str = "cohere", count: int = 2, **changes: Any) -> tuple[Any, dict[str, Any]]:
    seed = tiny_model(family, **changes)
    return seed, {f"donor{i}": grown(seed, i) for i in range(1, count + 1)}


def planned(model: Any, donors: dict[str, Any], seed: int = 0, **config: Any) -> ExpertPlan:
    opened = {name: OpenModel(donor, name) for name, donor in donors.items()}
    plan = BAM.plan(PlanInputs(subject=OpenModel(model), donors=opened, seed=seed), BAM.configure(config))
    assert isinstance(plan, ExpertPlan)
    return plan


def joined(model: Any, donors: dict[str, Any], seed: int = 0, **config: Any) -> dict[str, Any]:
    return surgery.apply(model, planned(model, donors, seed, **config), donors=donors)


def attentions(model: Any) -> list[MixtureOfAttention]:
    return [module for module in model.modules() if isinstance(module, MixtureOfAttention)]


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_experts_are_copies_and_the_rest_is_the_mean(kv: str) -> None:
    model, donors = family_of(attention_bias=True)
    models = [copy.deepcopy(model), *donors.values()]
    receipt = joined(model, donors, kv=kv)
    for layer, (there, mix) in enumerate(zip(attentions(model), mixture_layers(model).values(), strict=True)):
        stock = [one.model.layers[layer] for one in models]
        for expert, block in enumerate(stock):
            for name, path in {"query": "q_proj", "output": "o_proj"}.items():
                assert torch.equal(getattr(there, f"{name}_proj")[expert], getattr(block.self_attn, path).weight)
                assert torch.equal(getattr(there, f"{name}_bias")[expert], getattr(block.self_attn, path).bias)
            assert torch.equal(mix.bank.down_proj[expert], block.mlp.down_proj.weight)
        for name, path in {"key": "k_proj", "value": "v_proj"}.items():
            for part, leaf in (("proj", "weight"), ("bias", "bias")):
                wanted = torch.stack([getattr(getattr(block.self_attn, path), leaf) for block in stock])
                wanted = wanted if kv == "expert" else wanted.mean(0, keepdim=True)
                atol = 0 if kv == "expert" else 1e-6
                torch.testing.assert_close(getattr(there, f"{name}_{part}"), wanted, atol=atol, rtol=0)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
        wanted = torch.stack([one.get_parameter(name) for one in models]).mean(0)
        torch.testing.assert_close(model.get_parameter(name), wanted, atol=1e-6, rtol=0)
    rows = 2 * (3 * 3 + 2 * (12 if kv == "expert" else 8))  # layers (feed-forward matrices, attention rows and biases)
    assert receipt["ledger"]["rows_touched"] == receipt["ledger"]["rows_expected"] == rows
    assert receipt["sites"][1]["donors"] == ["donor1", "donor2"]


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("family", ["cohere", "llama", "qwen2", "bert"])
def test_equal_models_give_the_model_back_with_gates_that_sum_to_one(family: str, kv: str) -> None:
    model = tiny_model(family)
    wanted = logits(model)
    donors = {f"donor{i}": copy.deepcopy(model) for i in range(3)}
    joined(model, donors, kv=kv, ffn_gate_norm="topk_softmax")
    for one in attentions(model):
        torch.nn.init.normal_(one.router)
    for mix in mixture_layers(model).values():
        torch.nn.init.normal_(mix.router.weight)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)


def test_the_paper_s_gate_scales_the_feed_forward_branch_down() -> None:
    model = tiny_model("cohere", num_hidden_layers=1)
    donors = {f"donor{i}": copy.deepcopy(model) for i in range(3)}
    halved = copy.deepcopy(model)
    joined(model, donors)
    for mix in mixture_layers(model).values():
        mix.router.weight.data.zero_()  # p = 1/4 exactly
    halved.model.layers[0].mlp.down_proj.weight.data.mul_(0.25)
    torch.testing.assert_close(logits(model), logits(halved), atol=1e-5, rtol=1e-5)


def test_branch_train_mix_averages_the_attention() -> None:
    model, donors = family_of()
    models = [copy.deepcopy(model), *donors.values()]
    joined(model, donors, attention="mean", extra_experts=2, ffn_top_k=3)
    assert not attentions(model)
    name = "model.layers.0.self_attn.k_proj.weight"
    wanted = torch.stack([one.get_parameter(name) for one in models]).mean(0)
    torch.testing.assert_close(model.get_parameter(name), wanted, atol=1e-6, rtol=0)
    for mix in mixture_layers(model).values():
        assert (mix.bank.num_experts, mix.router.top_k) == (5, 3)
        assert torch.equal(mix.bank.down_proj[3], mix.bank.down_proj[0])
        assert set(mix.losses) == {"balance", "z"}


def test_losses_are_of_the_feed_forward_router_alone() -> None:
    model, donors = family_of()
    joined(model, donors)
    with session(collect=True) as opened:
        model(input_ids=ids())
    (ctx,) = opened.take()
    sites = list(mixture_layers(model))
    assert sorted(ctx.losses) == sorted((site, name) for site in sites for name in ("balance", "z"))
    assert all("mlp" in site for site in sites)
    sum(term.total for term in ctx.losses.values()).backward()
    # the attention of the last layer stands beside the last router, so nothing of it is asked
    last = attentions(model)[-1]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in last.parameters())
    assert all(bool(mix.router.weight.grad.any()) for mix in mixture_layers(model).values())


def test_gates_of_the_attention_are_as_the_settings_say() -> None:
    model, donors = family_of()
    joined(model, donors, kv="shared", attn_top_k=2, router_std=0.25)
    for one in attentions(model):
        assert (one.config.num_experts, one.config.kv, one.config.top_k) == (3, "shared", 2)
        assert one.config.router_std == 0.25
        assert float(one.router.detach().std()) == pytest.approx(0.25, rel=0.4)  # of 96 draws
    plain, others = family_of()
    joined(plain, others)
    assert [one.config.top_k for one in attentions(plain)] == [None, None]
    with pytest.raises(PlanError, match="attn_top_k=4 of 3; choose at most as many"):
        planned(*family_of(), attn_top_k=4)


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_from_disk_to_disk_is_the_same_model(tmp_path: Path, kv: str) -> None:
    model, donors = family_of("qwen3")  # norms of heads are averaged
    for name, one in {"seed": model, **donors}.items():
        one.save_pretrained(tmp_path / name)
    plan = planned(model, donors, seed=4, kv=kv)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    refs = {name: tmp_path / name for name in donors}
    told = surgery.apply(tmp_path / "seed", plan, tmp_path / "out", donors=refs)
    receipt = surgery.apply(model, plan, donors=donors)
    assert told["ledger"] == receipt["ledger"]
    assert told["parameters"] == receipt["parameters"]
    again = load(tmp_path / "out")
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(theirs[name], tensor), name
    norms = [one.get_parameter("model.layers.0.self_attn.q_norm.weight") for one in donors.values()]
    assert not torch.equal(again.get_parameter("model.layers.0.self_attn.q_norm.weight"), norms[0])


def test_the_command_joins_folders_that_transformers_opens_and_writes_with(tmp_path: Path) -> None:
    model, donors = family_of()
    for name, one in {"seed": model, **donors}.items():
        one.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("seed", "donor1", "donor2", "out")]
    assert main(["convert", "bam", *folders, "--kv", "shared"]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(attentions(again)) == 2
    assert attentions(again)[0].config.num_experts == 3
    wanted: Tensor = logits(again)
    text = again.generate(ids(1, 4), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert text.shape == (1, 7)
    save(again, tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), wanted, atol=1e-6, rtol=0)


def test_parameters_of_the_paper_s_small_model() -> None:
    config = CohereConfig(
        vocab_size=256_000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False, attention_bias=False,
    )  # fmt: skip
    found = {}
    for kv in ("dense", "btx", "shared", "expert"):
        with torch.device("meta"):
            model = CohereForCausalLM(config)
            if kv != "dense":
                router = {"method": "train.softmax_topk", "config": {"top_k": 1, "renormalise": False}}
                swap(model, "train.moe", {"num_experts": 4, "expert_size": 2048, "router": router})
            if kv in ("shared", "expert"):
                swap(model, "train.mixture_of_attention", {"num_experts": 4, "kv": kv}, kind="attention")
        found[kv] = sum(parameter.numel() for parameter in model.parameters())
    assert found == {"dense": 587_209_728, "btx": 700_480_512, "shared": 738_253_824, "expert": 776_002_560}


def test_tied_embeddings_stay_tied() -> None:
    model, donors = family_of("llama", tie_word_embeddings=True)
    joined(model, donors)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_one_model_stays_as_it_is() -> None:
    model = tiny_model("cohere")
    before = snapshot(model)
    plan = planned(model, {})
    assert not plan.layers
    assert not plan.sites
    surgery.apply(model, plan)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())


def test_notes_say_how_far_the_block_is_from_the_paper_s() -> None:
    parallel, sequential = (planned(*family_of(family)).notes for family in ("cohere", "llama"))
    assert parallel["parallel_block"] is True
    assert "deviation" not in parallel
    assert sequential["parallel_block"] is False
    assert "runs its feed-forward after its attention" in sequential["deviation"]
    assert [planned(*family_of(), kv=kv).notes["kv_caches"] for kv in ("expert", "shared")] == [3, 1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"intermediate_size": 40}, "donor1 layer 0: inner is 40, the first model has 48"),
        ({"num_key_value_heads": 4}, r"layer 0 attention: k_proj.weight of 'donor1' has shape \[32, 32\], a row of"),
        ({"vocab_size": 90}, r"model.embed_tokens.weight has shape \[97, 32\], donor 'donor1' has it with shape"),
    ],
)
def test_models_of_other_shapes_are_refused(changes: dict[str, int], told: str) -> None:
    model, donor = tiny_model("cohere"), tiny_model("cohere", **changes)
    before = snapshot(model)
    with pytest.raises(PlanError, match=told):
        joined(model, {"donor1": donor}, check_origin=False)
    assert_untouched(model, before)


def test_what_cannot_be_joined_is_refused() -> None:
    model, donors = family_of(count=1)
    with pytest.raises(PlanError, match="unrelated to the first model's"):
        planned(model, {"donor1": tiny_model("cohere", seed=9)})
    assert planned(model, {"donor1": tiny_model("cohere", seed=9)}, check_origin=False).sites
    with pytest.raises(PlanError, match="ffn_top_k=3 of 2 experts"):
        planned(model, donors, ffn_top_k=3)
    with pytest.raises(PlanError, match="0 dense layers"):
        planned(mixture(), {"donor1": mixture()})
    with pytest.raises(ConfigError, match="has no attention experts; leave kv and attn_top_k out"):
        BAM.configure({"attention": "mean", "kv": "shared"})
    plan = planned(model, donors)
    with pytest.raises(PlanError, match="an optimiser cannot move along yet"):
        surgery.apply(model, plan, donors=donors, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
