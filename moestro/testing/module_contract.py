"""Checks of the entry `build`: each builds the method into a small stack and looks at what it does there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from moestro.core.bank import StackedFFN
from moestro.core.context import RoutingContext, checkpoint_contexts, open_stack
from moestro.core.cost import RowCounter, Work, cost
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.losses import RoutingLoss
from moestro.core.registry import Method, method
from moestro.core.router import Router
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.core.site import Borrowed, Shared, Site
from moestro.testing.contracts import example_config
from moestro.testing.contracts import settings_round_trip as settings_round_trip
from moestro.testing.operations import operation_counter
from moestro.training.size import size_of


VOCABULARY, DIM, INNER = 32, 16, 24
PATH = "layers.0.mlp"
IDS = ((3, 9, 4, 27, 1, 12), (5, 5, 30, 2, 8, 17))


class Stack(nn.Module):
    """Embedding, then the site: the smallest model that opens a routing context."""

    def __init__(self, module: nn.Module, shared: Shared) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.site = module
        self.shared = shared.modules

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, S, O] of token ids [B, S]."""
        y: Tensor = self.site(self.embedding(input_ids))
        return y


@dataclass
class Seen:
    """What one forward showed."""

    output: Tensor
    routings: dict[str, Routing] = field(default_factory=dict)
    losses: dict[str, tuple[Tensor, str]] = field(default_factory=dict)

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """A session's recorder."""
        self.routings[site] = routing


def make(subject: Method, seed: int = 0) -> tuple[nn.Module, Stack]:
    """What the method builds, and a stack with it: a router gets a bank, a loss gets a mixture to look at."""
    torch.manual_seed(seed)
    config = example_config(subject)
    shared = Shared()
    settings = SimpleNamespace(vocab_size=VOCABULARY, hidden_size=DIM, intermediate_size=INNER)
    here = Site(
        path=PATH, kind="mlp", module=nn.Linear(DIM, DIM), dim=DIM, out=DIM, layer=0, num_layers=1,
        model_config=settings,
    )  # fmt: skip
    built: nn.Module = subject.build(here, config, shared)
    if isinstance(built, Router):
        layer: nn.Module = MoELayer(built, StackedFFN(built.num_experts, DIM, INNER), site=PATH)
    elif isinstance(built, RoutingLoss):
        plain = method("train.softmax_topk")
        router = plain.build(here, plain.configure({"num_experts": 4}), shared)
        layer = MoELayer(router, StackedFFN(4, DIM, INNER), site=PATH, losses={"loss": built})
    else:
        layer = built
    stack = Stack(layer, shared)
    # Logits of a fresh router are near zero; spread them, so that choices are clear and experts differ.
    with torch.no_grad():
        for parameter in stack.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    open_stack(stack, "model")
    return built, stack.eval()


def look(stack: Stack, ids: Any, mask: Any = None, seed: int = 1) -> Seen:
    """One forward with everything recorded."""
    torch.manual_seed(seed)
    seen = Seen(torch.empty(0))
    attention = None if mask is None else torch.tensor(mask)
    with session(recorder=seen, collect=True) as opened:
        seen.output = stack(torch.tensor(ids), attention)
        for ctx in opened.take():
            seen.losses |= {name: (term.total, term.unit) for (_, name), term in ctx.losses.items()}
    return seen


def choices(routing: Routing, tokens: range) -> list[dict[int, float]]:
    """Choice -> weight of each token; dropped assignments weigh nothing but are listed."""
    kept_N = torch.ones_like(routing.token_N, dtype=torch.bool) if routing.kept_N is None else routing.kept_N
    table: list[dict[int, float]] = [{} for _ in range(routing.num_tokens)]
    for token, expert, weight, kept in zip(
        routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist(), kept_N.tolist(), strict=True
    ):
        table[token][expert] = weight if kept else 0.0
    return [table[token] for token in tokens]


def tolerance(subject: Method) -> float:
    """Absolute tolerance of comparisons: 1e-5, or the card's with its reason."""
    return 1e-5 if subject.card.tolerance is None else subject.card.tolerance.atol


