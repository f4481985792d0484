"""The contracts of methods as checks that anyone can run, on the methods here and on those of other packages.

    for name in checks_of("train.switch"):
        check("train.switch", name)

Which invariants a method must keep stands in `moestro/methods/<stage>/_contract.py`, by entry; how each is checked
stands here and in the modules named in `_HOMES`. A failed check raises AssertionError.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable
from typing import Any

from moestro.core.card import STAGES
from moestro.core.config import Config
from moestro.core.errors import ConfigError, RegistryError
from moestro.core.registry import Method, infos, method


__all__ = ["check", "checks_of", "contract_of", "example_config", "example_values", "settings_round_trip"]

Check = Callable[[Method], None]

# Entry -> the module whose functions of the same name are the checks.
_HOMES = {
    "build": "moestro.testing.module_contract",
    "plan": "moestro.testing.planner_contract",
    "measure": "moestro.testing.meter_contract",
    "objective": "moestro.testing.objective_contract",
    "policy": "moestro.testing.policy_contract",
    "decoder": "moestro.testing.decoder_contract",
    "forecast": "moestro.testing.forecast_contract",
}


def contract_of(stage: str) -> dict[str, dict[str, str]]:
    """Entry -> invariant -> what it says; empty while a stage has no contract.

    A policy that decodes keeps what stands under ``decoder``.
    """
    name = f"moestro.methods.{stage}._contract"
    if stage not in STAGES or importlib.util.find_spec(name) is None:
        return {}
    keeps: dict[str, dict[str, str]] = importlib.import_module(name).KEEPS
    return keeps


def checks_of(method_id: str) -> tuple[str, ...]:
    """The names `<entry>.<invariant>` of every check a method is under; methods are not imported.

    An objective beside a `build` is for the models which that one makes, and is left to the method's own tests.
    """
    info = infos()[method_id]
    contract = contract_of(info.stage)
    entries = [
        "decoder" if entry == "policy" and info.acts == "Decoder" else entry
        for entry in info.entries
        if entry != "objective" or "build" not in info.entries
    ]
    return tuple(f"{entry}.{name}" for entry in entries for name in contract.get(entry, ()))


def check(method_id: str, name: str) -> None:
    """Run one check.

    Raises:
        AssertionError: the method breaks the invariant.
        RegistryError: there is no such check.
    """
    entry, _, invariant = name.partition(".")
    function = getattr(importlib.import_module(_HOMES[entry]), invariant, None) if entry in _HOMES else None
    if function is None or name not in checks_of(method_id):
        raise RegistryError(f"{method_id} has no check {name!r}; it has {', '.join(checks_of(method_id)) or 'none'}")
    function(method(method_id))


def example_config(subject: Method) -> Config:
    """Settings to build a method with: the defaults, and the first example of each field that has none.

    Raises:
        ConfigError: a required field gives no example; write `Field(examples=[...])`.
    """
    return subject.configure(example_values(subject))


def example_values(subject: Method) -> dict[str, Any]:
    """The first example of each field that has no default. Raises ConfigError as `example_config` does."""
    values: dict[str, Any] = {}
    for name, field in subject.config_type.model_fields.items():
        if field.is_required():
            if not field.examples:
                raise ConfigError(f"{subject.id}: field {name!r} has no default; give Field(examples=[...])")
            values[name] = field.examples[0]
    return values


def settings_round_trip(subject: Method) -> None:
    """Settings survive JSON, and an unknown key is refused by name: the check that every entry shares."""
    config = example_config(subject)
    again = subject.configure(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config, f"settings changed on the way through JSON: {config} became {again}"
    try:
        subject.configure({**config.model_dump(), "no_such_setting": 1})
    except ConfigError as error:
        told = str(error)
    else:
        raise AssertionError("an unknown setting was accepted")
    assert "no_such_setting" in told, f"the refusal of an unknown setting does not name it: {told}"
