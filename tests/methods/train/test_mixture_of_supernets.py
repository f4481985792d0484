"""Mixture-of-supernets: mixtures against plain loops, slices against plain models, and no architecture left over."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import moestro
from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.supernet_model import encoder_of, plain_config
from moestro.methods.train.mixture_of_supernets import (
    ArchRouter,
    collapse,
    copy_distance,
)
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model


ID = "train.mixture_of_supernets"
KINDS = ("embedding", "norm", "attention", "mlp", "head")
SPACE = {"hidden": [16, 32], "head_dim": 8, "ratio": [1, 1.5], "layers": [1, 2]}
SMALL = {"hidden": 16, "inner": 16, "heads": 2, "layers": 1}
MIDDLE = {"hidden": 16, "inner": 24, "heads": 2, "layers": 2}
LARGE = {"hidden": 32, "inner": 48, "heads": 4, "layers": 2}
IDS = torch.tensor([[5, 9, 17, 3, 40], [11, 8, 4, 2, 77]])
ROUTINGS = {"none": 1, "layer": 3, "neuron": 3}


def supernet(routing: str = "neuron", *, family: str = "llama", kinds=KINDS, model=(), **config):
    """A tiny model with everything elastic, and routers that disagree about the architectures."""
    torch.manual_seed(0)
    settings = {"space": SPACE, "routing": routing, "experts": ROUTINGS.get(routing, 3), "router_hidden": 6, **config}
    opened = adopt(tiny_model(family, **dict(model)))
    for kind in kinds:
        swap(opened, ID, settings, kind=kind)
    with torch.no_grad():
        for part in opened.modules():
            if isinstance(part, ArchRouter):
                for parameter in part.parameters():
                    parameter.normal_(std=1.0)
    return opened


def logits(model: nn.Module, arch, ids: Tensor = IDS, **more) -> Tensor:
    with torch.no_grad(), session(arch=arch):
        return model(input_ids=ids, **more).logits


# -- the mathematics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["layer", "neuron"])
def test_one_copy_is_the_plain_supernet_exactly(routing: str) -> None:
    plain, mixed = supernet("none"), supernet(routing, experts=1)
    for arch in (SMALL, MIDDLE, LARGE):
        assert torch.equal(logits(plain, arch), logits(mixed, arch))


@pytest.mark.parametrize("routing", ["layer", "neuron"])
def test_equal_copies_are_plain_slicing_whatever_the_router_says(routing: str) -> None:
    plain, mixed, apart = supernet("none"), supernet(routing, init="copies"), supernet(routing)
    assert max(copy_distance(mixed).values()) == 0
    assert min(copy_distance(apart).values()) > 1
    for arch in (SMALL, MIDDLE, LARGE):
        expected = logits(plain, arch)
        torch.testing.assert_close(logits(mixed, arch), expected, atol=1e-6 * float(expected.abs().max()), rtol=1e-6)
        assert (logits(apart, arch) - expected).abs().max() > 0.01


def test_the_largest_plain_supernet_is_the_stock_model() -> None:
    stock = tiny_model("llama")
    with torch.no_grad():
        expected = stock(input_ids=IDS).logits
    model = supernet("none")
    torch.testing.assert_close(logits(model, LARGE), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(logits(model, None), logits(model, LARGE)), "without a session the largest runs"


# -- slices of a whole model ------------------------------------------------------------------------------------


def by_hand(model: nn.Module, hidden: int, inner: int, heads: int, layers: int) -> dict[str, Tensor]:
    """Slices of a stock Llama's tensors, written out name by name."""
    kv = heads // 2
    found = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")
        if part[:2] == ["model", "layers"] and int(part[2]) >= layers:
            continue
        match part[-2]:
            case "q_proj":
                found[name] = tensor[: heads * 8, :hidden]
            case "k_proj" | "v_proj":
                found[name] = tensor[: kv * 8, :hidden]
            case "o_proj":
                found[name] = tensor[:hidden, : heads * 8]
            case "gate_proj" | "up_proj":
                found[name] = tensor[:inner, :hidden]
            case "down_proj":
                found[name] = tensor[:hidden, :inner]
            case "embed_tokens" | "lm_head":
                found[name] = tensor[:, :hidden]
            case _:
                found[name] = tensor[:hidden]
    return found