def same(subject: Method, one: list[dict[int, float]], two: list[dict[int, float]], what: str) -> None:
    """Assert equal choices with equal weights."""
    for place, (first, second) in enumerate(zip(one, two, strict=True)):
        assert first.keys() == second.keys(), f"{what}: token {place} chose {sorted(first)} and {sorted(second)}"
        for choice, weight in first.items():
            gap = abs(weight - second[choice])
            assert gap <= tolerance(subject), f"{what}: token {place}, choice {choice}: weights differ by {gap:.2e}"


def close(subject: Method, one: Tensor, two: Tensor, what: str) -> None:
    """Assert equal tensors within the tolerance."""
    gap = (one - two).abs().max().item() if one.numel() else 0.0
    assert one.shape == two.shape, f"{what}: shapes {tuple(one.shape)} and {tuple(two.shape)}"
    assert gap <= tolerance(subject), f"{what}: differ by {gap:.2e}"


@contextmanager
def training(stack: Stack) -> Iterator[None]:
    """Training mode for a while."""
    stack.train()
    try:
        yield
    finally:
        stack.eval()


def _total(seen: Seen) -> Tensor:
    """A scalar that depends on the output and on every loss."""
    total = seen.output.float().square().mean()
    for loss, _ in seen.losses.values():
        total = total + loss
    return total


# -- the checks, named as in the contract ------------------------------------------------------------------------


def tokens_conserved(subject: Method) -> None:
    """See the contract."""
    _, stack = make(subject)
    for site, routing in look(stack, IDS).routings.items():
        tokens, experts = routing.token_N, routing.expert_N
        assert routing.num_tokens == 12, f"{site}: routing of {routing.num_tokens} tokens, 12 came in"
        if tokens.numel():
            assert 0 <= int(tokens.min()) <= int(tokens.max()) < 12, f"{site}: a token that does not exist"
            assert 0 <= int(experts.min()) <= int(experts.max()) < routing.num_choices, f"{site}: no such choice"
        pairs = set(zip(tokens.tolist(), experts.tolist(), strict=True))
        assert len(pairs) == tokens.numel(), f"{site}: a token has a choice twice"
        if routing.top_k is not None:
            per_token = torch.bincount(tokens, minlength=12)
            assert bool((per_token == routing.top_k).all()), f"{site}: top_k={routing.top_k}, but {per_token.tolist()}"


def finite(subject: Method) -> None:
    """See the contract."""
    for ids in (IDS, ((7,),)):
        _, stack = make(subject)
        with training(stack):
            seen = look(stack, ids)
            _total(seen).backward()  # type: ignore[no-untyped-call]
        found = {"output": seen.output} | {f"loss {name}": total for name, (total, _) in seen.losses.items()}
        found |= {f"weights of {site}": routing.weight_N for site, routing in seen.routings.items()}
        found |= {f"gradient of {n}": p.grad for n, p in stack.named_parameters() if p.grad is not None}
        for name, tensor in found.items():
            assert bool(tensor.isfinite().all()), f"{name} is not finite for {len(ids)} x {len(ids[0])} tokens"


def gradients_arrive(subject: Method) -> None:
    """See the contract."""
    built, stack = make(subject)
    with training(stack):
        _total(look(stack, IDS)).backward()  # type: ignore[no-untyped-call]
    if isinstance(built, Router) and built.hard:
        assert hasattr(subject.module, "objective"), "a hard router gets no gradient; give it an objective"
        reached = [name for name, p in built.named_parameters() if p.grad is not None and bool((p.grad != 0).any())]
        assert not reached, f"the router says hard=True, and {reached} got a gradient"
        return
    for name, parameter in built.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            assert bool((parameter.grad != 0).any()), f"the gradient of {name} is zero"
    if isinstance(built, RoutingLoss):
        assert isinstance(stack.site, MoELayer)
        stack.zero_grad()
        for loss, _ in look(stack, IDS).losses.values():
            loss.backward()  # type: ignore[no-untyped-call]
        weight = stack.site.router.get_parameter("weight")
        assert weight.grad is not None, "the loss has no gradient to the router"
        assert bool((weight.grad != 0).any()), "the loss has a zero gradient to the router"


