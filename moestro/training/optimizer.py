"""AdamW over named parameters: groups by rule, state by name, and how it follows a model that surgery changed."""

import fnmatch
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moestro.core.errors import ConfigError, LoadError
from moestro.training.recipe import OptimizerConfig


MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW. Each group keeps its peak learning rate under ``peak``; the loop sets ``lr`` every step.

    Raises:
        ConfigError: a group pattern that matches no parameter.
    """
    return torch.optim.AdamW(_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    matched: set[str] = set()
    for name, parameter in model.named_parameters():
        lr, decay = config.lr, 0.0 if is_undecayed(name, parameter) else config.weight_decay
        for group in config.groups:
            hit = next((pattern for pattern in group.match if fnmatch.fnmatchcase(name, pattern)), None)
            if hit is not None:
                matched.add(hit)
                lr = config.lr if group.lr is None else group.lr
                decay = decay if group.weight_decay is None else group.weight_decay
                break
        groups.setdefault((lr, decay), []).append(parameter)
    for group in config.groups:
        if not matched.intersection(group.match):
            raise ConfigError(f"optimizer group {group.match} matches no parameter that an earlier group left")
    return [
        {"params": parameters, "lr": lr, "peak": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def is_undecayed(name: str, parameter: Tensor) -> bool:
    """Vectors and scalars, biases (stacked ones are matrices in shape only) and norms are not decayed."""
    last = name.rpartition(".")[2]
    return parameter.ndim < 2 or last == "bias" or last.endswith("_bias")


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's learning rate to ``factor`` times its peak; returns that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return float(optimizer.param_groups[0]["lr"])


def follow(optimizer: torch.optim.Optimizer, model: nn.Module, config: OptimizerConfig) -> None:
    """After surgery: the groups hold the model's parameters of now; state of parameters that are gone is dropped."""
    fresh = _groups(model, config)
    defaults = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    optimizer.param_groups[:] = [{**defaults, **group} for group in fresh]
    live = {id(p) for p in model.parameters()}
    for parameter in [p for p in optimizer.state if id(p) not in live]:
        del optimizer.state[parameter]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as ``<parameter>::<moment>`` -> tensor, whole tensors even where they are sharded."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[f"{name}::{moment}"] = tensor.detach().contiguous()
    return found


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Put a saved state back.

    Raises:
        LoadError: a tensor for a parameter the model does not have, of another shape, or one of three moments missing.
    """
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("::")
        if name not in parameters or moment not in MOMENTS:
            raise LoadError(f"{where}: optimiser state {key!r} fits no parameter of this model")
        if moment != "step" and tensor.shape != parameters[name].shape:
            raise LoadError(
                f"{where}: optimiser state {key!r} has shape {list(tensor.shape)}, the parameter "
                f"{list(parameters[name].shape)}"
            )
        states.setdefault(name, {})[moment] = tensor
    for name, state in states.items():
        missing = [moment for moment in MOMENTS if moment not in state]
        if missing:
            raise LoadError(f"{where}: optimiser state of {name!r} lacks {missing[0]!r}")
        optimizer.state[parameters[name]] = {
            moment: _like(tensor, parameters[name]) if moment != "step" else tensor for moment, tensor in state.items()
        }


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Sharded as the parameter is."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
