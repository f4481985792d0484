"""All-to-all among ranks by three algorithms that deliver the same rows: flat, hierarchical and coordinated.

With p ranks, G of them in a node, L of them in a tensor-slicing group, and V bytes of rows on every rank, as many for
each rank, a rank sends to others

    flat           one exchange among all                                 p - 1 messages, V (1 - 1/p) bytes
    hierarchical   inside the node, to the place that the goal has in     (G - 1) + (p/G - 1) messages,
                   its node; then across nodes, among equal places        V (2 - 1/G - G/p) bytes
    coordinated    the ranks of a slicing group hold the same rows, so    p/L - 1 messages,
                   each sends those for its own place in every group      V (1/L - 1/p) bytes
      ... back     the same way; then the group gathers all answers       (p/L - 1) + (L - 1) messages,
                   (V bytes of answers came for a whole group)            V (1/L - 1/p) + V (1 - 1/L) bytes

Ranks n G .. n G + G - 1 are node n, and ranks g L .. g L + L - 1 are slicing group g. Rows may be unevenly spread and
some ranks may get none. An empty message counts: a collective does not leave it out.

An algorithm is a generator that says which blocks go to which peers and is given what they sent. It knows no processes:
``Links`` runs it over process groups, ``all_to_all_here`` runs all ranks in this process.

Source: DeepSpeed-MoE (2201.05596, section 5: hierarchical all-to-all, parallelism-coordinated communication).
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.core.errors import ConfigError, ContextError


Algorithm = Literal["flat", "hierarchical", "coordinated"]
Blocks = list[list[Tensor]]  # by peer, the parts that it gets or sent
Steps = Generator[tuple[list[int], Blocks], Blocks, list[Tensor]]


@dataclass
class Sent:
    """What a rank sent to other ranks: messages and bytes of rows, and how much of both went to other nodes.

    The lengths of blocks, which processes tell each other before the rows, are not in it.
    """

    messages: int = 0
    bytes: int = 0
    messages_across: int = 0
    bytes_across: int = 0

    def add(self, nbytes: int, *, across: bool) -> None:
        """Count one message."""
        self.messages += 1
        self.bytes += nbytes
        self.messages_across += across
        self.bytes_across += across * nbytes


def flat(blocks: Sequence[Tensor], rank: int, size: int) -> Steps:
    """Blocks by goal to blocks by source, both [p]."""
    got = yield list(range(len(blocks))), [[block] for block in blocks]
    return [block for (block,) in got]


def hierarchical(blocks: Sequence[Tensor], rank: int, size: int) -> Steps:
    """The same by two exchanges; ``size`` ranks are a node."""
    world, node, place = len(blocks), rank // size, rank % size
    inside, across = list(range(node * size, (node + 1) * size)), list(range(place, world, size))
    by_place = yield inside, [list(blocks[other::size]) for other in range(size)]
    by_node = yield across, [[parts[goal] for parts in by_place] for goal in range(world // size)]
    return [block for parts in by_node for block in parts]


def coordinated_out(blocks: Sequence[Tensor], rank: int, size: int) -> Steps:
    """Blocks by goal [p], the same in the ``size`` ranks of a slicing group, to blocks by source group [p/L]."""
    peers = list(range(rank % size, len(blocks), size))
    got = yield peers, [[blocks[peer]] for peer in peers]
    return [block for (block,) in got]


def coordinated_back(blocks: Sequence[Tensor], rank: int, size: int) -> Steps:
    """Blocks by goal group [p/L] to blocks by source [p], which all ranks of a group get."""
    groups, group, place = len(blocks), rank // size, rank % size
    got = yield list(range(place, groups * size, size)), [[block] for block in blocks]
    mine = [block for (block,) in got]
    gathered = yield list(range(group * size, (group + 1) * size)), [mine] * size
    return [gathered[other][source] for source in range(groups) for other in range(size)]


def check_layout(algorithm: Algorithm, world: int, ranks_per_node: int, slicing: int) -> None:
    """Raise ConfigError unless ``world`` ranks are whole nodes and whole slicing groups."""
    if algorithm not in ("flat", "hierarchical", "coordinated"):
        raise ConfigError(f"no all-to-all {algorithm!r}; there are flat, hierarchical and coordinated")
    for what, size in (("ranks_per_node", ranks_per_node), ("slicing", slicing)):
        if size < 1 or world % size:
            raise ConfigError(f"{what}={size} does not divide {world} ranks; give a divisor")


def _steps(
    algorithm: Algorithm, x: Tensor, splits: Sequence[int], rank: int, world: int, sizes: tuple[int, int], *, back: bool
) -> Steps:
    """The generator for one rank's rows; ``sizes``: of a node and of a slicing group."""
    per_node, slicing = sizes
    count = world // slicing if back and algorithm == "coordinated" else world
    if len(splits) != count or min(splits, default=0) < 0 or sum(splits) != len(x):
        raise ContextError(
            f"{len(splits)} splits that sum to {sum(splits)} for {len(x)} rows; give {count} counts that sum to them"
        )
    blocks = list(x.split(list(splits)))
    if algorithm == "coordinated":
        return (coordinated_back if back else coordinated_out)(blocks, rank, slicing)
    return (hierarchical if algorithm == "hierarchical" else flat)(blocks, rank, per_node)


