"""Another view of a routing."""

from torch import Tensor

from moestro.core.errors import ContextError
from moestro.core.routing import Routing


def dense_weights(routing: Routing) -> Tensor:
    """Weights [T, C] with gradient: 0 where a token does not go and where capacity took the assignment out."""
    weight_N = routing.weight_N
    if routing.kept_N is not None:
        weight_N = weight_N.masked_fill(~routing.kept_N, 0.0)
    empty_TC = weight_N.new_zeros(routing.num_tokens, routing.num_choices)
    return empty_TC.index_put_((routing.token_N, routing.expert_N), weight_N, accumulate=True)


def headed_weights(routing: Routing, heads: int) -> Tensor:
    """The same as [T, H, C / H]: the choices are ``heads`` equal runs, one a routing head.

    Raises:
        ContextError: the heads do not divide the choices.
    """
    if routing.num_choices % heads:
        raise ContextError(f"heads={heads} do not divide the {routing.num_choices} choices of this routing")
    return dense_weights(routing).view(routing.num_tokens, heads, -1)
