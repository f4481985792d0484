"""Co-activation of inner units, against activations computed by hand."""

import pytest
import torch

from moestro.core.errors import ConfigError, DataError
from moestro.observe.neurons import coactivation
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model


def batch() -> torch.Tensor:
    return torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))


def test_the_sum_is_that_of_the_inner_activations() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        inputs = []
        handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        model(input_ids=batch())
        handle.remove()
        mlp = model.model.layers[0].mlp
        x = inputs[0].reshape(-1, 32)
        inner = (torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)).abs()
    found = coactivation(model, [batch()])
    assert list(found) == [0]
    torch.testing.assert_close(found[0], inner.T @ inner)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_is_left_out(family: str) -> None:
    model = tiny_model(family)
    ids = batch()
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 3, dtype=torch.int64)], 1)
    plain, masked = coactivation(model, [ids]), coactivation(model, [{"input_ids": padded, "attention_mask": mask}])
    for layer in (0, 1):
        torch.testing.assert_close(masked[layer], plain[layer], atol=1e-4, rtol=1e-4)


def test_batches_add_up_and_the_model_stays_as_it_was() -> None:
    model = tiny_model("llama").train()
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    both, first, second = (
        coactivation(model, batches, [1]) for batches in ([batch(), batch() + 0], [batch()], [batch()])
    )
    assert list(both) == [1]
    torch.testing.assert_close(both[1], first[1] + second[1])
    assert model.training
    assert hooks == sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_an_encoder_decoder_counts_its_blocks_on() -> None:
    model = tiny_model("switch_transformers")
    call = {"input_ids": batch(), "decoder_input_ids": batch()}
    dense = [layer for layer, there in OpenModel(model).shape.layers.items() if there.num_experts is None]
    first = model.config.num_layers  # of the decoder
    assert min(dense) < first <= max(dense)
    assert list(coactivation(model, [call])) == dense


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(DataError, match="no calibration batches"):
        coactivation(tiny_model("llama"), [])
    with pytest.raises(ConfigError, match=r"layer 2 has no dense feed-forward; layers \[0, 1\]"):
        coactivation(tiny_model("llama"), [batch()], [1, 2])