def test_an_architecture_is_a_plain_model_of_the_first_rows_and_columns() -> None:
    from transformers import LlamaForCausalLM

    stock = tiny_model("llama")
    model = supernet("none")
    for arch in (SMALL, MIDDLE):
        config = plain_config(model, encoder_of(model).space.resolve(arch))
        plain = LlamaForCausalLM(config).eval()
        plain.load_state_dict(by_hand(stock, **arch))
        with torch.no_grad():
            expected = plain(input_ids=IDS).logits
        torch.testing.assert_close(logits(model, arch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("routing", ["none", "layer", "neuron"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
    ids=["llama", "tied with biases", "mistral", "qwen2"],
)
def test_every_architecture_collapses_to_a_plain_model_of_equal_logits(family: str, more: dict, routing: str) -> None:
    model = supernet(routing, family=family, model=more).train()
    for arch in encoder_of(model).space.archs:
        plain = collapse(model, arch)
        assert type(plain).__module__.startswith("transformers.")
        fresh = type(plain)(plain_config(model, arch))
        assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in fresh.parameters())
        assert (plain.config.hidden_size, plain.config.num_hidden_layers) == (arch.hidden, arch.layers)
        assert plain.config.intermediate_size == arch.inner
        torch.testing.assert_close(plain(input_ids=IDS).logits, logits(model, arch), atol=1e-5, rtol=1e-5)
    before = logits(model, None)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, None), before), "the plain model shares memory with the supernet"


def test_a_collapse_keeps_the_type_the_settings_and_the_mode_and_drops_no_feature() -> None:
    model = supernet(router_dropout=0.5, router_hidden=20)
    model.generation_config.max_new_tokens = 7
    expected = logits(model, MIDDLE)
    for training in (False, True):
        plain = collapse(model.train(training), MIDDLE)
        assert model.training is training
        assert not plain.training
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert plain.generation_config.max_new_tokens == 7
    assert plain.generation_config is not model.generation_config
    half = collapse(model.bfloat16().eval(), MIDDLE)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    ours = logits(model, MIDDLE)
    torch.testing.assert_close(half(input_ids=IDS).logits, ours, atol=0.02 * float(ours.abs().max()), rtol=0)


def gradients(model: nn.Module, arch=None) -> dict[str, Tensor]:
    model.zero_grad()
    with session(arch=arch):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()  # outside the session, as the training loop does
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_the_slice_alone() -> None:
    model = supernet().train()
    found = gradients(model, SMALL)
    assert not any(".layers.1." in name for name in found), "a block beyond the architecture got a gradient"
    first = "model.layers.0."
    cut = {
        "model.embed_tokens.weight": (slice(None), slice(16)),
        "lm_head.weight": (slice(None), slice(16)),
        f"{first}input_layernorm.inner.weight": (slice(16),),
        f"{first}self_attn.inner.q_proj.weight": (slice(16), slice(16)),
        f"{first}self_attn.inner.k_proj.weight": (slice(8), slice(16)),
        f"{first}self_attn.inner.o_proj.weight": (slice(16), slice(16)),
        f"{first}mlp.parts.up_proj.weight": (slice(None), slice(16), slice(16)),
        f"{first}mlp.parts.down_proj.weight": (slice(None), slice(16), slice(16)),
        f"{first}mlp.routers.inner.last.weight": (slice(16 * 3),),
    }
    for name, inside in cut.items():
        gradient = found[name].clone()
        assert gradient[inside].abs().max() > 0, name
        gradient[inside] = 0
        assert (gradient == 0).all(), name
        assert gradient.numel() > found[name][inside].numel(), f"{name} is not cut, the test says nothing"


# -- the active architecture ------------------------------------------------------------------------------------


def test_an_architecture_ends_with_its_session() -> None:
    model = supernet()
    first, other = logits(model, SMALL), logits(model, MIDDLE)
    assert torch.equal(logits(model, SMALL), first)
    assert (first - other).abs().max() > 0.01
    with pytest.raises(RuntimeError, match="stop"), session(arch=MIDDLE):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, None), logits(model, LARGE))
    with session(arch=MIDDLE):
        assert torch.equal(logits(model, SMALL), first), "the inner session counts"
        assert torch.equal(logits(model, None), other), "the outer one counts again"


