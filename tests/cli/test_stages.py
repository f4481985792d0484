"""`moestro <stage> <method>`: arguments from cards, flags from settings, a model in and a model out."""

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.cli import main
from moestro.cli.stages import values_of
from moestro.core import registry
from moestro.core.errors import ConfigError, SaveError
from moestro.core.layer import mixture_layers
from moestro.core.plan import ExpertPlan
from moestro.core.registry import method
from moestro.core.report import Report
from moestro.data.tokens import byte_tokenizer
from moestro.models.load import load
from moestro.testing.tiny import tiny_folder


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    tiny_folder("llama", tmp_path / "parent", vocab_size=300)
    byte_tokenizer().save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load(folder)(torch.arange(20)[None]).logits
    return found


def test_upcycling_from_the_command_line(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plan = parent.parent / "out", parent.parent / "plan.json"
    flags = ["--layers", "last:1", "--num-experts", "4", "--top-k", "3", "--router", "train.softmax_topk"]
    assert main(["convert", "upcycle", str(parent), str(out), *flags, "--seed", "5", "--plan", str(plan)]) == 0
    told = capsys.readouterr().out
    assert "layers 1: 4 experts" in told
    assert "ledger: 12 of 12 rows written" in told
    assert torch.allclose(logits(out), logits(parent), atol=1e-5)
    (layer,) = mixture_layers(load(out)).values()
    assert (layer.router.num_experts, layer.router.top_k) == (4, 3)
    assert (out / "tokenizer_config.json").exists()
    receipt = json.loads((out / "receipt.json").read_text())
    assert '"seed": 5' in json.dumps(receipt)
    assert [entry.layer for entry in ExpertPlan.load(plan).layers] == [1]


def test_a_conversion_opens_models_only_to_compare_their_answers(
    parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["convert", "upcycle", str(parent), str(parent.parent / "out"), "--num-experts", "2", "--top-k", "2"]
    assert main(arguments) == 0
    assert "largest difference" in capsys.readouterr().out, "there is memory enough for a tiny model"

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("moestro.surgery.disk.load", opened)
    monkeypatch.setattr("moestro.models.load.load", opened)
    monkeypatch.setattr("moestro.cli.doctor.memory", lambda: (1 << 20, 1 << 10))
    assert main([*arguments, "--overwrite"]) == 0
    assert "answers were not compared" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="was opened"):
        main([*arguments, "--overwrite", "--compare"])


@pytest.mark.parametrize("where", ["moestro.models.save.save", "moestro.surgery.disk.write_model"])
def test_a_plan_file_is_neither_overwritten_nor_left_behind(
    where: str, parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = parent.parent / "out", parent.parent / "plan.json"
    arguments = ["convert", "split", str(parent), str(out), "--num-experts", "4", "--top-k", "4", "--plan", str(plan)]
    if where.endswith("save"):
        text = parent.parent / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
        arguments += ["--partition", "coactivation", "--data", str(text), "--tokens", "300"]
    plan.write_text("mine")
    assert main(arguments) == 2
    assert f"{plan} exists" in capsys.readouterr().err
    assert plan.read_text() == "mine"
    assert not out.exists()
    plan.unlink()

    def full(*_: Any, **__: Any) -> None:
        raise SaveError("no space")

    monkeypatch.setattr(where, full)
    assert main(arguments) == 2
    assert not plan.exists()


def test_settings_from_a_file_and_flags_over_them(parent: Path) -> None:
    config = parent.parent / "settings.yaml"
    config.write_text("num_experts: 2\ntop_k: 1\nlayers: [0]\n")
    out = parent.parent / "out"
    arguments = ["convert", "upcycle", str(parent), str(out), "--config", str(config), "--num-experts", "3"]
    assert main(arguments) == 0
    (layer,) = mixture_layers(load(out)).values()
    assert (layer.site.split(".")[2], layer.router.num_experts, layer.router.top_k) == ("0", 3, 1)


def test_a_setting_that_measures_needs_texts(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = parent.parent / "out"
    flags = ["--partition", "coactivation", "--num-experts", "4", "--top-k", "4"]
    assert main(["convert", "split", str(parent), str(out), *flags]) == 2
    assert "give calibration data" in capsys.readouterr().err
    assert not out.exists()
    text = parent.parent / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    assert main(["convert", "split", str(parent), str(out), *flags, "--data", str(text), "--tokens", "300"]) == 0
    assert "text.txt: 300 tokens" in capsys.readouterr().out
    assert torch.allclose(logits(out), logits(parent), atol=1e-5), "all slices on, the model is the dense one"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "upcycl", "a", "b"], "Did you mean 'upcycle'?"),
        (["convert"], "Missing command"),
        (["convert", "upcycle"], "Missing argument"),
        (["convert", "upcycle", "./no/folder", "{out}"], "./no/folder: no such file or folder"),
        (["convert", "upcycle", "{parent}", "{parent}"], "exists; give another name, or --overwrite"),
        (["convert", "upcycle", "{parent}", "{out}", "--top-k", "x"], "top_k='x'"),
        (["convert", "upcycle", "{parent}", "{out}", "--top-k", "9"], "top_k=9 but num_experts=8"),
        (["convert", "upcycle", "{parent}", "{out}", "--layers", "[7]"], "no feed-forward site in layer 7"),
        (["convert", "upcycle", "{parent}", "{out}", "--router", "train.swich"], "did you mean train.switch"),
        (["convert", "upcycle", "{parent}", "{out}", "--losses", "{a: "], "--losses"),
        (["convert", "upcycle", "{parent}", "{out}", "--config", "none.yaml"], "--config none.yaml"),
        (["convert", "segment", "{parent}", "{out}"], "mixture"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    arguments: list[str], words: str, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = parent.parent / "out"
    before = sorted(parent.parent.rglob("*"))
    given = [argument.replace("{parent}", str(parent)).replace("{out}", str(out)) for argument in arguments]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.splitlines()[-1].startswith("error: ")
    assert sorted(parent.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ({"layers": "last:2"}, {"layers": "last:2"}),
        ({"layers": "[1, 2]", "noise": "1e-2"}, {"layers": [1, 2], "noise": "1e-2"}),
        ({"router": "train.switch"}, {"router": {"method": "train.switch"}}),
        ({"router": "{method: train.switch, config: {}}"}, {"router": {"method": "train.switch", "config": {}}}),
        ({"num_experts": None}, {}),
    ],
)
def test_flags_are_read_as_yaml(flags: dict[str, Any], values: dict[str, Any]) -> None:
    assert values_of(method("convert.upcycle"), flags, None) == values


def test_a_settings_file_must_hold_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected settings by name, got list"):
        values_of(method("convert.upcycle"), {}, file)


def test_help_names_every_setting_with_its_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["convert", "upcycle", "--help"]) == 0
    told = capsys.readouterr().out
    for name in method("convert.upcycle").config_type.model_fields:
        assert f"--{name.replace('_', '-')}" in told
    for words in ("choices a token. (default: 2)", "2212.05055", "MODEL", "OUT"):
        assert words.lower() in told.lower()


