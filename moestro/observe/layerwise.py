"""Running a model one block at a time: the memory of one block's activations, the numbers of the plain forward.

Every piece is the model's own forward. Blocks before the one that runs return what they returned when it was their
turn, and the forward stops after the block. Masks, rotary tables, routing contexts and tuple returns are therefore the
model's own, whatever the family does with them. Slots that routers leave for later layers are carried over.

    for step in observe.layerwise(model, batches):
        with observe.statistics(step.block, gram=True) as stats:
            step.run(keep=False)              # look
        change(step.block, stats)             # change
                                              # later blocks see what the changed block returns
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moestro.core.context import RoutingContext, current_context
from moestro.core.errors import ConfigError


Batch = Mapping[str, Any]
Visit = Callable[[int, nn.Module], None]


class _Stop(Exception):
    """Ends a forward after the block that was wanted."""

    def __init__(self, output: Any) -> None:
        super().__init__("the wanted block has run")
        self.output = output


@dataclass(frozen=True, slots=True)
class _Leaf:
    """Where a tensor stood in a block's output."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _flatten(tree: Any, leaves: list[Tensor]) -> Any:
    """The structure of a block's output with its tensors moved to ``leaves``."""
    if isinstance(tree, Tensor):
        leaves.append(tree.detach())
        return _Leaf(len(leaves) - 1, tuple(tree.shape), tree.dtype, tree.device)
    if isinstance(tree, (tuple, list)):
        return type(tree)([_flatten(item, leaves) for item in tree])
    if isinstance(tree, dict):
        return {key: _flatten(item, leaves) for key, item in tree.items()}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise ConfigError(f"a block returned a {type(tree).__name__}; layerwise runs carry tensors, tuples and dicts")


def _unflatten(shape: Any, leaf: Callable[[_Leaf], Tensor]) -> Any:
    if isinstance(shape, _Leaf):
        return leaf(shape)
    if isinstance(shape, (tuple, list)):
        return type(shape)([_unflatten(item, leaf) for item in shape])
    if isinstance(shape, dict):
        return {key: _unflatten(item, leaf) for key, item in shape.items()}
    return shape


class _Store:
    """A block's outputs for every batch, in memory or as files."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._shapes: dict[int, Any] = {}
        self._tensors: dict[int, list[Tensor]] = {}

    def put(self, batch: int, output: Any) -> None:
        leaves: list[Tensor] = []
        self._shapes[batch] = _flatten(output, leaves)
        if self._folder is None:
            self._tensors[batch] = leaves
        else:
            named = {str(i): leaf.contiguous() for i, leaf in enumerate(leaves)}
            save_file(named, self._folder / f"{id(self)}-{batch}.safetensors")

    def get(self, batch: int) -> Any:
        if self._folder is None:
            return _unflatten(self._shapes[batch], lambda leaf: self._tensors[batch][leaf.index])
        with safe_open(self._folder / f"{id(self)}-{batch}.safetensors", framework="pt") as file:
            return _unflatten(self._shapes[batch], lambda leaf: file.get_tensor(str(leaf.index)).to(leaf.device))

    def dummy(self, batch: int) -> Any:
        """The output's structure with zeros."""
        return _unflatten(
            self._shapes[batch], lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        )

    def drop(self) -> None:
        """Forget the tensors; the shapes stay."""
        self._tensors.clear()
        if self._folder is not None:
            for batch in self._shapes:
                (self._folder / f"{id(self)}-{batch}.safetensors").unlink(missing_ok=True)


class Step:
    """One block's turn. ``index``: its place. ``block``: the module."""

    def __init__(self, run: "Layerwise", index: int) -> None:
        self._run = run
        self.index = index
        self.block = run.blocks[index]
        self.kept = False

    def run(self, keep: bool = True) -> None:
        """Run every batch through the block, under whatever hooks and sessions are in force.

        Args:
            keep: take the outputs as the next block's inputs. A block that is changed afterwards must be run with
                ``keep=False`` first; it then runs once more when the next step begins.
        """
        store = self._run._stores[self.index]
        for batch in range(len(self._run.batches)):
            output = self._run._piece(self.index, batch)
            if keep:
                store.put(batch, output)
        self.kept = self.kept or keep


