"""What of a checkpoint goes where in a packed model: its settings, its resident tensors, its banks of experts.

A model of a family in ``NATIVE`` whose every tensor is one that the native forward knows becomes a ``native`` model;
any other keeps its parameters as they are beside its slabs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from moestro.core.errors import LoadError
from moestro.engine import pack_ternary
from moestro.engine.dialect import (
    TERNARY_WORDS,
    VECTOR,
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    Shape,
    TokenRouterSpec,
)
from moestro.engine.layout import OF_BITS
from moestro.engine.pack_bank import BankReader, PoolReader, bank_at
from moestro.engine.pack_router import NotNative, Routers
from moestro.engine.ternary import WORDS


if TYPE_CHECKING:
    from torch import Tensor, nn

    from moestro.surgery.disk import Folder

NATIVE: Final = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe")
ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")
ROPES: Final = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose frequencies do not depend on the length of a text."""


@dataclass(frozen=True)
class Entry:
    """A resident tensor: shape, layout, and what gives its values."""

    shape: Shape
    layout: str
    fetch: "Callable[[], Tensor]"


@dataclass
class Contents:
    """All that goes into a packed model."""

    model: ModelSpec
    tensors: dict[str, Entry] = field(default_factory=dict)
    banks: dict[int, BankReader] = field(default_factory=dict)


def contents(folder: "Folder", bits: int, resident_bits: int) -> Contents:
    """What a checkpoint becomes.

    Raises:
        LoadError: neither native nor with a mixture of plain feed-forward experts.
    """
    try:
        return _Native(folder, bits, resident_bits).contents()
    except NotNative as error:
        why = str(error)
    found = _modules(folder, bits, why)
    if not found.banks:
        raise LoadError(f"{folder.name}: {why}, and it has no mixture of plain feed-forward experts to pack")
    return found


def _raw(code: str) -> str:
    return f"raw:{code}"


def _modules(folder: "Folder", bits: int, why: str) -> Contents:
    """Experts as slabs, all other tensors as they are."""
    from moestro.engine.packed import RAW
    from moestro.models.families import family
    from moestro.models.sites import sites_by_layer
    from moestro.models.source import DTYPE_CODES
    from moestro.models.spec import Get

    config, layers, banks = folder.model.config, [], {}
    found = sites_by_layer(folder.model, "mlp")
    for index in range(max(found, default=-1) + 1):
        site = found.get(index)
        bank = None if site is None else bank_at(folder, site.path, site.module, bits)
        layers.append(LayerSpec() if bank is None or site is None else bank.layer(site.path))
        if bank is not None:
            banks[index] = bank
    inside = tuple(f"{bank.path}." for bank in banks.values())
    tensors: dict[str, Entry] = {}
    for name in folder.entries:
        if name.startswith(inside):
            continue
        kind = _raw(DTYPE_CODES[folder.tensor(name).dtype])
        if kind not in RAW:
            raise LoadError(f"{folder.name}: {name} has the type {kind[4:]}, which a packed model does not hold")
        tensors[name] = Entry(folder.entries[name].shape or (1,), kind, _fetch(folder, name))
    model = ModelSpec(
        dialect="modules",
        why=why,
        family=family(config).name,
        hash="",
        hidden=int(Get(config)("hidden_size", "d_model")),
        vocab=int(Get(config)("vocab_size")),
        positions=int(Get(config)("max_position_embeddings", default=0)),
        eos=_eos(folder.model),
        layers=tuple(layers),
    )
    return Contents(model, tensors, banks)


def _fetch(folder: "Folder", name: str, index: Any = ()) -> "Callable[[], Tensor]":
    return lambda: folder.tensor(name)[index]


