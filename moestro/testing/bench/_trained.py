"""The routing of a trained mixture, recorded token by token over held-out text.

A small mixture with as many layers, experts and choices as reference model R (12, 64, top-8), but thin (hidden 128,
experts of 32), is trained from scratch on the documentation of Python's standard library, with 4096 tokens learned from
it, a balance loss and a z-loss. Its routing over held-out files then is R's routing, layer by layer and expert by
expert; nothing has to be mapped. It takes some minutes once; the trace is kept.
"""

import shutil
from pathlib import Path
from typing import Any, Final

from moestro.core.trace import RoutingTrace
from moestro.testing.bench._reference import EXPERTS, LAYERS, TOP_K, tell


STEPS: Final = 300
TOKENS: Final = 2048
"""Of the trace."""


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


def _record(folder: Path, path: Path, steps: int) -> None:
    from moestro.data.corpora import corpus
    from moestro.data.tokens import open_tokenizer
    from moestro.models.load import load
    from moestro.observe.record import record
    from moestro.training.recipe import Recipe
    from moestro.training.run import train

    run = folder / "trained"
    if not (run / "model" / "config.json").is_file():
        tell(f"training a mixture of {LAYERS} layers and {EXPERTS} experts for its routing ({steps} steps)")
        train(Recipe.parse(recipe(steps)), run)
    tell("recording its routing")
    model = load(str(run / "model"), dtype="float32")
    texts = {"docs": corpus("stdlib-docs", "heldout")}
    record(
        model, open_tokenizer(run / "model"), texts, path, length=512, limit=TOKENS,
        model=str(run / "model"), facts={"steps": steps, "data": "builtin:stdlib-docs, held-out files"},
    )  # fmt: skip
