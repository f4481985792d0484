"""The arms of the union-of-experts study differ in what they claim to differ in, and in nothing else."""

import pytest
import torch

from moestro.core.cost import Work
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.studies import uoe
from moestro.studies._framework import BUDGETS
from moestro.studies._language import Scale
from moestro.studies._patches import Attention, FeedForward
from moestro.training.size import size_of


DIGITS = uoe.Digits(layers=2)
TEXT = Scale(layers=2, vocabulary=512)


def test_patches_are_squares_of_the_image() -> None:
    from sklearn.datasets import load_digits

    patches, labels = uoe.images()
    image = torch.tensor(load_digits().images[7], dtype=torch.float32) / 8 - 1
    assert patches.shape == (1797, 16, 4)
    for row in range(4):
        for column in range(4):
            square = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(patches[7, 4 * row + column], square.flatten())
    assert int(labels[7]) == 7


def test_controls_have_the_operations_of_the_union() -> None:
    flops = {
        arm: uoe.block_flops(uoe.encoder(arm, DIGITS, 0), Work(uoe.PATCHES))
        for arm in ("union", "union_tokens", "released", "random", *uoe.EQUAL, "dropout", "dense")
    }
    assert flops["union"] == flops["released"] == flops["random"]
    assert flops["dropout"] == flops["dense"]
    for arm in uoe.EQUAL:
        assert flops[arm] == pytest.approx(flops["union"], rel=0.005)
    assert flops["union"] == pytest.approx(flops["dense"] / 2, rel=0.02)
    arms = ("union", *uoe.EQUAL)
    used = {arm: size_of(uoe.language_model(arm, TEXT, 0), TEXT.length).forward_flops for arm in arms}
    for arm in uoe.EQUAL:
        assert used[arm] == pytest.approx(used["union"], rel=0.005)


def test_a_mixture_differs_from_the_narrow_model_in_its_feed_forward_only() -> None:
    narrow, mixture = (uoe.encoder(arm, DIGITS, 0) for arm in uoe.EQUAL)
    ours, theirs = (dict(model.named_parameters()) for model in (mixture, narrow))
    apart = {name for name in {*ours, *theirs} if name not in ours or name not in theirs}
    assert apart
    assert all(".mlp." in name for name in apart)
    assert all(ours[name].shape == theirs[name].shape for name in set(ours) - apart)
    for layer in mixture_layers(mixture).values():
        assert (layer.router.num_experts, layer.router.top_k) == (2, 1)
        inner, wide = len(layer.bank.weight(0, "up")), len(theirs["blocks.0.mlp.up_proj.weight"])
        assert wide - 1 <= inner <= wide, "the operations of the gate of two are those of a hidden unit"


def test_arms_start_from_the_same_dense_weights_and_differ_in_their_gates() -> None:
    dense = uoe.encoder("dense", DIGITS, 3).state_dict()
    for arm in uoe.UNIONS:
        model = uoe.encoder(arm, DIGITS, 3)
        found = model.state_dict()
        assert set(found) - set(dense) == {name for name in found if ".router." in name}
        assert all(torch.equal(found[name], dense[name]) for name in dense)
        gates = [layer.router for layer in mixture_layers(model).values()]
        assert len(gates) == 4
        assert {gate.weight.requires_grad for gate in gates} == {arm != "random"}
        assert {gate.config.combine for gate in gates} == {"straight_through" if arm.startswith("union") else "sum"}
        assert {gate.causal for gate in gates} == {arm == "union_tokens"}


