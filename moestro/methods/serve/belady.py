"""Belady's rule: who will be needed latest goes. The bound for every other policy on a recorded trace.

    victim = argmax over candidates of F(e, now),  F(e, t) = the first step after t that needs e, infinity if none does

Equal F (experts that are not needed any more, or together): the one needed longest ago. For equal sizes, and steps
whose experts fit the cache together, no policy that reads on demand reads less.

Source: Belady 1966; as the eviction rule of Read-ME (2410.19123), whose decoupled router knows the future
of the queue.
"""

from typing import Any

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.expert_cache import CachePolicy
from moestro.methods.serve._parts.future import Foreseeing


class Config(BaseConfig):
    """No settings."""


class Belady(Foreseeing):
    """See CachePolicy and Oracle."""

    untold = "serve.belady must be told the future: use it in `moestro simulate cache`, or another policy"


def policy(config: Config, plan: Any = None) -> CachePolicy:
    """The policy."""
    return Belady()


CARD = MethodCard(
    title="A study of replacement algorithms for a virtual-storage computer",
    year=1966,
    paper="survey-inference",
    summary="Cache of experts: the one needed latest goes; the bound on a recorded trace.",
    taxonomy="inference/system/offloading/caching",
)
