"""MoE-X: are the hidden units of ReLU experts with a sparsity-aware router easier to read, at no cost in loss?

Games of chess with random legal moves give an exact answer to what a model ought to know: the board. Models learn to
continue games; then single hidden units of the middle layer are asked what stands on each square. The arms take the two
ideas apart (ReLU experts, the router); dense twins of equal active width show what the mixture itself brings. One arm
more starts as copies of a dense model, and one from scratch trains for as long as those copies do.
"""

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro import surgery
from moestro.core.errors import ConfigError
from moestro.core.inputs import MeterInputs
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.data.dataset import Dataset
from moestro.studies._framework import Arm, Beats, Budget, Claim, NotWorse, Study
from moestro.studies._language import Scale, heldout, llama, train


EXPERTS, TOP_K = 8, 2
AUX = {"balance": 0.01}
SQUARES = 64
ACTIVE = {"relu": 0.0, "gelu": 0.05}  # a unit of GELU experts is never exactly 0; of ReLU experts all above 0 count
PARENT = 0.6  # share of the steps that the dense parent of the upcycled arm gets

# Arm -> activation of the experts, router; dense twins are mixtures of one expert.
FORMS = {
    "moe_x": ("relu", "train.moe_x"),
    "relu": ("relu", "train.softmax_topk"),
    "router": ("gelu", "train.moe_x"),
    "gelu": ("gelu", "train.softmax_topk"),
    "dense": ("gelu", None),
    "dense_relu": ("relu", None),
    "upcycled": ("relu", "train.moe_x"),
    "short": ("relu", "train.moe_x"),
}


