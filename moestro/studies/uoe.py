"""Union of experts: is half of every layer, chosen token by token, worth more than a layer of half the size?

On digits, an encoder where slices choose positions, as in the paper; on source text, a causal model where each token
chooses its slices. Controls have the same operations: a dense model made narrow, slices chosen by a gate that nobody
trains, a mixture of whole experts. The released code's gate, which the model's loss does not reach, is an arm too.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moestro.core.context import open_stack
from moestro.core.cost import RowCounter, Work, cost, cost_inside
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.session import session
from moestro.core.site import Shared, Site, SiteKind
from moestro.studies._framework import Arm, Beats, Budget, Claim, Matches, Study, Within
from moestro.studies._language import Scale, Text, heldout, text, train
from moestro.training.size import size_of


PATCHES, PIXELS, CLASSES = 16, 4, 10
SLICES, TOP_K = 4, 2
BALANCE = 0.01
LOSSES = {"balance": {"method": "train.balance_loss", "config": {"scope": "batch"}}}
UNIONS = ("union", "union_tokens", "released", "random")


def union_config(arm: str, *, encoder: bool) -> dict[str, Any]:
    """Settings of an arm's slices. A gate that nobody trains weighs nothing, so that none of its gradient leaks."""
    choosing = "expert_choice" if encoder and arm != "union_tokens" else "token_choice"
    learned = arm.startswith("union")
    losses = LOSSES if learned and choosing == "token_choice" else {}  # expert choice is balanced by construction
    return {"mode": choosing, "top_k": TOP_K, "combine": "straight_through" if learned else "sum", "losses": losses}


def exchange(arm: str, blocks: nn.ModuleList, names: tuple[str, str], form: Mapping[str, Any], **about: Any) -> None:
    """Put what an arm has in the place of every dense block: slices, or two experts of half the width and one a token.

    Args:
        names: of attention and feed-forward. form: of the experts. about: what sites tell of the model.
    """
    union, moe = method("train.uoe"), method("train.moe")
    experts = moe.configure({**form, "num_experts": 2, "router": {"method": "train.switch"}, "losses": LOSSES})
    kinds: tuple[SiteKind, ...] = ("attention", "mlp")
    for number, block in enumerate(blocks):
        for kind, name in zip(kinds, names, strict=True):
            site = Site(path=f"{number}.{name}", kind=kind, module=block.get_submodule(name), layer=number, **about)
            if arm in UNIONS:
                config = union.configure(union_config(arm, encoder="family" not in about))
                layer = union.build(site, config, Shared())
                if arm == "random":  # logits of variance 1
                    nn.init.normal_(layer.router.weight, std=site.dim**-0.5)
                    layer.router.requires_grad_(False)
                setattr(block, name, layer)
            elif arm == "mixture" and kind == "mlp":
                setattr(block, name, moe.build(site, experts, Shared()))


def narrowed(flops: Callable[[int], float], target: float) -> int:
    """The number of hidden units whose operations, linear in it, come nearest to the target."""
    return round(1 + (target - flops(1)) / (flops(2) - flops(1)))


