"""What a simulation is, and what every one of them keeps true.

`KEEPS` names the invariants by entry; `moestro.testing.contracts` checks each of them on every method of the stage the
moment its file exists.
"""

from typing import Any, Final, Protocol

from moestro.core.inputs import MeterInputs
from moestro.core.report import Report


class Simulation(Protocol):
    """`measure(subject, config)`: plays a recorded trace through a model of a machine, and reports.

    Raises:
        ConfigError: settings that cannot work on this trace, with numbers.
    """

    def __call__(self, subject: MeterInputs, config: Any) -> Report: ...


KEEPS: Final[dict[str, dict[str, str]]] = {
    "measure": {
        "settings_round_trip": "settings survive JSON, and an unknown key is refused by name",
        "report_round_trips": "a report names its method and survives JSON",
        "report_is_repeatable": "the same inputs, settings and seed give the same report, whatever the global seed is",
    },
}
