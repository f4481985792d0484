"""Which layers a quantiser is about."""

from moestro.core.errors import PlanError
from moestro.core.inputs import LayerShape, PlanInputs


def float_mixtures(inputs: PlanInputs) -> dict[int, LayerShape]:
    """The mixtures of equal float experts, by layer.

    Raises:
        PlanError: there are none, or other layers hold experts that cannot be packed, such as those that are already.
    """
    shape = inputs.shape
    found = {layer: there for layer, there in shape.layers.items() if there.num_experts is not None}
    others = ", ".join(f"{layer} ({what})" for layer, what in shape.foreign.items())
    if others and found:
        raise PlanError(
            f"{shape.name} has float experts in layers {', '.join(map(str, found))} and others in layers {others}; "
            "start from the checkpoint whose experts are all float, packed ones are not packed again"
        )
    if not found:
        what = f" (layers {others})" if others else ""
        raise PlanError(f"{shape.name} has no mixture of equal float experts{what}; packed ones are not packed again")
    return found
