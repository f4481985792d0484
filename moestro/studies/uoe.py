"""Union of experts: is half of every layer, chosen token by token, worth more than a layer of half the size?

On digits, an encoder where slices choose positions, as in the paper; on source text, a causal model where each token
chooses its slices. Controls have the same operations: a dense model made narrow, the narrow one with two feed-forwards
to choose from, slices chosen by a gate that nobody trains. The released code's gate, which the model's loss does not
reach, is an arm too. What the dense model of the text loses when it is cut after its training is measured beside it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moestro.core.bank import Bank
from moestro.core.context import RoutingContext, open_stack
from moestro.core.cost import RowCounter, Work, cost
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.router import Router, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.session import session
from moestro.core.site import Shared, Site, SiteKind
from moestro.studies._framework import Arm, Beats, Budget, Claim, Matches, Study, Within
from moestro.studies._language import Scale, Text, heldout, text, train
from moestro.studies._patches import PATCHES, Digits, Encoder, images
from moestro.training.size import size_of


SLICES, TOP_K = 4, 2
BALANCE = 0.01
LOSSES = {"balance": {"method": "train.balance_loss", "config": {"scope": "batch"}}}
UNIONS = ("union", "union_tokens", "released", "random")
EQUAL = ("narrow", "equal_mixture")  # half the heads, and hidden units for the operations of the union
MIXTURES = ("mixture", "equal_mixture")
CUT, CUT_TOP_K = 8, 6


def union_config(arm: str, *, encoder: bool) -> dict[str, Any]:
    """Settings of an arm's slices. A gate that nobody trains weighs nothing, so that none of its gradient leaks."""
    choosing = "expert_choice" if encoder and arm != "union_tokens" else "token_choice"
    learned = arm.startswith("union")
    losses = LOSSES if learned and choosing == "token_choice" else {}  # expert choice is balanced by construction
    return {"mode": choosing, "top_k": TOP_K, "combine": "straight_through" if learned else "sum", "losses": losses}


def exchange(arm: str, blocks: nn.ModuleList, attention: str, form: Mapping[str, Any], **about: Any) -> None:
    """Put what an arm has in the place of every dense block: slices, or two experts and one of them a token.

    Args:
        attention: its name in a block. form: of the experts. about: what sites tell of the model.
    """
    union, moe = method("train.uoe"), method("train.moe")
    experts = moe.configure({**form, "num_experts": 2, "router": {"method": "train.switch"}, "losses": LOSSES})
    places: dict[SiteKind, str] = {"attention": attention, "mlp": "mlp"}
    for number, block in enumerate(blocks):
        for kind, name in places.items():
            site = Site(path=f"{number}.{name}", kind=kind, module=block.get_submodule(name), layer=number, **about)
            if arm in UNIONS:
                layer = union.build(site, union.configure(union_config(arm, encoder="family" not in about)), Shared())
                if arm == "random":  # logits of variance 1
                    nn.init.normal_(layer.router.weight, std=site.dim**-0.5)
                    layer.router.requires_grad_(False)
                setattr(block, name, layer)
            elif arm in MIXTURES and kind == "mlp":
                setattr(block, name, moe.build(site, experts, Shared()))


def as_dense(model: Any, dense: nn.Module) -> Any:
    """The model with the dense one's weights wherever names and shapes agree."""
    own = model.state_dict()
    same = {name: value for name, value in dense.state_dict().items() if name in own and value.shape == own[name].shape}
    model.load_state_dict(same, strict=False)
    return model


def narrowed(flops: Callable[[int], float], target: float) -> int:
    """The number of hidden units whose operations, linear in it, come nearest to the target."""
    return round(1 + (target - flops(1)) / (flops(2) - flops(1)))


# -- digits --------------------------------------------------------------------------------------------------------


def block_flops(model: Encoder, work: Work) -> float:
    """Operations of the blocks for one token."""
    return sum(cost(block, work) for block in model.blocks)


def exchanged(arm: str, size: Digits, inner: int) -> Encoder:
    """An encoder with an arm's parts; ``inner`` hidden units where operations are to be equal."""
    heads = size.heads * TOP_K // SLICES if arm in EQUAL else size.heads
    drop = 1 - TOP_K / SLICES if arm == "dropout" else 0.0
    model = Encoder(size, heads, inner if arm == "narrow" else size.inner, drop)
    width = inner if arm == "equal_mixture" else size.inner // 2
    form = {"expert_size": width, "activation": "gelu", "gated": False, "bias": True}
    exchange(arm, model.blocks, "attention", form, dim=size.dim, out=size.dim, num_layers=size.layers)
    return model


