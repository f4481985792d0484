"""QMoE: how little is lost with three values a row, what the code adds to that, and what a product then costs.

A float mixture with rows of 512 and 768 inputs is trained inside the job, and copies of it are packed: to the nearest
or by GPTQ on training text, in 2 bits or ternary. Bits are those of a safetensors file of the experts, by weight of the
float mixture, so that experts left out count as saved. Fewer experts in more bits are the control at equal bytes.
Codes are also judged alone, on independent symbols with the zeros of the paper, against a general compressor.
"""

import functools
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from moestro import surgery
from moestro.core.inputs import MeterInputs
from moestro.core.layer import mixture_layers
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts
from moestro.core.registry import method
from moestro.methods.planning import make_plan
from moestro.observe import collect
from moestro.ops.formats import Packing, format_named, packed_linear, packing, quantise
from moestro.studies._framework import Arm, Beats, Budget, Claim, NotWorse, Study, Within
from moestro.studies._mixture import Mixture, corpus_of, loss_of, rows_of, size_of, trained


TERNARY, TWO, FOUR = "ternary:row:bf16", "uint2:row:bf16", "uint4:row:bf16"
PACKED: Mapping[str, Mapping[str, Any]] = {
    "nearest_2bit": {"up": TWO, "down": TWO, "rounding": "nearest"},
    "nearest_ternary": {"rounding": "nearest"},
    "gptq_2bit": {"up": TWO, "down": TWO},
    "gptq_ternary": {},
    "gptq_template": {},
    "gptq_template_skipped": {"skip_unlabelled": True},
    "gptq_down_3bit": {"down": "uint3:row:bf16"},
    "half_2bit": {"up": TWO, "down": TWO},
    "quarter_4bit": {"up": FOUR, "down": FOUR},
}
KEPT = {"half_2bit": 2, "quarter_4bit": 4}  # one expert of so many stays
ZEROS, WIDTH = 0.885, 3072  # the paper's design point, and its widest rows
CODES = {"code_tree": "ternary", "code_paper": "ternary14", "code_trits": "trits", "code_zlib": "trits"}
TEMPLATE = 4  # a row begins with a fourth of its length in template tokens


def scale(budget: Budget) -> Mixture:
    """A mixture whose rows are wide enough for less than one bit."""
    full: dict[str, Any] = {"dim": 512, "inner": 768, "heads": 8, "steps": 200, "lr": 1e-3}
    return size_of(budget, **budget.pick(ci={"layers": 1}, micro={"dim": 96, "inner": 128, "steps": 60}, full=full))


@functools.cache
def calibration(seed: int, budget: Budget) -> list[dict[str, Tensor]]:
    """Training rows."""
    size = scale(budget)
    return rows_of(corpus_of(size).train, size, seed + 7, limit=budget.pick(ci=4, micro=64, full=256))


def with_template(batches: Sequence[Mapping[str, Tensor]], token: int) -> list[dict[str, Tensor]]:
    """The rows with the same token again and again in front, as many tokens as before; it has no labels."""
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        count = ids.shape[1] // TEMPLATE
        rest = ids[:, :-count]
        front = torch.full_like(ids[:, :count], token)
        labels = torch.cat([torch.full_like(front, -100), rest], 1)
        found.append({"input_ids": torch.cat([front, rest], 1), "labels": labels})
    return found


# -- packing ------------------------------------------------------------------------------------------------------


