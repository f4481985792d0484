"""The study of BAM: its text, what its joins share, and how much training equal compute buys."""

import pytest
import torch

from moestro.methods.train.mixture_of_attention import MixtureOfAttention
from moestro.studies._framework import BUDGETS
from moestro.studies.bam import DOMAINS, JOINS, STUDY, bare, branches, documents, joined, operations, scale, steps_of
from moestro.studies.bam import text as text_of
from moestro.training.size import size_of


CI = BUDGETS["ci"]


def test_code_is_bare() -> None:
    source = '"""What\nit does."""\n\nx = 1  # one\n# alone\ny = "a#b"\n'
    assert bare(source) == 'x = 1\ny = "a#b"\n'


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_stand_on_one_side_only(domain: str) -> None:
    found = documents(domain)
    assert len({key for key, _ in found}) == len(found)
    train, heldout = text_of(domain)
    assert len(train) + len(heldout) == sum(len(body.encode()) for _, body in found)
    assert 0.02 < len(heldout) / len(train) < 0.4
    assert min(len(train), len(heldout)) > 10 * scale(BUDGETS["full"]).length


def test_joins_start_from_the_same_models() -> None:
    first = branches(0, "ci")
    assert branches(0, "ci") is first
    assert len(first) == len(DOMAINS)
    weights = [model.model.layers[0].self_attn.q_proj.weight for model in first]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    before = [weight.detach().clone() for weight in weights]
    model = joined("bam", 0, CI)
    (mixed,) = [module for module in model.modules() if isinstance(module, MixtureOfAttention)]
    assert torch.equal(mixed.query_proj, torch.stack(before))
    with torch.no_grad():
        mixed.query_proj.zero_()
    assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))


def test_arms_are_joins_or_the_seed() -> None:
    assert {arm.name for arm in STUDY.arms} == {*JOINS, "dense"}


@pytest.mark.parametrize("name", ["ci", "micro", "full"])
def test_the_matched_join_has_as_many_weights_all_in_all_and_running(name: str) -> None:
    """Attention experts of one feed-forward against one attention of three feed-forwards, routers apart."""
    size = scale(BUDGETS[name])
    attention, forward = 4 * size.dim**2, 3 * size.dim * size.inner
    experts, models = 4 + int(str(JOINS["btx_matched"]["extra_experts"])), len(DOMAINS)
    assert models * (attention + forward) == attention + experts * forward
    assert models * attention + forward == attention + int(str(JOINS["btx_matched"]["ffn_top_k"])) * forward


def test_the_matched_join_is_what_its_settings_say() -> None:
    sizes, tiny = {}, scale(CI)
    for arm in ("bam", "btx_matched"):
        found = size_of(joined(arm, 0, CI), tiny.length)
        routers = {"bam": 4 + 4, "btx_matched": 6}[arm] * tiny.dim * tiny.layers
        sizes[arm] = (found.parameters - routers, found.active - routers)
    assert sizes["bam"] == sizes["btx_matched"]


def test_equal_compute_is_as_many_operations() -> None:
    models = {arm: joined(arm, 0, CI) for arm in ("bam", "btx", "bam_top1")}
    tiny = scale(CI)
    dense, soft = (operations(models[arm], tiny) for arm in ("btx", "bam"))
    extra = 3 * (4 * 2 * tiny.dim**2 + 4 * tiny.dim * (tiny.length + 1) / 2) + 2 * 4 * tiny.dim
    assert soft - dense == pytest.approx(tiny.layers * extra, rel=1e-6)
    one = operations(models["bam_top1"], tiny, one=True)
    kept = 3 * (2 * 2 * tiny.dim**2 + 4 * tiny.dim * (tiny.length + 1) / 2)
    assert soft - one == pytest.approx(tiny.layers * kept, rel=1e-6)
    assert steps_of("bam_compute", 0, CI, models["bam"]) == round(tiny.mix_steps * dense / soft)
    assert steps_of("bam_top1", 0, CI, models["bam_top1"]) == round(tiny.mix_steps * soft / one)
    assert steps_of("btx", 0, CI, models["btx"]) == tiny.mix_steps
    assert steps_of("bam_top1_tokens", 0, CI, models["bam_top1"]) == tiny.mix_steps


def test_arms_that_are_compared_differ_in_one_setting() -> None:
    """Equal first weights, the feed-forward routers' too, and equal rows to train on."""
    models = {arm: joined(arm, 0, CI).state_dict() for arm in ("bam", "bam_top1", "bam_shared", "btx")}
    first = models["bam"]
    assert all(torch.equal(tensor, models["bam_top1"][name]) for name, tensor in first.items())
    own = {name: tensor for name, tensor in first.items() if not name.endswith(("key_proj", "value_proj"))}
    assert all(torch.equal(tensor, models["bam_shared"][name]) for name, tensor in own.items())
    assert all(torch.equal(tensor, models["btx"][name]) for name, tensor in first.items() if ".self_attn." not in name)
