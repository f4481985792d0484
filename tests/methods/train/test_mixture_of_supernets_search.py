"""Training and searching a supernet: the sandwich step, its gradients and draws, limits that nothing keeps."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moestro.core.errors import ConfigError
from moestro.core.registry import method
from moestro.core.session import session
from moestro.methods.train._parts.supernet_model import encoder_of, latency, parameters
from moestro.methods.train._parts.supernet_space import Arch, Limits, Search, Space
from moestro.methods.train.mixture_of_supernets import collapse, copy_distance, objective, search
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model
from moestro.training.objectives import make_objective
from moestro.training.recipe import ObjectiveConfig
from moestro.training.step import Stepper


ID = "train.mixture_of_supernets"
SPACE = {"hidden": [16, 32], "head_dim": 8, "ratio": [1, 1.5], "layers": [1, 2]}
SETTINGS = {"space": SPACE, "router_hidden": 6, "pop_size": 2}
IDS = torch.tensor([[5, 9, 17, 3, 40], [11, 8, 4, 2, 77]])
LABELS = IDS.masked_fill(torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool(), -100)
BATCH = {"input_ids": IDS, "labels": LABELS, "position_ids": torch.arange(5).repeat(2, 1)}


def supernet(**changes) -> nn.Module:
    torch.manual_seed(0)
    model = adopt(tiny_model("llama"))
    for kind in ("embedding", "norm", "attention", "mlp", "head"):
        swap(model, ID, {**SETTINGS, **changes}, kind=kind)
    return model


def config(**changes):
    return method(ID).configure({**SETTINGS, **changes})


def summed(model: nn.Module, arch) -> torch.Tensor:
    """Next-token loss of one architecture, summed over targets."""
    with session(arch=arch):
        logits = model(input_ids=IDS).logits
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, LABELS[:, 1:].reshape(-1), reduction="sum", ignore_index=-100)


def drawn(model: nn.Module, seed: int, count: int) -> list[Arch]:
    archs = encoder_of(model).space.archs
    torch.manual_seed(seed)
    return [archs[place] for place in torch.randint(len(archs), (count,)).tolist()]


# -- the sandwich step ------------------------------------------------------------------------------------------


def test_a_step_sums_the_gradients_of_all_its_architectures_and_moves_once() -> None:
    model = supernet().train()
    space = encoder_of(model).space
    random = drawn(model, 7, 2)
    assert len({*random, space.largest, space.smallest}) >= 3
    total = sum(summed(model, arch) for arch in (space.largest, space.smallest, *random)) / 7  # targets
    names, tensors = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad(total, tensors)
    before = [tensor.detach().clone() for tensor in tensors]
    stepper = Stepper(
        model,
        make_objective(ObjectiveConfig(method=ID, config=SETTINGS)),
        torch.optim.SGD(model.parameters(), lr=0.1),
        clip=0.0,
    )
    torch.manual_seed(7)
    report = stepper.run(0, [BATCH], weights={})
    assert report.loss == pytest.approx(float(total.detach()), rel=1e-5)
    assert set(report.terms) == {"largest", "smallest", "random"}
    for name, tensor, old, gradient in zip(names, tensors, before, wanted, strict=True):
        assert gradient.abs().max() > 0, f"{name} gets nothing: ranks would wait for each other"
        torch.testing.assert_close(tensor.detach(), old - 0.1 * gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_losses_are_those_of_the_architectures() -> None:
    model = supernet().train()
    space = encoder_of(model).space
    random = drawn(model, 3, 2)
    torch.manual_seed(3)
    found = objective(model, BATCH, {}, config())
    torch.testing.assert_close(found["largest"].total, summed(model, space.largest), atol=0, rtol=1e-5)
    torch.testing.assert_close(found["smallest"].total, summed(model, space.smallest), atol=0, rtol=1e-5)
    both = torch.stack([summed(model, arch) for arch in random]).sum()
    torch.testing.assert_close(found["random"].total, both, atol=0, rtol=1e-5)
    with torch.no_grad():
        assert set(objective(model.eval(), BATCH, {}, config())) == {"largest", "smallest"}
    assert set(objective(model.train(), BATCH, {}, config(pop_size=0))) == {"largest", "smallest"}


def test_padding_is_no_part_of_a_loss_and_low_precision_none_of_its_sum() -> None:
    model = supernet()
    padded = {
        "input_ids": F.pad(IDS, (3, 0), value=1),
        "attention_mask": F.pad(torch.ones_like(IDS), (3, 0)),
        "position_ids": F.pad(torch.arange(5).repeat(2, 1), (3, 0)),
        "labels": F.pad(LABELS[:, 1:], (4, 0), value=-100),  # padding foretells no first token
    }
    plain, found = (objective(model.eval(), batch, {}, config()) for batch in (BATCH, padded))
    for name, term in plain.items():
        torch.testing.assert_close(found[name].total, term.total, atol=1e-4, rtol=1e-5)
    for term in objective(model.bfloat16(), BATCH, {}, config()).values():
        assert term.total.dtype == torch.float32


def test_the_largest_teaches_the_others_when_asked() -> None:
    model = supernet(distill=True).train()
    space = encoder_of(model).space
    keep = LABELS[:, 1:] != -100
    with session(arch=space.largest):
        taught = model(input_ids=IDS).logits[:, :-1][keep].softmax(-1)
    with session(arch=space.smallest):
        learns = model(input_ids=IDS).logits[:, :-1][keep].log_softmax(-1)
    expected = sum(-(p * q).sum() for p, q in zip(taught, learns, strict=True))
    found = objective(model, BATCH, {}, config(distill=True, pop_size=0))
    torch.testing.assert_close(found["smallest"].total, expected, atol=0, rtol=1e-5)
    torch.testing.assert_close(found["largest"].total, summed(model, space.largest), atol=0, rtol=1e-5)
    with torch.no_grad():
        held_out = objective(model.eval(), BATCH, {}, config(distill=True))
        assert held_out["smallest"].total == pytest.approx(float(summed(model, space.smallest)), rel=1e-5)
    found["smallest"].total.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient[:, :16].abs().max() > 0
    assert (gradient[:, 16:] == 0).all(), "the lesson reaches the teacher"


def test_training_parts_copies_that_started_equal() -> None:
    model = supernet(init="copies").train()
    assert max(copy_distance(model).values()) == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stepper = Stepper(model, make_objective(ObjectiveConfig(method=ID, config=SETTINGS)), optimizer)
    losses = [stepper.run(step, [BATCH], weights={}).terms["smallest"] for step in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    assert min(copy_distance(model).values()) > 1e-4


def test_an_objective_of_another_space_or_without_labels_is_refused() -> None:
    model = supernet()
    with pytest.raises(ConfigError, match="names another search space than the model's"):
        objective(model, BATCH, {}, config(space={**SPACE, "layers": [2]}))
    with pytest.raises(ConfigError, match="with labels; this one has input_ids"):
        objective(model, {"input_ids": IDS}, {}, config())


# -- the search -------------------------------------------------------------------------------------------------

WIDE = Space(hidden=[24 * n for n in range(1, 11)], head_dim=24, ratio=[1, 1.5, 2, 3, 4], layers=list(range(1, 9)))


def weights(arch: Arch) -> int:
    return arch.layers * (4 * arch.hidden * arch.heads * WIDE.head_dim + 3 * arch.hidden * arch.inner)


def time_of(arch: Arch) -> float:
    """A machine on which blocks cost time and width does not."""
    return 1.0 + arch.layers


def fitness(arch: Arch) -> float:
    """Wide is good, deep is better."""
    return -(arch.hidden + 60 * arch.layers + arch.inner / 50)


def hunt(fit=fitness, *, seed: int = 0, generations: int = 12, **limits):
    one = Search(WIDE, fit, Limits(**limits), parameters=weights, latency=time_of, seed=seed)
    return one.run(generations=generations)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "limits", [{}, {"parameters": 200_000}, {"latency": 4.0}, {"parameters": 150_000, "latency": 4.5}]
)
def test_evolution_finds_the_best_that_keeps_the_limits(limits: dict, seed: int) -> None:
    most, slow = limits.get("parameters", float("inf")), limits.get("latency", float("inf"))
    best = min((arch for arch in WIDE.archs if weights(arch) <= most and time_of(arch) <= slow), key=fitness)
    found = hunt(seed=seed, **limits)
    assert found.arch == best
    assert (found.loss, found.parameters) == (fitness(best), weights(best))
    assert found.latency == (time_of(best) if "latency" in limits else None)


def test_evolution_asks_for_fewer_losses_than_there_are_architectures() -> None:
    asked: list[Arch] = []
    found = hunt(lambda arch: asked.append(arch) or fitness(arch), generations=4)
    assert len(asked) == len(set(asked)) <= 16 * 5 < len(WIDE.archs) / 4
    assert fitness(found.arch) <= sorted(map(fitness, WIDE.archs))[7]
    again = hunt(generations=4)
    assert again == found, "a seed gives the same search"


@pytest.mark.parametrize("change", [{"population": 0}, {"parents": 0}, {"mutate": 1.5}, {"mutate": -0.1}])
def test_a_search_without_parents_or_children_is_refused(change: dict) -> None:
    name, value = next(iter(change.items()))
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        Search(WIDE, fitness, Limits(), parameters=weights, latency=time_of).run(**change)


def test_only_what_has_the_size_is_timed() -> None:
    timed: list[Arch] = []
    Search(
        WIDE,
        fitness,
        Limits(parameters=100_000, at_least=50_000, latency=9.0),
        parameters=weights,
        latency=lambda arch: timed.append(arch) or time_of(arch),
    ).run()
    assert timed
    assert all(50_000 <= weights(arch) <= 100_000 for arch in timed)
    assert len(timed) == len(set(timed))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"parameters": 100}, "none of the 400 architectures has 0 to 100 parameters; they have 4032 to 7372800"),
        ({"at_least": 10**9}, "has 1000000000 to inf parameters"),
        ({"parameters": 60_000, "at_least": 59_999}, "has 59999 to 60000 parameters"),
        ({"latency": 0.5}, r"none of the 400 .* runs in 0.5 ms; the fastest, Arch\(.*layers=1\), takes 2 ms"),
        ({"at_least": 3_000_000, "latency": 3.0}, r"runs in 3 ms; the fastest, .*layers=4\), takes 5 ms"),
    ],
)
def test_a_space_with_nothing_that_keeps_the_limits_is_refused_in_one_line(limits: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        hunt(**limits)
    assert "\n" not in str(caught.value)


def test_a_supernet_is_searched_by_what_its_plain_models_hold_and_take() -> None:
    model = supernet()

    def loss(arch: Arch) -> float:
        with torch.no_grad():
            return float(summed(model, arch))

    sizes = {arch: sum(p.numel() for p in collapse(model, arch).parameters()) for arch in encoder_of(model).space.archs}
    assert sizes == {arch: parameters(model, arch) for arch in sizes}
    budget = sorted(sizes.values())[4]
    found = search(model, loss, limits=Limits(parameters=budget, latency=60_000.0), generations=6, population=8)
    assert found.arch == min((arch for arch in sizes if sizes[arch] <= budget), key=loss)
    assert found.parameters <= budget
    assert 0 < found.latency < 60_000
    with pytest.raises(ConfigError, match=r"runs in 1e-06 ms; the fastest, .* takes"):
        search(model, loss, limits=Limits(latency=1e-6))


def test_latency_is_that_of_a_forward_of_the_whole_length() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = supernet()
    arch = encoder_of(model).space.smallest
    ran = {}
    for length, repeats in itertools.product((8, 16), (1, 3)):
        with FlopCounterMode(display=False) as counter:
            assert latency(model, arch, length=length, repeats=repeats) > 0
        ran[length, repeats] = counter.get_total_flops()
    assert ran[8, 3] == 2 * ran[8, 1], "one forward to warm up, then the repeats"
    assert ran[16, 1] >= 2 * ran[8, 1]


def test_the_space_lists_what_is_possible_and_nothing_else() -> None:
    space = Space(hidden=[12, 24], head_dim=4, heads=[2, 3, 8], inner=[10, 20], layers=[1])
    found = {(arch.hidden, arch.heads) for arch in space.archs}
    assert found == {(12, 2), (12, 3), (24, 2), (24, 3), (24, 8)}
    assert len(space.archs) == 10
    assert space.smallest == Arch(hidden=12, inner=10, heads=2, layers=1)
    assert space.largest == Arch(hidden=24, inner=20, heads=8, layers=1)
    assert all(space.decode(genes) == arch for arch, genes in space.by_arch.items())
    rounded = Space(hidden=[10, 30], head_dim=10, ratio=[0.7, 1.1], layers=[1])  # 0.7 x 10 is 7.000000000000001
    assert [arch.inner for arch in rounded.archs] == [7, 11, 21, 33]
    other = Space(hidden=[12, 24], head_dim=4, heads=[2, 3, 8], inner=[10, 21], layers=[1])
    assert space.digest() != other.digest()
    assert space.digest() == Space(**space.model_dump()).digest()
