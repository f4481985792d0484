"""What a serving policy is, and what every one of them keeps true.

`KEEPS` names the invariants by entry; `moestro.testing.contracts` checks each of them on every method of the stage the
moment its file exists.
"""

from typing import Any, Final, Protocol

from moestro.core.decoding import Decoder
from moestro.core.expert_cache import CachePolicy
from moestro.core.forecast import Forecast


class Policy(Protocol):
    """`policy(config, plan=None)`: who leaves the cache of experts, or how logits become a choice.

    The same policy of a cache runs in the simulator and in the engine. It may also be a `Learner` (it is shown a
    recorded past) or an `Oracle` (it must be told the future). What the entry is annotated to return says which of
    the two it is.
    """

    def __call__(self, config: Any, plan: Any = None) -> CachePolicy | Decoder: ...


class Foresees(Protocol):
    """`forecast(config, plan=None)`: which experts later layers will need.

    Read ahead of need, they cost no waiting. A forecast may be a `Student` of recorded tokens and routes.
    """

    def __call__(self, config: Any, plan: Any = None) -> Forecast: ...


KEEPS: Final[dict[str, dict[str, str]]] = {
    "policy": {
        "settings_round_trip": "settings survive JSON, and an unknown key is refused by name",
        "victim_is_a_candidate": "whoever goes is in the cache and not needed now",
        "order_does_not_matter": "the same steps evict the same experts, in whatever order candidates are given",
        "budget_is_kept": "hits and misses add up to what was asked for, and no event exceeds the budget",
        "room_for_all_misses_once": "with room for every expert only first uses miss",
        "optimum_is_the_bound": "no policy misses less than exhaustive search on short traces, or than serve.belady",
        "keys_are_opaque": "renamed experts meet the same fate",
    },
    "decoder": {
        "settings_round_trip": "settings survive JSON, and an unknown key is refused by name",
        "a_row_of_logits": "one float32 row, no NaN, at least one open token, the passes' logits left alone",
        "rows_are_independent": "what was joined before does not change what is joined now",
        "equal_passes_are_the_model": "where all passes agree, the likeliest token is the model's",
        "exact_is_exact": "a decoder that calls itself exact gives the model's own row",
        "it_is_named": "answers carry the id of the method",
    },
    "forecast": {
        "settings_round_trip": "settings survive JSON, and an unknown key is refused by name",
        "wishes_can_be_read": "wishes are for later layers of the model and its experts, each once, priorities from 1",
        "wishes_are_repeatable": "the same rows, routes and scores give the same wishes",
        "ends_are_forgotten": "a sequence whose id was used before gets the wishes that it would have got first",
        "outputs_are_the_model": "logits are the same bits with the forecast and without, in a store with few slots",
        "it_is_named": "it carries the id of the method",
    },
}
"""Entry -> invariant -> what it says."""
