"""Plans survive a round trip; ledgers fail closed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moestro.core.errors import ConfigError, LedgerError, PlanError
from moestro.core.ledger import Ledger
from moestro.core.plan import BitPlan, ExpertPlan, ExpertSource, LayerExperts, MethodUse, Plan


def expert_plan() -> ExpertPlan:
    layer = LayerExperts(
        layer=3,
        experts=[[ExpertSource(layer=3)], [ExpertSource(layer=3, rows=[4, 2], noise=0.1), ExpertSource(layer=2)]],
        router="new",
        module=MethodUse(method="train.moe", config={"top_k": 2}),
    )
    return ExpertPlan(method="convert.upcycle", config={"a": 1}, seed=7, layers=[layer])


def test_a_plan_read_back_is_the_plan(tmp_path: Path) -> None:
    plan = expert_plan()
    plan.save(tmp_path / "p.json", {"bias": torch.arange(3.0)})
    assert ExpertPlan.load(tmp_path / "p.json") == plan
    assert Plan.load(tmp_path / "p.json") == plan
    assert load_file(tmp_path / "p.safetensors")["bias"].tolist() == [0.0, 1.0, 2.0]
    assert json.loads((tmp_path / "p.json").read_text())["kind"] == "experts"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable plan"),
        ("[]", "kind None"),
        ('{"kind": "bits", "method": "m", "bits": {}}', "kind 'bits'"),
        ('{"kind": "experts", "method": "m", "layers": [], "layerz": 1}', "did you mean 'layers'"),
        ('{"kind": "experts", "method": "m", "layers": [{"layer": 0, "experts": []}]}', "needs experts"),
    ],
)
def test_damaged_plans_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        ExpertPlan.load(tmp_path / "p.json")
    assert "\n" not in str(caught.value)


def test_a_layer_is_planned_once() -> None:
    layer = expert_plan().layers[0]
    with pytest.raises(ConfigError, match="planned twice"):
        ExpertPlan(method="m", layers=[layer, layer])


def test_other_kinds(tmp_path: Path) -> None:
    plan = BitPlan(method="compress.mc_moe", bits={"0/1/up": 2.0})
    assert Plan.load(plan.save(tmp_path / "b.json")) == plan


def test_the_ledger_names_the_first_missing_row_and_counts_the_rest() -> None:
    ledger = Ledger("load")
    for expert in range(3):
        for projection in ("gate", "up"):
            ledger.expect(5, expert, projection)
    ledger.touch(5, 0, "gate")
    ledger.touch(5, 2, "up")
    with pytest.raises(LedgerError, match=r"load: layer 5 expert 0 projection up was not touched \(3 more"):
        ledger.close()


def test_the_ledger_refuses_a_second_touch() -> None:
    ledger = Ledger("convert")
    ledger.expect(0, 1, "down")
    ledger.touch(0, 1, "down")
    assert ledger.close()["rows_touched"] == 1
    ledger.touch(0, 1, "down")
    with pytest.raises(LedgerError, match="layer 0 expert 1 projection down was touched more often"):
        ledger.close()