def prune(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], one_of: int) -> None:
    """Keep the experts of each layer that most calibration tokens chose."""
    layers = []
    for number, (_, stats) in enumerate(collect(model, batches).items()):
        count = max(2, stats.num_experts // one_of)
        best = sorted(stats.count_E.argsort(descending=True)[:count].tolist())
        layers.append(LayerExperts(layer=number, experts=[[ExpertSource(layer=number, expert=e)] for e in best]))
    surgery.apply(model, ExpertPlan(method="study", layers=layers))


def weights_of(model: nn.Module) -> int:
    """Weights of all expert matrices."""
    banks: list[Any] = [layer.bank for layer in mixture_layers(model).values()]
    return sum(bank.num_experts * bank.flops_per_row(0) // 2 for bank in banks)


def packed(arm: str, seed: int, budget: Budget) -> nn.Module:
    """A copy of the trained mixture as the arm stores it."""
    model = trained(scale(budget), seed)
    rows = calibration(seed, budget)
    if arm.startswith("gptq_template"):
        rows = with_template(rows, token=int(rows[0]["input_ids"].flatten().bincount().argmax()))
    if arm in KEPT:
        prune(model, rows, KEPT[arm])
    surgery.apply(model, make_plan("compress.qmoe", model, PACKED[arm]), calib=rows)
    return model


def file_bytes(model: nn.Module) -> int:
    """Bytes of a file with the experts and nothing else."""
    tensors: dict[str, Tensor] = {}
    for site, layer in mixture_layers(model).items():
        state = {**dict(layer.bank.named_parameters()), **dict(layer.bank.named_buffers())}
        tensors |= {f"{site}.{name}": tensor.detach().contiguous() for name, tensor in state.items()}
    return len(safetensors.torch.save(tensors))


@functools.cache
def stored(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Loss, bits, zeros of one way of storing the mixture."""
    size = scale(budget)
    source = trained(size, seed)
    heldout = corpus_of(size).heldout
    if arm == "float":
        model = source
        bits = 16.0  # as the paper counts the checkpoint
    else:
        model = packed(arm, seed, budget)
        bits = 8 * file_bytes(model) / weights_of(source)
    found = {"loss": loss_of(model, heldout, size), "bits": bits}
    if "ternary" in arm:
        meter = method("inspect.packed_codes")
        report = meter.module.measure(MeterInputs(model=model), meter.configure({}))
        found |= {key: report.numbers[f"ternary_{key}"] for key in ("zeros", "entropy", "codes", "beside")}
    return found


# -- codes and products -------------------------------------------------------------------------------------------


def coded(arm: str, seed: int, budget: Budget) -> dict[str, float]:
    """Bits a weight of independent symbols: words alone, and with all that is stored for a row."""
    rows = budget.pick(ci=16, micro=128, full=512)
    draw = torch.Generator().manual_seed(seed)
    sign = torch.randint(1, 3, (1, rows, WIDTH), dtype=torch.uint8, generator=draw)
    symbols = (torch.rand(1, rows, WIDTH, generator=draw) >= ZEROS).to(torch.uint8) * sign
    form = format_named(CODES[arm])
    values = {"low": -torch.ones(1, rows, 1), "high": torch.ones(1, rows, 1)}
    parts, used = form.pack(symbols, values, Packing(form.name, None, "bf16"))
    decoded, _ = form.unpack(parts, (rows, WIDTH), used)
    codes = len(zlib.compress(parts["codes"].numpy().tobytes(), 9)) if arm == "code_zlib" else parts["codes"].nbytes
    beside = sum(part.nbytes for name, part in parts.items() if name != "codes")
    entropy = -ZEROS * math.log2(ZEROS) - (1 - ZEROS) * math.log2((1 - ZEROS) / 2)
    return {
        "code_bits": 8 * codes / symbols.numel(),
        "all_bits": 8 * (codes + beside) / symbols.numel(),
        "times_entropy": 8 * codes / symbols.numel() / entropy,
        "wrong": float((decoded != symbols).sum()),
    }


def clocked(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of calls in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(taken[1:]) for name, taken in seconds.items()}


def product(arm: str, seed: int, budget: Budget) -> dict[str, float]:
    """Times that a product with a packed matrix takes that of the dense one in float32, and the share of its bytes."""
    out, width = budget.pick(ci=(64, 512), micro=(768, 2048), full=(768, 2048))
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, out, width, generator=draw)
    used = packing({"product_ternary": TERNARY, "product_2bit": TWO}[arm])
    stack, used = quantise(weight, used)
    parts = {name: part[0] for name, part in stack.items()}
    found = {"share": sum(part.nbytes for part in parts.values()) / weight.nbytes}
    for tokens, name in ((1, "times_dense"), (32, "times_dense_32")):
        x = torch.randn(tokens, width, generator=draw)
        seconds = clocked(
            {
                "packed": functools.partial(packed_linear, x, parts, (out, width), used),
                "dense": functools.partial(nn.functional.linear, x, weight[0]),
            },
            budget.pick(ci=3, micro=15, full=41),
        )
        found[name] = seconds["packed"] / seconds["dense"]
    return found


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Measure a way of storing the mixture, a code, or a product."""
    if arm in CODES:
        return coded(arm, seed, budget)
    if arm.startswith("product"):
        return product(arm, seed, budget)
    found = dict(stored(arm, seed, budget))
    if arm == "gptq_ternary":
        near, whole = stored("nearest_ternary", seed, budget)["loss"], stored("float", seed, budget)["loss"]
        found["recovered"] = (near - found["loss"]) / max(near - whole, 1e-9)
    return found


LOSSES = (
    "held-out loss: float {float.loss}; nearest 2 bits {nearest_2bit.loss}, ternary {nearest_ternary.loss}; GPTQ 2 "
    "bits {gptq_2bit.loss}, ternary {gptq_ternary.loss}, ternary with down in 3 bits {gptq_down_3bit.loss}; bits a "
    "weight {gptq_2bit.bits}, {gptq_ternary.bits} and {gptq_down_3bit.bits}."
)
AT_BYTES = (
    "loss and bits a weight: ternary {gptq_ternary.loss} at {gptq_ternary.bits}, half of the experts in 2 bits "
    "{half_2bit.loss} at {half_2bit.bits}, a quarter in 4 bits {quarter_4bit.loss} at {quarter_4bit.bits}; all experts "
    "in 2 bits {gptq_2bit.loss} at {gptq_2bit.bits}."
)
CODED = (
    "bits a weight without and with what is stored for a row: tree {code_tree.code_bits} and {code_tree.all_bits}, the "
    "paper's dictionary {code_paper.code_bits} and {code_paper.all_bits}, zlib {code_zlib.code_bits}, five trits a "
    "byte {code_trits.code_bits}; times the entropy {code_tree.times_entropy}, {code_paper.times_entropy} and "
    "{code_zlib.times_entropy}."
)

STUDY = Study(
    paper="qmoe",
    title="Experts in less than one bit",
    setting=(
        "A decoder of 3 layers, width 512, 8 experts of width 768 and 2 a token, trained for 200 steps of 768 tokens "
        "of the standard library's source files in float32; calibrated on 256 rows of them, measured on others. The "
        "paper compresses trained Switch Transformers of 7 to 1600 billion parameters, which bear noise far better "
        "than a model as small and as little trained as this: relative losses stand beside each other and are not the "
        "same thing. Its special tokens are the masks of its training task; here a fourth of each calibration row is "
        "one token again and again, as a template would be. Products run on a CPU in PyTorch, the paper's in CUDA "
        "kernels."
    ),
    claims=(
        Claim(
            key="recovered",
            text="Data-dependent rounding recovers at least half of what rounding to three values loses.",
            where="table 2",
            claimed="loss 4.54 to 1.99, of 1.73 (base128); 2.15 to 1.26, of 1.18 (c2048)",
            metric="recovered",
            judge=Within(arm="gptq_ternary", low=0.5),
            tells=LOSSES,
        ),
        Claim(
            key="nearest_fails",
            text="Ternary by GPTQ is better than to the nearest.",
            where="table 2",
            claimed="1.99 against 4.54 (base128)",
            metric="loss",
            judge=Beats(method="gptq_ternary", control="nearest_ternary", by=0.02, relative=True),
            tells=LOSSES,
        ),
        Claim(
            key="ternary_loss",
            text="Ternary experts cost at most 6.7 % of the loss.",
            where="table 2, c2048",
            claimed="6.7 %",
            metric="loss",
            judge=NotWorse(method="gptq_ternary", control="float", tolerance=0.067, relative=True),
            tells=LOSSES,
        ),
        Claim(
            key="two_bit_loss",
            text="Experts in 2 bits cost at most 1.7 % of the loss.",
            where="table 2, c2048",
            claimed="1.7 %",
            metric="loss",
            judge=NotWorse(method="gptq_2bit", control="float", tolerance=0.017, relative=True),
            tells=LOSSES,
        ),
        Claim(
            key="sub_one_bit",
            text="A file of the ternary experts has less than one bit a weight, all that is stored counted.",
            where="table 6",
            claimed="0.807 bits (c2048)",
            metric="bits",
            judge=Within(arm="gptq_ternary", high=1.0),
            tells=(
                "{gptq_ternary} bits; words {gptq_ternary.codes}, beside them {gptq_ternary.beside}; zeros "
                "{gptq_ternary.zeros}, entropy {gptq_ternary.entropy}, to the nearest {nearest_ternary.zeros} and "
                "{nearest_ternary.entropy}; symbols with the paper's zeros take {code_tree.all_bits} at width 3072."
            ),
        ),
        Claim(
            key="zeros",
            text="Without any pressure towards it, 85 % of the symbols or more are zero.",
            where="table 5",
            claimed="85.7 to 88.6 %",
            metric="zeros",
            judge=Within(arm="gptq_ternary", low=0.85),
            tells="zeros {gptq_ternary} by GPTQ, {nearest_ternary} to the nearest, in rows of 512 and 768.",
        ),
        Claim(
            key="equal_bytes",
            text="All experts in three values are better than half of them in 2 bits, at no more bytes.",
            where="the control at equal bytes",
            claimed="not measured in the paper",
            metric="loss",
            judge=Beats(method="gptq_ternary", control="half_2bit"),
            tells=AT_BYTES,
        ),
        Claim(
            key="equal_bytes_4bit",
            text="They are better than a quarter of the experts in 4 bits, at no more bytes.",
            where="the control at equal bytes",
            claimed="not measured in the paper",
            metric="loss",
            judge=Beats(method="gptq_ternary", control="quarter_4bit"),
            tells=AT_BYTES,
        ),
        Claim(
            key="special_tokens",
            text="Leaving special tokens out of calibration is better.",
            where="table 4",
            claimed="ternary 2.16 to 1.99, 2 bits 1.86 to 1.76 (base128)",
            metric="loss",
            judge=Beats(method="gptq_template_skipped", control="gptq_template"),
            tells="a template left out {gptq_template_skipped}, measured {gptq_template}; without one {gptq_ternary}.",
        ),
        Claim(
            key="rate",
            text="The paper's code stays below its 0.807 bits on rows of 3072 with 88.5 % zeros, all counted.",
            where="table 6",
            claimed="0.807 bits at 88.6 %",
            metric="all_bits",
            judge=Within(arm="code_paper", high=0.807),
            tells=CODED,
        ),
        Claim(
            key="near_entropy",
            text="The paper's code needs at most 1.2 times the entropy.",
            where="section 4.1: the limit of independent symbols is 25.40 times, of its code 21.11",
            claimed="1.203",
            metric="times_entropy",
            judge=Within(arm="code_paper", high=1.203),
            tells=CODED,
        ),
        Claim(
            key="better_code",
            text="Words for the leaves of a tree are shorter by a twentieth than the paper's dictionary.",
            where="not of the paper: the code that is the default here",
            claimed="none",
            metric="code_bits",
            judge=Beats(method="code_tree", control="code_paper", by=0.05, relative=True),
            tells=CODED,
        ),
        Claim(
            key="general_compressor",
            text="A dictionary of fixed words is shorter than a general compressor on packed trits.",
            where="section 4.1: why a code of its own",
            claimed="not measured in the paper",
            metric="code_bits",
            judge=Beats(method="code_paper", control="code_zlib"),
            tells=CODED,
        ),
        Claim(
            key="speed",
            text="A product with coded weights takes at most 1.05 times that with dense ones.",
            where="abstract and section 5.3",
            claimed="at most 1.05 times end to end on GPUs, products alone up to 35 % faster than bfloat16",
            metric="times_dense",
            judge=Within(arm="product_ternary", high=1.05),
            tells=(
                "for one token {product_ternary} times, for 32 {product_ternary.times_dense_32}, from "
                "{product_ternary.share} of the bytes; in 2 bits {product_2bit} and {product_2bit.times_dense_32} from "
                "{product_2bit.share}: unpacking in PyTorch takes the time, coded or not."
            ),
        ),
    ),
    arms=(
        Arm(name="float", text="the trained mixture", role="control"),
        Arm(name="nearest_2bit", text="2 bits, to the nearest", role="control"),
        Arm(name="nearest_ternary", text="three values, to the nearest", role="control"),
        Arm(name="gptq_2bit", text="2 bits by GPTQ", role="reference"),
        Arm(name="gptq_ternary", text="three values by GPTQ, coded"),
        Arm(name="gptq_down_3bit", text="three values, the down projection in 3 bits", role="reference"),
        Arm(name="half_2bit", text="the half of the experts that is used most, 2 bits by GPTQ", role="control"),
        Arm(name="quarter_4bit", text="the quarter that is used most, 4 bits by GPTQ", role="control"),
        Arm(name="gptq_template", text="three values, calibrated on rows with a template", role="control"),
        Arm(name="gptq_template_skipped", text="the same rows, the template left out"),
        Arm(name="code_tree", text="words for leaves, on independent symbols"),
        Arm(name="code_paper", text="words of the paper's dictionary, on the same"),
        Arm(name="code_trits", text="five symbols a byte", role="reference"),
        Arm(name="code_zlib", text="the same, compressed by zlib at level 9", role="control"),
        Arm(name="product_ternary", text="a product with a coded matrix"),
        Arm(name="product_2bit", text="a product with a matrix in 2 bits", role="reference"),
    ),
    run=run,
    methods=("compress.qmoe", "compress.packed_experts", "inspect.packed_codes"),
    units={
        "loss": "nats a token, held out",
        "bits": "bits a weight of the float mixture",
        "recovered": "share of what rounding lost",
        "all_bits": "bits a weight",
        "code_bits": "bits a weight",
        "times_dense": "times the dense product",
    },
)
