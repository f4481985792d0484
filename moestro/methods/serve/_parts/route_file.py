"""The predictor of `route_predictor` on disk: a folder with ``predictor.json`` and ``predictor.safetensors``."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from moestro.core.config import Config
from moestro.core.errors import ConfigError, LoadError, SaveError
from moestro.core.files import whole_file, write_text


Floats = npt.NDArray[np.float32]

HEADER: Final = "predictor.json"
WEIGHTS: Final = "predictor.safetensors"
NOT_TAUGHT: Final = (
    "serve.expertflow has no predictor; `moestro learn expertflow TRACE OUT` makes one, name it in `predictor`"
)


class LayerShape(Config):
    """A routed layer: its number, E, and how many experts a token uses there."""

    layer: int = Field(ge=0)
    experts: int = Field(ge=1)
    top_k: int = Field(ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "LayerShape":
        if self.top_k > self.experts:
            raise ValueError(f"layer {self.layer}: top_k={self.top_k} of {self.experts} experts")
        return self


class Header(Config):
    """What ``predictor.json`` says.

    Attributes:
        layers: in the order of the logits. vocabulary: V, the last id being that of unknown tokens. dim: D.
        heads: of the attention. inner: width of the MLP. depth: blocks. window: W.
        trace: SHA-256 of what it was taught with. model, model_hash, tokenizer_hash: as that trace tells.
        weights: SHA-256 of the file of weights. settings: of the training. scores: on what was held back.
    """

    format: Literal["moestro-route-predictor"] = "moestro-route-predictor"
    version: Literal[1] = 1
    layers: tuple[LayerShape, ...]
    vocabulary: int = Field(ge=1)
    dim: int = Field(ge=2)
    heads: int = Field(ge=1)
    inner: int = Field(ge=1)
    depth: int = Field(ge=1)
    window: int = Field(ge=1)
    trace: str
    model: str = ""
    model_hash: str | None = None
    tokenizer_hash: str | None = None
    weights: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> "Header":
        if not self.layers or len({shape.layer for shape in self.layers}) != len(self.layers):
            raise ValueError("layers: name every routed layer once")
        check_heads(self.dim, self.heads)
        return self

    @property
    def choices(self) -> int:
        """C."""
        return sum(shape.experts for shape in self.layers)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape."""
        d, f = self.dim, self.inner
        found: dict[str, tuple[int, ...]] = {"embedding": (self.vocabulary, d)}
        for block in range(self.depth):
            parts = {"norm1": (d,), "qkv": (3 * d, d), "out": (d, d), "norm2": (d,), "up": (f, d), "down": (d, f)}
            found |= {f"blocks.{block}.{name}": shape for name, shape in parts.items()}
        return found | {"norm": (d,), "head": (self.choices, d), "bias": (self.choices,)}


def check_heads(dim: int, heads: int) -> None:
    """Raise ConfigError unless each head has an even width."""
    if dim % heads or dim // heads % 2:
        raise ConfigError(f"dim={dim} over heads={heads}; give a multiple of {2 * heads}")


def check_model(header: Header, experts: Sequence[int], choices: Sequence[int] | None = None) -> None:
    """Raise ConfigError unless a predictor's layers are a model's.

    Args:
        experts: of each of the model's layers, 0: none. choices: of them what a token chooses; None: unknown.
    """
    have = {shape.layer: shape.experts for shape in header.layers}
    need = {layer: count for layer, count in enumerate(experts) if count}
    if have != need:
        odd = next(layer for layer in sorted({*have, *need}) if have.get(layer) != need.get(layer))
        raise ConfigError(
            f"the predictor knows {have.get(odd, 0)} experts in layer {odd}, the model has {need.get(odd, 0)}: it was "
            f"learned from {header.model or 'another model'}; learn one from a trace of this model"
        )
    for shape in header.layers:
        if choices is not None and shape.top_k != choices[shape.layer]:
            raise ConfigError(
                f"the predictor knows {shape.top_k} choices of a token in layer {shape.layer}, the model makes "
                f"{choices[shape.layer]}: learn one from a trace of this model, as it is served"
            )


def check_free(folder: str | Path) -> Path:
    """Raise SaveError where something stands, but for an empty folder."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SaveError(f"{folder}: exists; remove it or give another name")
    return folder


def save(folder: str | Path, header: Header, weights: Mapping[str, Floats]) -> Path:
    """Write a predictor; the header comes last, so that a folder with one is complete.

    Raises:
        SaveError: something stands there, or the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    folder = check_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{folder}: cannot be made ({error.strerror})") from None
    with whole_file(folder / WEIGHTS) as draft:
        try:
            save_file({name: np.ascontiguousarray(weights[name], np.float32) for name in header.shapes()}, draft)
        except SafetensorError as error:
            raise SaveError(f"{folder / WEIGHTS}: cannot be written ({error})") from None
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    body = header.model_copy(update={"weights": digest}).model_dump(mode="json")
    write_text(folder / HEADER, json.dumps(body, indent=1) + "\n")
    return folder


def read(folder: str | Path) -> tuple[Header, dict[str, Floats]]:
    """Read a predictor.

    Raises:
        LoadError: no predictor there, damaged, or tensors that are not those its header tells of.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    folder = Path(folder)
    try:
        values = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        raw = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise LoadError(f"{folder}: no predictor of routes ({error.strerror}); `moestro learn` makes one") from None
    except (ValueError, RecursionError):
        raise LoadError(f"{folder / HEADER}: not a JSON file") from None
    try:
        header = Header.parse(values, where=str(folder / HEADER))
    except ConfigError as error:
        raise LoadError(str(error)) from None
    if hashlib.sha256(raw).hexdigest() != header.weights:
        raise LoadError(f"{folder / WEIGHTS}: does not have the sha256 that {HEADER} says; learn it again")
    try:
        weights = parse(raw)
    except SafetensorError as error:
        raise LoadError(f"{folder / WEIGHTS}: {error}") from None
    wanted, have = header.shapes(), {name: array.shape for name, array in weights.items()}
    odd = next((name for name in sorted({*wanted, *have}) if wanted.get(name) != have.get(name)), None)
    if odd is not None or any(array.dtype != np.float32 for array in weights.values()):
        raise LoadError(
            f"{folder / WEIGHTS}: {odd or 'a tensor'} is {have.get(odd or '')}, not {wanted.get(odd or '')}"
        )
    return header, weights
