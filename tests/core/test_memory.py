"""What a process holds in memory, and the most it held."""

import sys

import numpy as np
import pytest

from moestro.core.memory import peak_bytes, resident_bytes, restart_peak


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_seen_after_it_has_passed() -> None:
    before = restart_peak()
    held = np.ones(64_000_000, dtype=np.uint8)
    assert resident_bytes() > before + 40e6
    del held
    assert peak_bytes() - before > 60e6
    assert resident_bytes() - before < 30e6
    assert restart_peak() - before < 30e6