def _count(sent: Sent, rank: int, ranks_per_node: int, peers: Sequence[int], blocks: Blocks) -> None:
    for peer, parts in zip(peers, blocks, strict=True):
        if peer != rank:
            sent.add(sum(part.nbytes for part in parts), across=peer // ranks_per_node != rank // ranks_per_node)


def all_to_all_here(
    rows: Sequence[Tensor],
    splits: Sequence[Sequence[int]],
    algorithm: Algorithm = "flat",
    *,
    ranks_per_node: int = 1,
    slicing: int = 1,
    back: bool = False,
) -> tuple[list[list[Tensor]], list[Sent]]:
    """All ranks in this process, to look at what an algorithm does on machines that are not there.

    Args:
        rows: by rank. splits: by rank, see ``all_to_all``, as are the other arguments.

    Returns:
        By rank, the blocks received by source, and what was sent.

    Raises:
        ConfigError, ContextError: as ``Links`` and ``all_to_all`` do.
    """
    world = len(rows)
    check_layout(algorithm, world, ranks_per_node, slicing)
    sizes = (ranks_per_node, slicing)
    plans = [_steps(algorithm, rows[r], splits[r], r, world, sizes, back=back) for r in range(world)]
    sent = [Sent() for _ in range(world)]
    found: list[list[Tensor]] = []
    asked = [next(plan) for plan in plans]
    while len(found) < world:
        mail = {
            (r, to): parts for r, (peers, blocks) in enumerate(asked) for to, parts in zip(peers, blocks, strict=True)
        }
        for rank, (peers, blocks) in enumerate(asked):
            _count(sent[rank], rank, ranks_per_node, peers, blocks)
        answers = [[mail[peer, rank] for peer in peers] for rank, (peers, _) in enumerate(asked)]
        asked = []
        for plan, answer in zip(plans, answers, strict=True):
            try:
                asked.append(plan.send(answer))
            except StopIteration as end:
                found.append(end.value)
    return found, sent


class Links:
    """The process groups that an algorithm needs, and the counter of what went over them. One serves all layers.

    Args:
        algorithm: flat, hierarchical or coordinated.
        group: the ranks, all of the default group when None. Every rank of it must make its links at the same point.
        ranks_per_node: G; decides the way of the hierarchical algorithm, and what counts as sent to other nodes.
        slicing: L of the coordinated algorithm.

    Raises:
        ConfigError: an unknown algorithm, or ranks that are not whole nodes or slicing groups.
    """

    def __init__(
        self,
        algorithm: Algorithm = "flat",
        group: dist.ProcessGroup | None = None,
        *,
        ranks_per_node: int = 1,
        slicing: int = 1,
    ) -> None:
        self.algorithm, self.group, self.ranks_per_node, self.slicing = algorithm, group, ranks_per_node, slicing
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        check_layout(algorithm, self.world, ranks_per_node, slicing)
        self.sent = Sent()
        size = {"flat": self.world, "hierarchical": ranks_per_node, "coordinated": slicing}[algorithm]
        first = self.rank // size * size
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(range(self.world)): group}
        for peers in (tuple(range(first, first + size)), tuple(range(self.rank % size, self.world, size))):
            if peers not in self._groups:
                names = dist.get_process_group_ranks(group)
                members = [names[peer] for peer in peers]
                self._groups[peers] = dist.new_group(members, use_local_synchronization=True)

    def run(self, x: Tensor, splits: Sequence[int], *, back: bool) -> tuple[Tensor, list[int]]:
        """``all_to_all`` without a gradient."""
        sizes = (self.ranks_per_node, self.slicing)
        plan = _steps(self.algorithm, x, splits, self.rank, self.world, sizes, back=back)
        peers, blocks = next(plan)
        while True:
            _count(self.sent, self.rank, self.ranks_per_node, peers, blocks)
            try:
                peers, blocks = plan.send(_exchange(blocks, self._groups[tuple(peers)]))
            except StopIteration as end:
                return torch.cat(end.value), [len(block) for block in end.value]