class Layerwise:
    """A run of one block at a time; iterate once for the steps, then ask ``outputs``.

    Attributes:
        blocks: the blocks in execution order. batches: what is run.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        blocks: Sequence[nn.Module],
        last: Sequence[int],
        spill: str | Path | None,
        enter: Visit | None,
        leave: Visit | None,
    ) -> None:
        self.model = model
        self.batches = list(batches)
        self.blocks = list(blocks)
        self._last = set(last) | {len(blocks) - 1}
        self._enter, self._leave = enter, leave
        self._files = ExitStack()
        folder = None
        if spill is not None:
            Path(spill).mkdir(parents=True, exist_ok=True)
            folder = Path(self._files.enter_context(tempfile.TemporaryDirectory(prefix="layerwise-", dir=spill)))
        self._stores = [_Store(folder) for _ in blocks]
        self._contexts: dict[tuple[int, int], dict[str, RoutingContext]] = {}  # (block, batch) -> stack -> context
        self._done = 0

    def __iter__(self) -> Iterator[Step]:
        if self._done:
            raise ConfigError("this layerwise run has begun; start another for a second pass")
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            for index, block in enumerate(self.blocks):
                if self._enter is not None:
                    self._enter(index, block)
                step = Step(self, index)
                yield step
                if not step.kept:
                    step.run()
                if self._leave is not None:
                    self._leave(index, block)
                if index and index - 1 not in self._last:
                    self._stores[index - 1].drop()
                self._contexts = {key: known for key, known in self._contexts.items() if key[0] >= index}
                self._done = index + 1
        finally:
            for module, mode in modes:
                module.training = mode
            if self._done < len(self.blocks):
                self.close()

    def outputs(self) -> Iterator[Any]:
        """What the model returns for each batch, from the last block's outputs.

        Intermediate states a model may collect (``output_hidden_states``) are not in them.
        """
        if self._done < len(self.blocks):
            raise ConfigError(f"{self._done} of {len(self.blocks)} blocks have run; finish the steps first")
        training = self.model.training
        self.model.eval()
        try:
            for batch in range(len(self.batches)):
                yield self._piece(len(self.blocks), batch)
        finally:
            self.model.train(training)

    def close(self) -> None:
        """Remove spilled files and forget activations."""
        for store in self._stores:
            store.drop()
        self._files.close()

    @torch.no_grad()
    def _piece(self, index: int, batch: int) -> Any:
        """The model's forward with blocks before ``index`` answered from store; stops after ``index``."""
        with ExitStack() as patches:
            for place in range(min(index, len(self.blocks))):
                store = self._stores[place]
                whole = place == index - 1 or place in self._last
                answer = partial(store.get if whole else store.dummy, batch)
                patches.enter_context(_answer(self.blocks[place], answer))
            if index < len(self.blocks):
                patches.enter_context(self._stopping(index, batch))
            try:
                return self.model(**self.batches[batch])
            except _Stop as stop:
                return stop.output

    @contextmanager
    def _stopping(self, index: int, batch: int) -> Iterator[None]:
        known = self._contexts.get((index - 1, batch), {})

        def before(block: nn.Module, args: Any, kwargs: Any) -> None:
            ctx = current_context()
            if ctx is not None and ctx.stack in known:
                ctx.adopt(known[ctx.stack])

        def after(block: nn.Module, args: Any, output: Any) -> None:
            ctx = current_context()
            if ctx is not None:
                self._contexts[(index, batch)] = {**known, ctx.stack: ctx}
            raise _Stop(output)

        block = self.blocks[index]
        first = block.register_forward_pre_hook(before, with_kwargs=True)
        last = block.register_forward_hook(after)
        try:
            yield
        finally:
            first.remove()
            last.remove()


@contextmanager
def _answer(block: nn.Module, output: Callable[[], Any]) -> Iterator[None]:
    """While open, ``block`` returns ``output()`` and runs neither its forward nor its hooks."""
    own = block.__dict__.get("forward")
    hooks = (block._forward_hooks, block._forward_pre_hooks)
    saved = [dict(table) for table in hooks]
    for table in hooks:
        table.clear()
    block.forward = lambda *args, **kwargs: output()
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
        for table, entries in zip(hooks, saved, strict=True):
            table.update(entries)


def layerwise(
    source: nn.Module,
    batches: Iterable[Batch],
    *,
    blocks: Sequence[nn.Module] | None = None,
    spill: str | Path | None = None,
    enter: Visit | None = None,
    leave: Visit | None = None,
) -> Layerwise:
    """Run ``source`` over ``batches`` one block at a time, in evaluation mode.

    Args:
        source: a Transformers model of a known family, or any module with ``blocks``.
        batches: keyword arguments of the model's forward, run as ``source(**batch)``.
        blocks: the modules to stop at, in execution order; each must run once a forward, and each must hand what later
            ones need to the next. None asks the family's table.
        spill: a folder for activations instead of memory.
        enter, leave: called with (index, block) before and after a block's turn, to bring and drop its weights.

    Raises:
        FamilyError: no ``blocks`` and an unknown family. ConfigError: no blocks at all.
    """
    last: list[int] = []
    if blocks is None:
        from moestro.models.sites import sites

        found = sites(source, "block")
        blocks = [site.module for site in found]
        paths = [site.path.rpartition(".")[0] for site in found]
        last = [i for i in range(len(paths) - 1) if paths[i] != paths[i + 1]]
    if not blocks:
        raise ConfigError(f"{type(source).__name__} has no blocks to run one at a time")
    return Layerwise(source, batches, blocks, last, spill, enter, leave)
