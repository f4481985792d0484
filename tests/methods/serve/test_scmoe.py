"""Self-contrast: what must hold exactly, and the cached decoder against full recomputation of both passes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.core.decoding import Route
from moestro.core.errors import ConfigError
from moestro.core.registry import method
from moestro.core.session import session
from moestro.engine.reference import ReferenceForward
from moestro.engine.requests import Limits
from moestro.engine.scheduler import Scheduler
from moestro.methods.serve.scmoe import Config, SelfContrast, contrast, divergence, policy
from moestro.models.load import adopt
from moestro.testing.tiny import tiny_model
from tests.engine.running import Answer, run


PROMPTS = ([5, 9, 11, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57], [7])


def forward(family: str = "mixtral", **changes: Any) -> ReferenceForward:
    model = tiny_model(family, max_position_embeddings=128, **changes)
    adopt(model)
    return ReferenceForward(model, pages=96)


def texts(
    made: ReferenceForward, config: Config | None, limits: Limits | None = None, **settings: Any
) -> list[list[int]]:
    answers = [
        Answer(prompt, 10, **settings, **({} if config is None else {"decoder": policy(config)})) for prompt in PROMPTS
    ]
    return run(Scheduler(made, limits), *answers)


@pytest.fixture(scope="module")
def mixtral() -> ReferenceForward:
    return forward()


@pytest.mark.parametrize(
    "config",
    [
        Config(beta=0.0),
        Config(weak="topk:2", beta=3.0),
        Config(alpha=1.0, beta=9.0),
        Config(strong="topk:2", weak="topk:2", weak_weight="model", beta=0.9),
    ],
)
def test_no_strength_equal_passes_and_one_valid_token_are_greedy(mixtral: ReferenceForward, config: Config) -> None:
    assert texts(mixtral, config) == texts(mixtral, None)


def test_it_changes_something_else_and_leaves_the_model_as_it_was(mixtral: ReferenceForward) -> None:
    before = texts(mixtral, None, logprobs=5)
    assert texts(mixtral, Config(beta=3.0, alpha=0.01)) != before
    assert texts(mixtral, None, logprobs=5) == before


def test_the_first_rank_of_a_top_1_router_is_its_own_choice() -> None:
    made = forward(num_experts_per_tok=1)
    assert texts(made, Config(weak="rank:1", beta=5.0, alpha=0.001)) == texts(made, None)


@pytest.mark.parametrize("weak", ["rank:2", "rank:4", "random", "threshold:0.3"])
@pytest.mark.parametrize("limits", [Limits(), Limits(chunk=3, mixed=2), Limits(running=2)])
def test_cached_decoding_is_full_recomputation(mixtral: ReferenceForward, weak: str, limits: Limits) -> None:
    config = Config(weak=weak, beta=2.0, alpha=0.02)
    edit = mixtral.override(Route.parse(weak))
    wanted = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(10):
                strong = mixtral.model(torch.tensor([ids])).logits[0, -1].numpy()
                with session(edits=[edit]):
                    weaker = mixtral.model(torch.tensor([ids])).logits[0, -1].numpy()
                ids.append(int(contrast(strong, weaker, 0.02, 2.0).argmax()))
        wanted.append(ids[len(prompt) :])
    assert texts(mixtral, config, limits) == wanted


def test_both_passes_in_one_batch_are_two_batches(mixtral: ReferenceForward) -> None:
    seen: list[np.ndarray] = []

    class Listen(SelfContrast):
        def combine(self, logits: Any) -> Any:
            seen.append(logits)
            return super().combine(logits)

    run(Scheduler(mixtral), Answer(PROMPTS[0], 1, decoder=Listen(Config())))
    with torch.inference_mode():
        strong = mixtral.model(torch.tensor([PROMPTS[0]])).logits[0, -1].numpy()
        with session(edits=[mixtral.override(Route(kind="rank", k=2))]):
            weak = mixtral.model(torch.tensor([PROMPTS[0]])).logits[0, -1].numpy()
    assert np.abs(seen[0] - np.stack([strong, weak])).max() < 1e-5
    assert np.abs(strong - weak).max() > 1e-2


rows = st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6)


@given(rows, rows, st.floats(-50, 50), st.floats(0, 5), st.floats(0.01, 1))
def test_a_constant_on_either_pass_changes_nothing(
    strong: list[float], weak: list[float], shift: float, beta: float, alpha: float
) -> None:
    def shares(s: np.ndarray, w: np.ndarray) -> np.ndarray:
        z = contrast(s.astype(np.float32), w.astype(np.float32), alpha, beta).astype(np.float64)
        weights = np.exp(z - z.max())
        return weights / weights.sum()

    s, w = np.array(strong), np.array(weak)
    gaps = np.abs(s - s.max() - np.log(alpha))
    if gaps.min() < 1e-3:  # a token on the edge of V_valid may fall to either side by rounding
        return
    base = shares(s, w)
    assert np.abs(shares(s + shift, w) - base).max() < 2e-3
    assert np.abs(shares(s, w + shift) - base).max() < 2e-3


@given(rows, rows, st.floats(0, 5), st.floats(0.01, 1))
def test_the_formula(strong: list[float], weak: list[float], beta: float, alpha: float) -> None:
    s, w = np.array(strong, dtype=np.float32), np.array(weak, dtype=np.float32)
    z = contrast(s, w, alpha, beta)
    valid = s >= np.float32(np.log(alpha)) + s.max()
    assert np.isfinite(z[int(s.argmax())])
    assert np.array_equal(np.isfinite(z), valid)
    assert np.allclose(z[valid], ((1 + beta) * s.astype(np.float64) - beta * w)[valid], atol=1e-4)


def test_closed_tokens_and_counts() -> None:
    strong, weak = np.array([1, 0, -np.inf], dtype=np.float32), np.array([-np.inf, 0, 5], dtype=np.float32)
    assert contrast(strong, weak, 0.1, 1.0).tolist() == [1, 0, -np.inf]
    assert float(divergence(strong[:2], strong[:2])) == 0
    decoder = SelfContrast(Config(beta=1.0, stats=True))
    decoder.combine(np.array([[1.0, 0.9, -9], [1.0, 0.0, 0]], dtype=np.float32))
    decoder.combine(np.array([[1.0, 0.9, -9], [1.0, 0.9, -9]], dtype=np.float32))
    assert (decoder.steps, decoder.changed, decoder.valid) == (2, 1, 4)
    assert decoder.kl > 0


def test_divergence_by_hand() -> None:
    strong, weak = np.log([[0.7, 0.2, 0.1]]).astype(np.float32), np.log([[0.1, 0.6, 0.3]]).astype(np.float32)
    there = 0.7 * np.log(7) + 0.2 * np.log(1 / 3) + 0.1 * np.log(1 / 3)
    assert divergence(strong + 3, weak - 5) == pytest.approx([there], abs=1e-6)
    back = 0.1 * np.log(1 / 7) + 0.6 * np.log(3) + 0.3 * np.log(3)
    assert divergence(weak, strong) == pytest.approx([back], abs=1e-6)
    assert abs(there - back) > 0.05
    closed = np.array([0, -np.inf, 0], dtype=np.float32)
    assert divergence(closed, closed) == 0
    assert divergence(closed, np.zeros(3, np.float32)) == pytest.approx(np.log(1.5))
    assert divergence(np.zeros(3, np.float32), closed) == np.inf  # the weak pass excludes what the strong one may say


def test_temperatures_divide_each_pass_first() -> None:
    given = np.array([[2.0, 1.0, -8.0], [3.0, 0.6, 0.0]], dtype=np.float32)
    found = SelfContrast(Config(beta=0.5, strong_temperature=2.0, weak_temperature=3.0)).combine(given)
    assert found.tolist() == pytest.approx([1.5 * 1.0 - 0.5 * 1.0, 1.5 * 0.5 - 0.5 * 0.2, -np.inf])


def test_passes_follow_the_routes_that_are_asked_for(mixtral: ReferenceForward) -> None:
    config = Config(strong="topk:3", weak="threshold:0.4", weak_weight="one", beta=0.0)
    strong = Route(kind="topk", k=3)
    assert policy(config).routes == (strong, Route(kind="threshold", threshold=0.4, weight="one"))
    assert policy(Config()).routes == (None, Route(kind="rank", k=2))
    wanted = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.inference_mode(), session(edits=[mixtral.override(strong)]):
            for _ in range(10):
                ids.append(int(mixtral.model(torch.tensor([ids])).logits[0, -1].argmax()))
        wanted.append(ids[len(prompt) :])
    assert texts(mixtral, config) == wanted
    assert wanted != texts(mixtral, None)


def test_draws_follow_the_contrasted_distribution(mixtral: ReferenceForward) -> None:
    config = Config(beta=1.0)
    drawn = texts(mixtral, config, temperature=1.0, seed=4)
    assert drawn == texts(mixtral, config, Limits(chunk=4), temperature=1.0, seed=4)
    assert drawn != texts(mixtral, config, temperature=1.0, seed=5)


@pytest.mark.parametrize(
    "bad",
    [{"beta": -0.1}, {"beta": 11}, {"alpha": 0}, {"alpha": 1.1}, {"weak": "rank:0"}, {"weak": "worst"}, {"strong": "x"},
     {"weak_temperature": 0}, {"gamma": 1}],
)  # fmt: skip
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        method("serve.scmoe").configure(bad)


def test_what_a_model_cannot_do_is_an_error_of_the_request(mixtral: ReferenceForward) -> None:
    for made, weak in ((mixtral, "rank:6"), (forward("llama"), "rank:2")):
        answer = Answer([1, 2], 3, decoder=policy(Config(weak=weak)))
        other = Answer([1, 2], 3)
        run(Scheduler(made), answer, other)
        assert isinstance(answer.error, ConfigError)
        assert other.finish == "length"


def test_a_server_labels_what_is_not_the_model_itself() -> None:
    from openai import OpenAI

    from tests.engine.serving import serving

    with serving() as running, OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "stub", "prompt": "x", "max_tokens": 5, "temperature": 0}
        found = client.completions.create(
            **asked, extra_body={"decoding": {"method": "serve.scmoe", "beta": 2.0, "weak": "rank:3"}}
        )
        assert found.model_extra == {"moestro": {"decoding": "serve.scmoe", "exact": False}}
        assert client.completions.create(**asked).model_extra == {"moestro": {"decoding": "plain", "exact": True}}
