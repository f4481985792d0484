"""Traces of running models: sequence numbers through batches, caches, beams, packing; replay of what was recorded."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moestro.core.bank import StackedFFN
from moestro.core.context import checkpoint, open_stack
from moestro.core.errors import TraceError
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.router import LinearRouter
from moestro.core.routing import Routing, Scores
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.core.trace import trace


class TopP(LinearRouter):
    """Ragged: experts by probability until 60 % are reached; at times null experts (the last column)."""

    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts, top_k=None, num_null=1)

    def score(self, x_TD, bank, ctx):
        logits = self.logits(x_TD) * 10
        return Scores(logits, logits.detach(), logits.softmax(-1))

    def choose(self, scores, ctx):
        sorted_TC, place_TC = scores.gate_TC.sort(-1, descending=True)
        before_TC = sorted_TC.cumsum(-1) - sorted_TC
        chosen_TC = torch.zeros_like(place_TC, dtype=torch.bool).scatter(1, place_TC, before_TC < 0.6)
        return Routing.from_mask(
            chosen_TC, scores.gate_TC, num_experts=self.num_experts, num_null=self.num_null, scores=scores
        )


def make_router(kind, dim):
    if kind == "top_p":
        return TopP(dim, 4)
    values = {"num_experts": 4} | ({"top_k": 2} if kind == "train.softmax_topk" else {})
    chosen = method(kind)
    site = Site(path="", kind="mlp", module=nn.Identity(), dim=dim)
    return chosen.entry("build")(site, chosen.configure(values), Shared())


def make_model(kind="train.softmax_topk", layers=2, seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )
    )  # fmt: skip
    for number, block in enumerate(model.model.layers):
        bank = StackedFFN(4, 16, 8)
        nn.init.normal_(bank.gate_up_proj, std=0.5)
        nn.init.normal_(bank.down_proj, std=0.5)
        router = make_router(kind, 16)
        nn.init.normal_(router.weight, std=0.5)
        block.mlp = MoELayer(router, bank, site=f"model.layers.{number}.mlp")
    open_stack(model.model, "model")
    return model.eval()


def batch(rows=3, width=5, seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(2, 31, (rows, width))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


# -- sequences --------------------------------------------------------------------------------------------------


def test_forwards_without_a_cache_are_new_sequences():
    model, data = make_model(), batch()
    with trace(model) as found, torch.no_grad():
        model(**data, use_cache=False)
        model(**data, use_cache=False)
    assert found.header.num_sequences == 6
    assert found.header.num_forwards == 2
    assert found.header.num_tokens == 2 * 13
    assert [found.tokens(i).token_BS.shape[1] for i in range(6)] == [5, 3, 5, 5, 3, 5]
    assert found.load(0).sum() == 2 * 13 * 2
    assert torch.equal(found.tokens(1).expert[1], found.tokens(4).expert[1])


def test_generation_goes_on_with_its_sequences():
    model = make_model()
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])  # the first row is padded on the left
    with trace(model) as found:
        made = model.generate(
            ids, attention_mask=(ids != 0).long(), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    assert found.header.num_sequences == 2
    for row in range(2):
        view = found.tokens(row)
        ran = made[row, :-1]
        assert view.token_BS[0].tolist() == ran[ran != 0].tolist()
        assert view.position_BS[0].tolist() == list(
            range(view.position_BS[0, 0], view.position_BS[0, 0] + len(ran[ran != 0]))
        )
    assert found.load(0, phase="decode").sum() == 2 * 3 * 2
    assert found.load(0, phase="prefill").sum() == 6 * 2


def test_beams_are_rows():
    model = make_model()
    with trace(model) as found:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, num_beams=2, do_sample=False)
    steps = found.header.num_forwards
    assert found.header.num_tokens == found.load(1).sum() // 2
    rows = found.rows(range(found.header.num_sequences), ["forward", "sequence", "layer", "rank"])
    last = (rows["forward"] == steps - 1) & (rows["layer"] == 0) & (rows["rank"] == 0)
    assert len(set(rows["sequence"][last].tolist())) == 2


def test_two_caches_do_not_mix():
    model, data = make_model(), batch(rows=2, width=4)
    with trace(model) as found, torch.no_grad():
        model.generate(data["input_ids"], max_new_tokens=2, do_sample=False)
        model.generate(data["input_ids"], max_new_tokens=2, do_sample=False)
    assert found.header.num_sequences == 4
    assert torch.equal(found.tokens(0).expert[1], found.tokens(2).expert[1])


def test_packed_rows_are_split_where_positions_start_again():
    model = make_model()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with trace(model) as found, torch.no_grad():
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1]]), use_cache=False)
    assert [found.tokens(i).token_BS[0].tolist() for i in range(found.header.num_sequences)] == [[5, 6, 7], [8, 9]]


def test_tags_by_row_and_by_token():
    model, data = make_model(), batch()
    with trace(model) as found, torch.no_grad():
        with session(tags={"tag": ["code", "prose", "code"]}):
            model(**data, use_cache=False)
        with session(tags={"tag": torch.tensor([[0, 0, 1, 1, -1]] * 3)}):
            model(**data, use_cache=False)
        model(**data, use_cache=False)
    counts = {tag: int(load.sum()) // 2 for tag, load in found.load_by_tag(0).items()}
    assert counts == {"code": 10, "prose": 3, "0": 6, "1": 5, "": 2 + 13}


def test_a_looped_layer_is_one_layer_a_run():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make_model().model.layers[1].mlp

        def forward(self, inputs_embeds):
            return self.layer(self.layer(inputs_embeds))

    loop = Loop()
    open_stack(loop, "loop")
    with trace(loop) as found, torch.no_grad():
        loop(torch.randn(2, 3, 16))
    assert [(info.layer, info.site) for info in found.header.layers] == [
        (1, "model.layers.1.mlp"),
        (2, "model.layers.1.mlp#2"),
    ]
    assert found.header.num_tokens == 6
    assert found.tokens(0).token_BS.tolist() == [[-1, -1, -1]]
    assert found.affinity(1, 2).sum() == 6 * 4


def test_a_layer_by_itself_is_recorded_and_other_models_are_not():
    model, other = make_model(), make_model(seed=5)
    layer = model.model.layers[0].mlp
    with trace(model) as found, torch.no_grad():
        layer(torch.randn(2, 3, 16))
        other(**batch())
    assert found.header.num_tokens == 6
    assert found.load(1).sum() == 0


def test_models_without_mixtures_are_refused():
    with pytest.raises(TraceError, match="Linear has no mixture layer to record"), trace(nn.Linear(2, 2)):
        pass


def test_questions_during_the_recording_are_refused():
    model = make_model()
    with trace(model) as found, pytest.raises(TraceError, match="still running"):
        found.load(0)


def test_checkpointed_backward_records_once():
    model, data = make_model(), batch()
    checkpoint(model)
    model.train()
    with trace(model) as found:
        model(**data, use_cache=False).logits.sum().backward()
    assert found.header.num_tokens == 13
    assert found.load(0).sum() == 26


# -- replay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train.softmax_topk", "train.switch", "train.sigmoid_bias", "top_p"])
def test_replay_of_the_same_model_changes_no_bit(kind):
    model, data = make_model(kind), batch()
    with trace(model) as found, torch.no_grad():
        plain = model(**data, use_cache=False).logits
    with session(edits=[found.replay()]), torch.no_grad():
        again = model(**data, use_cache=False).logits
    assert torch.equal(plain, again)


@pytest.mark.parametrize("kind", ["train.softmax_topk", "top_p"])
def test_replay_forces_experts_and_weighs_anew(kind):
    """Another router with the recorded experts: the choice is the record's, the weights are its own gates'."""
    first, second, data = make_model(kind), make_model(kind), batch()
    for block in second.model.layers:
        nn.init.normal_(block.mlp.router.weight, std=0.7)
    with trace(first) as found, torch.no_grad():
        first(**data, use_cache=False)
    seen = {}

    class Look:
        def record(self, site, routing, ctx):
            seen[site] = routing

    with session(edits=[found.replay()], recorder=Look()), trace(second) as forced, torch.no_grad():
        second(**data, use_cache=False)
    with trace(second) as free, torch.no_grad():
        second(**data, use_cache=False)
    for sequence in range(3):
        for layer in (0, 1):
            assert torch.equal(forced.tokens(sequence).expert[layer], found.tokens(sequence).expert[layer])
    assert not torch.equal(free.load(1), found.load(1))
    for routing in seen.values():
        gate_N = routing.scores.gate_TC[routing.token_N, routing.expert_N]
        if kind == "train.softmax_topk":
            gate_N = gate_N / torch.zeros(15).index_add(0, routing.token_N, gate_N)[routing.token_N]
        torch.testing.assert_close(routing.weight_N, gate_N)


def test_replay_with_other_batch_sizes_and_generation():
    model, data = make_model(), batch()
    with trace(model) as found, torch.no_grad():
        whole = model(**data, use_cache=False).logits
    with session(edits=[found.replay()]), torch.no_grad():
        for row in range(3):
            one = model(
                data["input_ids"][row : row + 1], attention_mask=data["attention_mask"][row : row + 1], use_cache=False
            )
            valid = data["attention_mask"][row].bool()
            torch.testing.assert_close(one.logits[0, valid], whole[row, valid])
    with trace(model) as made:
        text = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
    with session(edits=[made.replay()]):
        assert torch.equal(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False), text)


def test_replay_carries_gradient_and_survives_checkpointing():
    model, data = make_model(), batch()
    with trace(model) as found, torch.no_grad():
        model(**data, use_cache=False)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint(model)
            model.train()
        model.zero_grad()
        with session(edits=[found.replay()]):
            model(**data, use_cache=False).logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert model.model.layers[0].mlp.router.weight.grad.abs().sum() > 0


def test_replay_keeps_dropped_marks_and_tokens_nobody_took():
    model, data = make_model(), batch()

    class Starve:
        """Expert 0 takes nothing; what asks for expert 1 is dropped."""

        def on_scores(self, site, scores, ctx):
            return scores

        def on_routing(self, site, routing, router, ctx):
            keep = routing.expert_N != 0
            return routing.replace(
                token_N=routing.token_N[keep], expert_N=routing.expert_N[keep], weight_N=routing.weight_N[keep],
                kept_N=routing.expert_N[keep] != 1, top_k=None,
            )  # fmt: skip

    with session(edits=[Starve()]), trace(model) as found, torch.no_grad():
        model(**data, use_cache=False)
    with session(edits=[found.replay()]), trace(model) as again, torch.no_grad():
        model(**data, use_cache=False)
    assert found.load(0)[0] == 0
    assert found.load(0)[1] > 0
    assert found.load(0, ran=True)[1] == 0
    for layer in (0, 1):
        for sequence in range(3):
            assert torch.equal(found.tokens(sequence).expert[layer], again.tokens(sequence).expert[layer])
            assert torch.equal(found.tokens(sequence).kept[layer], again.tokens(sequence).kept[layer])


def test_replay_refuses_other_data():
    model, data = make_model(), batch()
    with trace(model) as found, torch.no_grad():
        model(**data, use_cache=False)
    other = {**data, "input_ids": (data["input_ids"] + 1) % 31}
    with (
        session(edits=[found.replay()]),
        torch.no_grad(),
        pytest.raises(TraceError, match=r"model.layers.0.mlp: sequence 0 has token \d+ at position 0, the trace has"),
    ):
        model(**other, use_cache=False)
    edit = found.replay()
    with session(edits=[edit]), torch.no_grad():
        model(**data, use_cache=False)
        with pytest.raises(TraceError, match="does not hold position 0 of sequence 3"):
            model(**data, use_cache=False)
    with session(edits=[found.replay()]), torch.no_grad(), pytest.raises(TraceError, match="no run 1 of layer"):
        make_model(layers=3)(**data, use_cache=False)
