"""Switch layers in a whole encoder: the start, padding, saving, checkpointing, compiling, freezing, counting."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moestro
from moestro.core.cost import RowCounter
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.session import session
from moestro.data.dataset import Dataset
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model
from moestro.training.loop import Trainer
from moestro.training.objectives import Span
from moestro.training.recipe import Recipe
from moestro.training.size import size_of


HEAD: dict[str, Any] = {"placement": "head", "num_experts": 3, "min_capacity": 1}
STACK: dict[str, Any] = {"placement": "stack", "num_experts": 3, "layers": 2, "heads": 4, "dropout": 0.0}
REPLACE: dict[str, Any] = {"placement": "replace", "num_experts": 3}
PLACES = {"head": (HEAD, [1]), "stack": (STACK, [1]), "replace": (REPLACE, [0])}

IDS = torch.tensor([[5, 9, 17, 3, 22, 41, 8], [11, 8, 4, 2, 63, 0, 0]])
MASK = (IDS != 0).long()


def encoder(name: str | None = None, *, spread: bool = True, **more: Any) -> Any:
    """A tiny encoder with a span head; ``spread`` gives every new part random weights."""
    plain = tiny_model(
        "bert", cls="BertForQuestionAnswering", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = adopt(plain)
    if name is not None:
        config, layers = PLACES[name]
        torch.manual_seed(0)
        swap(model, "train.switch_encoder", {**config, **more}, kind="block", layers=layers)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if spread and (".top." in path or ".router." in path or ".bank." in path):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def logits(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = MASK) -> Tensor:
    found = model(input_ids=ids, attention_mask=mask)
    return torch.stack((found.start_logits, found.end_logits), -1)


@pytest.mark.parametrize("weight", ["normalised", "straight"])
def test_copies_of_the_feed_forward_start_as_the_dense_encoder(weight: str) -> None:
    model, dense = encoder("replace", spread=False, weight=weight), encoder()
    (layer,) = mixture_layers(model).values()
    assert layer.bank.num_experts == 3
    nn.init.normal_(layer.router.weight, std=2.0)  # whatever the router says
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)
    assert type(model.bert.encoder.layer[0].output.dense).__name__ == "Identity"
    expected = {name for name, _ in dense.named_parameters() if ".layer.0.intermediate." not in name}
    expected -= {f"bert.encoder.layer.0.output.dense.{name}" for name in ("weight", "bias")}
    assert expected <= {name for name, _ in model.named_parameters()}


def test_probabilities_as_weights_do_not_start_as_the_dense_encoder() -> None:
    model = encoder("replace", spread=False, weight="probability")
    with torch.no_grad():
        assert (logits(model) - logits(encoder())).abs().max() > 1e-2


def test_only_the_straight_weight_shows_the_task_to_the_router() -> None:
    found = {}
    for weight in ("normalised", "straight"):
        model = encoder("replace", weight=weight)
        logits(model).sum().backward()
        (layer,) = mixture_layers(model).values()
        found[weight] = float(layer.router.weight.grad.abs().max())
    assert found["normalised"] < 1e-5
    assert found["straight"] > 1e-2


def test_a_decoder_can_hold_copies_at_its_mlp_and_generates_alike_with_a_cache(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    model = adopt(tiny_model("llama"))
    swap(model, "train.switch_encoder", REPLACE)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, atol=1e-5, rtol=1e-5)
        for layer in mixture_layers(model).values():
            layer.bank.down_proj.add_(torch.randn_like(layer.bank.down_proj) * 0.3)
    moestro.save(model, tmp_path / "model")
    again = moestro.load(str(tmp_path / "model"))
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-6)
    settings = {"max_new_tokens": 6, "do_sample": False}
    cached = again.generate(IDS[:1], **settings)
    assert torch.equal(cached, again.generate(IDS[:1], use_cache=False, **settings))


def block_by_hand(block: Any, h_SD: Tensor) -> Tensor:
    """One block of a stack on one sequence without padding."""
    x = block.attention_norm(h_SD)
    heads, size = 4, x.shape[1] // 4
    query, key, value = block.attention.project(x).chunk(3, -1)
    parts = []
    for i in range(heads):
        mine = slice(i * size, (i + 1) * size)
        score = (query[:, mine] @ key[:, mine].T / size**0.5).softmax(-1)
        parts.append(score @ value[:, mine])
    h_SD = h_SD + block.attention.out(torch.cat(parts, -1))
    x, bank = block.norm(h_SD), block.mixture.bank
    rows = []
    for token in x:
        p = (block.mixture.router.weight @ token).softmax(-1)
        e = int(p.argmax())
        inner = torch.relu(bank.weight(e, "up") @ token + bank.up_bias[e])
        rows.append(p[e] * (bank.weight(e, "down") @ inner + bank.down_proj_bias[e]))
    return h_SD + torch.stack(rows)


def test_a_stack_is_its_formula_with_its_gradients() -> None:
    top = encoder("stack").bert.encoder.layer[1].top
    h = torch.randn(5, 32).requires_grad_()
    expected = h
    for block in top.layers:
        expected = block_by_hand(block, expected)
    expected = top.norm(expected)
    found = top(h[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wish = torch.randn(5, 32)
    wanted = [h, *top.parameters()]
    ours, theirs = (torch.autograd.grad((y * wish).sum(), wanted, allow_unused=True) for y in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        two = torch.zeros_like(one) if two is None else two
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PLACES)
def test_half_precision_and_a_single_token_stay_close_to_the_full_one(name: str) -> None:
    model = encoder(name)
    with torch.no_grad():
        full = [logits(model), logits(model, IDS[:, :1], None)]
        model.to(torch.bfloat16)
        half = [logits(model), logits(model, IDS[:, :1], None)]
    for one, two in zip(full, half, strict=True):
        assert two.dtype == torch.bfloat16
        near = (one - two.float()).norm() / one.norm()  # a token at the border of two experts may change sides
        assert near < 0.1
    logits(model.train()).float().square().sum().backward()
    for layer in mixture_layers(model).values():
        assert layer.router.weight.grad.abs().max() > 0
        assert layer.router.weight.grad.isfinite().all()


@pytest.mark.parametrize(("size", "inner"), [(None, 48), (20, 20)])
def test_experts_are_as_wide_as_the_feed_forward_unless_told(size: int | None, inner: int) -> None:
    for name in ("head", "stack"):
        for layer in mixture_layers(encoder(name, expert_size=size)).values():
            assert layer.bank.inner == inner
    (layer,) = mixture_layers(encoder("replace")).values()
    assert layer.bank.inner == 48


def test_dropout_of_a_stack_is_on_both_branches_and_in_attention_while_training() -> None:
    block = encoder("stack", dropout=0.4).bert.encoder.layer[1].top.layers[0]
    valid = torch.ones(1, 200, dtype=torch.bool)
    h = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(0))
    calls: list[Tensor] = []
    block.dropout.register_forward_hook(lambda module, given, found: calls.append((found == 0).float().mean()))
    with torch.no_grad():
        block.train()(h, valid)
        attended = [block.attention(h, valid) for _ in range(2)]
        assert not torch.equal(*attended)
        assert [float(share) for share in calls] == pytest.approx([0.4, 0.4], abs=4 * (0.24 / 6400) ** 0.5)
        block.eval()
        assert torch.equal(block.attention(h, valid), block.attention(h, valid))
        assert torch.equal(block(h, valid), block(h, valid))


def test_a_sequence_of_padding_alone_stays_finite_and_changes_no_other() -> None:
    model = encoder("stack")
    ids = torch.cat([IDS, torch.zeros_like(IDS[:1])])
    with torch.no_grad():
        found = model.bert(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        alone = model.bert(input_ids=IDS, attention_mask=MASK).last_hidden_state
    assert found.isfinite().all()
    torch.testing.assert_close(found[:2][MASK.bool()], alone[MASK.bool()], atol=1e-5, rtol=1e-5)


def test_all_layers_and_experts_of_a_stack_start_alike_and_are_apart() -> None:
    top = encoder("stack", spread=False, layers=3).bert.encoder.layer[1].top
    first, *others = (dict(block.named_parameters()) for block in top.layers)
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name])
            assert value.data_ptr() != other[name].data_ptr()
    for block in top.layers:
        for name, value in block.mixture.bank.named_parameters():
            assert torch.equal(value, value[:1].expand_as(value)), name
    assert len({block.mixture.site for block in top.layers}) == 3


@pytest.mark.parametrize("name", PLACES)
def test_padding_changes_nothing_and_evaluation_repeats_its_bits(name: str) -> None:
    model = encoder(name)
    with torch.no_grad():
        whole = logits(model)
        assert torch.equal(whole, logits(model))
        alone = logits(model, IDS[1:, :5], None)
        wide = logits(model, torch.nn.functional.pad(IDS, (0, 6)), torch.nn.functional.pad(MASK, (0, 6)))
    torch.testing.assert_close(whole[1, :5], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide[:, :7][MASK.bool()], whole[MASK.bool()], atol=1e-5, rtol=1e-5)
    assert (whole - logits(encoder())).abs().max() > 1e-2  # the new part does something


@pytest.mark.parametrize("name", PLACES)
def test_a_model_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    model = encoder(name)
    moestro.save(model, tmp_path / "model")
    again = moestro.load(str(tmp_path / "model"))
    assert dict(again.named_parameters()).keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", PLACES)
def test_checkpointed_and_compiled_encoders_equal_the_plain_one(name: str) -> None:
    model = encoder(name).train()

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        logits(model).square().sum().backward()
        return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    moestro.checkpoint(model)
    replayed = gradients()
    assert plain.keys() == replayed.keys()
    for path, gradient in plain.items():
        assert torch.equal(gradient, replayed[path]), path
    model.activation_checkpointing_disable()
    model.eval()
    compiled = torch.compile(model.bert, backend="eager")
    with torch.no_grad():
        expected = model.bert(input_ids=IDS, attention_mask=MASK).last_hidden_state
        found = compiled(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", PLACES)
def test_operations_are_counted_as_they_run(name: str) -> None:
    model, rows = encoder(name), RowCounter()
    ids = IDS[:, :5]
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not see into the fused one
    with torch.no_grad(), plain, session(recorder=rows), FlopCounterMode(display=False) as run:
        logits(model, ids, None)
    said = ids.numel() * size_of(model, 5, rows=rows.per_token()).forward_flops
    assert said == pytest.approx(run.get_total_flops(), rel=0.01)


def rows_of(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 97, (count, 9), generator=generator).numpy()
    return [{"input_ids": row, "token_type_ids": row * 0, "start": 3, "end": 4} for row in ids]


def test_two_phases_freeze_the_experts_and_change_to_the_target(tmp_path: Path) -> None:
    class Tokens:
        pad_token_id = 0

    model = encoder("head")
    recipe = Recipe.parse(
        {
            "model": {"load": "unused"},
            "data": {"sources": {"source": {"source": "a"}, "target": {"source": "b"}}},
            "objective": "span",
            "losses": {"balance": 0.01},
            "optimizer": {"lr": 0.01},
            "steps": 6,
            "batch_size": 4,
            "checkpoint": {"final": False},
            "phases": [
                {"name": "all", "steps": 3},
                {
                    "name": "target",
                    "freeze": ["*.bank.*"],
                    "sampler": {"kind": "weighted", "weights": {"source": 0, "target": 1}},
                },
            ],
        }
    )
    data = Dataset({"source": rows_of(16, 1), "target": rows_of(16, 2)})
    seen: list[dict[str, Tensor]] = []

    def look(trainer: Trainer, report: Any) -> None:
        seen.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    trainer = Trainer(model, recipe, data, Span(Tokens()), tmp_path)  # type: ignore[arg-type]
    trainer.hooks.append(look)
    trainer.run(silent=True)
    for name in seen[0]:
        moved = [not torch.equal(a[name], b[name]) for a, b in pairwise(seen)]
        if ".bank." in name:
            assert moved == [True, True, False, False, False], name
        elif ".router." in name or "qa_outputs" in name or ".query.weight" in name:
            assert moved == [True] * 5, name


@pytest.mark.parametrize(
    ("config", "where", "message"),
    [
        ({**HEAD, "top_k": 3}, {}, "top_k=3: Input should be less than or equal to 2"),
        ({**HEAD, "num_experts": 2, "top_k": 2, "weight": "straight"}, {}, "weight='straight' is for top_k=1"),
        ({**REPLACE, "num_experts": 1, "top_k": 2}, {}, "top_k=2 but num_experts=1"),
        ({**REPLACE, "residual": False}, {}, "residual=False is for placement='head'"),
        ({**HEAD, "activation": "swiglu_oss"}, {}, "needs gated experts"),
        ({**HEAD, "layers": 3}, {}, "layers=3 is of a stack, but placement='head'; leave it out"),
        ({**REPLACE, "dropout": 0.1}, {}, "dropout=0.1 is of a stack"),
        ({**HEAD, "capacity_factor": float("inf")}, {}, "finite"),
        ({**HEAD, "capacity_factor": 0}, {}, "greater than 0"),
        ({**HEAD, "second_threshold": 1.5}, {}, "less than or equal to 1"),
        (HEAD, {"layers": [0]}, r"goes on the last layer; give kind \(sites\): block and layers: \[1\]"),
        (HEAD, {"kind": "mlp", "layers": [1]}, "goes on the last layer"),
        ({**STACK, "heads": 5}, {}, "heads=5 do not divide the width 32"),
        (REPLACE, {"kind": "mlp"}, r"does not show the whole feed-forward of bert; give kind \(sites\): block"),
        (REPLACE, {"kind": "norm"}, "is for sites of kind block or mlp, not norm"),
        ({**REPLACE, "expert_size": 7}, {}, "copies of a feed-forward of 48 inner units with gelu; leave expert_size"),
    ],
)
def test_wrong_settings_are_refused_and_leave_the_model_alone(
    config: dict[str, Any], where: dict[str, Any], message: str
) -> None:
    model = encoder()
    with pytest.raises(ConfigError, match=message):
        swap(model, "train.switch_encoder", config, **{"kind": "block", "layers": [1], **where})
    assert not any(isinstance(module, MoELayer) for module in model.modules())


def test_a_decoder_takes_no_stack_and_a_mixture_is_not_replaced_again() -> None:
    decoder = adopt(tiny_model("llama"))
    with pytest.raises(ConfigError, match="attends both ways, but llama has a decoder"):
        swap(decoder, "train.switch_encoder", STACK, kind="block", layers=[1])
    model = encoder("replace")
    with pytest.raises(ConfigError, match="holds a mixture layer, not the dense feed-forward"):
        swap(model, "train.switch_encoder", REPLACE, kind="block", layers=[0])
