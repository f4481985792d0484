"""Rounding that makes up for its own errors, many matrices at a time.

For a matrix W [O, I] whose inputs have the second moments H = X^T X [I, I], the columns are rounded one after the
other. The error e of a column j is spread over the columns that are still to come, so that W x changes least:

    w_k -= e U_jk / U_jj  for k > j,   U upper triangular with U^T U = (H + damp I)^-1,   damp = percdamp mean(diag H)

Within a block of columns every column is updated at once, later blocks when the block is done. A group's scale is
fitted when its first column's turn comes, to weights that have taken all errors so far.

Inputs that never occurred (diag H = 0) have nothing to make up for: they are rounded to the nearest. A matrix without
any, or whose damped H has no Cholesky factor, is rounded with H = I, which is rounding to the nearest bit for bit.

Source: GPTQ (2210.17323, section 3 and algorithm 1); batched over experts as in QMoE (2310.16795, section 3.2).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moestro.core.errors import ConfigError
from moestro.core.layer import mixture_layers
from moestro.observe import LayerStats, layerwise, statistics
from moestro.observe.policy import Policy
from moestro.ops.formats import Format, Packing, Params, check_packing, format_named, nearest
from moestro.surgery.rounding import Batches, Seen, Visit


@dataclass
class Stats:
    """What a batch of matrices met.

    Attributes:
        unseen: matrices without any input. failed: matrices whose H has no Cholesky factor. dead: inputs of each matrix
            that never occurred. error: sum of e^2 / U_jj^2, the change of W x that is left, relative to damped H.
    """

    unseen: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


def batched_gptq(
    weight_EOI: Tensor,
    gram_EII: Tensor,
    used: Packing,
    *,
    form: Format | None = None,
    percdamp: float = 0.01,
    blocksize: int = 128,
) -> tuple[Tensor, Params, Stats]:
    """Codes of E matrices of one shape.

    Args:
        weight_EOI: float. gram_EII: X^T X of each matrix's inputs, on any scale. used: format, group, type of scales.
        form: instead of the registered format, one with other settings. percdamp: damping by the mean of the diagonal.
        blocksize: columns of a block, moved to a multiple of the group where that is smaller.

    Returns:
        Codes uint8 [E, O, I], params [E, O, groups], and what was met.

    Raises:
        ConfigError: shapes that do not fit, percdamp that is not positive, values that are not finite.
    """
    _check(weight_EOI, gram_EII, percdamp)
    width = weight_EOI.shape[2]
    form = form or format_named(used.format)
    used = check_packing(used, width)
    stats = Stats()
    factor_EII = _factors(gram_EII, percdamp, stats)
    left_EOI = weight_EOI.float().clone()
    codes: list[Tensor] = []
    shared: list[Params] = []
    error_E = torch.zeros(len(left_EOI), dtype=torch.float64, device=left_EOI.device)
    group = used.group or width
    step = blocksize if group == width else _block(group, blocksize)
    for start in range(0, width, step):
        stop = min(start + step, width)
        block_EOI = left_EOI[:, :, start:stop].clone()
        errors_EOI = torch.empty_like(block_EOI)
        for place in range(stop - start):
            column = start + place
            if column % group == 0:
                # A group longer than its block begins with it: columns behind the block are up to date.
                inside = block_EOI[:, :, place : place + group]
                behind = left_EOI[:, :, stop : column + group]
                shared.append(form.fit(torch.cat([inside, behind], -1), used))
            weight_EO1 = block_EOI[:, :, place : place + 1]
            code_EO1 = form.round(weight_EO1, shared[-1])
            codes.append(code_EO1)
            diagonal_E11 = factor_EII[:, column, column].view(-1, 1, 1)
            error_EO1 = (weight_EO1 - form.values(code_EO1, shared[-1])) / diagonal_E11
            block_EOI[:, :, place + 1 :] -= error_EO1 * factor_EII[:, column : column + 1, column + 1 : stop]
            errors_EOI[:, :, place : place + 1] = error_EO1
            error_E += error_EO1.double().square().sum((1, 2))
        left_EOI[:, :, stop:] -= errors_EOI @ factor_EII[:, start:stop, stop:]
    stats.error = error_E.tolist()
    params = {name: torch.cat([one[name] for one in shared], -1) for name in shared[0]}
    return torch.cat(codes, -1), params, stats


def _check(weight_EOI: Tensor, gram_EII: Tensor, percdamp: float) -> None:
    experts, _, width = weight_EOI.shape
    if gram_EII.shape != (experts, width, width):
        raise ConfigError(f"{experts} matrices of {width} inputs with second moments {list(gram_EII.shape)}")
    if percdamp <= 0:
        raise ConfigError(f"percdamp={percdamp}; must be above 0, or inputs that depend on each other have no factor")
    for name, tensor in (("weights", weight_EOI), ("second moments", gram_EII)):
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{name} are NaN or infinite; calibrate on other data or repair the checkpoint")


def _block(group: int, blocksize: int) -> int:
    """Columns of a block: whole groups, or a part of one that divides it."""
    if group <= blocksize:
        return group * (blocksize // group)
    return blocksize if group % blocksize == 0 else group


def _factors(gram_EII: Tensor, percdamp: float, stats: Stats) -> Tensor:
    """U [E, I, I] float32 of each matrix; computed in float64."""
    gram_EII = gram_EII.double().clone()
    width = gram_EII.shape[-1]
    eye_II = torch.eye(width, dtype=torch.float64, device=gram_EII.device)
    diagonal_EI = gram_EII.diagonal(dim1=1, dim2=2)
    dead_EI = diagonal_EI <= 0
    stats.dead = dead_EI.sum(1).tolist()
    unseen_E = dead_EI.all(1)
    stats.unseen = unseen_E.nonzero().flatten().tolist()
    # The mean over what occurred, so that dead inputs do not weaken the damping of the others.
    mean_E = diagonal_EI.clamp(min=0).sum(1) / (~dead_EI).sum(1).clamp(min=1)
    live_EII = ~(dead_EI[:, :, None] | dead_EI[:, None, :])
    gram_EII = torch.where(live_EII, gram_EII, torch.zeros_like(gram_EII))
    mean_E = torch.where(unseen_E, 1.0, mean_E)
    gram_EII += torch.diag_embed(torch.where(dead_EI, mean_E[:, None], percdamp * mean_E[:, None]))
    lower_EII, info_E = torch.linalg.cholesky_ex(gram_EII)
    lower_EII = torch.where((info_E > 0)[:, None, None], eye_II, lower_EII)
    upper_EII, again_E = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_EII), upper=True)
    bad_E = (info_E > 0) | (again_E > 0)
    stats.failed = bad_E.nonzero().flatten().tolist()
    return torch.where(bad_E[:, None, None], eye_II, upper_EII).float()


@dataclass
class GPTQ:
    """A ``Rounding`` by GPTQ: second moments of every expert's inputs, layer by layer on the model as packed so far.

    A matrix of the format ``wide`` has no codes to make up for.

    Attributes:
        percdamp, blocksize: see ``batched_gptq``. batch: matrices rounded together. policy, raise_to: whom a token
            counts for.
    """

    percdamp: float = 0.01
    blocksize: int = 128
    batch: int = 16
    policy: Policy = "natural"
    raise_to: int | None = None
    calibrates: bool = True

    def walk(
        self, model: nn.Module, batches: Batches, layers: Mapping[int, str], enter: Visit | None, leave: Visit | None
    ) -> Iterator[tuple[int, Seen]]:
        """See Rounding. The down projection's inputs are those of the experts as they were before packing."""
        by_site = {site: layer for layer, site in layers.items()}
        for step in layerwise(model, batches, enter=enter, leave=leave):
            inside = [site for site in mixture_layers(step.block) if site in by_site]
            if not inside:
                continue
            with statistics(
                step.block, gram=True, hidden_gram=True, policy=self.policy, raise_to=self.raise_to
            ) as stats:
                step.run(keep=False)
            for site in inside:
                yield by_site[site], seen_of(stats[site])

    def __call__(self, weight_EOI: Tensor, used: Packing, gram_EII: Tensor | None) -> tuple[Tensor, Params]:
        """See Rounding."""
        if gram_EII is None or used.format == "wide":
            return nearest(weight_EOI, used)
        codes: list[Tensor] = []
        shared: list[Params] = []
        for start in range(0, len(weight_EOI), self.batch):
            some = slice(start, start + self.batch)
            found, params, _ = batched_gptq(
                weight_EOI[some], gram_EII[some], used, percdamp=self.percdamp, blocksize=self.blocksize
            )
            codes.append(found)
            shared.append(params)
        return torch.cat(codes), {name: torch.cat([one[name] for one in shared]) for name in shared[0]}


def seen_of(stats: LayerStats) -> Seen:
    """A layer's statistics as surgery asks for them."""
    into, hidden = stats.input_gram, stats.hidden_gram

    def gram(expert: int, projection: str) -> Tensor:
        wanted = hidden if projection == "down" else into
        assert wanted is not None
        return wanted.of(expert)

    return Seen(stats.count_E, gram)
