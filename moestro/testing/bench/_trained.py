"""The routing of a trained mixture, recorded token by token over held-out text.

A small mixture with as many layers, experts and choices as reference model R (12, 64, top-8), but thin (hidden 128,
experts of 32), is trained from scratch on the documentation of Python's standard library, with 4096 tokens learned from
it, a balance loss and a z-loss. Its routing over held-out files then is R's routing, layer by layer and expert by
expert; nothing has to be mapped. What its gates say of the next layer is recorded too, for what reads ahead. It takes
some minutes once; model and trace are kept.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError
from moestro.core.forecast import Recorded
from moestro.core.trace import RoutingTrace
from moestro.testing.bench._reference import EXPERTS, LAYERS, TOP_K, tell
from moestro.testing.bench._streams import recorded


STEPS: Final = 300
TOKENS: Final = 2048
LENGTH: Final = 512
"""Of the trace, and of a sequence of it."""


def recipe(steps: int = STEPS) -> dict[str, Any]:
    """What is trained."""
    losses = {
        "balance": {"method": "train.balance_loss", "config": {"scope": "batch"}},
        "z": {"method": "train.z_loss"},
    }
    router = {"method": "train.softmax_topk", "config": {"top_k": TOP_K, "renormalise": True}}
    mixture = {"num_experts": EXPERTS, "expert_size": 32, "router": router, "losses": losses}
    return {
        "name": "trained",
        "seed": 0,
        "model": {
            "config": {
                "model_type": "qwen3",
                "vocab_size": "auto",
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": True,
            },
            "swaps": [{"sites": "mlp", "method": "train.moe", "config": mixture}],
        },
        "data": {"source": "builtin:stdlib-docs", "tokenizer": "bpe:4096", "sequence_length": 128},
        "losses": {"balance": 0.01, "z": 0.001},
        "optimizer": {"lr": 0.002, "weight_decay": 0.1, "clip": 1.0},
        "schedule": {"kind": "wsd", "warmup": 0.05, "decay": 0.2},
        "steps": steps,
        "batch_size": 8,
    }


def trained_trace(folder: Path, steps: int = STEPS) -> RoutingTrace:
    """The trace, recorded when missing."""
    path = folder / "trained.trace"
    if not (path / "header.json").is_file():
        shutil.rmtree(path, ignore_errors=True)
        _record(folder, path, steps)
    return RoutingTrace.open(path)


def trained_model(folder: Path, steps: int) -> Path:
    """The trained mixture, trained when missing."""
    from moestro.training.recipe import Recipe
    from moestro.training.run import train

    run = folder / "trained"
    if not (run / "model" / "config.json").is_file():
        tell(f"training a mixture of {LAYERS} layers and {EXPERTS} experts for its routing ({steps} steps)")
        train(Recipe.parse(recipe(steps)), run)
    return run / "model"


def _record(folder: Path, path: Path, steps: int) -> None:
    from moestro.data.corpora import corpus
    from moestro.data.tokens import open_tokenizer
    from moestro.models.load import load
    from moestro.observe.record import record

    source = trained_model(folder, steps)
    tell("recording its routing")
    model = load(str(source), dtype="float32")
    texts = {"docs": corpus("stdlib-docs", "heldout")}
    record(
        model, open_tokenizer(source), texts, path, length=LENGTH, limit=TOKENS,
        model=str(source), facts={"steps": steps, "data": "builtin:stdlib-docs, held-out files"},
    )  # fmt: skip


def trained_gates(folder: Path, stream: Mapping[str, npt.NDArray[Any]]) -> Recorded:
    """What the trained mixture's gates say of the next layer at each token of its trace, or at the first of them.

    Args:
        stream: ``tokens``, ``positions`` and ``ids``, see ``_streams.recorded``.

    Raises:
        ConfigError: the model does not route as the trace says: one of them is of another training.
    """
    from moestro.core.registry import method
    from moestro.engine.describe import describe
    from moestro.engine.native_forward import NativeForward
    from moestro.engine.pack import pack_model
    from moestro.engine.packed import EXPERTS as SLABS
    from moestro.engine.packed import Packed
    from moestro.engine.recorder import Recorder
    from moestro.engine.store import ExpertStore

    recorder, policy = Recorder(), method("serve.lru")
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        path = Path(place, "packed")
        pack_model(trained_model(folder, STEPS), path, bits=32)
        packed = Packed.open(path)
        with ExpertStore(packed, packed.files[SLABS][0], policy.entry("policy")(policy.configure({}))) as store:
            pages = -(-LENGTH // NativeForward.page)
            forward = NativeForward(describe(packed, packed.resident()), pages=pages, store=store, forecast=recorder)
            starts = np.flatnonzero(stream["positions"] == 0)
            for number, part in enumerate(np.split(stream["tokens"], starts[1:])):
                forward.step(
                    SimpleNamespace(
                        tokens=part, positions=np.arange(len(part), dtype=np.int32), sequences=[number],
                        rows_of=np.zeros(len(part), np.int32), tables=np.arange(pages, dtype=np.int32)[None],
                        want=np.zeros(0, np.int32), routes=None,
                    )
                )  # fmt: skip
    found = recorder.recorded()
    same = np.mean(
        [(np.sort(found.routes[layer]) == np.sort(stream["ids"][:, layer])).mean() for layer in range(LAYERS)]
    )
    if same < 0.99:
        raise ConfigError(
            f"{folder}: the trained mixture chooses {same:.0%} of the experts that its trace names; remove trained and "
            "trained.trace, they will be made anew"
        )
    return found


def trained_stream(folder: Path, length: int) -> dict[str, npt.NDArray[Any]]:
    """The first tokens of the trace for an arm, with what the gates said: see ``_streams.recorded`` and ``_arm``.

    Raises:
        ConfigError: the trace is shorter.
    """
    whole = recorded(trained_trace(folder))
    if len(whole["tokens"]) < length:
        raise ConfigError(f"the trace has {len(whole['tokens'])} tokens, these rounds need {length}; take fewer")
    part = {name: values[:length] for name, values in whole.items()}  # an arm pays for all it loads
    peeks = trained_gates(folder, part).peeks
    return {**part, **{f"peek.{layer}.{later}": scores for (layer, later), scores in peeks.items()}}
