"""The reference forward under the scheduler: what Transformers' own generation writes, in every arrangement."""

from typing import Any

import numpy as np
import pytest
import torch

from moestro.core.decoding import Route
from moestro.core.errors import ConfigError
from moestro.core.session import session
from moestro.engine.decoding import chosen, route_index
from moestro.engine.kernels.interface import Matrix, Router
from moestro.engine.reference import ReferenceForward
from moestro.engine.requests import Limits
from moestro.engine.scheduler import Scheduler
from moestro.models.load import adopt
from moestro.testing.tiny import tiny_model
from tests.engine.running import Answer, run


FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "gemma3_text", "llama")


def opened(family: str, pages: int = 96) -> ReferenceForward:
    model = tiny_model(family, max_position_embeddings=128)
    adopt(model)
    return ReferenceForward(model, pages=pages)


def generated(forward: ReferenceForward, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = forward.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def prompts(count: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    common = draw.integers(3, 97, 40).tolist()
    return [
        common[: int(draw.integers(0, 40)) * (n % 2)] + draw.integers(3, 97, int(draw.integers(1, 20))).tolist()
        for n in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(family: str) -> None:
    forward = opened(family)
    asked = prompts(4)
    wanted = [generated(forward, prompt, 8) for prompt in asked]
    for limits, share in ((Limits(), True), (Limits(chunk=5, mixed=3), True), (Limits(running=2), False)):
        scheduler = Scheduler(forward, limits, share=share)
        assert run(scheduler, *(Answer(prompt, 8) for prompt in asked)) == wanted
        assert run(scheduler, *(Answer(prompt, 8) for prompt in asked)) == wanted


def test_32_at_once_and_alone() -> None:
    forward = opened("qwen3_moe", pages=160)
    asked = prompts(32)
    together = run(
        Scheduler(forward, Limits(running=32, chunk=64)),
        *(Answer(prompt, 6, temperature=0.8, top_p=0.9, seed=n) for n, prompt in enumerate(asked)),
    )
    alone = [
        run(Scheduler(forward, share=False), Answer(prompt, 6, temperature=0.8, top_p=0.9, seed=n))[0]
        for n, prompt in enumerate(asked)
    ]
    assert together == alone


def test_what_was_routed_is_told() -> None:
    forward = opened("qwen3_moe")
    told: list[tuple[int, tuple[int, ...]]] = []
    forward.on_route = lambda layer, ids, weights: told.append((layer, ids.shape))
    run(Scheduler(forward), Answer([5, 6, 7], 2))
    assert forward.experts == (0, 5, 5)
    assert told == [(1, (3, 2)), (2, (3, 2)), (1, (1, 2)), (2, (1, 2))]


@pytest.mark.parametrize("text", ["rank:1", "rank:3", "topk:1", "topk:4", "random", "threshold:0.6"])
@pytest.mark.parametrize("weight", ["model", "one"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_routes_choose_the_same_over_modules_and_over_logits(text: str, weight: str, renormalise: bool) -> None:
    model = tiny_model("qwen3_moe", norm_topk_prob=renormalise)
    adopt(model)
    forward = ReferenceForward(model, pages=8)
    route = Route.parse(text, weight)  # type: ignore[arg-type]
    told: list[tuple[np.ndarray, np.ndarray]] = []  # router logits [9, 5], weights [9, 5]

    class Listen:
        def record(self, site: str, routing: Any, ctx: object) -> None:
            dense = np.zeros((9, 5))
            dense[routing.token_N.numpy(), routing.expert_N.numpy()] = routing.weight_N.float().numpy()
            told.append((routing.scores.logits_TC.float().numpy(), dense))

    with torch.inference_mode(), session(edits=[forward.override(route)], recorder=Listen()):
        model(torch.arange(9)[None])
    router = Router("softmax_topk", 2, Matrix("f32", 5, 32), renormalise=renormalise)
    assert len(told) == 2
    for logits, dense in told:
        ids, weights = chosen(route, router, logits)
        own = np.zeros((9, 5))
        np.add.at(own, (np.arange(9)[:, None], np.maximum(ids, 0)), np.where(ids < 0, 0, weights))
        assert np.allclose(dense, own, atol=1e-6)
        assert (dense > 0).any(axis=1).all()


def test_routes_that_a_model_cannot_follow_are_refused() -> None:
    with pytest.raises(ConfigError, match="only 5"):
        route_index(opened("qwen3_moe", 4), Route(kind="rank", k=6))
    with pytest.raises(ConfigError, match="none"):
        route_index(opened("llama", 4), Route(kind="rank", k=2))
    for text in ("rank:0", "rank:x", "best", "threshold:1.5"):
        with pytest.raises(ConfigError):
            Route.parse(text)