# -- digits --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Dense bidirectional attention; answers as Transformers' do."""

    is_causal = False

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, heads * head_dim) for _ in range(3))
        self.o_proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[B, S, D] to [B, S, D]."""
        parts = (linear(x) for linear in (self.q_proj, self.k_proj, self.v_proj))
        heads = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(*heads)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None

    def flops_per_token(self, work: Work) -> float:
        """Projections, and scores and sums over all positions."""
        return cost_inside(self, work) + 4 * self.q_proj.out_features * work.length


class FeedForward(nn.Module):
    """Dense, GELU."""

    activation = "gelu"

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, dim: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = Attention(dim, heads, head_dim), FeedForward(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        x = x + self.attention(self.norm(x))[0]
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """Patches of 2 x 2 pixels to the logits of ten digits."""

    def __init__(self, size: "Digits", heads: int, inner: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, size.dim)
        self.places = nn.Parameter(0.02 * torch.randn(PATCHES * size.dim))
        shape = (size.dim, heads, size.dim // size.heads, inner)
        self.blocks = nn.ModuleList([Block(*shape) for _ in range(size.layers)])
        self.norm, self.head = nn.LayerNorm(size.dim), nn.Linear(size.dim, CLASSES)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """[B, 10] of patches [B, 16, 4]."""
        x = self.embed(inputs_embeds) + self.places.view(PATCHES, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@dataclass(frozen=True)
class Digits:
    """Size of the encoder and of its run."""

    layers: int = 4
    dim: int = 64
    heads: int = 4
    inner: int = 256
    epochs: int = 36
    batch: int = 64
    lr: float = 3e-3
    train: int = 898


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """Patches [1797, 16, 4] and labels of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grid = torch.tensor(pixels, dtype=torch.float32).view(-1, 4, 2, 4, 2) / 8 - 1
    return grid.permute(0, 1, 3, 2, 4).reshape(-1, PATCHES, PIXELS), torch.tensor(labels)


def block_flops(model: Encoder, work: Work) -> float:
    """Operations of the blocks for one token."""
    return sum(cost(block, work) for block in model.blocks)


