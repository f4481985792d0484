"""Statistics of running experts against sums over assignments written out one by one."""

import pytest
import torch
from torch import nn

from moestro.core.bank import Bank, StackedFFN
from moestro.core.context import open_stack
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.router import LinearRouter
from moestro.core.routing import Routing, Scores
from moestro.observe import collect, coverage, model_hash, statistics


class Choosy(LinearRouter):
    """Top-2 of 4 experts and one null; whatever expert 3 gets is dropped."""

    def __init__(self, dim):
        super().__init__(dim, 4, top_k=2, num_null=1)

    def score(self, x_TD, bank, ctx):
        logits = self.logits(x_TD)
        return Scores(logits, logits, logits.softmax(-1))

    def choose(self, scores, ctx):
        expert_TK = scores.select_TC.topk(2).indices
        weight_TK = scores.gate_TC.gather(1, expert_TK) * 2
        return Routing.from_topk(expert_TK, weight_TK, num_experts=4, num_null=1, scores=scores, kept_TK=expert_TK != 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList()
        for number in range(2):
            bank, router = StackedFFN(4, 6, 5, bias=True), Choosy(6)
            for parameter in [*bank.parameters(), *router.parameters()]:
                nn.init.normal_(parameter, std=0.6)
            self.layers.append(MoELayer(router, bank, site=f"layers.{number}"))
        open_stack(self, "net")

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


def batches():
    torch.manual_seed(1)
    ids = torch.randint(0, 11, (6, 4))
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    return [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)]


def by_hand(net, site):
    """Every assignment that runs: (expert, weight, gate, input row, output row, inner row), and the counts."""
    layer, seen, chosen = net.layers[int(site[-1])], [], torch.zeros(5, dtype=torch.int64)
    rows = {}

    def keep(module, args, output):
        rows["x"] = args[0].reshape(-1, 6)

    handle = layer.register_forward_hook(keep)
    for batch in batches():
        with torch.no_grad():
            net(**batch)
        x_TD = rows["x"]
        gate_TC = (x_TD @ layer.router.weight.T).softmax(-1)
        for token in range(len(x_TD)):
            if not batch["attention_mask"].reshape(-1)[token]:
                continue
            for expert in gate_TC[token].topk(2).indices.tolist():
                chosen[expert] += 1
                if expert >= 3:
                    continue
                bank, x, gate = layer.bank, x_TD[token], gate_TC[token, expert]
                pre = bank.gate_up_proj[expert] @ x + bank.gate_up_proj_bias[expert]
                inner = nn.functional.silu(pre[:5]) * pre[5:]
                out = bank.down_proj[expert] @ inner + bank.down_proj_bias[expert]
                seen.append((expert, 2 * gate, gate, x, out.detach(), inner.detach()))
    handle.remove()
    return seen, chosen


def test_statistics_equal_the_sums_written_out():
    net = Net()
    stats = collect(net, batches(), outputs=True, means=True, gram=True, hidden_gram=True, dtype=torch.float64)
    assert list(stats) == ["layers.0", "layers.1"]
    assert stats.num_tokens == 22
    for site, found in stats.items():
        seen, chosen = by_hand(net, site)
        assert torch.equal(found.chosen_C, chosen)
        assert found.chosen_C.sum() == 44
        assert found.chosen_C[3:].sum() > 0
        for expert in range(4):
            mine = [row for row in seen if row[0] == expert]
            assert found.count_E[expert] == len(mine)
            if expert == 3:
                assert not mine
                continue
            weight, gate, x, out, inner = (torch.stack(list(column)) for column in list(zip(*mine, strict=True))[1:])
            close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
            torch.testing.assert_close(found.weight.mean[expert], weight.mean(), **close)
            torch.testing.assert_close(found.gate.total[expert], gate.sum(), **close)
            torch.testing.assert_close(found.input_norm.mean[expert], x.norm(dim=1).mean(), **close)
            torch.testing.assert_close(found.output_norm.mean[expert], out.norm(dim=1).mean(), **close)
            torch.testing.assert_close(found.gated_norm.total[expert], (weight * out.norm(dim=1)).sum(), **close)
            torch.testing.assert_close(found.gated_norm.high[expert], (weight * out.norm(dim=1)).max(), **close)
            torch.testing.assert_close(found.input_mean.mean[expert], x.mean(0), **close)
            torch.testing.assert_close(found.input_gram.of(expert), x.T @ x, **close)
            torch.testing.assert_close(found.hidden_gram.of(expert), inner.T @ inner, **close)


def test_watching_changes_no_bit_and_leaves_no_hook():
    net, data = Net(), batches()
    with torch.no_grad():
        before = [net(**batch) for batch in data]
        with statistics(net, outputs=True, gram=True, hidden_gram=True):
            during = [net(**batch) for batch in data]
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert all(not layer.bank._forward_hooks for layer in net.layers)


def test_parts_merge_to_the_whole():
    net, data = Net(), batches()
    wishes = {"outputs": True, "means": True, "gram": True, "dtype": torch.float64}
    whole, parts = collect(net, data, **wishes), [collect(net, [batch], **wishes) for batch in data]
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].num_tokens == whole.num_tokens
    for site, found in parts[0].items():
        assert torch.equal(found.chosen_C, whole[site].chosen_C)
        torch.testing.assert_close(found.gated_norm.variance, whole[site].gated_norm.variance)
        torch.testing.assert_close(found.input_mean.mean, whole[site].input_mean.mean)
        for expert in range(4):
            torch.testing.assert_close(found.input_gram.of(expert), whole[site].input_gram.of(expert))
    with pytest.raises(ConfigError, match="output_norm was collected in one run only"):
        whole.merge(collect(net, data))


def test_what_cannot_be_observed_is_refused():
    class Odd(Bank):
        def forward(self, x_TD, routing):
            return x_TD

        def weight(self, expert, projection):
            raise NotImplementedError

    net = Net()
    net.layers[0].bank = Odd(4)
    with (
        pytest.raises(ConfigError, match=r"layers.0: the inner rows of a Odd are not known"),
        statistics(net, hidden_gram=True),
    ):
        pass
    with pytest.raises(ConfigError, match="Linear has no mixture layer"), statistics(nn.Linear(1, 1)):
        pass


def test_coverage_names_the_starved():
    rows = coverage({3: torch.tensor([5, 0, 2, 9]), 4: torch.tensor([7, 7, 7])}, least=3)
    assert rows[0].starved == (1, 2)
    assert (rows[0].smallest, rows[0].median, rows[0].largest) == (0, 3.5, 9)
    assert str(rows[0]) == "3: 0 to 9 tokens an expert, median 3.5; 2 below 3: 1, 2"
    assert str(rows[1]) == "4: 7 to 7 tokens an expert, median 7"


def test_the_fingerprint_follows_the_weights():
    first, same, other = Net(), Net(), Net()
    with torch.no_grad():
        other.layers[1].bank.down_proj[3, 5, 4] += 1e-3
    assert model_hash(first) == model_hash(same)
    assert model_hash(first) != model_hash(other)
    assert len(model_hash(first)) == 64