def test_two_threads_run_two_architectures_of_one_model() -> None:
    model = supernet()
    meet = threading.Barrier(2)

    def work(arch) -> int:
        expected = logits(model, arch)
        try:
            wrong = 0
            for _ in range(30):
                meet.wait(timeout=10)
                wrong += not torch.equal(logits(model, arch), expected)
            return wrong
        except Exception:
            meet.abort()
            raise

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (SMALL, LARGE))) == [0, 0]


def test_checkpointed_gradients_are_those_of_the_architecture_that_ran() -> None:
    model = supernet().train()
    plain = gradients(model, MIDDLE)
    moestro.checkpoint(model)
    replayed = gradients(model, MIDDLE)
    assert plain.keys() == replayed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, replayed[name]), name


def test_a_compiled_stack_runs_every_architecture() -> None:
    model = supernet()
    compiled = torch.compile(model.model, backend="eager")
    for arch in (SMALL, LARGE, SMALL):
        with torch.no_grad(), session(arch=arch):
            expected = model.model(input_ids=IDS).last_hidden_state
            torch.testing.assert_close(compiled(input_ids=IDS).last_hidden_state, expected, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()


def test_attentions_and_hidden_states_are_those_of_the_plain_model() -> None:
    model = supernet(model={"attn_implementation": "eager"})
    plain = collapse(model, MIDDLE)
    plain.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad(), session(arch=MIDDLE):
        ours, theirs = (one(input_ids=IDS, **asked) for one in (model, plain))
    for kind in ("attentions", "hidden_states"):
        assert len(ours[kind]) == len(theirs[kind]) == 2 + (kind == "hidden_states")
        for one, two in zip(ours[kind], theirs[kind], strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing() -> None:
    model = supernet()
    ids = torch.tensor([[5, 9, 17, 3], [0, 8, 4, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    whole = logits(model, MIDDLE, ids, attention_mask=mask)
    torch.testing.assert_close(whole[1, 1:], logits(model, MIDDLE, ids[1:, 1:])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_supernet_saves_loads_and_generates(tmp_path, tied: bool) -> None:
    model = supernet(model={"tie_word_embeddings": tied})
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    moestro.save(model, tmp_path / "net")
    again = moestro.load(str(tmp_path / "net"))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    for arch in (SMALL, MIDDLE, LARGE):
        torch.testing.assert_close(logits(again, arch), logits(model, arch), atol=1e-6, rtol=1e-6)
        settings = {"max_new_tokens": 6, "do_sample": False}
        with session(arch=arch):
            cached = again.generate(IDS[:1], **settings)
            assert torch.equal(cached, again.generate(IDS[:1], use_cache=False, **settings))
        assert torch.equal(cached, collapse(again, arch).generate(IDS[:1], **settings))


def test_another_encoding_than_the_trained_one_is_refused(tmp_path) -> None:
    model = supernet()
    moestro.save(model, tmp_path / "net")
    config = tmp_path / "net" / "config.json"
    (tmp_path / "net" / "manifest.json").unlink()  # it would refuse any edit
    values = json.loads(config.read_text())

    def rewrite(ratio: list[float]) -> None:
        for entry in values["swaps"]:
            entry["config"]["space"]["ratio"] = ratio
        config.write_text(json.dumps(values))

    rewrite([1, 1.25])
    with pytest.raises(ConfigError, match="largest inner of the space is 40, the model has 48"):
        moestro.load(str(tmp_path / "net"))
    rewrite([1, 1.5])
    torch.testing.assert_close(logits(moestro.load(str(tmp_path / "net")), SMALL), logits(model, SMALL))
    rewrite([0.5, 1.5])
    changed = moestro.load(str(tmp_path / "net"))
    with pytest.raises(ContextError, match=r"another search space or encoding .* by \[32, 4, 48, 2\]"):
        logits(changed, None)
    with pytest.raises(ContextError, match="another search space"):
        collapse(changed, SMALL)


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ({**SMALL, "hidden": 24}, r"hidden=24.* not in the space: hidden \[16, 32\], inner \[1.0, 1.5\] x hidden"),
        ({**SMALL, "layers": 3}, r"layers \[1, 2\]"),
        ({**SMALL, "heads": 4}, "heads hidden / 8"),
        ({**SMALL, "hidden": 16.0}, r"hidden=16\.0.* not in the space"),
        ({**SMALL, "hidden": [16]}, r"hidden=\[16\].* not in the space"),
        ({"hidden": 16}, "sizes hidden, heads, inner, layers"),
        ("small", "arch='small'"),
    ],
)
def test_an_architecture_outside_the_space_is_refused(arch, message: str) -> None:
    with pytest.raises(ContextError, match=message):
        logits(supernet(), arch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": [8]}, "either inner, the widths, or ratio"),
        ({"ratio": None}, "either inner, the widths, or ratio"),
        ({"hidden": [20, 32]}, "hidden=20 is no multiple of head_dim=8"),
        ({"ratio": [0.3]}, "ratio=0.3 of hidden=16 is 4.8 neurons"),
        ({"heads": [3, 5]}, r"none of hidden=\[16, 32\] is a multiple of one of heads=\[3, 5\]"),
        ({"heads": [4, 5]}, "hidden=32 is no multiple of heads=5"),
        ({"ratio": [float("inf")]}, "finite number"),
        ({"layers": []}, "at least 1 item"),
        ({"hidden": [0]}, "greater than or equal to 1"),
        ({"hidden": list(range(8, 8008, 8)), "layers": list(range(1, 12))}, "22000 combinations, at most 10000"),
    ],
)
def test_an_impossible_space_is_refused_when_built(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(ID).configure({"space": {**SPACE, **change}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routing": "none", "experts": 2}, "experts=2 but routing='none' mixes nothing"),
        ({"routing": "token"}, "'none', 'layer' or 'neuron'"),
        ({"experts": 0}, "greater than or equal to 1"),
        ({"router_dropout": 1.0}, "less than 1"),
        ({"space": {**SPACE, "hidden": [16, 24]}}, "largest hidden of the space is 24, the model has 32"),
        ({"space": {**SPACE, "layers": [1, 3]}}, "largest layers of the space is 3, the model has 2"),
        ({"space": {**SPACE, "ratio": [1, 2]}}, "largest inner of the space is 64, the model has 48"),
        ({"space": {**SPACE, "head_dim": 16}}, "largest heads of the space is 2, the model has 4"),
        ({"space": {**SPACE, "head_dim": 16, "heads": [2, 4]}}, "largest head_dim of the space is 16, the model has 8"),
        ({"space": {**SPACE, "hidden": [8, 32]}}, "2 heads share one key, so 1 heads cannot"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        supernet(kinds=("attention", "mlp"), **change)


def test_without_a_space_the_neurons_alone_vary() -> None:
    model = supernet(space=None, kinds=("mlp",))
    space = encoder_of(model).space
    assert {(arch.hidden, arch.heads, arch.layers) for arch in space.archs} == {(32, 4, 2)}
    assert [arch.inner for arch in space.archs] == [12, 24, 48]
    for arch in space.archs:
        plain = collapse(model, arch)
        torch.testing.assert_close(plain(input_ids=IDS).logits, logits(model, arch), atol=1e-5, rtol=1e-5)
    whole = supernet(space=None)
    assert encoder_of(whole).space == space, "the same at every kind of site"
    with pytest.raises(ConfigError, match="Identity does not tell its inner width; give a space"):
        method(ID).build(Site(path="mlp", kind="mlp", module=nn.Identity(), dim=4), method(ID).configure({}), Shared())


def test_a_part_that_stayed_plain_is_named() -> None:
    model = supernet(kinds=("embedding", "attention", "mlp", "head"))
    with pytest.raises(ConfigError, match=r"varies hidden but model\.layers\.0\.input_layernorm is plain"):
        collapse(model, SMALL)
    with pytest.raises(ContextError, match="16 wide but its layer got 32"):
        logits(supernet(kinds=("attention", "mlp")), SMALL)
    with pytest.raises(ConfigError, match="is no supernet"):
        collapse(tiny_model("llama"), SMALL)


def test_a_model_has_one_space_and_a_family_that_is_known() -> None:
    model = supernet(kinds=("norm", "mlp"))
    with pytest.raises(ConfigError, match="another search space than at the sites before"):
        swap(model, ID, {"space": {**SPACE, "ratio": [0.5, 1.5]}}, kind="embedding")
    with pytest.raises(ConfigError, match="a block is not elastic"):
        swap(model, ID, {"space": SPACE}, kind="block")
    with pytest.raises(ConfigError, match="slicing a norm is known for llama"):
        swap(adopt(tiny_model("cohere")), ID, {"space": SPACE}, kind="norm")
    with pytest.raises(ConfigError, match="no dense feed-forward"):
        swap(adopt(tiny_model("bert")), ID, {"space": SPACE}, kind="mlp")
