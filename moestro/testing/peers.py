"""Other packages that ours is measured against; none of them is needed to use Moestro."""

import warnings

import torch
from torch import Tensor

from moestro.core.errors import ConfigError


@torch.no_grad()
def half_quadratic(weight_OI: Tensor, bits: int, group: int) -> tuple[Tensor, int]:
    """A matrix as hqq packs it: scales and zero points that make the 0.7-norm of the error small, without data.

    Args:
        weight_OI: float [O, I]. group: weights that share a scale and a zero point; must divide O * I.

    Returns:
        What the codes stand for, float32 [O, I], with scales and zero points in float16; and the bytes of all three.

    Raises:
        ConfigError: hqq is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it decorates with torch.compile, whose import warns of its own parts
            from hqq.core.quantize import Quantizer
    except ModuleNotFoundError:
        raise ConfigError(
            "half-quadratic quantisation comes from the package hqq; pip install 'moestro[dev]'"
        ) from None
    codes, meta = Quantizer.quantize(weight_OI.float(), nbits=bits, group_size=group, axis=1, device="cpu")
    stored = {name: meta[name].half() for name in ("scale", "zero")}
    meta |= {"compute_dtype": torch.float32} | {name: value.float() for name, value in stored.items()}
    values_OI: Tensor = Quantizer.dequantize(codes, meta)
    return values_OI, codes.nbytes + sum(value.nbytes for value in stored.values())
