"""The elastic layer of mixture-of-supernets by itself: its mixture against a plain loop, its router, its copies."""

import pytest
import torch
from torch import Tensor, nn

from moestro.core.registry import method
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.methods.train.mixture_of_supernets import ElasticFFN, ElasticLinear, copy_distance, mix


ID = "train.mixture_of_supernets"


def build(space=None, *, inner: int = 6, **config) -> ElasticFFN:
    """A layer of its own: 4 wide, ``inner`` neurons."""
    torch.manual_seed(0)
    use = method(ID)
    space = space or {"hidden": [2, 4], "head_dim": 2, "inner": [3, inner], "layers": [1]}
    site = Site(path="mlp", kind="mlp", module=nn.Identity(), dim=4, out=4, layer=0, num_layers=1)
    made = use.build(site, use.configure({"space": space, "router_hidden": 5, **config}), Shared())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.7)
    return made


def test_a_mixture_worked_by_hand() -> None:
    copies = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]])
    by_neuron = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    torch.testing.assert_close(mix(copies, by_neuron), torch.tensor([[5.5, 11.0], [23.25, 31.0]]))
    torch.testing.assert_close(mix(copies, torch.tensor([[0.9, 0.1]])), torch.tensor([[1.9, 3.8], [5.7, 7.6]]))
    bias = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    torch.testing.assert_close(mix(bias, by_neuron), torch.tensor([2.0, 5.0]))


def loop(layer: ElasticFFN, x_TD: Tensor, hidden: int, inner: int, encoding: list[float]) -> Tensor:
    """The layer from its formula: every weight of every neuron mixed by itself."""
    single = layer.config.routing == "layer"

    def shares(name: str, rows: int) -> Tensor:
        router = layer.routers[name]
        z = router.last.weight @ (router.first.weight @ torch.tensor(encoding) + router.first.bias).relu()
        z = z + router.last.bias
        count = layer.config.experts
        each = [z[:count] if single else z[n * count : (n + 1) * count] for n in range(rows)]
        return torch.stack([row.exp() / row.exp().sum() for row in each])

    def matrix(name: str, router: str, rows: int, columns: int) -> Tensor:
        share, copies = shares(router, rows), layer.parts[name].weight
        return torch.stack(
            [
                torch.stack([sum(share[n, j] * copies[j, n, i] for j in range(len(copies))) for i in range(columns)])
                for n in range(rows)
            ]
        )

    gate, up = (matrix(name, "inner", inner, hidden) for name in ("gate_proj", "up_proj"))
    down = matrix("down_proj", "out", hidden, inner)
    return torch.stack([down @ (nn.functional.silu(gate @ x) * (up @ x)) for x in x_TD])


@pytest.mark.parametrize("routing", ["layer", "neuron"])
@pytest.mark.parametrize(
    ("hidden", "inner", "encoding"), [(2, 3, [0.5, 0.5, 0.5, 1.0]), (4, 3, [1, 1, 0.5, 1]), (4, 6, [1, 1, 1, 1])]
)
def test_outputs_and_gradients_equal_a_plain_loop(routing: str, hidden: int, inner: int, encoding: list) -> None:
    layer = build(routing=routing, experts=3)
    x, wish = torch.randn(7, hidden), torch.randn(7, hidden)
    expected = loop(layer, x, hidden, inner, [float(e) for e in encoding])
    with session(arch={"hidden": hidden, "inner": inner, "heads": hidden // 2, "layers": 1}):
        found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    names, tensors = zip(*layer.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad((y * wish).sum(), tensors) for y in (found, expected))
    for name, one, two in zip(names, ours, theirs, strict=True):
        assert two.abs().max() > 1e-4, name
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4, msg=name)


def test_mixing_keeps_small_differences_of_low_precision_copies() -> None:
    torch.manual_seed(0)
    copies, shares = torch.randn(2, 16, 16).bfloat16(), torch.rand(16, 2)
    found = mix(copies, shares)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, mix(copies.double(), shares.double()).bfloat16())
    layer, encoding = build(experts=3), torch.tensor([0.5, 0.5, 0.5, 1.0])
    expected = layer.routers["inner"](encoding, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.routers["inner"](encoding, 6), expected), "autocast reached the shares"


def test_copies_are_compared_with_each_other_not_with_the_first_alone() -> None:
    layer = ElasticLinear(nn.Linear(2, 2, bias=False), 3, "copies")
    assert copy_distance(nn.Sequential(layer)) == {"0": 0.0}
    with torch.no_grad():
        layer.weight[1] += 1.0
        layer.weight[2] -= 1.0
    assert copy_distance(nn.Sequential(layer))["0"] == pytest.approx(2.0 / float(layer.weight.detach().std()))


def test_rows_of_a_router_sum_to_one_and_keep_their_place_when_sliced() -> None:
    layer = build(experts=3)
    encoding = torch.tensor([0.5, 0.5, 0.5, 1.0])
    router = layer.routers["inner"]
    whole, part = router(encoding, 6), router(encoding, 4)
    torch.testing.assert_close(whole.sum(-1), torch.ones(6))
    assert whole.std(0).min() > 0.05
    torch.testing.assert_close(part, whole[:4], atol=0, rtol=0)
    assert (router(torch.ones(4), 6) - whole).abs().max() > 0.05, "the router does not read the architecture"


@pytest.mark.parametrize(("init", "size"), [("copies", 1.0), ("random", 3**-0.5), ("scaled", 1.0)])
def test_an_even_mixture_is_as_large_as_the_start_says(init: str, size: float) -> None:
    torch.manual_seed(0)
    stock = nn.Linear(200, 300)
    copies = ElasticLinear(stock, 3, init).weight.detach()
    even = mix(copies, torch.full((1, 3), 1 / 3))
    assert float(even.std() / stock.weight.detach().std()) == pytest.approx(size, rel=0.02)
    first = copies[0] / (3**0.5 if init == "scaled" else 1)
    torch.testing.assert_close(first, stock.weight.detach())


def test_dropout_of_the_router_is_for_training_only() -> None:
    layer = build(router_dropout=0.5, router_hidden=40)
    x = torch.randn(3, 4)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer(x), loop(layer, x, 4, 6, [1.0] * 4), atol=1e-5, rtol=1e-5)
