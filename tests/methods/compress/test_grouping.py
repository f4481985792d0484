"""Groups of alike experts on cases small enough to know the answer, and orders of inner units."""

import itertools

import numpy as np
import pytest
import torch

from moestro.core.errors import PlanError
from moestro.core.inputs import PlanInputs
from moestro.methods.compress._parts import alignment
from moestro.methods.compress._parts.grouping import affinity, cosine, group, k_means
from moestro.observe import calibrate
from moestro.surgery.opened import OpenModel
from tests.methods.compress.helpers import batches
from tests.surgery.helpers import layers_of, mixture


BLOCKS = [[0, 3, 5], [1, 4], [2]]


def blocks(near: float = 0.9, far: float = 0.2) -> np.ndarray:
    alike = np.full((6, 6), far)
    for members in BLOCKS:
        alike[np.ix_(members, members)] = near
    np.fill_diagonal(alike, 1.0)
    return alike


@pytest.mark.parametrize("method", ["spectral", "agglomerative", "dominant"])
def test_blocks_are_found(method) -> None:
    usage = np.array([9.0, 8, 7, 1, 2, 3])
    assert group(blocks(), 3, method, usage, seed=4) == BLOCKS
    assert group(blocks(), 6, method, usage) == [[e] for e in range(6)]
    assert group(blocks(), 1, method, usage) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("method", ["spectral", "agglomerative", "dominant", "random"])
def test_groups_are_a_partition_whatever_the_affinities(method) -> None:
    draw = np.random.default_rng(0)
    for size in (2, 5, 9):
        points = draw.normal(size=(size, 3))
        points[-1] = points[0]
        alike = (1.0 + cosine(torch.from_numpy(points @ points.T))) / 2.0
        for count in range(1, size + 1):
            found = group(alike, count, method, draw.random(size), seed=1)
            assert len(found) == count
            assert all(found)
            assert sorted(e for members in found for e in members) == list(range(size))
            assert found == sorted(found)
            assert found == group(alike, count, method, np.zeros(size) + 1, seed=1) or method == "dominant"
    assert group(np.ones((4, 4)), 3, "spectral", np.ones(4)) == group(np.ones((4, 4)), 3, "spectral", np.ones(4))


def test_average_linkage_is_the_one_by_hand() -> None:
    """Distances .1 (0, 1), .3 (1, 2), .35 (0, 2) and .5 to 3: 0 and 1 join first, then 2 at (.3 + .35) / 2."""
    alike = 1.0 - np.array([[0, 0.1, 0.35, 0.5], [0.1, 0, 0.3, 0.5], [0.35, 0.3, 0, 0.34], [0.5, 0.5, 0.34, 0]])
    assert group(alike, 3, "agglomerative", np.ones(4)) == [[0, 1], [2], [3]]
    assert group(alike, 2, "agglomerative", np.ones(4)) == [[0, 1, 2], [3]]


def test_dominant_experts_lead() -> None:
    alike = blocks()
    usage = np.array([0.0, 5, 9, 0, 0, 0])
    assert group(alike, 2, "dominant", usage) == [[0, 2, 3, 5], [1, 4]], "equal likeness goes to the more used"
    usage = np.array([0.0, 5, 0, 0, 0, 9])
    assert group(alike, 2, "dominant", usage)[0][:1] == [0]
    assert [4 in members for members in group(alike, 2, "dominant", usage)] == [False, True]


def test_k_means_leaves_no_group_empty() -> None:
    rows = np.zeros((5, 2))
    rows[4] = 1.0
    cost, label = k_means(rows, 4, np.random.default_rng(0))
    assert sorted(set(label.tolist())) == [0, 1, 2, 3]
    assert cost == pytest.approx(0.0)


def test_what_cannot_be_grouped_is_refused() -> None:
    with pytest.raises(PlanError, match="6 experts cannot be 7 groups"):
        group(blocks(), 7, "spectral", np.ones(6))
    broken = blocks()
    broken[0, 1] = np.nan
    with pytest.raises(PlanError, match="NaN or infinity"):
        group(broken, 2, "spectral", np.ones(6))


@torch.no_grad()
def test_affinities_are_the_formulas_written_out() -> None:
    model = mixture("llama", experts=5)
    layer, rows = layers_of(model)[1], []
    handle = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    found = calibrate(model, batches(), output_gram=True, allow_starved=True)
    handle.remove()
    inputs = PlanInputs(subject=OpenModel(model), statistics={"experts": found})
    there = inputs.shape.layer(1)
    x_TD = torch.cat(rows)
    weight_ED = layer.router.weight
    r_EE = np.corrcoef((x_TD @ weight_ED.T).double().numpy(), rowvar=False)
    np.testing.assert_allclose(affinity(inputs, there, "router_logits"), (1 + r_EE) / 2, atol=1e-5)
    y_ETD = [
        torch.nn.functional.silu(x_TD @ layer.bank.weight(e, "gate").T)
        * (x_TD @ layer.bank.weight(e, "up").T)
        @ layer.bank.weight(e, "down").T
        for e in range(5)
    ]
    for similarity, vectors in (("router_weight", weight_ED), ("expert_output", torch.stack(y_ETD).flatten(1))):
        cos_EE = [[torch.cosine_similarity(a, b, dim=0) for b in vectors.double()] for a in vectors.double()]
        np.testing.assert_allclose(affinity(inputs, there, similarity), (1 + np.array(cos_EE)) / 2, atol=1e-5)