def repeatable(subject: Method) -> None:
    """See the contract."""
    first, second = (look(make(subject)[1], IDS) for _ in range(2))
    assert torch.equal(first.output, second.output), "two builds with one seed differ"
    stack = make(subject)[1]
    assert torch.equal(look(stack, IDS).output, look(stack, IDS).output), "two forwards with one seed differ"
    if not subject.card.stochastic:
        same_bits = torch.equal(look(stack, IDS, seed=1).output, look(stack, IDS, seed=2).output)
        assert same_bits, "evaluation depends on the random state; declare stochastic=True on the card"


def padding_is_nothing(subject: Method) -> None:
    """See the contract."""
    if subject.card.stochastic:
        return
    _, stack = make(subject)
    plain = look(stack, IDS)
    pad = 3
    for side, start in {"right": 0, "left": pad}.items():
        before, after = (0,) * start, (0,) * (pad - start)
        mask = [(*before, *[1] * 6, *after)] * 2
        padded = look(stack, [(*before, *row, *after) for row in IDS], mask)
        close(subject, padded.output[:, start : start + 6], plain.output, f"outputs beside {side} padding")
        for site, routing in plain.routings.items():
            wide = padded.routings[site]
            for row in range(2):
                begin = row * (6 + pad) + start
                same(
                    subject,
                    choices(wide, range(begin, begin + 6)),
                    choices(routing, range(row * 6, row * 6 + 6)),
                    f"{site} beside {side} padding, row {row}",
                )
        for name, (loss, _) in plain.losses.items():
            close(subject, padded.losses[name][0], loss, f"loss {name} beside {side} padding")


def rows_are_apart(subject: Method) -> None:
    """See the contract."""
    _, stack = make(subject)
    if subject.card.stochastic or not subject.card.causal:
        return
    together = look(stack, IDS)
    for row, ids in enumerate(IDS):
        alone = look(stack, [ids])
        close(subject, alone.output[0], together.output[row], f"row {row} alone and in a batch")
        for site, routing in alone.routings.items():
            mine = choices(together.routings[site], range(row * 6, row * 6 + 6))
            same(subject, choices(routing, range(6)), mine, f"{site}, row {row} alone and in a batch")


def no_look_ahead(subject: Method) -> None:
    """See the contract."""
    built, stack = make(subject)
    routings = look(stack, IDS).routings.values()
    declared = all(routing.causal for routing in routings) and getattr(built, "causal", True)
    assert declared == subject.card.causal, f"card says causal={subject.card.causal}, the routing says {declared}"
    if not declared or subject.card.stochastic:
        return
    other = [(*row[:4], 31, 0) for row in IDS]
    before, after = look(stack, IDS), look(stack, other)
    close(subject, after.output[:, :4], before.output[:, :4], "first outputs after the last tokens changed")
    for site, routing in before.routings.items():
        for row in range(2):
            tokens = range(row * 6, row * 6 + 4)
            same(subject, choices(routing, tokens), choices(after.routings[site], tokens), f"{site}: later tokens leak")


def state_is_complete(subject: Method) -> None:
    """See the contract."""
    _, first = make(subject, seed=0)
    _, second = make(subject, seed=5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(look(first, IDS).output, look(second, IDS).output), "the state dict does not hold everything"


def logits_are_float32(subject: Method) -> None:
    """See the contract."""
    _, stack = make(subject)
    for site, routing in look(stack.to(torch.bfloat16), IDS).routings.items():
        if routing.scores is not None:
            dtype = routing.scores.logits_TC.dtype
            assert dtype == torch.float32, f"{site}: logits are {dtype} in a bfloat16 model"


def replay_is_exact(subject: Method) -> None:
    """See the contract."""
    gradients = []
    for replayed in (False, True):
        _, stack = make(subject)
        site = stack.site
        if replayed:
            stack.site = _Replayed(site)
        with training(stack):
            _total(look(stack, IDS)).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in site.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]), "a replay loses gradients"
    for plain, replay in zip(*gradients, strict=True):
        assert torch.equal(plain, replay), f"a replay changes a gradient by {(plain - replay).abs().max():.2e}"


