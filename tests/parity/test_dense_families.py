"""Dense families: they open, save, export and give their sites."""

import pytest
import torch

import moestro
from moestro.models.families import families
from moestro.testing.tiny import TINY


DENSE = [name for name in TINY if families()[name].kind == "dense"]


@pytest.mark.parametrize("family", DENSE)
def test_open_save_and_export(stock, inputs, tmp_path, family):
    plain, folder = stock(family)
    model = moestro.load(folder)
    batch = inputs(plain, pad="right")
    moestro.save(model, tmp_path / "own")
    moestro.export(model, tmp_path / "stock")
    with torch.no_grad():
        logits = plain(**batch).logits
        for other in (
            model,
            moestro.load(tmp_path / "own"),
            moestro.load(folder, swap=False),
            type(plain).from_pretrained(tmp_path / "stock"),
        ):
            assert (other(**batch).logits - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("family", DENSE)
def test_buffers_are_rebuilt(stock, family):
    plain, folder = stock(family)
    theirs = dict(plain.named_buffers())
    ours = dict(moestro.load(folder).named_buffers())
    assert ours.keys() == theirs.keys()
    for name, buffer in ours.items():
        assert torch.equal(buffer, theirs[name]), name
