"""Memory that this process holds and held, where the system says."""

import contextlib
import os
import sys
from pathlib import Path


def resident_bytes(otherwise: int = 0) -> int:
    """Bytes of this process that are in memory now; ``otherwise`` where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return otherwise
    return pages * os.sysconf("SC_PAGE_SIZE")


def restart_peak() -> int:
    """Count the most memory of this process from now on, where the system can (Linux); what is held now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """Most bytes this process held in memory since it began, or since ``restart_peak``; 0 where the system does not
    say."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        found = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
        if found is not None:
            return found
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
