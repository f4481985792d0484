"""Teaching the predictor of `route_predictor` from a recorded trace; what it predicts with is the same in numpy.

    loss = mean over (token, layer) rows that have an expert of  sum over E of BCE(sigmoid(logit), used)

AdamW, with rates of their own for the body and the last map, warmed up and let down in a line.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.core.inputs import MeterInputs
from moestro.methods.serve._parts.route_file import Floats, Header, check_free, save
from moestro.methods.serve._parts.route_paths import Paths, paths_of, split_heldout, trace_hash
from moestro.methods.serve._parts.route_predictor import BASE, EPSILON, RoutePredictor


if TYPE_CHECKING:
    from torch import Tensor

ROW = 256
"""Tokens of a row in training; longer sequences are cut."""


def fit(
    header: Header, paths: Paths, *, steps: int, batch: int, lr: float, head_lr: float, seed: int
) -> dict[str, Floats]:
    """Weights for a header, taught on paths; the same for a seed, and the global generator is left alone.

    Args:
        steps: updates. batch: rows of ``ROW`` tokens an update. lr, head_lr: peaks, of the body and of the last map.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = _start(header, paths)
        head = [weights["head"], weights["bias"]]
        body = [weight for name, weight in weights.items() if name not in ("head", "bias")]
        groups = [
            {"params": body, "lr": lr, "peak": lr, "weight_decay": 1e-4},
            {"params": head, "lr": head_lr, "peak": head_lr, "weight_decay": 0.01},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        warm = max(1, steps // 20)
        draw = _rows(paths, batch, seed)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
            loss = _loss(weights, header, *next(draw))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_([*body, *head], 1.0)
            optimizer.step()
        with torch.no_grad():
            # A token that was never met says nothing: it stands where the others stand on average.
            met = torch.zeros(header.vocabulary, dtype=torch.bool)
            met[torch.from_numpy(paths.tokens)] = True
            weights["embedding"][~met] = weights["embedding"][met].mean(0)
    return {name: weight.detach().numpy().copy() for name, weight in weights.items()}


def _start(header: Header, paths: Paths) -> dict[str, "Tensor"]:
    """First weights; the bias starts at how often each expert is used."""
    import torch

    found = {}
    for name, shape in header.shapes().items():
        if "norm" in name:
            weight = torch.ones(shape)
        elif name == "bias":
            rate = torch.from_numpy(paths.used.mean(0)).float().clamp(1e-4, 1 - 1e-4)
            weight = torch.log(rate / (1 - rate))
        else:
            weight = torch.randn(shape) * (0.1 if name == "embedding" else shape[-1] ** -0.5 / 2)
        found[name] = weight.requires_grad_()
    return found


def _rows(paths: Paths, batch: int, seed: int) -> Any:
    """Batches (ids [B, S], used [B, S, C], valid [B, S]) without end, every row once before any twice."""
    import torch

    spans = [
        (at, min(at + ROW, int(stop)))
        for start, stop in zip(paths.start[:-1], paths.start[1:], strict=True)
        for at in range(int(start), int(stop), ROW)
    ]
    draw = np.random.default_rng(seed)
    order: list[int] = []
    while True:
        while len(order) < batch:
            order += draw.permutation(len(spans)).tolist()
        chosen, order = [spans[item] for item in order[:batch]], order[batch:]
        width = max(stop - start for start, stop in chosen)
        place = np.stack([np.minimum(np.arange(start, start + width), stop - 1) for start, stop in chosen])
        valid = np.stack([np.arange(width) < stop - start for start, stop in chosen])
        yield torch.from_numpy(paths.tokens[place]), torch.from_numpy(paths.used[place]), torch.from_numpy(valid)


def _loss(
    weights: Mapping[str, "Tensor"], header: Header, ids_BS: "Tensor", used_BSC: "Tensor", valid_BS: "Tensor"
) -> "Tensor":
    import torch
    import torch.nn.functional as F

    logits_BSC = logits_of(weights, header, ids_BS)
    target = used_BSC.float()
    each_BSC = F.binary_cross_entropy_with_logits(logits_BSC, target, reduction="none")
    sizes = [shape.experts for shape in header.layers]
    rows_BSL = torch.stack([part.sum(-1) for part in torch.split(each_BSC, sizes, -1)], -1)
    live_BSL = torch.stack([part.any(-1) for part in torch.split(used_BSC, sizes, -1)], -1) & valid_BS[..., None]
    return (rows_BSL * live_BSL).sum() / live_BSL.sum().clamp(min=1)


def logits_of(weights: Mapping[str, "Tensor"], header: Header, ids_BS: "Tensor") -> "Tensor":
    """Logits [B, S, C] of whole sequences: `RoutePredictor.step` in PyTorch."""
    import torch
    import torch.nn.functional as F

    rows, length = ids_BS.shape
    half = header.dim // header.heads // 2
    place = torch.arange(length)
    angle = place[:, None].float() * BASE ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    open_SS = (place[None] <= place[:, None]) & (place[None] > place[:, None] - header.window)

    def norm(x: "Tensor", name: str) -> "Tensor":
        return F.rms_norm(x, (header.dim,), weights[name], EPSILON)

    def rotated(x: "Tensor") -> "Tensor":
        one, two = x[..., :half], x[..., half:]
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    x = F.embedding(ids_BS, weights["embedding"])
    for number in range(header.depth):
        at = f"blocks.{number}."
        qkv = norm(x, at + "norm1") @ weights[at + "qkv"].T
        q, k, v = qkv.view(rows, length, 3, header.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, attn_mask=open_SS)
        x = x + mixed.transpose(1, 2).reshape(x.shape) @ weights[at + "out"].T
        x = x + F.silu(norm(x, at + "norm2") @ weights[at + "up"].T) @ weights[at + "down"].T
    return norm(x, "norm") @ weights["head"].T + weights["bias"]


def taught(paths: Paths, config: Any, *, seed: int = 0, **header: Any) -> RoutePredictor:
    """A predictor for paths. config: `serve.expertflow`'s; header: more fields of ``Header``."""
    rows = -(-len(paths.tokens) // (config.batch * ROW))
    steps = min(config.steps, config.epochs * rows)
    made = Header(
        layers=paths.layers,
        vocabulary=int(paths.tokens.max()) + 2,
        **{name: getattr(config, name) for name in ("dim", "heads", "inner", "depth", "window")},
        settings={"steps": steps, "seed": seed, **{n: getattr(config, n) for n in ("batch", "lr", "head_lr")}},
        **{"trace": "", **header},
    )
    weights = fit(made, paths, steps=steps, batch=config.batch, lr=config.lr, head_lr=config.head_lr, seed=seed)
    return RoutePredictor(made, weights)


def learned(subject: MeterInputs, config: Any, out: Path) -> dict[str, float]:
    """See `serve.expertflow.learn`."""
    from moestro.methods.serve._parts import route_rivals as rivals

    check_free(out)
    paths = paths_of(subject.trace)
    rest, held = split_heldout(paths, config.held, subject.seed)
    told = subject.trace.header
    made = taught(
        rest,
        config,
        seed=subject.seed,
        trace=trace_hash(subject.trace),
        model=told.model,
        model_hash=told.model_hash,
        tokenizer_hash=told.tokenizer_hash,
    )
    found = {
        "predictor": rivals.by_predictor(made, held),
        "token_table": rivals.by_token(rest, held, int(paths.tokens.max()) + 1),
        "previous_token": rivals.by_previous(rest, held),
        "frequency": rivals.by_frequency(rest, held),
    }
    scores = {}
    for name, ranked in found.items():
        chosen = rivals.top(ranked, paths.layers, config.factor)
        scores[f"{name}_recall"] = rivals.recall(chosen, held.used)
        scores[f"{name}_precision"] = rivals.precision(chosen, held.used)
    save(out, made.header.model_copy(update={"scores": scores}), made.weights)
    return scores