def test_controls_start_from_the_dense_weights_where_shapes_agree() -> None:
    dense = uoe.encoder("dense", DIGITS, 3).state_dict()
    text = uoe.language_model("dense", TEXT, 3).state_dict()
    for arm in (*uoe.EQUAL, "mixture", "dropout"):
        found = uoe.encoder(arm, DIGITS, 3).state_dict()
        same = [name for name in found if name in dense and found[name].shape == dense[name].shape]
        assert {"embed.weight", "places", "blocks.1.attention.o_proj.bias", "head.weight"} <= set(same)
        assert all(torch.equal(found[name], dense[name]) for name in same)
        if arm != "dropout":
            model = uoe.language_model(arm, TEXT, 3).state_dict()
            assert torch.equal(model["model.embed_tokens.weight"], text["model.embed_tokens.weight"])
    assert not torch.equal(dense["head.weight"], uoe.encoder("dense", DIGITS, 4).state_dict()["head.weight"])


def test_heads_and_hidden_units_are_dropped_token_by_token_in_training() -> None:
    torch.manual_seed(0)
    attention, feed = Attention(8, 4, 2, 0.5), FeedForward(8, 64, 0.5)
    seen: dict[str, torch.Tensor] = {}
    attention.o_proj.register_forward_pre_hook(lambda _, given: seen.update(heads=given[0].unflatten(2, (4, 2))))
    feed.down_proj.register_forward_pre_hook(lambda _, given: seen.update(units=given[0]))
    x, dropped = torch.randn(3, 16, 8), {}
    for training in (False, True):
        attention.train(training)(x)
        feed.train(training)(x)
        dropped[training] = dict(seen)
    for kind, kept in dropped[False].items():
        gone = dropped[True][kind] == 0
        torch.testing.assert_close(dropped[True][kind], torch.where(gone, 0.0, 2 * kept))
        assert gone.double().mean() == pytest.approx(0.5, abs=0.1)
    heads = dropped[True]["heads"] == 0
    assert torch.equal(heads[..., 0], heads[..., 1]), "a head as a whole"
    assert (heads[:, 0] != heads[:, 1]).any(), "not the same for all tokens"


def test_a_cut_model_keeps_the_largest_answers() -> None:
    model = uoe.language_model("dense", TEXT, 0)
    feed = model.model.layers[0].mlp
    x_TD = torch.randn(5, TEXT.dim)
    config = method("train.uoe").configure({"num_slices": uoe.CUT, "combine": "sum", "losses": {}})
    site = Site(path="0.mlp", kind="mlp", module=feed, **uoe.facts(model, TEXT))
    layer = method("train.uoe").build(site, config, Shared())
    layer.router = uoe.BySize(uoe.CUT, uoe.CUT_TOP_K, largest=True)
    width, hidden = TEXT.inner // uoe.CUT, feed.act_fn(feed.gate_proj(x_TD)) * feed.up_proj(x_TD)
    parts = [slice(i * width, (i + 1) * width) for i in range(uoe.CUT)]
    answers = torch.stack([hidden[:, part] @ feed.down_proj.weight[:, part].T for part in parts], 1)
    for t in range(5):
        smallest = answers[t].norm(dim=-1).topk(2, largest=False).indices
        expected = answers[t].sum(0) - answers[t, smallest].sum(0)
        torch.testing.assert_close(layer(x_TD[t][None])[0], expected, atol=1e-6, rtol=1e-4)
    found = uoe.run("dense", 0, BUDGETS["ci"])
    assert found["cut_all"] == pytest.approx(found["loss"], abs=1e-5)
    assert found["cut_largest"] != found["cut_any"]


def test_only_the_unions_gate_moves() -> None:
    size = uoe.Digits(layers=1, dim=16, inner=32, epochs=2, train=256)
    found = {arm: uoe.digits(arm, 0, size) for arm in ("union", "released", "random")}
    assert found["released"]["turned"] < 1e-6
    assert found["random"]["turned"] < 1e-6
    assert found["union"]["turned"] > 1e-3
    assert found["union"]["gap"] < 1e-6
    assert found["union"]["moved"] == 2 * 2 * 2 * 16 * 4, "half of four slices, twice a layer, in and out, 4 bytes"


def test_a_run_depends_on_nothing_but_its_arguments() -> None:
    first, second = (uoe.run("union", 1, BUDGETS["ci"]) for _ in range(2))
    assert first == second
