"""One block at a time equals the plain forward bit for bit."""

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from moestro.core.bank import StackedFFN
from moestro.core.context import open_stack
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.router import LinearRouter
from moestro.core.routing import Routing, Scores
from moestro.observe import layerwise, statistics


SMALL = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def gemma():
    """Blocks with different masks and rotary tables."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, layer_types=kinds, sliding_window=3)).eval()


def t5():
    """Blocks that return tuples; the first one's position bias is handed on; two stacks."""
    torch.manual_seed(0)
    return T5(
        T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ).eval()


def data(encoder_decoder=False):
    torch.manual_seed(1)
    found = []
    for width in (5, 7):
        ids = torch.randint(1, 31, (3, width))
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        found.append(batch | ({"decoder_input_ids": ids[:, :4]} if encoder_decoder else {}))
    return found


def plain(model, batches):
    with torch.no_grad():
        return [model(**batch).logits for batch in batches]


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("spilled", [False, True])
def test_equals_the_plain_forward(make, spilled, tmp_path):
    model, batches = make(), data()
    run = layerwise(model, batches, blocks=model.model.layers, spill=tmp_path if spilled else None)
    assert [step.index for step in run] == [0, 1, 2, 3]
    for ours, theirs in zip(run.outputs(), plain(model, batches), strict=True):
        assert torch.equal(ours.logits, theirs)
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_two_stacks_and_tuples():
    model, batches = t5(), data(encoder_decoder=True)
    blocks = [*model.encoder.block, *model.decoder.block]
    from moestro.observe.layerwise import Layerwise

    run = Layerwise(model, batches, blocks, [1], None, None, None)
    assert len(list(run)) == 4
    for ours, theirs in zip(run.outputs(), plain(model, batches), strict=True):
        assert torch.equal(ours.logits, theirs)


def test_any_module_will_do():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
    rows = torch.randn(5, 4)
    run = layerwise(net, [{"input": rows}], blocks=list(net))
    for _ in run:
        pass
    assert torch.equal(next(run.outputs()), net(rows))


def test_later_blocks_see_a_changed_block():
    model, twin, batches = llama(), llama(), data()
    looked = []
    for step in layerwise(model, batches, blocks=model.model.layers):
        handle = step.block.mlp.register_forward_hook(lambda module, args, out: looked.append(args[0].detach()))
        step.run(keep=False)
        handle.remove()
        step.block.mlp.down_proj.weight.data.mul_(0.5)
    seen = []
    for block in twin.model.layers:
        before = block.mlp.down_proj.weight.detach().clone()
        handle = block.mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
        plain(twin, batches)
        handle.remove()
        block.mlp.down_proj.weight.data.copy_(before * 0.5)
    assert all(torch.equal(a, b) for a, b in zip(looked, seen, strict=True))


def test_each_block_runs_once_unless_asked_twice_and_modes_return():
    model, batches = llama(), data()
    model.train()
    model.model.norm.eval()
    runs = [0] * 4
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *args, number=number: runs.__setitem__(number, runs[number] + 1))
    visits = []
    run = layerwise(
        model, batches, blocks=model.model.layers,
        enter=lambda index, block: visits.append(("enter", index)),
        leave=lambda index, block: visits.append(("leave", index)),
    )  # fmt: skip
    for step in run:
        step.run(keep=step.index != 2)
    assert runs == [2, 2, 4, 2]
    assert visits == [(what, index) for index in range(4) for what in ("enter", "leave")]
    assert model.training
    assert not model.model.norm.training
    assert "forward" not in vars(model.model.layers[0])


def test_memory_is_one_blocks_activations():
    model, batches = llama(), data()
    run = layerwise(model, batches, blocks=model.model.layers)
    for step in run:
        held = [index for index, store in enumerate(run._stores) if store._tensors]
        assert held == ([step.index - 1] if step.index else [])


def test_a_run_that_breaks_leaves_the_model_as_it_was(tmp_path):
    model, batches = llama(), data()
    expected = plain(model, batches)

    def fail(module, args, output):
        raise ValueError("broken")

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        list(layerwise(model, batches, blocks=model.model.layers, spill=tmp_path))
    handle.remove()
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(a, b) for a, b in zip(plain(model, batches), expected, strict=True))


def test_questions_out_of_order_are_refused():
    model, batches = llama(), data()
    run = layerwise(model, batches, blocks=model.model.layers)
    with pytest.raises(ConfigError, match="0 of 4 blocks have run"):
        next(run.outputs())
    list(run)
    with pytest.raises(ConfigError, match="has begun"):
        list(run)
    with pytest.raises(ConfigError, match="has no blocks"):
        layerwise(model, batches, blocks=[])


class Recurrent(LinearRouter):
    """Adds the logits of the layer before: slots must cross the pieces."""

    def score(self, x_TD, bank, ctx):
        logits = self.logits(x_TD)
        before = ctx.previous(self.site, "logits")
        logits = logits if before is None else logits + before
        ctx.put(self.site, "logits", logits)
        return Scores(logits, logits, logits.softmax(-1))

    def choose(self, scores, ctx):
        weight, expert = scores.gate_TC.topk(2)
        return Routing.from_topk(expert, weight, num_experts=4, scores=scores)


def test_slots_cross_the_pieces_and_statistics_fit_one_block():
    model, batches = llama(), data()
    torch.manual_seed(2)
    for number, block in enumerate(model.model.layers):
        bank, router = StackedFFN(4, 16, 8), Recurrent(16, 4, top_k=2)
        router.site = f"model.layers.{number}.mlp"
        for parameter in [*bank.parameters(), *router.parameters()]:
            nn.init.normal_(parameter, std=0.6)
        block.mlp = MoELayer(router, bank, site=router.site)
    open_stack(model.model, "model")
    with statistics(model, gram=True) as whole:
        expected = plain(model, batches)
    run, found = layerwise(model, batches, blocks=model.model.layers), {}
    for step in run:
        with statistics(step.block, gram=True) as stats:
            step.run(keep=step.index % 2 == 0)
        found |= stats.layers
    for ours, theirs in zip(run.outputs(), expected, strict=True):
        assert torch.equal(ours.logits, theirs)
    for site, stats in whole.items():
        assert torch.equal(found[site].chosen_C, stats.chosen_C)
        for expert in range(4):
            assert torch.equal(found[site].input_gram.of(expert), stats.input_gram.of(expert))
