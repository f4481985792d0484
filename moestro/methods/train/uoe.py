"""Union of experts: a dense feed-forward or attention cut into slices that sum to it, each used by some tokens only.

For a block cut into n slices f_i with sum_i f_i(x) + b = block(x) exactly (hidden units of a feed-forward, heads of an
attention; nothing is copied, b is added once) and g = softmax(x W_g^T + b_g) [T, n]:

    y_t = b + sum_{i in S_t} w_ti f_i(x_t),   v_ti = k_t g_ti / sum_{j in S_t} g_tj,   k_t = |S_t|

    combine="straight_through":  w = 1 forward, gradient of v;  all slices are the dense block and the gate learns
    combine="sum":               w = 1, no gradient;            what the released language model does
    combine="gate":              w = v

A head attends among the tokens that were routed to it; its keys are those of no other token.

    mode="token_choice":   S_t = the top_k largest g_t, a matter of token t alone
    mode="expert_choice":  slice i takes the ceil(keep_ratio S) positions of a sequence with the largest g_ti
    mode="sequence":       one g of the whole sequence, softmax([x_1 .. x_L] W_g^T + b_g), for all of its tokens

The last two read later tokens, so causal models refuse them. Weights keep the names of the dense block and the gate
comes beside them: a saved model opens as the dense one too, and ``recompose`` brings the dense block back.

Source: Yang et al. 2025 (2503.02495) and its released code, which the formulas follow; with "sum" there, the gate has no
gradient, and its selections run over positions (feed-forward: over the batch).
"""

import copy
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.core.router import LinearRouter, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.assemble import losses_by_id
from moestro.methods.train._parts.selection import normalise, warn_if_dead
