"""A made-up but lifelike recording: three kinds of text, specialists, habits from layer to layer, idle experts."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from moestro.core.context import RoutingContext
from moestro.core.routing import Routing
from moestro.core.session import Session
from moestro.core.tokens import Tokens
from moestro.core.trace import RoutingTrace
from moestro.core.trace_writer import TraceWriter


PROSE = """The lighthouse keeper counted the ships as they passed, one by one, until the fog took the last of them. \
He had done so every evening for eleven years, and every evening he wrote the number down in a book with a green \
cover. Nobody ever asked to see it. When the harbour office sent a young clerk to ask why the lamp burned more oil \
than the year before, the keeper gave him tea and the book, and said nothing at all. """
GERMAN = """Der Leuchtturmwärter zählte die Schiffe, die vorüberfuhren, eines nach dem anderen, bis der Nebel das \
letzte verschluckte. Elf Jahre lang hatte er es so gehalten, und jeden Abend schrieb er die Zahl in ein Buch mit \
grünem Einband. Niemand wollte es je sehen. Als das Hafenamt einen jungen Schreiber schickte, um zu fragen, warum \
die Lampe mehr Öl verbrauche als im Jahr zuvor, gab ihm der Wärter Tee und das Buch und schwieg. """
TEXTS = {"code": inspect.getsource(json.decoder), "prose": PROSE * 4, "German": GERMAN * 4}


def make_tokenizer():
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS.values(), vocab_size=900, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)


def lifelike(
    path,
    tokenizer,
    *,
    layers=12,
    experts=32,
    top_k=2,
    first=4,
    length=256,
    sequences=4,
    seed=0,
    texts=TEXTS,
    p=None,
    nulls=0,
):
    """Record made-up routing: each token's experts follow its kind, its label and the layer before.

    With ``p`` a token takes choices until their probability exceeds p; the last ``nulls`` choices are null experts.
    """
    rng = np.random.default_rng(seed)
    kinds = 9
    taste = rng.normal(0, 1.1, (layers, kinds, experts))  # of kinds of tokens
    label = rng.normal(0, 0.9, (layers, len(texts), experts))
    habit = rng.normal(0, 1.2, (layers, experts, experts))  # of a layer given the one before
    popular = -0.55 * np.log1p(rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1))
    popular[0, 1] = popular[layers // 2, experts - 1] = -1e9  # two idle experts
    with TraceWriter(path, model="toy-moe-12x32", model_hash="9f2c41" * 10 + "ab12", tokenizer="toy") as writer:
        for place, (tag, text) in enumerate(texts.items()):
            ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"])
            for number in range(sequences):
                piece = np.resize(np.roll(ids, -number * length), length)
                row = torch.from_numpy(piece)[None]
                tokens = Tokens(
                    torch.zeros(length, dtype=torch.int64), torch.arange(length),
                    torch.ones(length, dtype=torch.bool), row.reshape(-1), 1, length,
                )  # fmt: skip
                ctx = RoutingContext("model", Session(tags={"tag": tag}), tokens)
                before = np.zeros((length, experts))
                for layer in range(layers):
                    logits = popular[layer] + taste[layer, piece % kinds] + label[layer, place]
                    logits = logits + before @ habit[layer] + rng.gumbel(0, 0.6, (length, experts))
                    scores = torch.from_numpy(logits).float()
                    weight, chosen = scores.softmax(-1).topk(top_k)
                    weight = weight / weight.sum(1, keepdim=True)
                    if p is None:
                        routing = Routing.from_topk(chosen, weight, num_experts=experts - nulls, num_null=nulls)
                    else:
                        gate, order = scores.softmax(-1).sort(descending=True)
                        used = torch.zeros_like(gate, dtype=torch.bool).scatter(1, order, gate.cumsum(-1) - gate <= p)
                        routing = Routing.from_mask(used, scores, num_experts=experts - nulls, num_null=nulls)
                    writer.record(f"model.layers.{first + layer}.mlp", routing, ctx)
                    before = np.eye(experts)[chosen[:, 0].numpy()]
    return RoutingTrace.open(path)


def run_rows(steps=400, layers=4, experts=16):
    """Metrics of a made-up run, as the training loop writes them."""
    rng = np.random.default_rng(1)
    rows = []
    for step in range(1, steps + 1):
        decay = math.exp(-step / 90)
        loss = 2.9 + 1.4 * decay + 0.05 * rng.normal()
        row = {
            "step": step, "tokens": 4096 * step, "loss": loss, "losses": {"causal": loss - 0.01, "balance": 1 + decay},
            "lr": 3e-4 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "grad_norm": 0.8 + 2 * decay * abs(rng.normal()), "seconds": 0.8 + 0.05 * rng.random(),
            "tokens_per_second": 4096 / (0.8 + 0.05 * rng.random()),
        }  # fmt: skip
        if step % 10 == 0:
            row["router"] = {
                f"model.layers.{layer}.mlp": {
                    "load": [1 / experts] * experts, "load_entropy": 1 - 0.3 * decay - 0.01 * layer,
                    "max_violation": 0.2 + (2 + layer) * decay, "dead": [1] * int(6 * decay),
                    "token_entropy": 2.7 - 1.2 * (1 - decay),
                }
                for layer in range(layers)
            }  # fmt: skip
        rows.append(row)
        if step % 100 == 0:
            rows.append({"step": step, "heldout": {"causal": loss + 0.1}})
    return rows


RECEIPT = {
    "command": "moestro convert upcycle model out --experts 16 --top-k 2",
    "method": {"id": "convert.upcycle", "config": {"experts": 16, "top_k": 2, "noise": 0.0, "layers": [4, 5, 6, 7]}},
    "parity": {"max_logit_difference": 2.3841858e-06, "tokens": 512, "limit": 1e-05, "held": True},
    "ledger": [
        {"layer": layer, "expert": expert, "projection": name, "expected": 1, "touched": 1}
        for layer in (4, 5) for expert in range(12) for name in ("gate", "up", "down")
    ],
    "files": {"model.safetensors": 538_090_408, "config.json": 1_204},
}  # fmt: skip
COMPARISONS = {
    "title": "Held-out perplexity", "note": "Same tokens, same schedule; lower is better.",
    "better": {"perplexity": "lower", "tokens/s": "higher"},
    "rows": [
        {"model": "dense parent", "parameters": 134_515_008, "active": 134_515_008, "perplexity": 18.42,
         "tokens/s": 2140},
        {"model": "dense parent, trained on", "parameters": 134_515_008, "active": 134_515_008, "perplexity": 15.07,
         "tokens/s": 2135},
        {"model": "upcycled, 16 experts", "parameters": 373_900_032, "active": 150_470_400, "perplexity": 14.61,
         "tokens/s": 1722},
    ],
}  # fmt: skip
SAMPLES = [
    {"model": "dense parent", "prompt": "The lighthouse keeper", "text": " was a man of few words."},
    {"model": "upcycled, 16 experts", "prompt": "def decode(", "text": "self, s, _w=WHITESPACE.match):\n    return s"},
]  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_trace():
    """The maker of lifelike traces."""
    return lifelike


@pytest.fixture(scope="session")
def recorded(tmp_path_factory, tokenizer):
    """A lifelike trace, small enough to be quick."""
    return lifelike(
        tmp_path_factory.mktemp("trace") / "toy.trace", tokenizer, layers=5, experts=12, sequences=2, length=96
    )


@pytest.fixture(scope="session")
def parts():
    """The other parts of a report."""
    return {"metrics": run_rows(), "receipt": RECEIPT, "comparisons": COMPARISONS, "samples": SAMPLES}