def test_logits_that_never_vary_are_told_apart_by_router_rows() -> None:
    """Of one token only, no two logits correlate."""
    model = mixture("llama", experts=6)
    with torch.no_grad():
        layers_of(model)[0].router.weight[4] = 2.0 * layers_of(model)[0].router.weight[1]
    found = calibrate(model, [torch.tensor([[5]])], allow_starved=True)
    inputs = PlanInputs(subject=OpenModel(model), statistics={"experts": found})
    there = inputs.shape.layer(0)
    alike = affinity(inputs, there, "router_logits")
    np.testing.assert_allclose(alike, affinity(inputs, there, "router_weight"))
    for method in ("spectral", "agglomerative"):
        assert [1, 4] in group(alike, 5, method, np.ones(6))


def test_routers_without_rows_and_broken_weights_are_refused() -> None:
    model = mixture("llama", experts=3)
    subject = OpenModel(model)
    with pytest.raises(PlanError, match=r"layer 0: a SoftmaxTopK has no row for each expert in 'table'"):
        subject.router_row(0, 1, "table")
    with torch.no_grad():
        layers_of(model)[1].bank.down_proj[2, 0, :3] = torch.nan
    there = subject.shape.layer(1)
    message = rf"layer 1 expert 2: its weights hold NaN or infinity in 3 of {there.inner} inner units"
    with pytest.raises(PlanError, match=message):
        alignment.permutations(subject, there, [[0, 2], [1]], "weights", None)


def test_a_zero_vector_is_like_nobody() -> None:
    gram = torch.tensor([[4.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert cosine(gram).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("exact", [4096, 7])
def test_a_permuted_copy_is_put_in_order(by, exact, monkeypatch) -> None:
    monkeypatch.setattr(alignment, "EXACT", exact)
    model = mixture("llama", experts=3)
    bank = layers_of(model)[0].bank
    pi = torch.randperm(bank.inner, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        bank.gate_up_proj[2] = bank.gate_up_proj[0][torch.cat([pi, bank.inner + pi])]
        bank.down_proj[2] = bank.down_proj[0][:, pi]
    subject = OpenModel(model)
    there = subject.shape.layer(0)
    input_TD = torch.randn(64, there.dim, generator=torch.Generator().manual_seed(3))
    found = alignment.permutations(subject, there, [[0, 2], [1]], by, input_TD)
    assert list(found) == [2]
    assert torch.equal(pi[torch.tensor(found[2])], torch.arange(bank.inner))
    both = alignment.permutations(subject, there, [[1, 0]], by, input_TD)
    one, other = alignment.units(subject, there, 1), alignment.units(subject, there, 0)
    if by == "weights" and exact == 4096:
        best = (one * other[torch.tensor(both[0])]).sum()
        assert best >= (one * other).sum(), "no order fits better; experts grown from one parent may be in order"
        assert best > (one * other[pi]).sum()


def test_the_fit_of_two_units_is_that_of_all_their_weights() -> None:
    model = mixture("llama", experts=2)
    bank, subject = layers_of(model)[0].bank, OpenModel(model)
    one, two = (alignment.units(subject, subject.shape.layer(0), expert) for expert in (0, 1))
    want = bank.weight(0, "down").T @ bank.weight(1, "down")
    for name in ("gate", "up"):
        want = want + bank.weight(0, name) @ bank.weight(1, name).T
    torch.testing.assert_close(one @ two.T, want.detach())
    draw = torch.Generator().manual_seed(0)
    few, many = torch.randn(5, 3, generator=draw), torch.randn(5, 3, generator=draw)
    found = alignment.order(few, many)
    fit = few @ many.T
    best = max(itertools.permutations(range(5)), key=lambda pi: sum(float(fit[i, j]) for i, j in enumerate(pi)))
    assert tuple(found) == best


def test_activations_are_correlated_and_constants_are_not() -> None:
    model = mixture("llama", experts=2)
    bank, subject = layers_of(model)[0].bank, OpenModel(model)
    there = subject.shape.layer(0)
    draw = torch.Generator().manual_seed(5)
    x_TD = torch.randn(300, there.dim, generator=draw)
    x_TD[:, 0] = 0.3
    with torch.no_grad():
        for name in ("gate", "up"):  # units 0 and 1 see nothing but the constant
            bank.weight(0, name)[:2] = 0.0
            bank.weight(0, name)[:2, 0] = torch.tensor([1.7, 0.9])
    rows = alignment.activations(subject, there, 0, x_TD)
    assert torch.count_nonzero(rows[:2]) == 0
    inner = torch.nn.functional.silu(x_TD @ bank.weight(0, "gate").T) * (x_TD @ bank.weight(0, "up").T)
    torch.testing.assert_close(rows[2:] @ rows[2:].T, torch.corrcoef(inner.T.detach()[2:]), rtol=0, atol=1e-4)


def test_an_expert_is_in_order_with_itself_whatever_ties() -> None:
    rows = torch.zeros(6, 4)
    rows[2:] = 1.0
    assert alignment.order(rows, rows.clone()) == list(range(6))


def test_no_alignment_and_no_sample() -> None:
    model = mixture("llama", experts=3)
    subject = OpenModel(model)
    there = subject.shape.layer(0)
    assert alignment.permutations(subject, there, [[0, 1, 2]], "none", None) == {}
    with pytest.raises(PlanError, match="calibrate with sample=512"):
        alignment.permutations(subject, there, [[0, 1, 2]], "activations", None)
