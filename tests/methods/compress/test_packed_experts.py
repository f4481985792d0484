"""A mixture with packed experts: bytes and operations counted, all else kept, wrong places refused."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moestro.core.bank import StackedFFN
from moestro.core.context import open_stack
from moestro.core.cost import RowCounter, Work, cost
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.packed import PackedFFN
from moestro.core.registry import method
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.ops import formats


FORMATS = {"gate": ["int4:g8", "int8:row", "sign1:g8", "int4:g8"], "up": "uint2:g16:f16", "down": "uint3:g10"}


def site(module: nn.Module) -> Site:
    return Site(path="layers.0.mlp", kind="mlp", module=module, dim=16, out=16, layer=0)


def mixture(**form: Any) -> MoELayer:
    torch.manual_seed(0)
    use = method("train.moe")
    values = {
        "num_experts": 4,
        "expert_size": 24,
        "shared": 8,
        "activation": "silu",
        "gated": True,
        "bias": False,
        **form,
    }
    layer = use.build(site(nn.Linear(16, 16)), use.configure(values), Shared())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer.eval()


def packed(layer: MoELayer, spelled: dict[str, Any] | None = None) -> MoELayer:
    """The layer packed to the nearest codes."""
    use = method("compress.packed_experts")
    config = use.configure({"formats": spelled or FORMATS})
    made = use.build(site(layer), config, Shared())
    for name, each in made.bank.packings.items():
        for expert, used in enumerate(each):
            parts, _ = formats.quantise(layer.bank.weight(expert, name).detach()[None], used)
            made.bank.put(expert, name, {key: part[0] for key, part in parts.items()})
    return made.eval()


@pytest.mark.parametrize("form", [{}, {"bias": True}, {"activation": "swiglu_oss", "bias": True}])
def test_only_the_matrices_change(form: dict[str, Any]) -> None:
    layer = mixture(**form)
    made = packed(layer)
    assert made.router is layer.router
    assert made.shared is layer.shared
    assert made.losses is layer.losses
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = made(x[None])[0]
    with torch.no_grad():
        for expert in range(4):
            for name in ("gate", "up", "down"):
                layer.bank.weight(expert, name).copy_(made.bank.weight(expert, name))
    torch.testing.assert_close(y, layer(x[None])[0], atol=1e-4, rtol=1e-4)
    y.sum().backward()
    mine = x.grad.clone()
    x.grad = None
    layer(x[None]).sum().backward()
    torch.testing.assert_close(mine, x.grad, atol=1e-3, rtol=1e-3)


def test_not_gated_experts() -> None:
    layer = mixture(gated=False, activation="relu", shared=0)
    made = packed(layer, {"up": "int8", "down": "int8:g8"})
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2))
    assert (made(x) - layer(x)).abs().max() < 0.02 * layer(x).abs().max()


def test_a_token_without_experts_gets_zeros() -> None:
    from moestro.core.routing import Routing

    bank = packed(mixture(shared=0)).bank
    routing = Routing(torch.tensor([2, 2]), torch.tensor([0, 3]), torch.ones(2), 4, 4)
    y = bank(torch.randn(4, 16), routing)
    assert y[[0, 1, 3]].abs().max() == 0
    assert y[2].abs().max() > 0
    none = Routing(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), 4, 4)
    assert bank(torch.randn(4, 16), none).tolist() == torch.zeros(4, 16).tolist()


def test_bytes_and_operations_are_those_that_run() -> None:
    made = packed(mixture(bias=True))
    bank = made.bank
    assert isinstance(bank, PackedFFN)
    held = sum(tensor.nbytes for tensor in (*bank.parameters(), *bank.buffers()))
    assert sum(bank.nbytes(expert) for expert in range(4)) == held
    gate, up, down = 24 * (8 + 2 * 4), 24 * (4 + 2 + 1), 16 * (9 + 3 * 4 + 2)  # codes, scales, zero points of a row
    assert bank.nbytes(0) == gate + up + down + 4 * (48 + 16)
    stack = nn.Sequential(made)
    open_stack(stack, "model")
    rows = RowCounter()
    x = torch.randn(2, 6, 16)
    with torch.no_grad(), session(recorder=rows), FlopCounterMode(display=False) as run:
        stack(x)
    assert 12 * cost(stack, Work(6, False, rows.per_token())) == run.get_total_flops()


def test_wrong_places_are_refused() -> None:
    use = method("compress.packed_experts")
    config = use.configure({"formats": {"gate": "int4", "up": "int4", "down": "int4"}})
    with pytest.raises(ConfigError, match="a Linear stands there, not a mixture of equal experts"):
        use.build(site(nn.Linear(16, 16)), config, Shared())
    with pytest.raises(ConfigError, match="the experts are packed already"):
        use.build(site(packed(mixture())), config, Shared())


@pytest.mark.parametrize(
    ("spelled", "words"),
    [
        ({"gate": "int5", "up": "int4", "down": "int4"}, "no format 'int5'"),
        ({"router": "int4"}, "no projection 'router'"),
        ({"up": "int4", "down": "int4"}, "these experts have gate, up, down"),
        ({"gate": ["int4"] * 3, "up": "int4", "down": "int4"}, "3 packings of gate for 4 experts"),
        ({"gate": "int4:g32", "up": "int4", "down": "int4"}, "groups of 32 do not fit rows of 16 inputs"),
    ],
)
def test_packings_that_do_not_fit(spelled: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        packed(mixture(), spelled)


def test_the_bank_is_still_of_its_form() -> None:
    bank = packed(mixture()).bank
    again = StackedFFN(4, 16, 24)
    assert bank.projections == again.projections
    assert [tuple(bank.weight(0, name).shape) for name in bank.projections] == [(24, 16), (24, 16), (16, 24)]
    assert bank.formats() == {
        "gate": ["int4:g8:f32", "int8:row:f32", "sign1:g8:f32", "int4:g8:f32"],
        "up": "uint2:row:f16",  # a group as wide as the row
        "down": "uint3:g10:f32",
    }
    with pytest.raises(ConfigError, match="no weight 'up' of expert 4"):
        bank.weight(4, "up")
