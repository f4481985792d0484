"""``wide``: a matrix that stays a float, of the packing's type, so that a plan can leave single experts as they are."""

import torch
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.ops.formats._base import SCALE_TYPES, Format, Packing, Params, Parts


class Wide(Format):
    """Parts: ``weight`` [out, in] of the type ``packing.scale``. Its codes are the weights themselves."""

    name = "wide"
    bits = 16

    def fit(self, weight: Tensor, packing: Packing) -> Params:
        """See Format. Nothing is shared.

        Raises:
            ConfigError: a weight that the type cannot hold.
        """
        kind = SCALE_TYPES[packing.scale]
        if not bool(weight.to(kind).isfinite().all()):
            raise ConfigError(
                f"a weight of {float(weight.abs().max()):.3g} does not fit {packing.scale}; use bf16 or f32"
            )
        return {}

    def round(self, weight: Tensor, params: Params) -> Tensor:
        """See Format."""
        return weight

    def values(self, codes: Tensor, params: Params) -> Tensor:
        """See Format."""
        return codes.float()

    def parts(self, shape: tuple[int, int], packing: Packing) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Format."""
        return {"weight": (shape, packing.scale_type)}

    def pack(self, codes: Tensor, params: Params, packing: Packing) -> tuple[Parts, Packing]:
        """See Format."""
        return {"weight": codes.to(packing.scale_type)}, packing

    def unpack(self, parts: Parts, shape: tuple[int, int], packing: Packing) -> tuple[Tensor, Params]:
        """See Format."""
        return parts["weight"], {}


FORMATS: tuple[Format, ...] = (Wide(),)