def after_step_moves_buffers(subject: Method) -> None:
    """See the contract."""
    built, stack = make(subject)
    step = getattr(built, "after_step", None)
    if step is None:
        return
    routing = next(iter(look(stack, IDS).routings.values()))
    before = {name: value.clone() for name, value in built.named_parameters()}
    keys = list(built.state_dict())
    step(routing.counts_C())
    assert list(built.state_dict()) == keys, "after_step changed what is saved"
    for name, value in built.named_parameters():
        assert torch.equal(value, before[name]), f"after_step moved the trainable parameter {name}"
    for name, buffer in built.named_buffers():
        assert bool(buffer.isfinite().all()), f"after_step left {name} not finite"


def sums_over_units(subject: Method) -> None:
    """See the contract."""
    _, stack = make(subject)
    together = look(stack, IDS)
    for name, (loss, unit) in together.losses.items():
        assert loss.ndim == 0, f"loss {name} has shape {tuple(loss.shape)}; a scalar is needed"
        assert unit in ("token", "sequence", "batch"), f"loss {name} has unit {unit!r}"
        if unit != "batch":
            alone = torch.stack([look(stack, [ids]).losses[name][0] for ids in IDS]).sum()
            close(subject, loss, alone, f"loss {name} of two sequences together and one by one")


def costs_are_counted(subject: Method) -> None:
    """See the contract. Operations are counted in evaluation and in training, with the numbers of rows that ran."""
    built, stack = make(subject)
    for mode in (False, True):
        stack.train(mode)
        rows = RowCounter()
        with session(recorder=rows), operation_counter() as run:
            seen = look(stack, IDS)
        said, ran = 12 * cost(stack, Work(6, mode, rows.per_token())), run.get_total_flops()
        words = "training" if mode else "evaluation"
        assert abs(said - ran) <= 0.01 * ran, (
            f"a forward in {words} costs {ran} operations, counted as {said:.0f}; define flops_per_token(work), see "
            "moestro.core.cost"
        )
    size = size_of(stack, 6)
    optimizer = torch.optim.AdamW(stack.parameters())
    _total(seen).backward()  # type: ignore[no-untyped-call]
    if isinstance(built, Router) and built.hard:
        lent = [
            part.module for module in built.modules() for part in vars(module).values() if isinstance(part, Borrowed)
        ]
        for parameter in (p for module in (built, *lent) for p in module.parameters()):
            parameter.grad = torch.zeros_like(parameter)  # what its objective would have given
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    ran_bytes = {
        "weight_bytes": list(stack.parameters()),
        "gradient_bytes": [p.grad for p in stack.parameters() if p.grad is not None],
        "optimizer_bytes": moments,
        "buffer_bytes": list(stack.buffers()),
    }
    for name, tensors in ran_bytes.items():
        held = sum(tensor.nbytes for tensor in tensors)
        assert abs(getattr(size, name) - held) <= 0.01 * held, f"{name}: {held} bytes, counted as {getattr(size, name)}"
    for site, layer in mixture_layers(stack).items():
        needed = sum(layer.bank.nbytes(expert) for expert in range(layer.bank.num_experts))
        held = sum(parameter.nbytes for parameter in layer.bank.parameters())
        assert needed >= 0.99 * held, f"{site}: nbytes of all experts is {needed} bytes, the bank holds {held}"


class _Replayed(nn.Module):
    """A site that runs under activation checkpointing."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.inner = site

    def forward(self, hidden: Tensor) -> Tensor:
        """The site's output, recomputed in the backward pass."""
        y: Tensor = recompute(self.inner, hidden, use_reentrant=False, context_fn=checkpoint_contexts)
        return y