@pytest.fixture
def foreign_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A meter of another package, found by its entry point: the template that new methods start from."""
    template = Path(__file__).parents[2] / "scripts" / "templates" / "inspect" / "method.py.txt"
    (tmp_path / "foreign_meter.py").write_text(
        template.read_text().replace("@NAME@", "foreign").replace("@YEAR@", "2024")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("inspect.foreign", "foreign_meter", registry.GROUP)
    monkeypatch.setattr(registry, "_foreign", lambda: {point.name: point})
    monkeypatch.setattr(registry, "infos", registry.infos.__wrapped__)
    return point.name


def test_a_meter_of_another_package_is_a_command_too(
    foreign_meter: str, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture, out = parent.parent / "mixture", parent.parent / "report.json"
    text = parent.parent / "text.txt"
    text.write_text("To be, or not to be. " * 10)
    assert main(["convert", "upcycle", str(parent), str(mixture)]) == 0
    assert main(["inspect", "foreign", str(mixture), str(text), str(out), "--dead-below", "0.5"]) == 0
    assert "mean entropy: " in capsys.readouterr().out
    report = Report.load(out)
    assert (report.method, report.subject, report.config) == (foreign_meter, str(mixture), {"dead_below": 0.5})
    assert [row[0] for row in report.tables["layers"].rows] == [0, 1]
    assert main(["inspect", "--help"]) == 0
    assert "Entropy of the load" in capsys.readouterr().out
