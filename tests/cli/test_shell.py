"""The command-line shell: exit statuses, one-line errors, light start."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import moestro.cli
from moestro.cli import main
from moestro.core.errors import ConfigError, NonFiniteError


HEAVY = {"torch", "transformers", "scipy", "pyarrow", "matplotlib"}


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """An application with one verb `act` that raises what the test puts into the dictionary."""
    raised: dict[str, BaseException] = {}
    build = moestro.cli.app

    def app() -> typer.Typer:
        root = build()

        @root.command()
        def act(number: int = typer.Argument(0), name: str = typer.Option("x", "--name")) -> None:
            if "error" in raised:
                raise raised["error"]
            print(f"number {number}")

        return root

    monkeypatch.setattr(moestro.cli, "app", app)
    return raised


def test_a_verb_runs(verb: dict[str, BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["act", "7"]) == 0
    assert capsys.readouterr().out == "number 7\n"


@pytest.mark.parametrize("error", [ConfigError("lr=-1\nmust be positive"), NonFiniteError("loss is nan at step 3")])
def test_a_users_error_is_one_line_and_status_two(
    error: BaseException, verb: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    verb["error"] = error
    assert main(["act"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["nothing", "moestro --help"]),
        (["act", "--nmae", "y"], ["--nmae", "--name"]),
        (["act", "seven"], ["number", "integer"]),
        (["study"], ["KEY", "moestro study --help"]),
    ],
)
def test_wrong_usage_is_one_line_and_status_two(
    arguments: list[str], words: list[str], verb: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    for word in words:
        assert word.lower() in told.lower()


def test_an_interrupt_is_one_line_and_status_130(
    verb: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    verb["error"] = KeyboardInterrupt()
    assert main(["act"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_bug_of_ours_keeps_its_traceback(verb: dict[str, BaseException]) -> None:
    verb["error"] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        main(["act"])


def test_a_closed_pipe_brings_no_message() -> None:
    # In a process of its own: what is done about it replaces the process's standard output.
    for verb in ("papers --json", "--version"):
        run = subprocess.run(
            f"{sys.executable} -m moestro {verb} | true", shell=True, capture_output=True, text=True, check=False
        )
        assert run.stderr == ""


def test_what_the_disk_refuses_is_one_line_and_status_two(
    verb: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    verb["error"] = OSError(errno.ENOSPC, "No space left on device", "out/metrics.jsonl")
    assert main(["act"]) == 2
    assert capsys.readouterr().err == "error: out/metrics.jsonl: No space left on device\n"
    verb["error"] = FileNotFoundError(errno.ENOENT, "a file of ours is missing", "page.css")
    with pytest.raises(FileNotFoundError):
        main(["act"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_an_output_that_cannot_be_written_is_one_line() -> None:
    command = f"{sys.executable} -m moestro papers --json > /dev/full"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (2, "error: No space left on device\n")


def test_a_report_does_not_take_the_place_of_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is renamed into place; where root writes to /dev/null, that would be the end of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.json").write_text("[1]")
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "pipe")]) == 2
    assert "is not a file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 2
    assert "samples.json: expected a list of objects" in capsys.readouterr().err


def test_help_lists_every_verb_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out
    for word in ("doctor", "papers", "methods", "study", "--version"):
        assert word in told
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moestro {moestro.__version__}\n"


def test_every_verb_file_registers_something() -> None:
    folder = Path(moestro.cli.__file__).parent
    for path in folder.glob("*.py"):
        if not path.stem.startswith("_"):
            assert "def register(app: typer.Typer) -> None:" in path.read_text(), path.name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["papers", "--json"],
        ["methods", "--json"],
        ["catalog", "list", "--json"],
        ["convert", "--help"],
        ["study", "--help"],
        ["doctor", "--quick", "--json"],
    ],
    ids=" ".join,
)
def test_listing_verbs_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, json; from moestro.cli import main; "
        f"status = main({arguments!r}); "
        f"print(json.dumps([status, sorted({HEAVY!r} & set(sys.modules))]), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stderr.splitlines()[-1]) == [0, []]
