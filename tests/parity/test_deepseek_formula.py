"""DeepSeek-V2's router by the authors' formula, which Transformers follows only in part."""

import pytest
import torch

import moestro
from moestro.core.layer import mixture_layers
from moestro.testing.tiny import tiny_folder


def authors_block(x_TD, block, *, top_k, groups, kept, scale, norm):
    """2405.04434, section 2.2 with the published modelling code: scores, groups by their best, weights, experts."""
    score_TE = torch.softmax(x_TD @ block.gate.weight.T, -1)
    num_experts = score_TE.shape[1]
    y_TD = block.shared_experts(x_TD)
    for t in range(len(x_TD)):
        best_G = score_TE[t].view(groups, -1).max(-1).values
        open_G = set(best_G.topk(kept).indices.tolist())
        allowed = [e for e in range(num_experts) if e // (num_experts // groups) in open_G]
        chosen = sorted(allowed, key=lambda e: -score_TE[t, e].item())[:top_k]
        weight = score_TE[t, chosen]
        if top_k > 1 and norm:
            weight = weight / (weight.sum() + 1e-20)
        else:
            weight = weight * scale
        for w, e in zip(weight, chosen, strict=True):
            gate, up = (x_TD[t] @ block.experts.gate_up_proj[e].T).chunk(2, -1)
            y_TD[t] += w * ((torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[e].T)
    return y_TD


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_block(tmp_path, norm, method):
    plain = tiny_folder("deepseek_v2", tmp_path, norm_topk_prob=norm, topk_method=method)
    model = moestro.load(tmp_path)
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(11, 32, generator=generator)
    grouped = method != "greedy"
    for site, layer in mixture_layers(model).items():
        with torch.no_grad():
            expected = authors_block(
                x_TD,
                plain.get_submodule(site),
                top_k=3,
                groups=4 if grouped else 1,
                kept=2 if grouped else 1,
                scale=4.0,
                norm=norm,
            )
            assert (layer(x_TD) - expected).abs().max() <= 1e-5


def test_transformers_departs_from_the_formula_only_when_it_renormalises(tmp_path):
    """If this fails, Transformers has changed and the family's docstring must too."""
    x_BTD = torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(3))
    for norm in (False, True):
        plain = tiny_folder("deepseek_v2", tmp_path / str(norm), norm_topk_prob=norm)
        block = plain.model.layers[1].mlp
        with torch.no_grad():
            formula = authors_block(x_BTD[0], block, top_k=3, groups=4, kept=2, scale=4.0, norm=norm)
            near = (block(x_BTD)[0] - formula).abs().max() <= 1e-5
        assert near == (not norm)


def test_closed_groups_stay_closed_when_probabilities_underflow(tmp_path):
    """All open experts but one underflow to probability 0; a mask of 0 would let a closed expert tie with them."""
    tiny_folder("deepseek_v2", tmp_path)
    model = moestro.load(tmp_path)
    layer = next(iter(mixture_layers(model).values()))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([-500.0, -500.0, -400.0, -400.0, -300.0, -300.0, 0.0, -200.0])
        x_TD = torch.zeros(1, 32)
        x_TD[0, 0] = 1.0
        chosen = []

        class Recorder:
            def record(self, site, routing, ctx):
                chosen.extend(routing.expert_N.tolist())

        with moestro.session(recorder=Recorder()):
            layer(x_TD)
    assert chosen[0] == 6
    groups = {expert // 2 for expert in chosen}
    assert len(groups) == 2