def encoder(arm: str, size: Digits, seed: int) -> Encoder:
    """The model of an arm; all start from the same dense weights where shapes agree."""
    inner = size.inner
    if arm in EQUAL:
        target = block_flops(exchanged("random", size, inner), Work(PATCHES))
        inner = narrowed(lambda inner: block_flops(exchanged(arm, size, inner), Work(PATCHES)), target)
    torch.manual_seed(seed)
    dense = Encoder(size, size.heads, size.inner)
    model = as_dense(exchanged(arm, size, inner), dense)
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
    return torch.stack([m.router.get_parameter("weight").detach().flatten() for m in mixture_layers(model).values()])


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


def facts(model: Any, size: Scale) -> dict[str, Any]:
    """What the sites of a Llama model tell of it."""
    own = {"family": "llama", "model_config": model.config, "num_layers": size.layers}
    return {**own, "dim": size.dim, "out": size.dim}


def llama_exchanged(arm: str, size: Scale, inner: int) -> Any:
    """A Llama model with an arm's parts; ``inner`` hidden units where operations are to be equal."""
    heads = size.heads * TOP_K // SLICES if arm in EQUAL else size.heads
    model = llama_of(size, heads, inner if arm == "narrow" else size.inner)
    form = {"expert_size": inner if arm == "equal_mixture" else size.inner // 2}
    exchange(arm, model.model.layers, "self_attn", form, **facts(model, size))
    return model


def language_model(arm: str, size: Scale, seed: int) -> Any:
    """The model of an arm; all start from the same dense weights where shapes agree."""
    inner = size.inner
    if arm in EQUAL:

        def flops(model: Any) -> float:
            return size_of(model, size.length).forward_flops

        target = flops(llama_exchanged("random", size, inner))
        inner = narrowed(lambda inner: flops(llama_exchanged(arm, size, inner)), target)
    torch.manual_seed(seed)
    dense = llama_of(size, size.heads, size.inner)
    model = as_dense(llama_exchanged(arm, size, inner), dense)
    open_stack(model.model, "model")
    return model


class BySize(Router):
    """Takes the slices whose answers are largest, for which it computes all of them; or any."""

    def __init__(self, num_slices: int, top_k: int, *, largest: bool) -> None:
        super().__init__(num_slices, top_k=top_k)
        self.largest, self.draw = largest, torch.Generator().manual_seed(0)

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """Norms of the slices' answers, or noise."""
        logits_TC = torch.randn(len(x_TD), self.num_experts, generator=self.draw)
        if self.largest:
            one_T1 = torch.ones(len(x_TD), 1)
            alone = (Routing.from_topk(one_T1.long() * i, one_T1, num_experts=self.num_experts) for i in range(CUT))
            logits_TC = torch.stack([bank(x_TD, routing).norm(dim=-1) for routing in alone], 1)
        return Scores(logits_TC, logits_TC, torch.ones_like(logits_TC))

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """Each slice weighs 1."""
        expert_TK = choose_topk(scores.select_TC, self.top_k or 1)
        weight_TK = scores.gate_TC.gather(1, expert_TK)
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)


def cut(model: Any, size: Scale, data: Text) -> dict[str, float]:
    """Held-out loss of a trained dense model in slices: all of a feed-forward, the largest ones of a token, any."""
    union = method("train.uoe")
    config = union.configure({"num_slices": CUT, "combine": "sum", "losses": {}})
    found, whole = {}, [layer.mlp for layer in model.model.layers]
    tried = {"cut_all": (CUT, True), "cut_largest": (CUT_TOP_K, True), "cut_any": (CUT_TOP_K, False)}
    for name, (top_k, largest) in tried.items():
        for number, layer in enumerate(model.model.layers):
            site = Site(path=f"{number}.mlp", kind="mlp", module=whole[number], **facts(model, size))
            layer.mlp = union.build(site, config, Shared())
            layer.mlp.router = BySize(CUT, top_k, largest=largest)
        found[name] = heldout(model, data.heldout, size)
    return found


