"""Comparisons: what is summed, what is put together, what is compared at equal cost, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.cli import main
from moestro.core.errors import ConfigError, DataError
from moestro.report import compare, figures
from moestro.report.results import read_entries


def run(
    folder: Path, name: str, seed: int, losses: list[float], flops: dict[int, int], held: dict[int, float], **more: Any
) -> Path:
    """A run of one step a loss: 100 tokens and half a second each, reports of ``flops`` at some steps."""
    folder.mkdir(parents=True)
    recipe = {"name": name, "seed": seed, "losses": {"causal": 1.0}, **more}
    size = {"parameters": 1000 * len(name), "active": 500}
    (folder / "run.json").write_text(json.dumps({"schema": 1, "recipe": recipe, "size": size}))
    rows: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, 1):
        row: dict[str, Any] = {"step": step, "loss": loss, "tokens": 100, "seconds": 0.5}
        rows.append(row | ({"flops_per_token": flops[step]} if step in flops else {}))
        if step in held:
            rows.append({"step": step, "heldout": {"causal": held[step]}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def study(path: Path) -> Path:
    seeds = {"seeds": {"0": 2.0, "1": 2.2}}
    measured = {
        "cheap": {"steps": seeds, "heldout_loss": seeds, "gigaflops": {"seeds": {"0": 3.0, "1": 5.0}}},
        "plain": {"heldout_loss": {"seeds": {"0": 2.5, "1": 2.4}}, "megaflops": seeds},
    }
    units = {"heldout_loss": "nats", "megaflops": "operations a token"}
    path.write_text(json.dumps({"schema": 1, "measured": measured, "units": units}))
    return path


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    cheap, dear = {2: 10, 4: 30}, {4: 100}
    return [
        run(tmp_path / "a0", "cheap", 0, [4, 4, 4, 4], cheap, {2: 3.0, 4: 2.0}, steps=4),
        run(tmp_path / "b0", "dear", 0, [4, 4, 4, 4], dear, {2: 2.0, 4: 1.0}, steps=5),
        run(tmp_path / "a1", "cheap", 1, [4, 4, 4, 4], {2: 20, 4: 40}, {2: 3.2, 4: 2.4}, steps=4),
    ]


def test_seeds_of_one_recipe_are_together_and_costs_add_up(folders: list[Path]) -> None:
    cheap, dear = read_entries(folders)
    assert (cheap.name, [seed.seed for seed in cheap.seeds]) == ("cheap", [0, 1])
    assert [seed.flops for seed in cheap.seeds] == [200 * 10 + 200 * 30, 200 * 20 + 200 * 40]
    assert [(p.step, p.loss, p.flops, p.seconds) for p in cheap.seeds[0].curve] == [(2, 3, 2000, 1), (4, 2, 8000, 2)]
    assert dear.seeds[0].flops == 40000
    assert (cheap.mean, dear.std) == (pytest.approx(2.2), None)
    assert cheap.std == pytest.approx(0.4 / 2**0.5)
    assert (cheap.seeds[0].parameters, cheap.seeds[0].active) == (5000, 500)


def test_losses_at_equal_cost(folders: list[Path]) -> None:
    found = compare.summary(read_entries(folders))
    assert (found["equal_flops"], found["equal_seconds"]) == (8000, 2)
    cheap, dear = found["entries"]
    # at 8000 operations: the first seed's end; the second's 4000..12000, halfway from 3.2 to 2.4
    assert cheap["loss_at_equal_flops"] == pytest.approx((2.0 + 2.8) / 2)
    assert dear["loss_at_equal_flops"] is None  # its first held-out loss stands at 20000
    assert (cheap["loss_at_equal_seconds"], dear["loss_at_equal_seconds"]) == (pytest.approx(2.2), 1.0)
    lines = compare.table(found)
    assert lines[0][:5] == ["", "seeds", "loss", "loss at 8.00 k FLOP", "loss at 2 s"]
    assert lines[2][:5] == ["dear", "1", "1.0000", "", "1.0000"]
    assert "seconds" in lines[0]


def test_without_a_held_out_loss_in_each_run_training_losses_are_smoothed(folders: list[Path], tmp_path: Path) -> None:
    bare = run(tmp_path / "c0", "bare", 0, [4, 3, 2, 2], {}, {}, steps=6)
    entries = read_entries([*folders, bare])
    assert {entry.kind for entry in entries} == {"training, smoothed"}
    assert len(entries[2].seeds[0].curve) == 4
    assert np.isnan(entries[2].seeds[0].flops)  # an older run did not count its operations
    assert compare.summary(entries)["entries"][2]["flops"] is None


def test_arms_of_a_study(tmp_path: Path) -> None:
    cheap, plain = read_entries([study(tmp_path / "some.json")])
    assert (cheap.name, cheap.kind) == ("some: cheap", "heldout_loss (nats)")
    assert [(seed.seed, seed.loss, seed.flops) for seed in cheap.seeds] == [(0, 2.0, 3e9), (1, 2.2, 5e9)]
    assert np.isnan(plain.seeds[0].flops)  # operations of one token are not those of the training
    found = compare.summary([cheap, plain])
    assert found["equal_flops"] is None
    assert compare.table(found)[0] == ["", "seeds", "loss", "FLOP", "which loss"]


def test_the_figure_holds_the_numbers(folders: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    kept: list[Any] = []
    real = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure), real(figure, path))[1])
    entries = read_entries([*folders, study(tmp_path / "some.json")])
    path = compare.draw(entries, tmp_path / "out.svg")
    final, flops, seconds, parameters = kept[0].axes
    assert [tick.get_text() for tick in final.get_yticklabels()] == ["cheap", "dear", "some: cheap", "some: plain"]
    cheap, dear, arm = flops.lines
    assert (cheap.get_xdata().tolist(), cheap.get_ydata().tolist()) == ([3000, 10000], pytest.approx([3.1, 2.2]))
    assert dear.get_xdata().tolist() == [20000, 40000]
    assert arm.get_xdata().tolist() == [3e9, 5e9]
    assert len({line.get_color() for line in flops.lines}) == 3
    assert len(seconds.lines) == 2
    assert parameters.lines[0].get_xdata().tolist() == [5000, 5000]
    assert len(flops.collections) == 1, "one seed has no band"
    colours = {line.get_label(): line.get_color() for line in flops.lines}
    assert {line.get_label(): line.get_color() for line in seconds.lines}.items() <= colours.items()
    assert parameters.lines[0].get_color() == colours["cheap"]
    assert [axes.get_legend() is not None for axes in kept[0].axes] == [False, True, False, False]
    assert path.read_bytes() == compare.draw(entries, tmp_path / "again.svg").read_bytes()


def test_two_recipes_of_one_name_are_told_apart(folders: list[Path], tmp_path: Path) -> None:
    other = run(tmp_path / "d0", "cheap", 0, [4, 4], {2: 10}, {2: 3.0}, steps=9)
    assert [entry.name for entry in read_entries([folders[0], other])] == [
        f"cheap ({folders[0]})",
        f"cheap ({other})",
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "none", "no such file or folder"),
        (lambda path: write(path / "x.txt", "hello"), "not a run's folder and not a study's record"),
        (lambda path: write(path / "metrics.jsonl", "").parent, "the run has not made a step"),
        (lambda path: run(path / "r", "r", 0, [4, float("nan")], {}, {}), "the loss at step 2 is not a finite number"),
        (lambda path: run(path / "r", "r", 0, [4], {}, {1: float("inf")}), "the loss at step 1 is not a finite number"),
        (lambda path: write(path / "metrics.jsonl", '{"step": 1, "loss": [2]}\n').parent, "not what `moestro train`"),
        (
            lambda path: write(path / "x.json", record({"0": float("nan")})),
            "loss of arm 'a' is missing or not a finite",
        ),
        (lambda path: write(path / "x.json", record({})), "loss of arm 'a' is missing or not a finite"),
        (lambda path: write(path / "x.json", record(3)), "arm 'a' does not hold numbers by seed"),
        (lambda path: path, "expected JSON lines of a training run"),
        (lambda path: write(path / "x.json", "[]"), "not a study record of schema 1"),
        (lambda path: write(path / "x.json", '{"schema": 1, "measured": {"a": {"bits": {}}}}'), "it has bits"),
        (lambda path: write(path / "run.json", '{"recipe": 3}').parent, "not what `moestro train` writes"),
        (lambda path: write(path / "metrics.jsonl", '{"step": 1}\n').parent, "hold no loss"),
    ],
)
def test_what_cannot_be_compared_is_refused(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_entries([make(tmp_path)])


def record(seeds: Any) -> str:
    return json.dumps({"schema": 1, "measured": {"a": {"loss": {"seeds": seeds}}}, "units": {}})


def data(tokenizer: str, **more: Any) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "sources": {"data": {"source": "builtin:german"}}, "sequence_length": 8, **more}


TEXT = {"data": {"sources": {"data": {"source": "builtin:german", "split": "heldout"}}}, "limit": 4}
RUSSIAN = {"data": {"source": "builtin:russian"}}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"data": data("bytes"), "eval": TEXT}, r'their tokenizer differ \("bpe:300" and "bytes"\)'),
        ({"data": data("bpe:300", sources=RUSSIAN), "eval": TEXT}, "their tokenizer differ"),
        ({"data": data("bpe:300"), "eval": {**TEXT, "limit": 5}}, r"their held-out text differ \(4 and 5\)"),
        ({"data": data("bpe:300", sequence_length=9), "eval": TEXT}, r"their held-out text differ \(8 and 9\)"),
        ({"data": data("bpe:300"), "eval": TEXT, "objective": {"method": "masked"}}, "their objective differ"),
    ],
)
def test_losses_of_other_tokens_or_texts_are_refused(
    other: dict[str, Any], words: str, tmp_path: Path, capsys: Any
) -> None:
    same = {"data": data("bpe:300"), "eval": TEXT}
    one = run(tmp_path / "one", "one", 0, [4, 3], {2: 10}, {2: 3.0}, **same)
    two = run(tmp_path / "two", "two", 0, [4, 3], {2: 10}, {2: 3.0}, steps=9, **same)
    odd = run(tmp_path / "odd", "odd", 0, [4, 3], {2: 10}, {2: 3.0}, **other)
    assert [entry.name for entry in read_entries([one, two])] == ["one", "two"]
    with pytest.raises(DataError, match=words):
        read_entries([one, two, odd])
    assert main(["compare", str(one), str(odd)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_training_losses_need_the_same_training_text(tmp_path: Path) -> None:
    one = run(tmp_path / "one", "one", 0, [4, 3], {}, {}, data=data("bytes"))
    two = run(tmp_path / "two", "two", 0, [4, 3], {}, {}, data=data("bytes", sources=RUSSIAN))
    with pytest.raises(DataError, match="their training text differ"):
        read_entries([one, two])


def test_losses_of_several_kinds_are_told(folders: list[Path], tmp_path: Path, capsys: Any) -> None:
    first = study(tmp_path / "some.json")
    second = write(tmp_path / "other.json", first.read_text())
    assert compare.notes(read_entries([first])) == []
    assert "within a study only" in compare.notes(read_entries([first, second]))[0]
    assert main(["compare", str(folders[0]), str(first), "-o", str(tmp_path / "c.svg")]) == 0
    assert "note: losses of 2 kinds (held out, heldout_loss (nats))" in capsys.readouterr().out


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_verb(folders: list[Path], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [str(folder) for folder in folders]
    assert main(["compare", *paths]) == 0
    shown = capsys.readouterr().out
    assert "2.2000 ± 0.2828" in shown
    assert "drawn in compare.svg" in shown
    (tmp_path / "compare.svg").unlink()
    assert main(["compare", *paths, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal_flops"] == 8000
    assert not (tmp_path / "compare.svg").exists()
    assert main(["compare", *paths, "--json", "-o", "x.png"]) == 0
    assert (tmp_path / "x.png").exists()
    assert main(["compare", *paths, "-o", "x.pdf"]) == 2
    assert "figures are written as .svg or .png" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        compare.draw(read_entries(folders), tmp_path / "x.pdf")
