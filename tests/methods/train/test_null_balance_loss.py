"""The balance loss with null experts against its formula, its invariances and its cuts of a step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from moestro.core.routing import Routing, Scores
from moestro.core.session import Session
from tests.methods.train.helpers import build, context, tokens


REAL, NULL, K = 4, 3, 3


def routing_of(logits_TC: Tensor, *, num_experts: int = REAL, top_k: int = K) -> Routing:
    return Routing.from_topk(
        logits_TC.topk(top_k).indices,
        torch.ones(len(logits_TC), top_k),
        num_experts=num_experts,
        num_null=logits_TC.shape[1] - num_experts,
        scores=Scores(logits_TC, logits_TC, logits_TC),
    )


def loss(routing: Routing, rows: int = 1, **config: Any) -> Tensor:
    total: Tensor = build("train.null_balance_loss", **config)("s", routing, context(rows, routing.num_tokens // rows))
    return total


def formula(logits_TC: Tensor, *, bucket: str, num_experts: int = REAL, top_k: int = K) -> Tensor:
    """(n + m) sum_i f~_i P_i in loops: f and then its mean over the nulls."""
    tokens_, choices = logits_TC.shape
    chosen = logits_TC.topk(top_k).indices.tolist()
    share = [sum(i in row for row in chosen) / tokens_ for i in range(choices)]
    if bucket == "mean":
        mean = sum(share[num_experts:]) / (choices - num_experts)
        smooth = share[:num_experts] + [mean] * (choices - num_experts)
        assert sum(smooth[num_experts:]) == pytest.approx(sum(share[num_experts:])), "the nulls' total stays"
        share = smooth
    probability = logits_TC.softmax(-1).mean(0)
    total = torch.zeros(())
    for i in range(choices):
        total = total + share[i] * probability[i]
    return choices * total


@pytest.mark.parametrize("bucket", ["mean", "separate"])
def test_value_and_gradient_are_the_formulas(bucket: str) -> None:
    torch.manual_seed(0)
    logits_TC = torch.randn(20, REAL + NULL, requires_grad=True)
    found = loss(routing_of(logits_TC), null_bucket=bucket)
    expected = formula(logits_TC, bucket=bucket)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(y, logits_TC)[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


def test_the_bucket_matters() -> None:
    """All tokens take the same null: separate nulls are as uneven as can be, one bucket does not care which."""
    logits_TC = torch.tensor([[0.0, 0.0, 9.0, -9.0]]).repeat(8, 1)
    routing = routing_of(logits_TC, num_experts=2, top_k=1)
    p = logits_TC[0].softmax(-1)
    torch.testing.assert_close(loss(routing, null_bucket="separate"), 4 * p[2])
    torch.testing.assert_close(loss(routing), 4 * 0.5 * (p[2] + p[3]))


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
@pytest.mark.parametrize("bucket", ["mean", "separate"])
def test_uniform_routing_gives_k_a_unit(scope: str, bucket: str) -> None:
    """12 tokens in 2 rows over 6 choices, choice (t + j) mod 6 in slot j, equal logits."""
    expert_TK = (torch.arange(12)[:, None] + torch.arange(2)) % 6
    flat = torch.zeros(12, 6)
    routing = Routing.from_topk(
        expert_TK, torch.ones(12, 2), num_experts=4, num_null=2, scores=Scores(flat, flat, flat)
    )
    units = {"sequence": 2, "batch": 1, "global": 12}[scope]
    config = {"scope": scope, "null_bucket": bucket}
    unit = {"sequence": "sequence", "batch": "batch", "global": "token"}[scope]
    assert build("train.null_balance_loss", **config).unit == unit
    torch.testing.assert_close(loss(routing, 2, **config) / units, torch.tensor(2.0))
    torch.testing.assert_close(loss(routing, 2, **config, scaling="slots") / units, torch.tensor(1.0))


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
def test_which_null_is_taken_changes_nothing(scope: str) -> None:
    """The nulls of each token are shuffled in the choice alone, with the probabilities left where they are."""
    torch.manual_seed(1)
    logits_TC = torch.randn(24, REAL + NULL)
    routing = routing_of(logits_TC)
    shuffled = routing.expert_N.clone()
    for token in range(24):
        mine = slice(token * K, token * K + K)
        order = torch.cat([torch.arange(REAL), REAL + torch.randperm(NULL)])
        shuffled[mine] = order[shuffled[mine]]
    assert not torch.equal(shuffled, routing.expert_N)
    other = routing.replace(expert_N=shuffled)
    torch.testing.assert_close(loss(other, 2, scope=scope), loss(routing, 2, scope=scope), atol=1e-5, rtol=1e-6)
    apart = {"scope": scope, "null_bucket": "separate"}
    assert abs(float(loss(other, 2, **apart) - loss(routing, 2, **apart))) > 1e-4
    columns = torch.cat([torch.arange(REAL), REAL + torch.tensor([2, 0, 1])])
    renamed = routing_of(logits_TC[:, columns])
    torch.testing.assert_close(loss(renamed, 2, scope=scope), loss(routing, 2, scope=scope), atol=1e-5, rtol=1e-6)


def test_without_nulls_it_is_the_plain_balance_loss() -> None:
    torch.manual_seed(2)
    routing = routing_of(torch.randn(16, 5), num_experts=5)
    plain = build("train.balance_loss", scaling="transformers")("s", routing, context(1, 16))
    assert torch.equal(loss(routing), plain)


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
def test_padding_changes_nothing(scope: str) -> None:
    torch.manual_seed(3)
    logits_TC = torch.randn(8, REAL + NULL)
    wide = torch.randn(2, 6, REAL + NULL)
    wide[:, 2:] = logits_TC.view(2, 4, -1)
    valid = [False, False, True, True, True, True] * 2
    padded = build("train.null_balance_loss", scope=scope)(
        "s", routing_of(wide.view(12, -1)), context(2, 6, valid=valid)
    )
    torch.testing.assert_close(padded, loss(routing_of(logits_TC), 2, scope=scope), atol=1e-6, rtol=0)


def test_one_step_of_eight_rows_equals_eight_of_one() -> None:
    torch.manual_seed(4)
    logits_TC = torch.randn(40, REAL + NULL, requires_grad=True)
    whole = loss(routing_of(logits_TC), 8, scope="global") / 40
    (grad,) = torch.autograd.grad(whole, logits_TC)
    known = Session(global_load={"s": routing_of(logits_TC).counts_C()})
    one = build("train.null_balance_loss", scope="global")
    parts = [one("s", routing_of(row), RoutingContext("t", known, tokens(1, 5))) / 40 for row in logits_TC.split(5)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logits_TC)[0], grad, atol=1e-7, rtol=0)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="null_bucket"):
        method("train.null_balance_loss").configure({"null_bucket": "sum"})
    routing = routing_of(torch.randn(4, REAL + NULL)).replace(scores=None)
    with pytest.raises(ContextError, match="needs scores"):
        loss(routing)
