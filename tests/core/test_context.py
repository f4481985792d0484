"""The rules of the forward context, on Transformers models: replays, threads, generation, masks, exceptions."""

import threading

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import moestro
from moestro.core.bank import Bank, StackedFFN
from moestro.core.context import RoutingContext, current_context, layer_context, open_stack
from moestro.core.errors import ContextError
from moestro.core.layer import MoELayer
from moestro.core.losses import RoutingLoss
from moestro.core.router import LinearRouter, topk_indices
from moestro.core.routing import Routing, Scores
from moestro.core.session import Edit, session


class Recurrent(LinearRouter):
    """Reads the state of the layer before and hands its own on: what a replay must see unchanged."""

    site = ""

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        before = ctx.previous(self.site, "state")
        state = x_TD if before is None else torch.tanh(x_TD + before)
        ctx.put(self.site, "state", state)
        logits = self.logits(state)
        return Scores(logits, logits.detach(), logits.softmax(-1))

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        expert_TK = topk_indices(scores.select_TC, 2)
        weight_TK = scores.gate_TC.gather(1, expert_TK)
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)


class LogitSum(RoutingLoss):
    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        assert routing.scores is not None
        assert ctx.tokens is not None
        return routing.scores.logits_TC.square().mean(-1).mul(ctx.tokens.valid_T).sum()


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Routing, RoutingContext]] = []

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        self.seen.append((site, routing, ctx))


def tiny_llama(layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for index, block in enumerate(model.model.layers):
        site = f"model.layers.{index}.mlp"
        router = Recurrent(16, 4, top_k=2)
        router.site = site
        block.mlp = MoELayer(router, StackedFFN(4, 16, 8), site=site, losses={"sum": LogitSum()})
    open_stack(model.model, "model")
    return model


IDS = torch.tensor([[5, 9, 7, 3, 11, 4], [8, 6, 5, 4, 9, 10]])


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: LlamaForCausalLM, ids: Tensor = IDS, **call: Tensor) -> Tensor:
    with session(collect=True) as opened:
        out = model(input_ids=ids, labels=ids, **call)
    (ctx,) = opened.take()
    total: Tensor = out.loss + 0.1 * sum(term.total for term in ctx.losses.values())
    return total


