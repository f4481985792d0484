"""SIGKILL at random and at chosen points of a save: the last complete folder is always there, and the next
save works.

The killed savers are forks of one small process without torch, so that a trial takes milliseconds.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest


DRIVER = '''
import json, os, random, select, signal, sys, time
from pathlib import Path
from moestro.models.atomic import atomic_folder, leftovers, recover, verify_folder

target, mode, trials = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


def save(number):
    with atomic_folder(target, overwrite=True) as folder:
        for part in range(3):
            (folder / f"part{part}").write_text(f"{number}:" + "x" * 20000)
        (folder / "number").write_text(str(number))


def read():
    """The number of the folder that stands; every file must belong to the same save."""
    recover(target)
    verify_folder(target, deep=True)
    number = int((target / "number").read_text())
    for part in range(3):
        assert (target / f"part{part}").read_text() == f"{number}:" + "x" * 20000
    assert not leftovers(target), leftovers(target)
    return number


def forked(number, kill_at_event):
    """Fork a saver; it kills itself at its n-th file system event, or says when it starts and when it is "
    "done."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        seen = [0]

        def hook(event, _):
            if event.startswith(("open", "os.", "shutil.")):
                seen[0] += 1
                if seen[0] == kill_at_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        if kill_at_event:
            sys.addaudithook(hook)
        os.write(send, b"s")
        save(number)
        os.write(send, b"d")
        os._exit(0)
    os.close(send)
    os.read(receive, 1)
    return child, receive


save(0)
start = time.perf_counter()
for _ in range(3):
    save(0)
window = (time.perf_counter() - start) / 3
last, kept, moved, cut = 0, 0, 0, 0
rng = random.Random(7)
for trial in range(1, trials + 1):
    child, receive = forked(trial, trial if mode == "events" else 0)
    if mode == "random":
        time.sleep(rng.random() * window)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    done = os.read(receive, 1) == b"d"
    os.close(receive)
    cut += os.WIFSIGNALED(status) and not done
    # About half of the saves are to be cut, however busy the machine is.
    window *= 0.93 if done else 1.07
    before = last
    last = read()
    assert last in (before, trial) and (last == trial or not done), (before, trial, last, done)
    kept, moved = kept + (last == before), moved + (last == trial)
    if trial % 10 == 0:  # the next save must succeed
        save(trial)
        last = read()
        assert last == trial
assert os.listdir(target.parent) == [target.name]
print(json.dumps({"kept": kept, "moved": moved, "cut": cut}))
'''


def run(tmp_path: Path, mode: str, trials: int) -> dict[str, int]:
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "disk").mkdir()
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "disk" / "out"), mode, str(trials)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=_environment())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_200_kills_at_random_points_lose_nothing(tmp_path: Path) -> None:
    outcome = run(tmp_path, "random", 200)
    # The kills must have hit saves under way, early and late; otherwise the test shows nothing.
    assert outcome["cut"] >= 60, outcome
    assert outcome["kept"] >= 30, outcome
    assert outcome["moved"] >= 30, outcome


def test_a_kill_at_every_file_system_event_loses_nothing(tmp_path: Path) -> None:
    outcome = run(tmp_path, "events", 80)
    # A save has fewer than 80 events: the last trials run through, the first ones are all cut.
    assert 25 <= outcome["cut"] < 80, outcome


@pytest.mark.slow
def test_2000_kills_at_random_points_lose_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, "random", 2000)["cut"] >= 600
