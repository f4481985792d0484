"""Reference model R with experts of few bits, packed; and what such choices cost the trained mixture in perplexity.

R's weights are random, so nothing is lost by rounding them to the nearest; what bits cost is measured on the mixture
whose routing is replayed.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from moestro.testing.bench import _reference as reference
from moestro.testing.bench._trained import STEPS, trained_model
from moestro.testing.bench.low_bits import ZEROS


FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    "mixed": ("sign1:g64:f16", *2 * ("uint2:g64:f16",), *5 * ("uint3:g64:f16",)),
    "ternary": ("ternary:row:bf16",),
}
"""Packings of a layer's experts, in turns: MC-MoE's programme at 2.5 bits; three values, 88.5 % of them zero."""
_BITS: Final = {"sign1": 1.0, "uint2": 2.0, "uint3": 3.0, "ternary": float(np.log2(3))}
RESIDENT_BITS: Final = 4
CALIBRATION: Final = 32
"""Rows of 128 tokens."""


def packed(folder: Path, name: str) -> Path:
    """R in one of ``FORMATS``, what every token needs in 4 bits; made when missing."""
    path = folder / f"packed-{name}"
    if not (path / "pack.json").is_file():
        from moestro import surgery
        from moestro.core.plan import BitPlan
        from moestro.engine.pack import pack_model
        from moestro.models.load import load
        from moestro.models.save import save

        reference.tell(f"compressing the reference model: {name}")
        model = load(str(reference.checkpoint(folder)))
        if name == "ternary":
            _make_ternary(model)
        formats = {
            f"{layer}/{expert}/{part}": FORMATS[name][expert % len(FORMATS[name])]
            for layer in range(reference.LAYERS)
            for expert in range(reference.EXPERTS)
            for part in ("gate", "up", "down")
        }
        bits = {key: _BITS[kind.partition(":")[0]] for key, kind in formats.items()}
        surgery.apply(model, BitPlan(method="compress.mc_moe", bits=bits, formats=formats))
        work = folder / f"compressed-{name}"
        shutil.rmtree(work, ignore_errors=True)
        save(model, work)
        pack_model(work, path, resident_bits=RESIDENT_BITS, progress=reference.tell)
        shutil.rmtree(work)
    return path


def _make_ternary(model: Any) -> None:
    """Expert weights to three values a row, most of them zero, as QMoE finds them in trained experts."""
    import torch

    from moestro.core.bank import StackedFFN

    for bank in model.modules():
        if isinstance(bank, StackedFFN):
            for weight in (bank.gate_up_proj, bank.down_proj):
                with torch.no_grad():
                    for matrix in weight:
                        size = matrix.float().abs()
                        edge = size.flatten().kthvalue(int(ZEROS * size.numel())).values
                        value = size.amax(1, keepdim=True)
                        matrix.copy_(torch.where(size > edge, value * matrix.float().sign(), torch.zeros(())))


def perplexities(folder: Path, tell: Callable[[str], None] = reference.tell) -> dict[str, float]:
    """Held-out perplexity of the trained mixture by arm: float, 4 bits, 2.5 bits, and both of these pruned."""
    import torch

    from moestro import surgery
    from moestro.data.corpora import corpus
    from moestro.data.tokens import open_tokenizer
    from moestro.methods.planning import make_plan
    from moestro.methods.serve.dynamic_pruning import Config, pruning
    from moestro.models.load import load
    from moestro.training.evaluate import score_texts

    source = trained_model(folder, STEPS)
    tokenizer = open_tokenizer(source)
    ids = [i for text in corpus("stdlib-docs", "train")[:40] for i in tokenizer(text)["input_ids"]]
    data = list(torch.tensor(ids[: CALIBRATION * 128]).view(-1, 4, 128))
    texts = corpus("stdlib-docs", "heldout")[:4]
    found = {}
    for name, settings in {
        "float": None,
        "4 bits": {"avg_bits": 4, "allocation": "uniform", "choices": (4,)},
        "2.5 bits": {"avg_bits": 2.5},
    }.items():
        tell(f"perplexity of the trained mixture: {name}")
        model = load(str(source), dtype="float32")
        if settings is not None:
            plan = make_plan("compress.mc_moe", model, {"group_size": 32, **settings}, batches=data)
            surgery.apply(model, plan, calib=data)
        found[name] = score_texts(model, tokenizer, texts).perplexity
        drops: Any = make_plan("serve.dynamic_pruning", model, {}, batches=data)
        with pruning(model, Config(**drops.decoder.config)):
            found[f"{name}, pruned"] = score_texts(model, tokenizer, texts).perplexity
    return found
