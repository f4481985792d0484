"""The arms of the union-of-experts study differ in what they claim to differ in, and in nothing else."""

import pytest
import torch

from moestro.core.cost import Work
from moestro.core.layer import mixture_layers
from moestro.studies import uoe
from moestro.studies._framework import BUDGETS
from moestro.studies._language import Scale
from moestro.training.size import size_of


DIGITS = uoe.Digits(layers=2)
TEXT = Scale(layers=2, vocabulary=512)


def test_patches_are_squares_of_the_image() -> None:
    from sklearn.datasets import load_digits

    patches, labels = uoe.images()
    image = torch.tensor(load_digits().images[7], dtype=torch.float32) / 8 - 1
    assert patches.shape == (1797, 16, 4)
    for row in range(4):
        for column in range(4):
            square = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(patches[7, 4 * row + column], square.flatten())
    assert int(labels[7]) == 7


def test_controls_have_the_operations_of_the_union() -> None:
    flops = {
        arm: uoe.block_flops(uoe.encoder(arm, DIGITS, 0), Work(uoe.PATCHES))
        for arm in ("union", "union_tokens", "released", "random", "narrow", "dense")
    }
    assert flops["union"] == flops["released"] == flops["random"]
    assert flops["narrow"] == pytest.approx(flops["union"], rel=0.005)
    assert flops["union"] == pytest.approx(flops["dense"] / 2, rel=0.02)
    used = {arm: size_of(uoe.language_model(arm, TEXT, 0), TEXT.length).forward_flops for arm in ("union", "narrow")}
    assert used["narrow"] == pytest.approx(used["union"], rel=0.005)


def test_arms_start_from_the_same_dense_weights_and_differ_in_their_gates() -> None:
    dense = uoe.encoder("dense", DIGITS, 3).state_dict()
    for arm in uoe.UNIONS:
        model = uoe.encoder(arm, DIGITS, 3)
        found = model.state_dict()
        assert set(found) - set(dense) == {name for name in found if ".router." in name}
        blocks = [name for name in dense if name.startswith("blocks.0.attention")]
        assert all(torch.equal(found[name], dense[name]) for name in blocks)
        gates = [layer.router for layer in mixture_layers(model).values()]
        assert len(gates) == 4
        assert {gate.weight.requires_grad for gate in gates} == {arm != "random"}
        assert {gate.config.combine for gate in gates} == {"straight_through" if arm.startswith("union") else "sum"}
        assert {gate.causal for gate in gates} == {arm == "union_tokens"}


def test_only_the_unions_gate_moves() -> None:
    size = uoe.Digits(layers=1, dim=16, inner=32, epochs=2, train=256)
    found = {arm: uoe.digits(arm, 0, size) for arm in ("union", "released", "random")}
    assert found["released"]["turned"] < 1e-6
    assert found["random"]["turned"] < 1e-6
    assert found["union"]["turned"] > 1e-3
    assert found["union"]["gap"] < 1e-6
    assert found["union"]["moved"] == 2 * 2 * 2 * 16 * 4, "half of four slices, twice a layer, in and out, 4 bytes"


def test_a_run_depends_on_nothing_but_its_arguments() -> None:
    first, second = (uoe.run("union", 1, BUDGETS["ci"]) for _ in range(2))
    assert first == second
