"""Peak memory of packing a checkpoint on disk: one layer's, not the model's."""

import json
from pathlib import Path

import pytest

from moestro.testing.large import write_mixture
from tests.surgery.peak import grown


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stacked", "split"])
def test_a_checkpoint_is_packed_in_the_memory_of_a_layer(layout: str, tmp_path: Path) -> None:
    """16 layers of 50 MB: 800 MB of experts are packed while the process grows by less than 6 layers."""
    layers, layer = 16, 8 * 3 * 1024 * 512 * 4
    written = write_mixture(tmp_path / "in", layers=layers, experts=8, dim=1024, inner=512, layout=layout)
    assert written > layers * layer
    write_mixture(tmp_path / "in-small", layers=1, experts=2, dim=64, inner=32)
    flags = [str(tmp_path / "in"), str(tmp_path / "out")]
    growth = grown(
        ["compress", "finequant", f"{flags[0]}-small", f"{flags[1]}-small"],
        ["compress", "finequant", *flags, "--bits", "4"],
    )
    assert growth < 6 * layer, f"{growth:,} bytes for layers of {layer:,}"
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())["surgery"][0]
    assert receipt["ledger"]["rows_touched"] == layers * 8 * 3
    assert receipt["bits_per_weight"]["after"] < 4.2