def language(arm: str, seed: int, size: Scale, data: Text) -> dict[str, float]:
    """Held-out loss, and what a token costs with the assignments of the held-out rows."""
    model, rows = language_model(arm, size, seed), RowCounter()
    balanced = arm == "union" or arm in MIXTURES
    train(model, data.train, size, seed, losses={"balance": BALANCE} if balanced else {})
    with session(recorder=rows):
        loss = heldout(model, data.heldout, size)
    dense = size_of(llama_of(size, size.heads, size.inner), size.length).forward_flops
    used = size_of(model, size.length, rows=rows.per_token()).forward_flops
    found = {"loss": loss, "language_share": used / dense}
    return found | (cut(model, size, data) if arm == "dense" else {})


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Measure one arm on both tasks; the source text has no encoder arms."""
    small = Digits(layers=1, dim=16, heads=4, inner=32, epochs=1, train=128)
    size = budget.pick(ci=small, micro=Digits(layers=2, epochs=4), full=Digits())
    found = digits(arm, seed, size)
    if arm in ("union_tokens", "released", "dropout"):
        return found
    scale = budget.pick(
        ci=Scale(layers=1, dim=32, inner=64, heads=4, vocabulary=300, length=32, batch=4, steps=3, heldout=4),
        micro=Scale(layers=2, dim=64, inner=256, heads=4, vocabulary=512, length=64, steps=30, heldout=16),
        full=Scale(vocabulary=512, steps=150),
    )
    data = text(scale.vocabulary, scale.length, scale.heldout, limit=budget.pick(ci=6, micro=120, full=None))
    return {**found, **language(arm, seed, scale, data)}


CLAIMED = "perplexity 2.38 lower than the best mixture with 76 % of its operations"
LANGUAGE = {"where": "abstract, language modelling", "claimed": CLAIMED, "metric": "loss"}
IMAGES = {
    "where": "abstract, image classification",
    "claimed": "+1.75 points on average at comparable operations",
    "metric": "accuracy",
}
LACKS = {"where": "the control the paper lacks", "claimed": "not measured in the paper"}

STUDY = Study(
    paper="uoe",
    title="Half of every layer against a layer of half the size",
    setting=(
        "An encoder (4 layers, width 64, 4 heads, 256 hidden units) on scikit-learn's digits as 16 patches, 898 images "
        "for 28 epochs; slices choose half of the positions. A Llama model (4 layers, width 128, 4 heads, 512 hidden "
        "units) on the standard library's sources, 150 steps of 1024 tokens; tokens choose half the slices. Controls "
        "of equal operations have half the heads. The dense model of the text is also cut after its training, its "
        "feed-forwards into 8 slices. The paper trains 16 layers on WikiText-103, and on long sequences."
    ),
    claims=(
        Claim(
            key="digits_against_narrow",
            text="At equal operations a union of experts classifies better than a narrow dense encoder.",
            judge=Beats(method="union", control="narrow", better="higher", by=0.5),
            tells="union {union}, where tokens choose {union_tokens}; narrow {narrow}, random {random}; dense {dense}, "
            "{dropout} when half of it is dropped while training.",
            **IMAGES,
        ),
        Claim(
            key="digits_against_mixture",
            text="At equal operations a union of experts classifies better than a mixture of whole experts.",
            judge=Beats(method="union", control="equal_mixture", better="higher", by=0.5),
            tells="union {union}; one of two experts {equal_mixture}, and narrow without the second {narrow}; with all "
            "heads {mixture} at {mixture.share} of the dense operations.",
            **IMAGES,
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
            tells="union {union}, random {random}, narrow {narrow}; dense {dense}, cut after training "
            "{dense.cut_largest} with the 6 largest of 8 slices of a token, {dense.cut_any} with any 6.",
            **LACKS,
        ),
        Claim(
            key="language_against_equal_mixture",
            text="At equal operations a union of experts predicts text better than a mixture of whole experts.",
            judge=Beats(method="union", control="equal_mixture", by=0.01),
            tells="union {union}; one of two experts {equal_mixture}, and narrow without the second {narrow}.",
            **LANGUAGE,
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
        Arm(name="equal_mixture", text="as narrow, one of two experts, widths for equal operations", role="control"),
        Arm(name="dropout", text="digits: dense, half of heads and hidden units dropped in training", role="reference"),
        Arm(name="dense", text="the dense model, twice the operations", role="reference"),
    ),
    run=run,
    methods=("train.uoe", "train.moe", "train.switch", "train.balance_loss"),
    units={"accuracy": "per cent", "loss": "nats a token", "gap": "share of the formula"},
)
