"""Generation: greedy, beams and padded prompts give the tokens that Transformers gives."""

import pytest
import torch

import moestro
from moestro.testing.tiny import TINY


DECODERS = [name for name in TINY if name != "bert"]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", DECODERS)
def test_tokens(stock, inputs, family, beams):
    plain, folder = stock(family)
    model = moestro.load(folder)
    batch = inputs(plain, pad="left")
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    with torch.no_grad():
        theirs = plain.generate(**batch, **options)
        ours = model.generate(**batch, **options)
    assert torch.equal(ours, theirs)


# Not Switch Transformers: its capacity starts anew with every forward, so single steps drop fewer tokens than one.
@pytest.mark.parametrize("family", [name for name in DECODERS if name != "switch_transformers"])
def test_cached_steps_equal_one_forward(stock, inputs, family):
    _, folder = stock(family)
    model = moestro.load(folder)
    ids = inputs(model, rows=1, width=6)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        cache = None
        for position in range(ids.shape[1]):
            step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            assert (step.logits[:, 0] - whole[:, position]).abs().max() <= 1e-5
