"""Mixture of depths: the batch's best tokens go through, at their own positions; the cache knows who was there."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moestro
from moestro.core.context import current_context
from moestro.core.cost import RowCounter, Work, cost
from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.batch_choice import Picked
from moestro.methods.train.mixture_of_depths import Config, MixtureOfDepths
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model
from moestro.training.size import attention_costs


IDS = torch.randint(3, 97, (3, 8), generator=torch.Generator().manual_seed(1))
FIRST = 50
MOMA = {"groups": {"text": 2, "image": 2}, "modality": {"image": [(FIRST, 96)]}}
SITES = ["model.layers.0", "model.layers.2"]
ASK = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def whole(taught: bool = True, inside: bool = False, kind: str = "block", seed: int = 3, **config: object) -> nn.Module:
    """A tiny Llama of three layers; depth routing in the first and the third."""
    model = adopt(tiny_model("llama", num_hidden_layers=3))
    if inside:
        swap(model, "train.moma", MOMA)
    swap(model, "train.mixture_of_depths", config, kind=kind, layers=[0, 2])
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".bank." in name or name.endswith("router.weight"):
            nn.init.normal_(parameter, std=0.4, generator=draw)
        if taught and "auxiliary" in name:
            nn.init.normal_(parameter, std=0.5, generator=draw)
    return model


def forward(model: nn.Module, ids: Tensor = IDS, **call: object) -> tuple[Tensor, dict[str, Routing]]:
    with torch.no_grad(), session(collect=True) as opened:
        logits = model(ids, use_cache=False, **call).logits
    (ctx,) = opened.take()
    return logits, {site: routing for site, routing in ctx.routings.items() if routing is not None}


def chosen(routing: Routing) -> list[int]:
    return sorted(routing.token_N.tolist())


def look_back(width: int) -> Tensor:
    return torch.ones(width, width).tril().log()[None, None]


def alone(wrapped: MixtureOfDepths, rotary: nn.Module, row: Tensor, taken: list[int], weight: Tensor) -> Tensor:
    """The layer on one row [S, D] token by token: chosen ones see chosen ones, at their original positions."""
    out = list(row)
    if taken:
        x = row[taken][None]
        place = torch.tensor([taken])
        y = wrapped.inner(x, look_back(len(taken)), position_embeddings=rotary(x, place), position_ids=place)[0]
        for slot, token in enumerate(taken):
            out[token] = row[token] + weight[token] * (y[slot] - row[token])
    return torch.stack(out)


# -- the choice and the sum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_outputs_and_gradients_equal_rows_run_alone_with_their_chosen_tokens(attention: str) -> None:
    model = whole(capacity=0.4).train()
    model.set_attn_implementation(attention)
    with session(collect=True) as opened:
        found = model(IDS, use_cache=False).logits
    (ctx,) = opened.take()
    counts = [len(chosen(ctx.routings[site])) for site in SITES]
    assert counts == [10, 10], "0.4 of 24 tokens, whatever the rows"
    per_row = torch.bincount(ctx.routings[SITES[0]].token_N // 8, minlength=3).tolist()
    assert len(set(per_row)) > 1, "the choice is over the batch, rows differ"
    h = model.model.embed_tokens(IDS)
    for number, layer in enumerate(model.model.layers):
        if number == 1:
            place = torch.arange(8)[None]
            h = layer(h, look_back(8), position_embeddings=model.model.rotary_emb(h, place), position_ids=place)
            continue
        score = (h @ layer.router.weight[0]).view(-1)
        best = score.detach().topk(10).indices.tolist()
        rows = [[t - 8 * r for t in sorted(best) if t // 8 == r] for r in range(3)]
        weight = score.sigmoid().view(3, 8)
        h = torch.stack(
            [alone(layer, model.model.rotary_emb, h[r], rows[r], weight[r]) for r in range(3)]
        )  # fmt: skip
    expected = model.lm_head(model.model.norm(h))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    wish = torch.randn_like(found)
    named = {n: p for n, p in model.named_parameters() if "auxiliary" not in n}
    ours, theirs = (torch.autograd.grad((y * wish).sum(), list(named.values())) for y in (found, expected))
    for name, one, two in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=2e-4 * float(two.abs().max()), rtol=1e-3, msg=name)


def test_tokens_that_skip_pass_unchanged() -> None:
    model = whole(taught=False)
    wrapped = model.model.layers[0]
    seen: dict[str, Tensor] = {}
    wrapped.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    _, routings = forward(model)
    took = torch.zeros(24, dtype=torch.bool)
    took[chosen(routings[SITES[0]])] = True
    assert int(took.sum()) == 6
    changed = (seen["x"] != seen["y"]).any(-1).view(-1)
    assert torch.equal(changed, took)


def test_all_tokens_with_score_one_are_the_plain_model() -> None:
    plain = adopt(tiny_model("llama", num_hidden_layers=3))
    model = whole(taught=False, capacity=1.0)
    for number in (0, 2):
        nn.init.constant_(model.model.layers[number].router.weight, 0.0)
    half, _ = forward(model)

    class One(Edit):
        def on_scores(self, site, scores, ctx):
            return scores.replace(gate_TC=torch.ones_like(scores.gate_TC))

    with torch.no_grad(), session(edits=[One()]):
        found = model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, plain(IDS, use_cache=False).logits.detach(), atol=1e-5, rtol=0)
    assert float((half - found).abs().max()) > 0.1


@pytest.mark.parametrize(("capacity", "count"), [(0.25, 6), (0.1, 2), (0.01, 1), (0.06, 1), (0.07, 2), (1.0, 24)])
def test_the_number_of_tokens_of_a_batch_is_fixed(capacity: float, count: int) -> None:
    for seed in range(3):
        _, routings = forward(whole(taught=False, capacity=capacity, seed=seed))
        assert [routing.num_tokens for routing in routings.values()] == [24, 24]
        assert [len(chosen(routing)) for routing in routings.values()] == [count, count]


def test_chosen_tokens_come_first_in_their_order_and_rows_are_filled_up() -> None:
    chosen_BS = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    picked = Picked.of(chosen_BS)
    assert picked.place_BM.tolist() == [[1, 3], [3, 0], [0, 1]]
    assert picked.real_BM.tolist() == [[True, True], [True, False], [False, False]]
    assert picked.token_X.tolist() == [1, 3, 7, 4, 8, 9]
    assert Picked.of(chosen_BS[2:]).place_BM.shape == (1, 0)
    assert Picked.of(chosen_BS[2:], least=1).real_BM.tolist() == [[False]]
    mask = picked.mask(None, chosen_BS, 0, causal=True)[:, 0]
    assert mask.int().tolist()[0] == [[0, 1, 0, 0], [0, 1, 0, 1]]
    assert mask.int().tolist()[1] == [[0, 0, 0, 1], [1, 0, 0, 0]], "a filling sees itself, nobody sees it"
    added = torch.zeros(1, 1, 4, 4).masked_fill(~torch.ones(4, 4).tril(0).bool(), -1e30)
    found = picked.mask(added, chosen_BS, 0, causal=False)[:, 0]
    assert torch.equal(found == 0, mask)


def test_a_feed_forward_alone_is_skipped_the_same_way() -> None:
    wide = nn.Linear(4, 4)
    site = Site(path="mlp", kind="mlp", module=wide, dim=4)
    use = method("train.mixture_of_depths")
    layer = use.build(site, use.configure({"capacity": 0.5}), Shared()).eval()
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        y = layer(x).view(6, 4)
        score = (x @ layer.router.weight[0]).view(-1)
        for token in range(6):
            took = token in score.topk(3).indices
            expected = score[token].sigmoid() * wide(x.view(6, 4)[token]) if took else torch.zeros(4)
            torch.testing.assert_close(y[token], expected, atol=1e-6, rtol=0)


# -- causality and decoding ---------------------------------------------------------------------------------------


def test_later_tokens_matter_to_the_batch_choice_but_not_to_a_trained_auxiliary_router() -> None:
    other = IDS.clone()
    other[:, 5:] = torch.randint(3, 97, (3, 3), generator=torch.Generator().manual_seed(9))
    model = whole(taught=False)
    (one, before), (two, _) = forward(model), forward(model, other)
    assert not any(routing.causal for routing in before.values())
    assert float((one - two)[:, :5].abs().max()) > 0.01
    model = whole()
    (one, before), (two, _) = forward(model), forward(model, other)
    assert all(routing.causal for routing in before.values())
    torch.testing.assert_close(two[:, :5], one[:, :5], atol=1e-5, rtol=0)
    for row in range(3):
        torch.testing.assert_close(forward(model, IDS[row : row + 1])[0], one[row : row + 1], atol=1e-5, rtol=0)
    share = len(before[SITES[0]].token_N) / 24
    assert 0.1 < share < 0.9
    with session(values={"batch_selection": 1.0}):
        assert len(forward(model)[1][SITES[0]].token_N) == 6


def test_steps_with_ragged_keys_are_the_whole_forward() -> None:
    model = whole(inside=True)
    expected, routings = forward(model)
    per_row = {tuple(torch.bincount(r.token_N // 8, minlength=3).tolist()) for s, r in routings.items() if s in SITES}
    assert any(len(set(counts)) > 1 for counts in per_row)
    cache, lines, skipped = None, [], 0
    for place in range(8):
        with torch.no_grad(), session(collect=True) as opened:
            out = model(IDS[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        lines.append(out.logits)
        (ctx,) = opened.take()
        skipped += sum(not len(ctx.routings[site].token_N) for site in SITES)
        assert [layer.get_seq_length() for layer in cache.layers] == [place + 1] * 3, "positions stay the original ones"
    torch.testing.assert_close(torch.cat(lines, 1), expected, atol=2e-5, rtol=0)


def test_a_step_that_no_row_takes_does_not_run_the_block() -> None:
    model = whole()
    block = model.model.layers[0].inner
    runs = []
    block.register_forward_hook(lambda module, args, output: runs.append(args[0].shape[:2]))
    with torch.no_grad():
        cache = model(IDS[:, :6], use_cache=True).past_key_values
        model.model.layers[0].router.auxiliary.threshold.fill_(1e6)
        step = model(IDS[:, 6:7], past_key_values=cache, use_cache=True)
    assert len(runs) == 1
    keys = cache.layers[0].keys
    assert keys.shape[2] == 7
    assert not keys[:, :, 6].any()
    assert step.logits.isfinite().all()
    flags = cache.moestro_state["model.layers.0.keys"]
    assert not flags[:, 6].any()
    assert torch.equal(flags[:, :6].any(), torch.tensor(True))


@pytest.mark.parametrize("inside", [False, True], ids=["dense", "moma"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_with_a_cache_is_generation_without(inside: bool, attention: str) -> None:
    model = whole(inside=inside)
    model.set_attn_implementation(attention)
    assert torch.equal(model.generate(IDS, **ASK), model.generate(IDS, use_cache=False, **ASK))
    beams = {**ASK, "num_beams": 3}
    assert torch.equal(model.generate(IDS, **beams), model.generate(IDS, use_cache=False, **beams))
    mask = torch.ones_like(IDS)
    mask[0, :3] = mask[1, :1] = 0
    ids = IDS * mask
    found = model.generate(ids, attention_mask=mask, **ASK)
    for row, start in enumerate((3, 1, 0)):
        single = model.generate(IDS[row : row + 1, start:], **ASK)
        assert torch.equal(found[row, start:], single[0])


def test_generating_is_refused_until_the_auxiliary_router_is_trained() -> None:
    with pytest.raises(ContextError, match=r"model\.layers\.0: cannot generate.*not trained"):
        whole(taught=False).generate(IDS, **ASK)
    prompt = whole(taught=False, allow_noncausal=True)
    assert prompt.generate(IDS, **{**ASK, "max_new_tokens": 1}).shape == (3, 9)
    with pytest.raises(ContextError, match="cannot generate"):
        prompt.generate(IDS, **ASK)
    mixed = whole(inside=True)
    with torch.no_grad():
        mixed.model.layers[1].mlp.router.auxiliary.out[:2].zero_()
    with pytest.raises(ContextError, match=r"model\.layers\.1\.mlp: cannot generate"):
        mixed.generate(IDS, **ASK)


def test_a_group_that_depth_routing_starved_takes_nothing_there_and_does_not_stop_generation() -> None:
    model = whole(inside=True)
    out = model.model.layers[0].mlp.router.auxiliary.out.detach()
    before = forward(model)[1]["model.layers.0.mlp"]
    assert int(before.counts_C()[2:].sum()) > 0
    nn.init.zeros_(out[2:])
    after = forward(model)[1]["model.layers.0.mlp"]
    assert after.causal
    assert after.counts_C().tolist() == [*before.counts_C()[:2].tolist(), 0, 0]
    model.generate(IDS, **ASK)
    nn.init.zeros_(out[:2])
    with pytest.raises(ContextError, match=r"model\.layers\.0\.mlp: cannot generate"):
        model.generate(IDS, **ASK)


def test_a_cropped_cache_forgets_who_came_after_the_cut() -> None:
    model = whole(inside=True)
    expected, _ = forward(model)
    with torch.no_grad():
        cache = model(torch.cat([IDS[:, :5], IDS[:, :2]], 1), use_cache=True).past_key_values
        cache.crop(-2)
        out = model(IDS[:, 5:], past_key_values=cache, use_cache=True)
    assert out.past_key_values.moestro_state["model.layers.0.keys"].shape == (3, 8)
    torch.testing.assert_close(out.logits, expected[:, 5:], atol=2e-5, rtol=0)


def test_caches_that_keep_no_place_for_each_position_are_refused() -> None:
    model = whole()
    with pytest.raises(ContextError, match="DynamicCache"):
        model.generate(IDS, cache_implementation="static", **ASK)
    plain = adopt(tiny_model("llama", num_hidden_layers=3))
    with torch.no_grad():
        cache = plain(IDS, use_cache=True).past_key_values
    with pytest.raises(ContextError, match="did not come through"), torch.no_grad():
        model(IDS[:, :1], past_key_values=cache)


# -- in whole models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("inside", [False, True], ids=["dense", "moma"])
def test_padding_takes_no_places_and_changes_nothing(taught: bool, inside: bool) -> None:
    model = whole(taught, inside)
    pad, ones = torch.zeros(3, 3, dtype=torch.int64), torch.ones_like(IDS)
    mask = torch.cat([pad, ones], 1)
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected, routings = forward(model)
    found, padded = forward(model, torch.cat([pad, IDS], 1), **call)
    torch.testing.assert_close(found[:, 3:], expected, atol=2e-5, rtol=0)
    for site in SITES:
        assert len(padded[site].token_N) == len(routings[site].token_N)


def test_packed_documents_stay_apart() -> None:
    model = whole()
    place = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    found, _ = forward(model, IDS[:1], position_ids=place)
    for part in (slice(0, 3), slice(3, 8)):
        torch.testing.assert_close(found[:, part], forward(model, IDS[:1, part])[0], atol=2e-5, rtol=0)


def test_depth_comes_before_modality_and_the_inner_mixture_sees_the_chosen_tokens_only() -> None:
    model = whole(taught=False, inside=True, capacity=0.5)
    rows = RowCounter()
    with torch.no_grad(), session(recorder=rows):
        model(IDS, use_cache=False)
    _, routings = forward(model)
    taken = IDS.view(-1)[chosen(routings[SITES[0]])]
    text = int((taken < FIRST).sum())
    counts = routings["model.layers.0.mlp"].counts_C().tolist()
    assert counts == [int(text / 2 + 0.5)] * 2 + [int((12 - text) / 2 + 0.5)] * 2
    per_row = torch.bincount(torch.tensor(chosen(routings[SITES[0]])) // 8, minlength=3)
    assert 3 * int(per_row.max()) > 12, "some slots are filled up"
    assert rows.per_token()["model.layers.0.mlp"] == [count / 12 for count in counts], "a token that came, not a slot"
    assert rows.per_token()[SITES[0]] == [0.5]
    assert sum(routings["model.layers.1.mlp"].counts_C().tolist()) >= 24


def test_a_token_costs_the_router_and_its_share_of_a_block_among_as_many() -> None:
    model = whole(capacity=0.25)
    wrapped = model.model.layers[0]
    block, router = wrapped.inner, wrapped.router
    costs = attention_costs(model)
    attention = costs[block.self_attn]
    assert attention(40) > attention(10) > 0
    work = Work(length=40, training=False, by_length=costs)
    matrices = 2 * sum(p.numel() for p in block.parameters() if p.ndim > 1)
    main, extra = 2 * 32, 2 * (16 * 32 + 16)
    assert cost(router, work) == main + extra
    assert cost(wrapped, work) == pytest.approx(main + extra + (matrices + attention(10)) / 4)
    measured = dataclasses.replace(work, rows={SITES[0]: [0.5]})
    assert cost(wrapped, measured) == pytest.approx(main + extra + (matrices + attention(20)) / 2)
    alone = whole(capacity=0.25, kind="mlp").model.layers[0].mlp
    assert cost(alone, work) == pytest.approx(main + extra + 2 * 3 * 32 * 48 / 4)


def test_the_auxiliary_losses_of_both_reach_their_routers_and_nothing_else() -> None:
    model = whole(inside=True).train()
    with session(collect=True) as opened:
        model(IDS, use_cache=False)
    (ctx,) = opened.take()
    terms = {site: term.total for (site, name), term in ctx.losses.items() if name == "auxiliary"}
    assert set(terms) == {*SITES, *(f"model.layers.{n}.mlp" for n in range(3))}
    routing = ctx.routings[SITES[0]]
    router = model.model.layers[0].router.auxiliary
    x = model.model.embed_tokens(IDS).view(24, -1)
    answer = (nn.functional.silu(x @ router.narrow[0].T) @ router.out.T).sigmoid()[:, 0]
    took = torch.zeros(24, dtype=torch.bool)
    took[routing.token_N] = True
    torch.testing.assert_close(terms[SITES[0]], -torch.where(took, answer, 1 - answer).log().sum())
    sum(terms.values()).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {name for name, _ in model.named_parameters() if "auxiliary" in name}


def test_the_model_is_the_same_after_disk(tmp_path: Path) -> None:
    model = whole(inside=True, threshold="calibrated")
    with torch.no_grad():
        model.model.layers[0].router.auxiliary.threshold.fill_(-0.2)
    moestro.save(model, tmp_path)
    again = moestro.load(tmp_path)
    assert torch.equal(forward(again)[0], forward(model)[0])
    assert torch.equal(again.generate(IDS, **ASK), model.generate(IDS, **ASK))


@pytest.mark.parametrize("inside", [False, True], ids=["dense", "moma"])
def test_a_checkpointed_backward_is_the_plain_one(inside: bool) -> None:
    found = []
    for replayed in (False, True):
        model = whole(inside=inside).train()
        if replayed:
            moestro.checkpoint(model)
        with session(collect=True) as opened:
            loss = model(IDS, labels=IDS, use_cache=False).loss
        (loss + sum(term.total for ctx in opened.take() for term in ctx.losses.values())).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=0, rtol=0, msg=name)
    assert float(found[0]["model.layers.0.router.weight"].abs().max()) > 0


def test_the_compiled_base_model_computes_the_same() -> None:
    model = whole()
    expected, _ = forward(model)
    model.model.forward = torch.compile(model.model.forward, backend="aot_eager")
    torch.testing.assert_close(forward(model)[0], expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_what_cannot_be_is_refused() -> None:
    for config, words in [({"capacity": 0.0}, "capacity"), ({"capacity": 1.1}, "capacity"), ({"threshold": 0}, "thre")]:
        with pytest.raises(ConfigError, match=words):
            Config(**config)
    use = method("train.mixture_of_depths")
    with pytest.raises(ConfigError, match="kind attention"):
        use.build(Site(path="a", kind="attention", module=nn.Identity(), dim=4), use.configure({}), Shared())
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp: a mixture stands there.* kind block"):
        whole(inside=True, kind="mlp")
    coder = tiny_model("switch_transformers").config
    block = Site(path="a", kind="block", module=nn.Identity(), dim=4, model_config=coder)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        use.build(block, use.configure({}), Shared())
    model = whole()
    wrapped = model.model.layers[0]
    x = torch.randn(1, 4, 32)
    with pytest.raises(ContextError, match="cannot cut"), torch.no_grad():
        wrapped(x, cu_seq_lens_q=torch.tensor([0, 4]))
    with pytest.raises(ContextError, match="4-D attention mask"), torch.no_grad():
        wrapped(x, attention_mask=torch.ones(1, 4))
    assert wrapped.hidden_size == 32, "attributes of the block stay readable"


def test_a_context_is_left_as_it_was_found() -> None:
    model, seen = whole(), []
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(current_context().tokens))
    forward(model)
    (tokens,) = seen
    assert tokens.whole
    assert tokens.count == 24
