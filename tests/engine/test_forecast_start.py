"""A forecast when serving starts: one that was not taught, or for another model, is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.cli import main
from moestro.core.errors import ConfigError
from moestro.core.forecast import Forecast, Ints, Peek, Wish
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.engine import room
from moestro.engine.open_native import Native
from moestro.engine.pack import pack_model
from moestro.engine.packed import Packed
from moestro.engine.recorder import Recorder
from moestro.engine.requests import Limits
from moestro.engine.scheduler import Scheduler
from moestro.methods.serve._parts.route_file import Header, LayerShape, save
from moestro.testing.tiny import VOCAB, tiny_folder
from tests.engine.running import Answer, run
from tests.engine.serving import byte_vocabulary
from tests.methods.serve.routes import random_predictor


FLOW = "serve.expertflow"
LAYERS = (LayerShape(layer=1, experts=5, top_k=2), LayerShape(layer=2, experts=5, top_k=2))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds PyTorch; a serving one does not, and tiny models need no working space."""
    monkeypatch.setattr(room, "resident_set", lambda: 0)
    monkeypatch.setattr(room, "working_bytes", lambda model: 0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers, the first of them dense."""
    folder = tmp_path_factory.mktemp("start")
    tiny_folder("qwen3_moe", folder / "model", head_dim=16, num_hidden_layers=3)
    pack_model(folder / "model", folder / "packed", bits=8)
    return folder / "packed"


def predictor(folder: Path, layers: Sequence[LayerShape] = LAYERS) -> MethodUse:
    """A forecast by a predictor for these layers that nobody taught anything."""
    made = random_predictor(layers=tuple(layers), vocabulary=VOCAB)
    header: Header = made.header
    save(folder / "predictor", header, made.weights)
    return MethodUse(method=FLOW, config={"predictor": str(folder / "predictor")})


def opened(packed: Path, slots: int, forecast: Any, policy: Any = "serve.lru") -> Native:
    """The model with room for some of its ten experts."""
    found = Packed.open(packed)
    model, stride = found.model, max(there.stride for there in found.experts.values())
    kept = len(model.layers) * 24 * 2 * 16 * model.kv_heads * model.head_dim * 4
    resident = sum(piece.nbytes for piece in found.tensors.values())
    return Native(packed, kept + resident + slots * stride, context=24 * 16, forecast=forecast, policy=policy)


@pytest.mark.parametrize("slots", [4, 10])
@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (LAYERS[:1], "knows 0 experts in layer 2, the model has 5"),
        ((*LAYERS, LayerShape(layer=0, experts=5, top_k=2)), "knows 5 experts in layer 0, the model has 0"),
        ((LAYERS[0], LayerShape(layer=2, experts=6, top_k=2)), "knows 6 experts in layer 2, the model has 5"),
        (
            (LAYERS[0], LayerShape(layer=2, experts=5, top_k=1)),
            "knows 1 choices of a token in layer 2, the model makes 2",
        ),
    ],
)
def test_a_predictor_for_another_model_is_refused_at_start(
    layers: Sequence[LayerShape], told: str, slots: int, packed: Path, tmp_path: Path
) -> None:
    """Whether or not all experts fit, so that its name in a plan is never wrong by luck."""
    with pytest.raises(ConfigError, match=told):
        opened(packed, slots, predictor(tmp_path, layers))


def test_a_forecast_that_nobody_taught_ends_the_command(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moestro.engine.open.open_vocabulary", lambda folder: byte_vocabulary())
    assert main(["serve", str(packed), "--memory", "1GiB", "--forecast", FLOW]) == 2
    told = capsys.readouterr().err
    assert "serve.expertflow has no predictor; `moestro learn expertflow TRACE OUT` makes one" in told
    assert len(told.strip().splitlines()) == 1
    with pytest.raises(ConfigError, match="has no predictor"):
        opened(packed, 4, FLOW)
    with pytest.raises(ConfigError, match="has no predictor"):
        Recorder(other=method(FLOW).entry("forecast")(method(FLOW).configure({}))).ready((0, 5), (0, 2))


def test_a_forecast_for_a_model_that_is_not_packed_is_refused(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(packed.parent / "model")
    assert main(["serve", model, "--memory", "1GiB", "--forecast", "serve.next_gate"]) == 2
    told = capsys.readouterr().err
    assert "is no packed model, and forecast serve.next_gate reads experts of those only" in told
    assert len(told.strip().splitlines()) == 1


class Told(Forecast):
    """Passes on what was settled."""

    name = "serve.told"

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        return []

    def settled(self, layer: int, ids: Ints) -> list[Wish]:
        return [Wish(layer, tuple(ids.ravel().tolist()))]


def test_a_recorder_passes_on_what_is_settled() -> None:
    assert Recorder(other=Told()).settled(2, np.array([[3, 1]], np.int32)) == [Wish(2, (3, 1))]
    assert Recorder().settled(2, np.array([[3, 1]], np.int32)) == []


@pytest.mark.parametrize("slots", [4, 10])
def test_one_that_fits_serves_and_texts_stay(slots: int, packed: Path, tmp_path: Path) -> None:
    prompts = [[(7 * number + at) % VOCAB for at in range(3 + number % 3)] for number in range(6)]

    def texts(native: Native) -> list[list[int]]:
        found = run(Scheduler(native.forward, Limits(running=6)), *[Answer(prompt, 5) for prompt in prompts])
        native.close()
        return found

    use = predictor(tmp_path)
    assert texts(opened(packed, slots, use, policy=use)) == texts(opened(packed, 10, None))