def _exchange(blocks: Blocks, group: dist.ProcessGroup | None) -> Blocks:
    """One collective; every peer gets as many parts, of any lengths, which are told first."""
    rows = torch.cat([part for parts in blocks for part in parts])
    lengths = torch.tensor([[len(part) for part in parts] for parts in blocks], device=rows.device)
    arriving = torch.empty_like(lengths)
    dist.all_to_all_single(arriving, lengths, group=group)
    got = rows.new_empty(int(arriving.sum()), *rows.shape[1:])
    dist.all_to_all_single(got, rows, arriving.sum(1).tolist(), lengths.sum(1).tolist(), group=group)
    parts: Iterator[Tensor] = iter(got.split(arriving.flatten().tolist()))
    return [[next(parts) for _ in range(lengths.shape[1])] for _ in blocks]


class _AllToAll(torch.autograd.Function):
    """The rows of all sources; their gradients go back the way they came. ``tell`` is told the bytes of both."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, splits: Sequence[int], links: Links, tell: Callable[[int, bool], None] | None
    ) -> tuple[Tensor, Tensor]:
        before = links.sent.bytes
        got, received = links.run(x, splits, back=False)
        ctx.received, ctx.links, ctx.tell = received, links, tell
        if tell is not None:
            tell(links.sent.bytes - before, False)
        counts = torch.tensor(received)
        ctx.mark_non_differentiable(counts)
        return got, counts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        before = ctx.links.sent.bytes
        back, _ = ctx.links.run(gradient.contiguous(), ctx.received, back=False)
        if ctx.tell is not None:
            ctx.tell(ctx.links.sent.bytes - before, True)
        return back, None, None, None


def all_to_all(
    x: Tensor,
    splits: Sequence[int],
    links: Links,
    *,
    back: bool = False,
    tell: Callable[[int, bool], None] | None = None,
) -> tuple[Tensor, list[int]]:
    """Send rows to ranks; what arrives stands in the order of its sources.

    Under the coordinated algorithm ``x`` and ``splits`` are the same in all ranks of a slicing group. Its rows come to
    a rank once, though all of the group hold them; ``back`` brings answers to all of the group. Otherwise ``back``
    changes nothing.

    Args:
        x: [N, ...], any dtype. splits: rows for each rank, [p], that sum to N; for each slicing group [p/L] on the
            coordinated way back.
        tell: called with the bytes sent, and whether they were gradients, after each exchange.

    Returns:
        The rows, and how many came from each rank [p]; from each slicing group [p/L] on the coordinated way out.

    Raises:
        ContextError: splits that do not fit, or a gradient through the coordinated algorithm.
    """
    if links.algorithm == "coordinated":
        if torch.is_grad_enabled() and x.requires_grad:
            raise ContextError(
                "the coordinated all-to-all has no gradient: ranks that hold the same tokens would count theirs "
                f"{links.slicing} times; run it under torch.no_grad(), or use algorithm='hierarchical'"
            )
        before = links.sent.bytes
        rows, received = links.run(x, splits, back=back)
        if tell is not None:
            tell(links.sent.bytes - before, False)
        return rows, received
    got, counts = _AllToAll.apply(x, list(splits), links, tell)
    return got, counts.tolist()
