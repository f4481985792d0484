"""One forward in numpy, call by call; see ``interface.Steps``."""

import numpy as np

from moestro.core.errors import ConfigError
from moestro.engine.kernels.interface import LANES, Addresses, Attention, Description, Ffn, Floats, Ints
from moestro.engine.kernels.twin import activate, choose, floats, linear, sigmoid, softmax


class TwinSteps:
    """Steps over keys and values [pages, layers, kv_heads, 16, head_dim]."""

    def __init__(self, description: Description, pages: int, slabs: dict[int, Addresses]) -> None:
        self.model = description
        self.slabs = slabs
        shape = (pages, len(description.layers), description.kv_heads, LANES, description.head_dim)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.page_bytes = 2 * self.keys[0].nbytes
        self.table = np.zeros((0, 0), np.float32)
        embedding = description.embedding
        self._embedding = floats(embedding) if embedding.layout in ("f32", "f16") else None

    def begin(self, tokens: Ints, positions: Ints, rows_of: Ints, tables: Ints) -> None:
        """See ``Steps``."""
        model = self.model
        if len(tokens) < 1:
            raise ValueError("a step needs at least one row")
        if tokens.min() < 0 or tokens.max() >= model.vocab:
            raise ValueError("token id outside the vocabulary")
        if rows_of.min() < 0 or rows_of.max() >= len(tables):
            raise ValueError("rows_of: no such sequence")
        if positions.min() < 0 or positions.max() // LANES >= tables.shape[1]:
            raise ValueError("position outside the page table")
        self.positions, self.rows_of, self.tables = positions, rows_of, tables
        if self._embedding is None:
            self._embedding = floats(model.embedding)
        self.x = self._embedding[tokens] * np.float32(model.embed_scale)
        self.turns = []
        for table in model.inv_freq:
            angle = positions.astype(np.float32)[:, None] * np.asarray(table, np.float32)
            factor = np.float32(model.rope_factor)
            self.turns.append((np.cos(angle) * factor, np.sin(angle) * factor))
        self._chosen: dict[int, tuple[Ints, Floats]] = {}
        self._logits: dict[int, Floats] = {}
        self.normed_of = -1

    def _norm(self, x: Floats, weight: Floats, bias: Floats | None = None) -> Floats:
        eps = np.float32(self.model.norm_eps)
        if self.model.norm == "layer":
            centred = x - x.mean(-1, keepdims=True)
            y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight
            return y if bias is None else y + bias
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (weight + np.float32(self.model.norm_add))

    def _turn(self, x: Floats, rope: int) -> Floats:
        """x [R, heads, dim] turned to the rows' positions."""
        if not self.turns:
            return x
        cos, sin = (part[:, None] for part in self.turns[rope])
        half, y = cos.shape[-1], x.copy()
        if self.model.rope_interleaved:
            a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
            y[..., 0 : 2 * half : 2], y[..., 1 : 2 * half : 2] = a * cos - b * sin, b * cos + a * sin
        else:
            a, b = x[..., :half], x[..., half : 2 * half]
            y[..., :half], y[..., half : 2 * half] = a * cos - b * sin, b * cos + a * sin
        return y

    def _heads(self, attention: Attention, name: str, normed: Floats, count: int) -> Floats:
        model = self.model
        y = linear(getattr(attention, name), normed)
        bias = getattr(attention, f"{name}_bias")
        y = y if bias is None else y + bias
        weight = getattr(attention, f"{name}_norm", None)
        if weight is not None and attention.qk_norm == "all":
            y = self._norm_rms(y, weight)
        y = y.reshape(len(y), count, model.head_dim)
        if weight is not None and attention.qk_norm == "head":
            y = self._norm_rms(y, weight)
        return y

    def _norm_rms(self, x: Floats, weight: Floats) -> Floats:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.model.norm_eps))
        return x / scale * (weight + np.float32(self.model.norm_add))

    def attention(self, layer: int) -> None:
        """See ``Steps``."""
        model, spec = self.model, self.model.layers[layer]
        attention = spec.attention
        normed = self._norm(self.x, spec.attention_norm, spec.attention_norm_bias)
        q = self._turn(self._heads(attention, "q", normed, model.heads), attention.rope)
        k = self._turn(self._heads(attention, "k", normed, model.kv_heads), attention.rope)
        v = self._heads(attention, "v", normed, model.kv_heads)
        pages = self.tables[self.rows_of, self.positions // LANES]
        self.keys[pages, layer, :, self.positions % LANES] = k
        self.values[pages, layer, :, self.positions % LANES] = v
        out = np.stack([self._attend(layer, row, q[row]) for row in range(len(q))])
        self.x = self.x + self._scaled(linear(attention.o, out), attention.o_bias)
        self.normed = self._norm(self.x, spec.ffn_norm, spec.ffn_norm_bias)
        self.normed_of = layer
        for target in model.routed_at(layer):
            router = model.layers[target].router
            assert router is not None
            logits = self.peek(layer, target)
            if not np.isfinite(logits).all():
                raise RuntimeError(f"a NaN or an infinity appeared in the attention of layer {layer}")
            self._logits[target], self._chosen[target] = logits, choose(router, logits)

    def _scaled(self, y: Floats, bias: Floats | None) -> Floats:
        y = y if bias is None else y + bias
        return y * np.float32(self.model.residual_scale)

    def _attend(self, layer: int, row: int, q: Floats) -> Floats:
        """Queries [heads, dim] of a row over its pages -> [heads * dim]."""
        model, attention = self.model, self.model.layers[layer].attention
        position = int(self.positions[row])
        pages = self.tables[self.rows_of[row], : position // LANES + 1]
        first = max(0, position - attention.window + 1) if attention.window else 0
        span = slice(first, position + 1)
        keys = self.keys[pages, layer].transpose(1, 0, 2, 3).reshape(model.kv_heads, -1, model.head_dim)[:, span]
        values = self.values[pages, layer].transpose(1, 0, 2, 3).reshape(model.kv_heads, -1, model.head_dim)[:, span]
        grouped = q.reshape(model.kv_heads, -1, model.head_dim)
        scores = grouped @ keys.transpose(0, 2, 1) * np.float32(attention.scale)
        if attention.softcap:
            scores = np.float32(attention.softcap) * np.tanh(scores / np.float32(attention.softcap))
        return (softmax(scores) @ values).reshape(-1).astype(np.float32)

    def chosen(self, layer: int) -> tuple[Ints, Floats]:
        """See ``Steps``."""
        empty = np.zeros((len(self.x), 0))
        return self._chosen.get(layer, (empty.astype(np.int32), empty.astype(np.float32)))

    def scores(self, layer: int) -> Floats:
        """See ``Steps``."""
        return self._logits[layer]

    def peek(self, layer: int, other: int) -> Floats:
        """See ``Steps``."""
        router = self.model.layers[other].router if 0 <= other < len(self.model.layers) else None
        if layer != self.normed_of or router is None:
            raise ValueError("peek: the attention of another layer ran last, or a layer without experts is asked for")
        logits = linear(router.weight, self.normed)
        return logits if router.bias is None else logits + router.bias

    def routes(self, layer: int, ids: Ints, weights: Floats) -> None:
        """See ``Steps``."""
        if ids.size and ids.max() >= self.model.layers[layer].experts:
            raise ValueError("route to an expert that does not exist")
        self.layer, self.ids, self.weights = layer, ids, weights
        self.outputs: dict[int, tuple[Ints, Floats]] = {}

    def _ffn(self, ffn: Ffn, x: Floats, weights: Floats, slab: int = 0) -> Floats:
        hidden = linear(ffn.up, x, slab)
        if ffn.gate is not None:
            hidden = activate(ffn.activation, linear(ffn.gate, x, slab)) * hidden
        else:
            hidden = activate(ffn.activation, hidden)
        return linear(ffn.down, hidden * weights[:, None], slab)

    def experts(self, layer: int, ids: Ints, slabs: Addresses) -> None:
        """See ``Steps``."""
        spec = self.model.layers[layer]
        if spec.expert is None or layer != self.layer:
            raise ConfigError(f"layer {layer} has no routes to experts")
        for expert, slab in zip(ids.tolist(), slabs.tolist(), strict=True):
            rows, ranks = np.nonzero(self.ids == expert)
            ffn = spec.ffn_of(expert)
            assert ffn is not None
            self.outputs[expert] = (rows, self._ffn(ffn, self.normed[rows], self.weights[rows, ranks], slab))

    def finish(self, layer: int) -> None:
        """See ``Steps``."""
        spec = self.model.layers[layer]
        total = np.zeros_like(self.x)
        if spec.router is not None:
            missing = sorted(set(self.ids[self.ids >= 0].tolist()) - set(self.outputs))
            if missing:
                raise RuntimeError(f"experts {missing} of layer {layer} are missing")
            for expert in sorted(self.outputs):
                rows, y = self.outputs[expert]
                np.add.at(total, rows, y)
        if spec.shared is not None:
            weights = np.ones(len(self.x), np.float32)
            if spec.shared_gate is not None:
                weights = sigmoid(linear(spec.shared_gate, self.normed)[:, 0])
            total = total + self._ffn(spec.shared, self.normed, weights)
        self.x = self.x + total * np.float32(self.model.residual_scale)

    def run(self, from_layer: int, to_layer: int) -> None:
        """See ``Steps``."""
        for layer in range(from_layer, to_layer):
            self.attention(layer)
            if self.model.layers[layer].router is not None:
                ids, weights = self.chosen(layer)
                self.routes(layer, ids, weights)
                needed = np.unique(ids[ids >= 0]).astype(np.int32)
                self.experts(layer, needed, self.slabs[layer][needed])
            self.finish(layer)

    def logits(self, want: Ints) -> Floats:
        """See ``Steps``."""
        model = self.model
        normed = self._norm(self.x[want], model.final_norm, model.final_norm_bias)
        y = linear(model.head, normed) * np.float32(model.logit_scale)
        if model.logit_softcap:
            y = np.float32(model.logit_softcap) * np.tanh(y / np.float32(model.logit_softcap))
        if not np.isfinite(y).all():
            raise RuntimeError("a NaN or an infinity appeared in the input of the head")
        return y.astype(np.float32)

    def hidden(self) -> Floats:
        """The residual stream [R, hidden]."""
        return self.x

    def copy_page(self, src: int, dst: int) -> None:
        """See ``Steps``."""
        self.keys[dst], self.values[dst] = self.keys[src], self.values[src]
