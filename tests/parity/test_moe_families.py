"""Every mixture family: what Moestro opens computes what Transformers computes."""

import pytest
import torch

import moestro
from moestro.core.layer import mixture_layers
from moestro.models.families import families
from moestro.models.keymap import entries
from moestro.models.swap import mixtures
from moestro.models.weights import split
from moestro.testing.tiny import TINY


MOE = [name for name in TINY if families()[name].kind == "moe"]
ATOL = 1e-5


class Choices:
    """A recorder of which experts each token chose at each site, and which of them ran."""

    def __init__(self):
        self.chosen = {}
        self.ran = {}

    def record(self, site, routing, ctx):
        for name, view in (("chosen", routing), ("ran", routing.real())):
            pairs = zip(view.token_N.tolist(), view.expert_N.tolist(), strict=True)
            getattr(self, name).setdefault(site, []).append(set(pairs))


def forward(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("pad", [None, "left", "right"])
@pytest.mark.parametrize("family", MOE)
def test_logits_are_those_of_transformers(stock, inputs, family, pad):
    plain, folder = stock(family)
    model = moestro.load(folder)
    batch = inputs(plain, pad=pad)
    assert (forward(model, batch) - forward(plain, batch)).abs().max() <= ATOL


@pytest.mark.parametrize("family", MOE)
def test_one_token_leaves_most_experts_empty(stock, inputs, family):
    plain, folder = stock(family)
    model = moestro.load(folder)
    batch = inputs(plain, rows=1, width=1)
    seen = Choices()
    with moestro.session(recorder=seen):
        ours = forward(model, batch)
    assert (ours - forward(plain, batch)).abs().max() <= ATOL
    layers = mixture_layers(model)
    assert seen.chosen
    assert all(len(pairs) < layers[site].bank.num_experts for site, (pairs,) in seen.chosen.items())


@pytest.mark.parametrize("family", MOE)
def test_all_tokens_on_the_same_experts(stock, inputs, family):
    """One id repeated gives equal hidden states, so all tokens go to the same experts and the others get none."""
    plain, folder = stock(family)
    model = moestro.load(folder)
    batch = inputs(plain, rows=1, width=6)
    batch = {name: ids[:, :1].expand_as(ids).clone() for name, ids in batch.items()}
    seen = Choices()
    with moestro.session(recorder=seen):
        ours = forward(model, batch)
    assert (ours - forward(plain, batch)).abs().max() <= ATOL
    layers = mixture_layers(model)
    first = next(site for site in seen.chosen if "decoder" not in site)
    assert len({expert for _, expert in seen.chosen[first][0]}) == layers[first].router.top_k


@pytest.mark.parametrize("family", MOE)
def test_mixture_layers_stand_where_the_config_says_and_choose_the_stock_experts(stock, inputs, family):
    plain, folder = stock(family)
    model = moestro.load(folder)
    spec = families()[family]
    layers = mixture_layers(model)
    blocks = {name for name, module in plain.named_modules() if type(module).__name__ == spec.moe.block}
    assert set(layers) == blocks
    assert blocks

    stock_choices = {}
    for name in blocks:
        router = next(m for n, m in plain.get_submodule(name).named_children() if n in ("gate", "router"))
        router.register_forward_hook(lambda m, a, out, name=name: stock_choices.update({name: out}))
    batch = inputs(plain)
    seen = Choices()
    forward(plain, batch)
    with moestro.session(recorder=seen):
        forward(model, batch)
    assert set(seen.chosen) == blocks
    for name, output in stock_choices.items():
        if family == "switch_transformers":
            ran = {(token, expert) for token, expert in output[0].flatten(0, 1).nonzero().tolist()}
            assert seen.ran[name] == [ran]
        else:
            rows = output[2].tolist()
            assert seen.chosen[name] == [{(t, e) for t, row in enumerate(rows) for e in row}]


@pytest.mark.parametrize("family", MOE)
def test_gradients_of_every_tensor(stock, inputs, family):
    plain, folder = stock(family)
    model = moestro.load(folder)
    batch = inputs(plain)
    for one in (plain, model):
        one.zero_grad()
        one(**batch).logits.square().mean().backward()
    spec = families()[family]
    ours = {name: p.grad for name, p in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    theirs = dict(plain.named_parameters())
    checked = 0
    for entry in entries(shapes, mixtures(model, spec), spec.moe.stock).values():
        for piece, mine in zip(entry.pieces, split(ours[entry.name], entry.chain), strict=True):
            other = theirs[piece.key].grad
            other = torch.zeros_like(theirs[piece.key]) if other is None else other
            scale = max(1.0, other.abs().max().item())
            assert (mine - other).abs().max() <= ATOL * scale, piece.key
            checked += 1
    plain.zero_grad()
    assert checked == len(theirs)


@pytest.mark.parametrize("family", MOE)
def test_saved_and_exported_folders_compute_the_same(stock, inputs, tmp_path, family):
    plain, folder = stock(family)
    model = moestro.load(folder)
    batch = inputs(plain, pad="left")
    before = forward(model, batch)
    moestro.save(model, tmp_path / "own")
    again = moestro.load(tmp_path / "own")
    assert set(mixture_layers(again)) == set(mixture_layers(model))
    assert (forward(again, batch) - before).abs().max() <= 1e-6
    moestro.export(model, tmp_path / "stock")
    third = type(plain).from_pretrained(tmp_path / "stock")
    assert (forward(third, batch) - forward(plain, batch)).abs().max() <= 1e-6


@pytest.mark.parametrize("family", MOE)
def test_without_swapping_it_is_the_plain_model(stock, inputs, family):
    plain, folder = stock(family)
    model = moestro.load(folder, swap=False)
    assert type(model) is type(plain)
    theirs = plain.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