def assert_same_grads(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, grad in a.items():
        assert torch.equal(grad, b[name]), name


@pytest.fixture
def plain_grads() -> dict[str, Tensor]:
    model = tiny_llama()
    step(model).backward()
    return grads(model)


def test_gradient_reaches_every_router_through_the_slots(plain_grads: dict[str, Tensor]) -> None:
    for layer in range(3):
        assert plain_grads[f"model.layers.{layer}.mlp.router.weight"].abs().sum() > 0


def test_checkpointed_backward_is_bit_equal_outside_the_session(plain_grads: dict[str, Tensor]) -> None:
    model = tiny_llama().train()
    moestro.checkpoint(model)
    step(model).backward()
    assert_same_grads(plain_grads, grads(model))


def test_checkpointed_backward_is_bit_equal_inside_the_session(plain_grads: dict[str, Tensor]) -> None:
    model = tiny_llama().train()
    moestro.checkpoint(model)
    recorder = Recorder()
    with session(collect=True, recorder=recorder) as opened:
        out = model(input_ids=IDS, labels=IDS)
        (ctx,) = opened.take()
        losses = dict(ctx.losses)
        (out.loss + 0.1 * sum(term.total for term in losses.values())).backward()
        assert opened.take() == []
    assert_same_grads(plain_grads, grads(model))
    assert len(recorder.seen) == 3, "a replay records nothing"
    assert ctx.losses == losses, "a replay adds no loss"


def test_two_forwards_before_one_backward_keep_their_own_context() -> None:
    def both(checkpointed: bool) -> dict[str, Tensor]:
        model = tiny_llama().train()
        if checkpointed:
            moestro.checkpoint(model)
        first, second = step(model, IDS), step(model, IDS.flip(1))
        (first + 2 * second).backward()
        return grads(model)

    assert_same_grads(both(False), both(True))


def test_backward_in_another_thread_replays_in_its_own_context(plain_grads: dict[str, Tensor]) -> None:
    model = tiny_llama().train()
    moestro.checkpoint(model)
    loss = step(model)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            loss.backward()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures
    assert_same_grads(plain_grads, grads(model))


class DropFirstExpert(Edit):
    def on_scores(self, site: str, scores: Scores, ctx: RoutingContext) -> Scores:
        select = scores.select_TC.clone()
        select[:, 0] = float("-inf")
        return scores.replace(select_TC=select)


def test_a_replay_runs_under_the_edits_of_its_first_run() -> None:
    def run(checkpointed: bool) -> dict[str, Tensor]:
        model = tiny_llama().train()
        if checkpointed:
            moestro.checkpoint(model)
        with session(edits=[DropFirstExpert()]):
            loss = step(model)
        loss.backward()
        return grads(model)

    edited = run(checkpointed=False)
    assert edited["model.layers.0.mlp.bank.gate_up_proj"][0].abs().sum() == 0
    assert_same_grads(edited, run(checkpointed=True))


def test_reentrant_checkpointing_never_passes_silently(plain_grads: dict[str, Tensor]) -> None:
    model = tiny_llama().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    loss = step(model)
    with pytest.raises(ContextError, match="use_reentrant"):
        loss.backward()


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_opens_one_context_a_step_and_counts_positions_from_the_cache(beams: int) -> None:
    model = tiny_llama().eval()
    recorder = Recorder()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with session(recorder=recorder, tags={"kind": ["a", "b"]}):
        model.generate(
            input_ids=IDS, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, num_beams=beams, do_sample=False
        )
    contexts = list({id(ctx): ctx for _, _, ctx in recorder.seen}.values())
    assert len(contexts) == 4
    prefill, *steps = (ctx.tokens for ctx in contexts)
    assert prefill is not None
    assert prefill.valid_T.view(prefill.num_rows, -1)[0].tolist() == [False, False, True, True, True, True]
    for number, tokens in enumerate(steps):
        assert tokens is not None
        assert tokens.num_rows in (2, 2 * beams)
        assert tokens.width == 1
        assert tokens.valid_T.all()
        assert tokens.position_T.tolist() == [4 + number] * (tokens.num_rows // 2) + [6 + number] * (
            tokens.num_rows // 2
        )
    assert contexts[-1].tag_T("kind", ["a", "b"]).tolist() == [0] * (len(steps[-1].row_T) // 2) + [1] * (
        len(steps[-1].row_T) // 2
    )
    assert current_context() is None


@pytest.mark.parametrize("additive", [False, True])
def test_a_4d_mask_gives_the_same_validity_as_the_2d_one(additive: bool) -> None:
    mask_2d = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    mask_4d = (causal & mask_2d[:, None, None, :].bool()).clone()
    mask_4d[0, 0, :2] = True  # what mask makers do, so that padding attends to something
    mask: Tensor = mask_4d
    if additive:
        mask = torch.where(mask_4d, 0.0, torch.finfo(torch.float32).min)
    recorder = Recorder()
    with session(recorder=recorder):
        tiny_llama()(input_ids=IDS, attention_mask=mask)
    tokens = recorder.seen[0][2].tokens
    assert tokens is not None
    assert tokens.valid_T.tolist() == mask_2d.reshape(-1).bool().tolist()


def test_a_mask_longer_than_the_forward_counts_from_its_end() -> None:
    model = tiny_llama().eval()
    recorder = Recorder()
    first = model(input_ids=IDS[:, :4], use_cache=True)
    with session(recorder=recorder):
        mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
        model(input_ids=IDS[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    tokens = recorder.seen[0][2].tokens
    assert tokens is not None
    assert tokens.valid_T.tolist() == [True, False, True, True]
    assert tokens.position_T.tolist() == [4, 5, 4, 5]


def test_encoder_and_decoder_have_contexts_of_their_own() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    for stack in ("encoder", "decoder"):
        for index, block in enumerate(getattr(model, stack).block):
            site = f"{stack}.block.{index}.layer.{len(block.layer) - 1}.DenseReluDense"
            router = Recurrent(16, 4, top_k=2)
            router.site = site
            block.layer[-1].DenseReluDense = MoELayer(router, StackedFFN(4, 16, 8), site=site)
        open_stack(getattr(model, stack), stack)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    with session(collect=True) as opened:
        model(input_ids=IDS, attention_mask=mask, decoder_input_ids=IDS[:, :3])
    encoder, decoder = opened.take()
    assert (encoder.stack, decoder.stack) == ("encoder", "decoder")
    assert encoder.tokens is not None
    assert decoder.tokens is not None
    assert encoder.tokens.valid_T.tolist() == mask.bool().reshape(-1).tolist()
    assert decoder.tokens.count == 6
    assert len(encoder.routings) == len(decoder.routings) == 2
    assert encoder.sites == ("encoder.block.0.layer.1.DenseReluDense", "encoder.block.1.layer.1.DenseReluDense")


def test_an_exception_in_mid_forward_leaves_nothing_open() -> None:
    model = tiny_llama()
    good = model.model.layers[1].mlp.bank.forward
    model.model.layers[1].mlp.bank.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("boom"))
    with session(collect=True) as opened:
        with pytest.raises(RuntimeError, match="boom"):
            model(input_ids=IDS)
        assert current_context() is None
        model.model.layers[1].mlp.bank.forward = good
        model(input_ids=IDS)
        assert len(opened.take()) == 1, "the broken forward is not collected"


def test_slots_are_written_once() -> None:
    with layer_context(torch.zeros(1, 2, 4), training=False) as ctx:
        ctx.put("a", "state", 1)
        with pytest.raises(ContextError, match="written twice"):
            ctx.put("a", "state", 2)


def test_subset_narrows_the_tokens_and_gives_them_back() -> None:
    hidden = torch.zeros(2, 3, 4)
    with layer_context(hidden, training=False) as ctx:
        with ctx.subset(torch.tensor([1, 5])):
            assert ctx.tokens is not None
            assert ctx.tokens.row_T.tolist() == [0, 1]
            assert ctx.tokens.position_T.tolist() == [1, 2]
            ctx.tokens_for(torch.zeros(2, 4))
        with pytest.raises(ContextError, match="6 tokens but a layer got 2"):
            ctx.tokens_for(torch.zeros(2, 4))


def test_an_inner_session_adds_to_the_outer_and_a_teacher_can_stay_out() -> None:
    model, teacher = tiny_llama(), tiny_llama()
    with session(collect=True, tags={"a": 1}, values={"tau": 2.0}) as outer:
        with session(tags={"b": 2}):
            model(input_ids=IDS)
        with session(collect=False):
            teacher(input_ids=IDS)
        (ctx,) = outer.take()
    assert dict(ctx.session.tags) == {"a": 1, "b": 2}
    assert ctx.value("tau", 1.0) == 2.0
    assert ctx.value("other", 1.0) == 1.0


def test_a_missing_tag_says_how_to_set_it() -> None:
    with layer_context(torch.zeros(1, 2, 4), training=False) as ctx, pytest.raises(ContextError, match="tags="):
        ctx.tag_T("language")


def test_a_cache_of_fixed_size_does_not_hide_the_tokens() -> None:
    model = tiny_llama().eval()
    recorder = Recorder()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with session(recorder=recorder):
        model.generate(
            input_ids=IDS, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, cache_implementation="static"
        )
    contexts = list({id(ctx): ctx for _, _, ctx in recorder.seen}.values())
    prefill, *steps = (ctx.tokens for ctx in contexts)
    assert prefill is not None
    assert prefill.valid_T.tolist() == mask.bool().reshape(-1).tolist()
    assert all(tokens is not None and tokens.valid_T.all() for tokens in steps)


def test_an_integer_4d_mask_is_read() -> None:
    causal = torch.ones(6, 6, dtype=torch.long).tril()
    recorder = Recorder()
    with session(recorder=recorder), layer_context(torch.zeros(1, 1, 4), training=False):
        pass
    from moestro.core.tokens import tokens_of_call

    mask = causal.expand(2, 1, 6, 6).clone()
    mask[0, 0, :, 0] = 0
    tokens = tokens_of_call({"input_ids": IDS, "attention_mask": mask})
    assert tokens is not None
    assert tokens.valid_T.tolist() == [False] + [True] * 11


def test_an_interrupt_in_one_model_does_not_silence_the_next() -> None:
    first, second = tiny_llama(), tiny_llama()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    bank = first.model.layers[1].mlp.bank
    good, bank.forward = bank.forward, interrupt
    with pytest.raises(KeyboardInterrupt):
        first(input_ids=IDS)
    recorder = Recorder()
    with session(recorder=recorder, collect=True) as opened:
        second(input_ids=IDS)
        assert len(opened.take()) == 1
    assert len(recorder.seen) == 3
    bank.forward = good
    first(input_ids=IDS)
    assert current_context() is None, "the next forward of the interrupted model closes what was left open"


def test_a_tag_per_token_follows_the_positions_of_a_prompt_in_pieces() -> None:
    model = tiny_llama().eval()
    tag = torch.arange(12).view(2, 6)
    recorder = Recorder()
    with session(recorder=recorder, tags={"place": tag}):
        first = model(input_ids=IDS[:, :4], use_cache=True)
        model(input_ids=IDS[:, 4:], past_key_values=first.past_key_values)
    contexts = list({id(ctx): ctx for _, _, ctx in recorder.seen}.values())
    assert contexts[0].tag_T("place").tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert contexts[1].tag_T("place").tolist() == [4, 5, 10, 11]
    with session(recorder=recorder, tags={"place": tag[:, :4]}):
        model(input_ids=IDS)
    with pytest.raises(ContextError, match="reaches position 6"):
        recorder.seen[-1][2].tag_T("place")


def test_a_tag_that_is_a_function_of_ids_answers_for_each_token_of_a_forward_or_of_a_part_of_it() -> None:
    model = tiny_llama().eval()
    recorder = Recorder()
    with session(recorder=recorder, tags={"odd": lambda ids_T: ids_T % 2, "one": lambda ids_T: ids_T[:1]}):
        model(input_ids=IDS)
    ctx = recorder.seen[-1][2]
    assert ctx.tag_T("odd").tolist() == (IDS % 2).flatten().tolist()
    index_T = torch.tensor([1, 4, 5])
    with ctx.subset(index_T):
        assert ctx.tag_T("odd").tolist() == (IDS.flatten()[index_T] % 2).tolist()
    with pytest.raises(ContextError, match=r"given 12 token ids .* not a shape of \[1\]"):
        ctx.tag_T("one")


def test_router_logits_stay_float32_under_autocast() -> None:
    model = tiny_llama()
    with torch.autocast("cpu", dtype=torch.bfloat16), session(collect=True) as opened:
        model(input_ids=IDS)
    (ctx,) = opened.take()
    for routing in ctx.routings.values():
        assert routing is not None
        assert routing.scores is not None
        assert routing.scores.logits_TC.dtype == torch.float32


def test_a_layer_used_alone_can_be_checkpointed() -> None:
    from torch.utils.checkpoint import checkpoint

    from moestro.core.context import checkpoint_contexts

    layer = tiny_llama(1).model.layers[0].mlp
    x = torch.randn(1, 5, 16, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    y = checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts)
    (again,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(plain, again)
