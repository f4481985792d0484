"""The bench of the study of ExpertFlow: a mixture, its routing on three domains, and what forecasts say of it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.trace import trace
from moestro.data.dataset import DataConfig, Dataset, build_dataset, load_tokenizer
from moestro.methods.serve._parts import route_rivals as rivals
from moestro.methods.serve._parts import route_training as training
from moestro.methods.serve._parts.route_file import Floats
from moestro.methods.serve._parts.route_paths import Paths, paths_of
from moestro.methods.serve._parts.route_predictor import RoutePredictor
from moestro.observe.passing import watched
from moestro.studies._framework import Budget
from moestro.studies._mixture import Mixture, fresh, tune


CODE, CROSS = "stdlib-code", "german"


def size_of(budget: Budget) -> Mixture:
    """The mixture: 32 experts a layer, two of them a token."""
    return budget.pick(
        ci=Mixture(layers=2, dim=16, inner=16, heads=1, vocabulary=300, length=24, batch=2, steps=3, files=3,
                   experts=8, task="german"),
        micro=Mixture(layers=3, dim=64, inner=32, heads=2, vocabulary=1024, length=64, batch=8, steps=80, files=60,
                      experts=16),
        full=Mixture(layers=4, dim=128, inner=64, heads=4, vocabulary=2048, length=128, batch=8, steps=350, files=160,
                     experts=32),
    )  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A mixture of a seed and what forecasts say of its routing.

    Attributes:
        model: the mixture. predictor: taught on its routing. taught: paths of the predictor's data.
        held: paths held out, by kind (``in``, ``cross``).
        said: kind -> forecast -> float [T, C]. gate: kind -> float [T, C], the gates' word on the input one mixture
            earlier; minus infinity for the first mixture.
    """

    model: Any
    predictor: RoutePredictor
    taught: Paths
    held: Mapping[str, Paths]
    said: Mapping[str, Mapping[str, Floats]]
    gate: Mapping[str, Floats]


@functools.cache
def data(size: Mixture) -> dict[tuple[str, str], Any]:
    """(domain, split) -> packed rows: source files, the size's task, and all of the little German there is."""
    names = dict.fromkeys((CODE, size.task, CROSS))
    whole = {
        "sources": {name: {"source": f"builtin:{name}", "split": "train", "limit": size.files} for name in names},
        "tokenizer": f"bpe:{size.vocabulary}",
        "sequence_length": size.length,
    }
    tokenizer = load_tokenizer(DataConfig.parse(whole))
    found = {}
    parts = [(name, part) for name in (CODE, size.task) for part in ("train", "heldout")]
    for name, part in [*parts, (CROSS, "all")]:
        source = {"source": f"builtin:{name}", "split": part, "limit": size.files}
        config = DataConfig.parse({**whole, "sources": {"data": source}})
        (found[name, part],) = build_dataset(config, tokenizer, "packed").sources.values()
    return found


def drawn(rows: Any, count: int, seed: int) -> list[Tensor]:
    """Token ids [S] of so many rows, drawn by the seed; of all, if there are fewer."""
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [torch.from_numpy(np.asarray(rows[int(place)]["input_ids"])).long() for place in order]


def mixture(size: Mixture, seed: int) -> Any:
    """Trained on source files and documentation in turns, every ninth row German."""
    code, docs, german = data(size)[CODE, "train"], data(size)[size.task, "train"], data(size)[CROSS, "all"]
    rows = []
    for place in range(size.steps * size.batch // 2 + 1):
        rows += [code[place % len(code)], docs[place % len(docs)]]
        rows += [german[place // 4 % len(german)]] * (place % 4 == 0)
    model = fresh(size, seed)
    tune(model, Dataset({"data": rows}), size, seed, size.steps)
    return model.eval()


@torch.no_grad()
def routed(model: Any, rows: list[Tensor]) -> tuple[Paths, Floats]:
    """Paths of rows, and what each gate says of the input of the mixture before its own."""
    layers: list[Any] = list(mixture_layers(model).values())
    inputs: dict[int, list[Tensor]] = {}

    def take(at: int, given: tuple[Any, ...], output: Any) -> None:
        inputs.setdefault(at, []).append(given[0])

    with trace(model) as found, watched(dict(enumerate(layers)), take):
        for at in range(0, len(rows), 16):
            model.base_model(input_ids=torch.stack(rows[at : at + 16]))
    said = []
    for at, layer in enumerate(layers):
        if at == 0:
            said.append(torch.full((len(rows) * len(rows[0]), layer.router.num_experts), -torch.inf))
        else:
            said.append(torch.cat([x.flatten(0, -2) for x in inputs[at - 1]]) @ layer.router.weight.T)
    return paths_of(found), torch.cat(said, dim=1).float().numpy()


def log_odds(rate: Floats) -> Floats:
    """Logits of rates."""
    clipped = np.clip(rate, 1e-4, 1 - 1e-4)
    found: Floats = np.log(clipped / (1 - clipped)).astype(np.float32)
    return found


def forecasts(predictor: RoutePredictor, taught: Paths, asked: Paths, vocabulary: int) -> dict[str, Floats]:
    """What every forecast says of every token, as logits."""
    usual = taught.used.mean(0, dtype=np.float32)
    repeats = rivals.by_previous(taught, asked) >= 1
    return {
        "predictor": rivals.by_predictor(predictor, asked),
        "token_table": log_odds(rivals.by_token(taught, asked, vocabulary)),
        "previous_token": log_odds(0.5 * repeats + 0.5 * usual),
        "frequency": log_odds(np.broadcast_to(usual, asked.used.shape)),
        "perfect": log_odds(asked.used.astype(np.float32)),
    }


@functools.lru_cache(maxsize=2)
def made(seed: int, budget: Budget) -> Made:
    """The bench of a seed."""
    size = size_of(budget)
    rows, model = data(size), mixture(size, seed)
    each = budget.pick(ci=8, micro=120, full=700)
    asked = budget.pick(ci=20, micro=32, full=64)
    taught, _ = routed(model, [row for name in (CODE, size.task) for row in drawn(rows[name, "train"], each, seed)])
    both = [drawn(rows[name, "heldout"], asked, seed) for name in (CODE, size.task)]
    held = {
        "in": routed(model, [row for pair in zip(*both, strict=False) for row in pair]),
        "cross": routed(model, drawn(rows[CROSS, "all"], 2 * asked, seed)),
    }
    use = method("serve.expertflow")
    steps = budget.pick(ci=4, micro=100, full=400)
    config = use.configure({"steps": steps, "epochs": 100, "lr": 1e-2, "head_lr": 1e-2})
    predictor = training.taught(taught, config, seed=seed)
    return Made(
        model,
        predictor,
        taught,
        {kind: paths for kind, (paths, _) in held.items()},
        {kind: forecasts(predictor, taught, paths, size.vocabulary) for kind, (paths, _) in held.items()},
        {kind: gate for kind, (_, gate) in held.items()},
    )