def _eos(model: Any) -> tuple[int, ...]:
    """Ids that end a text, those of the generation config first."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = getattr(model.config, "eos_token_id", None) if found is None else found
    return tuple(found) if isinstance(found, list | tuple) else () if found is None else (int(found),)


class _Native(Routers):
    """Walks a decoder of a native family and takes every tensor that the native forward knows.

    Raises NotNative on the first thing that it does not know.
    """

    def __init__(self, folder: "Folder", bits: int, resident_bits: int) -> None:
        self.folder, self.bits = folder, bits
        self.matrix = OF_BITS[resident_bits]
        self.tensors: dict[str, Entry] = {}
        self.banks: dict[int, BankReader] = {}
        self.used: set[str] = set()
        self.token_router: TokenRouterSpec | None = None
        self.hand_on: list[int] = []  # layers so far whose input later routers may read

    def contents(self) -> Contents:
        """The whole model; every tensor of the checkpoint is in it."""
        from moestro.models.families import family
        from moestro.models.sites import stacks

        model, spec = self.folder.model, family(self.folder.model.config)
        if spec.name not in NATIVE:
            raise NotNative(f"the native forward does not know the family {spec.name}")
        if not hasattr(model, "lm_head"):
            raise NotNative(f"a {type(model).__name__} has no head over the vocabulary")
        stack = stacks(model, spec)[0]
        self.take("embedding", f"{stack.path}.embed_tokens.weight")
        tied = "lm_head.weight" not in self.folder.entries
        if not tied:
            self.take("head", "lm_head.weight")
        self.norm("final_norm", stack.path, stack.module.norm)
        settings = self.settings(stack.module)
        layers = [
            self.block(index, f"{stack.path}.layers.{index}", block) for index, block in enumerate(stack.module.layers)
        ]
        left = sorted(self.folder.entries.keys() - self.used)
        if left:
            raise NotNative(f"the native forward has no use for {left[0]} ({len(left)} such tensors)")
        attention = stack.module.layers[0].self_attn
        made = ModelSpec(
            dialect="native",
            family=spec.name,
            hash="",
            vocab=self.tensors["embedding"].shape[0],
            heads=model.config.num_attention_heads,
            kv_heads=model.config.num_key_value_heads,
            head_dim=attention.head_dim,
            tied=tied,
            layers=tuple(layers),
            eos=_eos(model),
            token_router=self.token_router,
            ternary=self.words(),
            **settings,
        )
        for name, shape in made.tensors().items():
            if self.tensors[name].shape != shape:
                raise NotNative(f"{name} has the shape {list(self.tensors[name].shape)}, not {list(shape)}")
        return Contents(made, self.tensors, self.banks)

    def words(self) -> int:
        """Zeros in a thousand of the one table of ternary words, which becomes a resident tensor; 0 without any."""
        import torch

        shares = [share for bank in self.banks.values() for share in bank.shares_of_zeros()]
        if not shares:
            return 0
        zeros = pack_ternary.nearest_zeros(sum(shares) / len(shares) / 1000)
        for bank in self.banks.values():
            bank.zeros = zeros
        self.tensors[TERNARY_WORDS] = Entry(
            (WORDS,), "raw:I64", lambda: torch.from_numpy(pack_ternary.book(zeros).table.view(np.int64))
        )
        return zeros

    def settings(self, stack: Any) -> dict[str, Any]:
        """Numbers of the whole model, from its config and its rotary embedding."""
        config = self.folder.model.config
        rope = stack.rotary_emb
        if rope.rope_type not in ROPES:
            raise NotNative(f"rotary embeddings of type {rope.rope_type!r} change with the length of a text")
        inv_freq = rope.inv_freq.float().clone()
        self.tensors["rope.0"] = Entry(tuple(inv_freq.shape), VECTOR, lambda: inv_freq)
        if getattr(config, "clip_qkv", None) is not None:
            raise NotNative("queries, keys and values are clipped (clip_qkv)")
        return {
            "hidden": int(config.hidden_size),
            "positions": int(config.max_position_embeddings),
            "norm_eps": float(config.rms_norm_eps),
            "rotary": 2 * len(inv_freq),
            "ropes": 1,
            "rope_factor": float(rope.attention_scaling),
            "embed_scale": float(getattr(config, "embedding_multiplier", 1.0)),
            "residual_scale": float(getattr(config, "residual_multiplier", 1.0)),
            "logit_scale": 1.0 / float(getattr(config, "logits_scaling", 1.0)),
        }

    def take(self, name: str, path: str, index: Any = (), *, layout: str | None = None) -> None:
        """Hold a tensor of the checkpoint (or the part ``index`` of it) under the engine's name."""
        if path not in self.folder.entries:
            raise NotNative(f"there is no {path}")
        import torch

        shape = tuple(torch.empty(self.folder.entries[path].shape, device="meta")[index].shape)
        kind = layout or (VECTOR if len(shape) == 1 else self.matrix)
        self.tensors[name] = Entry(shape, kind, _fetch(self.folder, path, index))
        self.used.add(path)

    def linear(self, name: str, path: str, module: Any, *, layout: str | None = None) -> bool:
        """Take a linear; whether it has a bias."""
        from torch import nn

        if type(module) is not nn.Linear:
            raise NotNative(f"{path} is a {type(module).__name__}")
        self.take(name, f"{path}.weight", layout=layout)
        if module.bias is not None:
            self.take(f"{name}_bias", f"{path}.bias")
        return module.bias is not None

    def norm(self, name: str, path: str, module: Any) -> None:
        """Take an RMS norm called like its last name in the stack."""
        leaf = {"final_norm": "norm"}.get(name, "")
        where = f"{path}.{leaf}" if leaf else path
        if not type(module).__name__.endswith("RMSNorm"):
            raise NotNative(f"{where} is a {type(module).__name__}")
        self.take(name, f"{where}.weight")

    def block(self, index: int, path: str, block: Any) -> LayerSpec:
        """One layer."""
        name = f"layers.{index}"
        self.norm(f"{name}.attention_norm", f"{path}.input_layernorm", block.input_layernorm)
        self.norm(f"{name}.ffn_norm", f"{path}.post_attention_layernorm", block.post_attention_layernorm)
        attention = self.attention(name, f"{path}.self_attn", block.self_attn)
        site = next(s for s in ("mlp", "block_sparse_moe") if hasattr(block, s))
        found = self.feed_forward(index, f"{path}.{site}", getattr(block, site))
        return found.model_copy(update={"attention": attention, "site": f"{path}.{site}"})

    def attention(self, name: str, path: str, module: Any) -> AttentionSpec:
        """Grouped-query attention of Transformers' own class."""
        if not type(module).__module__.startswith("transformers."):
            raise NotNative(f"{path} is a {type(module).__name__}")
        bias = [
            short
            for short in ("q", "k", "v", "o")
            if self.linear(f"{name}.{short}", f"{path}.{short}_proj", getattr(module, f"{short}_proj"))
        ]
        kind = "none"
        if hasattr(module, "q_norm"):
            kind = "head" if module.q_norm.weight.shape[0] == module.head_dim else "all"
            for short in ("q_norm", "k_norm"):
                self.norm(f"{name}.{short}", f"{path}.{short}", getattr(module, short))
        window = getattr(module, "sliding_window", None)
        if not hasattr(module, "sliding_window"):
            window = getattr(self.folder.model.config, "sliding_window", None)
        return AttentionSpec(scale=float(module.scaling), bias=tuple(bias), qk_norm=kind, window=int(window or 0))

    def feed_forward(self, index: int, path: str, module: "nn.Module") -> LayerSpec:
        """A mixture with its router and shared branch, or a dense feed-forward."""
        from moestro.core.layer import MoELayer

        name = f"layers.{index}"
        if not isinstance(module, MoELayer):
            width, form = self.dense(f"{name}.shared", path, module)
            return LayerSpec(shared=width, **form)
        bank = bank_at(self.folder, path, module, self.bits, coded=True)
        if bank is None or bank.bias:
            raise NotNative(f"the experts of {path} are no plain feed-forwards without bias")
        self.banks[index] = bank
        self.used |= bank.names()
        made = bank.layer(path)
        if made.activation not in ACTIVATIONS:
            raise NotNative(f"the experts of {path} have the activation {made.activation}")
        update: dict[str, Any] = {"router": self.router(name, path, module)}
        if module.shared is not None:
            update |= self.shared(name, f"{path}.shared", module.shared, made)
        if isinstance(bank, PoolReader) and len(bank.permanent):
            for part in bank.projections:
                self.take(f"{name}.shared.{part}", *bank.units(bank.permanent, part))
            update["shared"] = len(bank.permanent)
        return made.model_copy(update=update)

    def shared(self, name: str, path: str, module: Any, made: LayerSpec) -> dict[str, Any]:
        """The branch beside the experts."""
        from moestro.models.swap import SharedExpert

        update: dict[str, Any] = {}
        if isinstance(module, SharedExpert):
            if self.linear(f"{name}.shared_gate", f"{path}.gate", module.gate, layout="f32"):
                raise NotNative(f"{path}.gate has a bias")
            update["shared_gate"] = True
            path, module = f"{path}.expert", module.expert
        width, form = self.dense(f"{name}.shared", path, module)
        if form != {"gated": made.gated, "activation": made.activation}:
            raise NotNative(f"{path} is of another form than the experts beside it")
        return {**update, "shared": width}

    def dense(self, name: str, path: str, module: Any) -> tuple[int, dict[str, Any]]:
        """A dense feed-forward without bias: its width and form."""
        from moestro.core.bank import StackedFFN
        from moestro.models.families import family
        from moestro.models.spec import Get, activation

        bank = getattr(module, "bank", None)
        if type(bank) is StackedFFN and bank.up_bias is None and not isinstance(module, _mixture_type()):
            reader = BankReader(self.folder, f"{path}.bank", bank, 8)
            for part in bank.projections:
                leaf, index = reader.slot(0, part)
                self.take(f"{name}.{part}", leaf, index)
            width, gated, kind = bank.inner, bank.gated, bank.activation
        else:
            if not type(module).__module__.startswith("transformers."):
                raise NotNative(f"{path} is a {type(module).__name__}")
            for part in ("gate", "up", "down"):
                if self.linear(f"{name}.{part}", f"{path}.{part}_proj", getattr(module, f"{part}_proj", None)):
                    raise NotNative(f"{path}.{part}_proj has a bias")
            config = self.folder.model.config
            width, gated = self.tensors[f"{name}.up"].shape[0], True
            kind = activation(Get(config), family(config).ffn.activation)  # type: ignore[assignment]
        if kind not in ACTIVATIONS:
            raise NotNative(f"{path} has the activation {kind}")
        return width, {"gated": gated, "activation": kind}


def _mixture_type() -> type:
    from moestro.core.layer import MoELayer

    return MoELayer