@dataclass(frozen=True)
class Games:
    """Token ids [B, 1 + 2 plies]: a start token, then from- and to-square of each move.

    After each token, ``mine_BS`` and ``theirs_BS`` hold the squares of the player whose move the token belongs to and
    of the other, one bit a square.
    """

    ids_BS: np.ndarray
    mine_BS: np.ndarray
    theirs_BS: np.ndarray

    def rows(self) -> Dataset:
        """The games as training examples."""
        starts_S = np.arange(self.ids_BS.shape[1]) == 0
        return Dataset({"data": [{"input_ids": ids_S, "starts": starts_S} for ids_S in self.ids_BS]})

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Batches for the probe: a property is "mine", "theirs" or "empty" of one square."""
        mine_BSX, theirs_BSX = (_bits(squares_BS) for squares_BS in (self.mine_BS, self.theirs_BS))
        true_BSP = torch.cat([mine_BSX, theirs_BSX, ~(mine_BSX | theirs_BSX)], -1)
        ids_BS = torch.from_numpy(self.ids_BS)
        return [
            {"input_ids": ids_BS[at : at + size], "properties": true_BSP[at : at + size]}
            for at in range(0, len(ids_BS), size)
        ]


def _bits(squares_BS: np.ndarray) -> Tensor:
    octets = squares_BS.astype("<u8").view(np.uint8).reshape(*squares_BS.shape, 8)
    return torch.from_numpy(np.unpackbits(octets, axis=-1, bitorder="little")).bool()


@functools.cache
def games(count: int, plies: int, seed: int) -> Games:
    """Games of ``plies`` random legal moves each; made once a process. Shorter ones are thrown away.

    Raises:
        ConfigError: python-chess is not installed.
    """
    try:
        import chess
    except ImportError:
        raise ConfigError("the study moe_x plays chess with python-chess; pip install 'moestro[studies]'") from None
    draw = random.Random(seed)
    ids: list[list[int]] = []
    mine, theirs = [], []
    while len(ids) < count:
        board = chess.Board()
        tokens, sides = [SQUARES], [(board.occupied_co[chess.WHITE], board.occupied_co[chess.BLACK])]
        while len(tokens) <= 2 * plies and (moves := list(board.legal_moves)):
            move, player = draw.choice(moves), board.turn
            if move.promotion:
                move.promotion = chess.QUEEN  # two squares then say all
            for square in (move.from_square, move.to_square):
                if len(tokens) % 2 == 0:
                    board.push(move)
                tokens.append(square)
                sides.append((board.occupied_co[player], board.occupied_co[not player]))
        if len(tokens) == 1 + 2 * plies:
            ids.append(tokens)
            mine.append([own for own, _ in sides])
            theirs.append([other for _, other in sides])
    return Games(np.array(ids), np.array(mine, dtype=np.uint64), np.array(theirs, dtype=np.uint64))


@dataclass(frozen=True)
class Setup:
    """Sizes of a budget: the model and its run, games to learn from, held-out games for loss and probe, plies."""

    size: Scale
    train_games: int
    heldout_games: int
    plies: int
    min_true: int

    @property
    def parent_steps(self) -> int:
        """Steps of the dense parent of the upcycled arm; the copies, and the short arm, train for the others."""
        return round(PARENT * self.size.steps)

    @property
    def learned(self) -> Games:
        """Games to learn from."""
        return games(self.train_games, self.plies, 1)

    @property
    def asked(self) -> Games:
        """Held-out games."""
        return games(self.heldout_games, self.plies, 2)


def setup(budget: Budget) -> Setup:
    """A small run for each budget; ``inner`` is the dense width, experts have half of it."""

    def sized(layers: int, dim: int, batch: int, steps: int, plies: int, held: int) -> Scale:
        return Scale(
            layers=layers, dim=dim, inner=4 * dim, heads=4, vocabulary=SQUARES + 1, length=1 + 2 * plies, batch=batch,
            steps=steps, lr=3e-3, heldout=held,
        )  # fmt: skip

    return budget.pick(
        ci=Setup(sized(2, 16, 4, 4, 8, 16), 16, 16, 8, min_true=4),
        micro=Setup(sized(2, 48, 16, 80, 12, 96), 800, 96, 12, min_true=30),
        full=Setup(sized(3, 96, 40, 340, 24, 400), 8000, 400, 24, min_true=100),
    )


def mixture(inner: int, activation: str, router: str | None) -> MethodUse:
    """What stands at a feed-forward site: 8 experts of half the dense width, or the dense twin."""
    form: dict[str, Any] = {"activation": activation, "gated": False, "bias": False}
    if router is None:
        alone = {"method": "train.softmax_topk", "config": {"top_k": 1, "renormalise": False}}
        return MethodUse(method="train.moe", config={**form, "num_experts": 1, "expert_size": inner, "router": alone})
    config = {"top_k": TOP_K, "softmax": "chosen"} if router == "train.softmax_topk" else {"top_k": TOP_K}
    more = {
        "num_experts": EXPERTS,
        "expert_size": inner // TOP_K,
        "router": {"method": router, "config": config},
        "losses": {"balance": {"method": "train.balance_loss"}},
    }
    return MethodUse(method="train.moe", config={**form, **more})


def build(size: Scale, use: MethodUse, seed: int, *, watch: bool = True) -> nn.Module:
    """A Llama model with that at every feed-forward site."""
    model = llama(size, seed, watch=watch)
    layer = method(use.method)
    for number, block in enumerate(model.model.layers):
        site = Site(path=f"model.layers.{number}.mlp", kind="mlp", module=block.mlp, dim=size.dim, layer=number)
        block.mlp = layer.build(site, layer.configure(use.config), Shared())
    return model


def upcycled(there: Setup, seed: int) -> tuple[nn.Module, float]:
    """A dense GELU model with one expert's width, its copies made ReLU experts, trained on; and the loss they cost."""
    size, data, asked, first = there.size, there.learned.rows(), there.asked.rows(), there.parent_steps
    model = build(size, mixture(size.inner // TOP_K, "gelu", None), seed, watch=False)
    train(model, data, size, seed, steps=first)
    before = heldout(model, asked, size)
    use = mixture(size.inner, *FORMS["upcycled"])
    copies = [
        LayerExperts(
            layer=layer,
            experts=[[ExpertSource(layer=layer, expert=0, noise=0.01)]] * EXPERTS,
            router="new",
            module=use,
        )
        for layer in range(size.layers)
    ]
    surgery.apply(model, ExpertPlan(method="convert.upcycle", seed=seed, layers=copies))
    jump = heldout(model, asked, size) - before
    train(model, data, size, seed, steps=size.steps - first, first=first, losses=AUX)
    return model, jump


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one arm, then measure held-out loss and ask the units of the middle layer."""
    there = setup(budget)
    activation, router = FORMS[arm]
    found: dict[str, float] = {}
    if arm == "upcycled":
        model, found["step0_jump"] = upcycled(there, seed)
    else:
        model = build(there.size, mixture(there.size.inner, activation, router), seed)
        first = there.parent_steps if arm == "short" else 0
        losses = AUX if router else {}
        train(model, there.learned.rows(), there.size, seed, steps=there.size.steps - first, first=first, losses=losses)
    found["heldout_loss"] = heldout(model, there.asked.rows(), there.size)
    meter = method("inspect.property_probe")
    settings = {"layers": [there.size.layers // 2], "active_above": ACTIVE[activation], "min_true": there.min_true}
    config = meter.configure(settings)
    subject = MeterInputs(name=arm, model=model.eval(), batches=there.asked.batches(50), seed=seed)
    seen = meter.entry("measure")(subject, config).numbers
    found["coverage"] = seen["coverage"] - seen["coverage by chance"]
    found["reconstruction"] = seen["reconstruction"] - seen["reconstruction by chance"]
    return found | {name.replace(" ", "_").lower(): seen[name] for name in ("L0", "dead units", "empty pairs")}


STUDY = Study(
    paper="moe-x",
    title="Units that can be read",
    setting=(
        "Llama models (3 layers, width 96) with feed-forwards of 384 hidden units, or 8 experts of 192 with 2 active, "
        "on 8000 games of 24 random legal chess moves, two tokens a move; no gate, no bias, balance loss 0.01 (that of "
        "Switch Transformers) in every mixture. All arms but the short one see the same tokens. The probe asks the "
        "middle layer on 400 other games what stands on each square (mine, theirs, empty), and what shuffled labels "
        "reach is subtracted. Units count as active above 0 behind ReLU and beyond 0.05 on either side behind GELU, "
        "the routing weight included. The paper trains 8 layers of width 512 for up to 600,000 steps."
    ),
    claims=(
        Claim(
            key="no_cost",
            text="MoE-X costs no loss against an ordinary mixture.",
            where="comparison on chess",
            claimed="validation loss 0.211 against 0.212",
            metric="heldout_loss",
            judge=NotWorse(method="moe_x", control="gelu", tolerance=0.02, relative=True),
            tells=(
                "The loss is {moe_x} with both changes, {relu} with ReLU experts alone, {router} with this router "
                "alone, {gelu} with neither; a dense model has {dense} with GELU and {dense_relu} with ReLU."
            ),
        ),
        Claim(
            key="reconstruction",
            text="The board can be put together from units better than with an ordinary mixture.",
            where="comparison on chess",
            claimed="0.840 against 0.734",
            metric="reconstruction",
            judge=Beats(method="moe_x", control="gelu", better="higher", by=0.02),
            tells=(
                "Above chance reconstruction is {moe_x} with both changes (L0 {moe_x.l0}), {relu} with ReLU experts "
                "alone ({relu.l0}), {router} with this router alone ({router.l0}), {gelu} with neither ({gelu.l0})."
            ),
        ),
        Claim(
            key="sparser",
            text="Fewer units are active at a time.",
            where="the premise of the method",
            claimed="a sparser code",
            metric="l0",
            judge=Beats(method="moe_x", control="gelu", by=0.2, relative=True),
            tells="L0 is {moe_x} with both, {relu} with ReLU alone, {router} with this router alone, {gelu} without.",
        ),
        Claim(
            key="beats_dense",
            text="The units of the mixture tell more than those of a dense model of equal active width.",
            where="comparison on chess",
            claimed="reconstruction 0.840 against 0.608 (GELU) and 0.581 (ReLU)",
            metric="reconstruction",
            judge=Beats(method="moe_x", control="dense", better="higher", by=0.02),
            tells=(
                "MoE-X reaches {moe_x}, the ordinary mixture {gelu}, the dense model {dense}, dense with ReLU "
                "{dense_relu}; their losses are {moe_x.heldout_loss}, {gelu.heldout_loss}, {dense.heldout_loss} and "
                "{dense_relu.heldout_loss}."
            ),
        ),
        Claim(
            key="mixture_helps",
            text="That is not the activation's doing alone.",
            where="comparison on chess",
            claimed="reconstruction 0.840 against 0.581 for the dense model with ReLU",
            metric="reconstruction",
            judge=Beats(method="moe_x", control="dense_relu", better="higher", by=0.02),
            tells=(
                "MoE-X reaches {moe_x} at L0 {moe_x.l0}, ReLU experts with a learned router {relu} at {relu.l0}, the "
                "dense model with ReLU {dense_relu} at {dense_relu.l0}."
            ),
        ),
        Claim(
            key="coverage",
            text="More squares have a unit of their own than in a dense model.",
            where="comparison on chess",
            claimed="coverage 0.428 against 0.356",
            metric="coverage",
            judge=Beats(method="moe_x", control="dense", better="higher"),
            tells=(
                "Above chance coverage is {moe_x} with both changes, {relu} with ReLU experts alone, {router} with "
                "this router alone, {gelu} with neither, {dense} in the dense model, {dense_relu} there with ReLU."
            ),
        ),
        Claim(
            key="relu_helps",
            text="ReLU experts under a learned router, without the sparsity-aware one, already bring a gain.",
            where="ablation on chess",
            claimed="reconstruction 0.829 with ReLU alone against 0.734 with neither",
            metric="reconstruction",
            judge=Beats(method="relu", control="gelu", better="higher", by=0.02),
            tells=(
                "Under a learned router reconstruction is {relu} with ReLU experts (L0 {relu.l0}) and {gelu} with GELU "
                "ones ({gelu.l0}); a dense model has {dense_relu} with ReLU ({dense_relu.l0}), {dense} with GELU "
                "({dense.l0})."
            ),
        ),
        Claim(
            key="router_helps",
            text="The sparsity-aware router adds to ReLU experts.",
            where="ablation on chess",
            claimed="reconstruction 0.840 against 0.829, coverage 0.428 against 0.418",
            metric="reconstruction",
            judge=Beats(method="moe_x", control="relu", better="higher", by=0.01),
            tells=(
                "With ReLU experts reconstruction is {moe_x} under this router (L0 {moe_x.l0}, coverage "
                "{moe_x.coverage}) and {relu} under a learned one ({relu.l0}, {relu.coverage}); with GELU experts "
                "{router} and {gelu}. Less than 0.01 either way counts as no effect."
            ),
        ),
        Claim(
            key="upcycling_helps",
            text="Experts that start as copies of a dense feed-forward end up easier to read, at equal tokens.",
            where="upcycling against scratch, on chess",
            claimed="reconstruction 0.840 against 0.657 from scratch",
            metric="reconstruction",
            judge=Beats(method="upcycled", control="moe_x", better="higher", by=0.02),
            tells=(
                "Copies had 40 % of the steps as a mixture and reach {upcycled} (loss {upcycled.heldout_loss}, L0 "
                "{upcycled.l0}); from scratch it is {short} in as many steps as a mixture ({short.heldout_loss}, "
                "{short.l0}) and {moe_x} in all steps ({moe_x.heldout_loss}, {moe_x.l0}); a dense model with ReLU "
                "reaches {dense_relu}. ReLU for GELU cost the copies {upcycled.step0_jump} at first."
            ),
        ),
    ),
    arms=(
        Arm(name="moe_x", text="ReLU experts, sparsity-aware router"),
        Arm(name="relu", text="ReLU experts, learned router", role="control"),
        Arm(name="router", text="GELU experts, sparsity-aware router", role="reference"),
        Arm(name="gelu", text="GELU experts, learned router", role="control"),
        Arm(name="dense", text="a dense GELU feed-forward of equal active width", role="control"),
        Arm(name="dense_relu", text="a dense ReLU feed-forward of equal active width", role="control"),
        Arm(name="upcycled", text="MoE-X from copies of a dense GELU model that had 60 % of the steps"),
        Arm(name="short", text="MoE-X from scratch, for the 40 % of the steps that the copies have", role="reference"),
    ),
    run=run,
    methods=("train.moe_x", "train.softmax_topk", "train.balance_loss", "train.moe", "inspect.property_probe"),
    units={
        "heldout_loss": "nats a token",
        "reconstruction": "F1 above chance",
        "coverage": "F1 above chance",
        "l0": "active units a token",
        "step0_jump": "nats a token",
    },
)