def encoder(arm: str, size: Digits, seed: int) -> Encoder:
    """The model of an arm; all start from the same dense weights where shapes agree."""
    torch.manual_seed(seed)
    if arm == "narrow":
        target = block_flops(encoder("random", size, seed), Work(PATCHES))
        heads = size.heads * TOP_K // SLICES

        def flops(inner: int) -> float:
            return size.layers * cost(Block(size.dim, heads, size.dim // size.heads, inner).to("meta"), Work(PATCHES))

        return Encoder(size, heads, narrowed(flops, target))
    model = Encoder(size, size.heads, size.inner)
    form = {"expert_size": size.inner // 2, "activation": "gelu", "gated": False, "bias": True}
    exchange(arm, model.blocks, ("attention", "mlp"), form, dim=size.dim, out=size.dim, num_layers=size.layers)
    open_stack(model, "encoder")
    return model


def fit(model: Encoder, size: Digits, order: np.ndarray, seed: int) -> None:
    """AdamW with a cosine; the balance loss is the sum of the layers' means."""
    patches, labels = images()
    draw, per_epoch = np.random.default_rng(seed), len(order) // size.batch
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=size.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.lr, total_steps=size.epochs * per_epoch + 1)
    model.train()
    for step in range(size.epochs * per_epoch):
        at = step % per_epoch * size.batch
        order = order if at else draw.permutation(order)
        chosen = torch.from_numpy(order[at : at + size.batch])
        with session(collect=True) as opened:
            loss = nn.functional.cross_entropy(model(patches[chosen]), labels[chosen])
            for ctx in opened.take():
                loss = loss + BALANCE * sum(term.total for term in ctx.losses.values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def digits(arm: str, seed: int, size: Digits) -> dict[str, float]:
    """Accuracy on the other half of the images, and what a token costs in the blocks."""
    patches, labels = images()
    order = np.random.default_rng(seed).permutation(len(labels))
    model = encoder(arm, size, seed)
    before = gates(model) if arm in UNIONS else torch.empty(0)
    fit(model, size, order[: size.train], seed)
    held, rows = torch.from_numpy(order[size.train :]), RowCounter()
    model.eval()
    with torch.no_grad(), session(recorder=rows):
        right = (model(patches[held]).argmax(1) == labels[held]).double().mean()
    work = Work(PATCHES, training=False, rows=rows.per_token())
    dense = block_flops(Encoder(size, size.heads, size.inner), work)
    found = {"accuracy": 100 * float(right), "share": block_flops(model, work) / dense}
    if arm in UNIONS:
        found |= {
            "gap": gap(model, patches[held[: size.batch]]),
            "turned": float(1 - (nn.functional.cosine_similarity(before, gates(model))).mean()),
        }
        found["moved"] = sum(map(sum, work.rows.values())) * 2 * size.dim * 4
    return found


def gates(model: nn.Module) -> Tensor:
    """A copy of all gates [layers, n D]."""
    routers = [layer.router for layer in mixture_layers(model).values()]
    return torch.stack([router.get_parameter("weight").detach().flatten() for router in routers])


@torch.no_grad()
def gap(model: Encoder, patches: Tensor) -> float:
    """How far the operations of a run are from the formula, as a share of it; the whole model."""
    rows = RowCounter()
    # The fused kernel of a CPU is not counted by torch, the plain one is.
    with FlopCounterMode(display=False) as run, sdpa_kernel(SDPBackend.MATH), session(recorder=rows):
        model(patches)
    head = 2 * model.head.weight.numel() * (1 / PATCHES - 1)  # runs once an image
    said = cost(model, Work(PATCHES, training=False, rows=rows.per_token())) + head
    return abs(run.get_total_flops() / (len(patches) * PATCHES) / said - 1)


# -- source text ---------------------------------------------------------------------------------------------------


def llama_of(size: Scale, heads: int, inner: int) -> Any:
    """A Llama model whose heads keep their width when there are fewer of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.dim, intermediate_size=inner, num_hidden_layers=size.layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=size.dim // size.heads,
        max_position_embeddings=size.length, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def language_model(arm: str, size: Scale, seed: int) -> Any:
    """The model of an arm; all start from the same dense weights where shapes agree."""
    torch.manual_seed(seed)
    if arm == "narrow":
        target = size_of(language_model("random", size, seed), size.length).forward_flops
        heads = size.heads * TOP_K // SLICES

        def flops(inner: int) -> float:
            with torch.device("meta"):
                return size_of(llama_of(size, heads, inner), size.length).forward_flops

        return llama_of(size, heads, narrowed(flops, target))
    model = llama_of(size, size.heads, size.inner)
    about = {"dim": size.dim, "out": size.dim, "num_layers": size.layers, "model_config": model.config}
    form = {"expert_size": size.inner // 2}
    exchange(arm, model.model.layers, ("self_attn", "mlp"), form, family="llama", **about)
    open_stack(model.model, "model")
    return model


def language(arm: str, seed: int, size: Scale, data: Text) -> dict[str, float]:
    """Held-out loss, and what a token costs with the assignments of the held-out rows."""
    model, rows = language_model(arm, size, seed), RowCounter()
    train(model, data.train, size, seed, losses={} if arm in ("dense", "narrow", "random") else {"balance": BALANCE})
    with session(recorder=rows):
        loss = heldout(model, data.heldout, size)
    dense = size_of(llama_of(size, size.heads, size.inner), size.length).forward_flops
    used = size_of(model, size.length, rows=rows.per_token()).forward_flops
    return {"loss": loss, "language_share": used / dense}


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Measure one arm on both tasks; the source text has no encoder arms."""
    small = Digits(layers=1, dim=16, heads=4, inner=32, epochs=1, train=128)
    size = budget.pick(ci=small, micro=Digits(layers=2, epochs=5), full=Digits())
    found = digits(arm, seed, size)
    if arm in ("union_tokens", "released"):
        return found
    scale = budget.pick(
        ci=Scale(layers=1, dim=32, inner=64, heads=4, vocabulary=300, length=32, batch=4, steps=3, heldout=4),
        micro=Scale(layers=2, dim=64, inner=256, heads=4, vocabulary=512, length=64, steps=40, heldout=16),
        full=Scale(vocabulary=512, steps=150),
    )
    data = text(scale.vocabulary, scale.length, scale.heldout, limit=budget.pick(ci=6, micro=120, full=None))
    return {**found, **language(arm, seed, scale, data)}


CLAIMED = "perplexity 2.38 lower than the best mixture with 76 % of its operations"
LANGUAGE = {"where": "abstract, language modelling", "claimed": CLAIMED, "metric": "loss"}
LACKS = {"where": "the control the paper lacks", "claimed": "not measured in the paper"}

STUDY = Study(
    paper="uoe",
    title="Half of every layer against a layer of half the size",
    setting=(
        "An encoder (4 layers, width 64, 4 heads, 256 hidden units) on scikit-learn's digits as 16 patches, 898 images "
        "for 36 epochs; slices choose half of the positions. A Llama model (4 layers, width 128, 4 heads, 512 hidden "
        "units) on the standard library's sources, 150 steps of 1024 tokens; tokens choose half the slices. Controls "
        "of equal operations have half the heads. The paper trains 16 layers on WikiText-103, and on long sequences."
    ),
    claims=(
        Claim(
            key="digits_against_narrow",
            text="At equal operations a union of experts classifies better than a narrow dense encoder.",
            judge=Beats(method="union", control="narrow", better="higher", by=0.5),
            tells="union {union}, where tokens choose {union_tokens}; narrow {narrow}, dense {dense}, random {random}.",
            where="abstract, image classification",
            claimed="+1.75 points on average at comparable operations",
            metric="accuracy",
        ),
        Claim(
            key="digits_routing",
            text="A trained gate classifies better than one drawn at random.",
            metric="accuracy",
            judge=Beats(method="union", control="random", better="higher"),
            tells="union {union}, its gates turned by {union.turned}; random {random}, gates untaught {released}.",
            **LACKS,
        ),
        Claim(
            key="released_gate",
            text="Slices summed as in the released code do as well as with a frozen random gate: it is not learned.",
            where="released code, UoME_DS and SMHA",
            claimed="described as learned routing",
            metric="accuracy",
            judge=Matches(method="released", other="random", tolerance=1.0),
            tells="released {released}, random {random}; training turned the released gates by {released.turned}.",
        ),
        Claim(
            key="language_against_narrow",
            text="At equal operations a union of experts predicts text better than a narrow dense model.",
            judge=Beats(method="union", control="narrow", by=0.01),
            tells="union {union}, narrow {narrow}, dense {dense}, random slices {random}, two whole experts {mixture}.",
            **LANGUAGE,
        ),
        Claim(
            key="language_routing",
            text="A trained gate predicts text better than one drawn at random.",
            metric="loss",
            judge=Beats(method="union", control="random"),
            tells="union {union}, random {random}, narrow {narrow}, dense {dense}.",
            **LACKS,
        ),
        Claim(
            key="language_against_mixture",
            text="A union of experts predicts text better than a mixture that costs more.",
            judge=Beats(method="union", control="mixture", by=0.01),
            tells="union {union} at {union.language_share} of the dense operations, mixture {mixture.language_share}.",
            **LANGUAGE,
        ),
        Claim(
            key="operations",
            text="The operations of a run are those of the formula.",
            where="abstract: operations are reported",
            claimed="equal",
            metric="gap",
            judge=Within(arm="union", high=0.02),
            tells="union {union}; where tokens choose, loads differ and kernels fill up: {union_tokens}.",
        ),
    ),
    arms=(
        Arm(name="union", text="slices of half the positions (text: half the slices of a token), gate trained"),
        Arm(name="union_tokens", text="digits: tokens choose slices, gate trained", role="reference"),
        Arm(name="released", text="digits: slices summed as in the released code, no gradient to the gate"),
        Arm(name="random", text="slices summed, gate drawn and frozen", role="control"),
        Arm(name="narrow", text="dense, half the heads, hidden units for equal operations", role="control"),
        Arm(name="mixture", text="dense attention, one of two experts of half the width", role="control"),
        Arm(name="dense", text="the dense model, twice the operations", role="reference"),
    ),
    run=run,
    methods=("train.uoe", "train.moe", "train.switch", "train.balance_loss"),
    units={"accuracy": "per cent", "loss": "nats a token", "gap": "share of the formula"},
)
