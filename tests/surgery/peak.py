"""How much a process grows while a command runs, once everything it needs is imported."""

import json
import subprocess
import sys


CODE = """
import json, resource, sys
from moestro.cli import main
small, large = json.loads(sys.argv[1])
assert main(small) == 0  # imports everything
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(large) == 0
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def grown(small: list[str], large: list[str]) -> int:
    """Bytes by which the command line ``large`` raises the peak of a process that has run ``small``."""
    run = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps([small, large])], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return 1024 * int(run.stdout.splitlines()[-1])
