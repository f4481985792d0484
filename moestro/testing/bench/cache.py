"""What every policy of the expert cache reads on the recorded routing of a trained mixture, against Belady's bound.

The trace is that of ``_trained``, played token by token as generation would; a quarter of it is shown to policies that
learn from a past. The bound knows the whole future; policies that can be told one are shown it, too, and say so. One
round is enough: nothing is timed.
"""

from pathlib import Path
from typing import Any, Final

from moestro.core.expert_cache import Oracle
from moestro.core.inputs import MeterInputs
from moestro.core.plan import MethodUse
from moestro.core.registry import infos, method
from moestro.testing.bench import _reference as reference
from moestro.testing.bench._trained import trained_trace
from moestro.testing.bench.harness import Row


BUDGETS: Final = (0.15, 0.25, 0.4)
"""Shares of all experts; 0.25 is about what 500 MiB hold of the reference model in 8 bits."""
BASELINE, BOUND = "lru", "belady"


def run(rounds: int, model: Path | None = None) -> list[Row]:
    """Rows of every policy and budget; ``rounds`` has no effect."""
    return compare(trained_trace(reference.folder_of(model)))


def compare(trace: Any, budgets: tuple[float, ...] = BUDGETS) -> list[Row]:
    """Experts read a token by every policy that runs with its own settings, against the bound and against LRU."""
    simulate = method("simulate.cache")
    found = infos()
    uses = [MethodUse(method=id) for id in sorted(found) if found[id].acts == "CachePolicy"]
    made = {use.method: method(use.method).entry("policy")(method(use.method).configure({})) for use in uses}
    told = {id.removeprefix("serve.") for id, policy in made.items() if isinstance(policy, Oracle)}
    slab = 1 << 20
    config = simulate.configure(
        {"policies": [use.model_dump() for use in uses], "budgets": budgets, "expert_bytes": slab}
    )
    table = simulate.entry("measure")(MeterInputs(trace=trace, name="trained"), config).tables["policies"]
    cells = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    rows = []
    for budget in dict.fromkeys(cell["experts held"] for cell in cells):
        here = {cell["policy"]: cell for cell in cells if cell["experts held"] == budget}
        bound, lru = (here[name]["bytes a token"] / slab for name in (BOUND, BASELINE))
        case = f"trained mixture, {budget} experts held ({here[BOUND]['share']:.0%})"
        for name, cell in here.items():
            size = cell["bytes a token"] / slab
            note = f"hits {cell['hit ratio']:.1%}" + (", told the future" if name in told else "")
            if name != BOUND:
                rows.append(
                    Row(
                        f"{case}, {name}",
                        "read",
                        "experts a token",
                        size,
                        "Belady's bound",
                        bound,
                        bound / size,
                        0.0,
                        note,
                    )
                )
            if name != BASELINE:
                rows.append(Row(f"{case}, {name}", "read", "experts a token", size, "LRU", lru, lru / size, 0.0, note))
    return rows
