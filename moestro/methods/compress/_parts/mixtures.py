"""Which layers a quantiser is about."""

from moestro.core.errors import PlanError
from moestro.core.inputs import LayerShape, ModelShape


def float_mixtures(shape: ModelShape) -> dict[int, LayerShape]:
    """The mixtures of equal float experts, by layer.

    Raises:
        PlanError: there are none.
    """
    found = {layer: there for layer, there in shape.layers.items() if there.num_experts is not None}
    if not found:
        raise PlanError(f"{shape.name} has no mixture of equal float experts; packed ones are not packed again")
    return found
