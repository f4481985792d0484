"""Packing and order: every token where it belongs, every example once an epoch, exact from the seed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.core.errors import ConfigError, DataError
from moestro.data.packing import chunk, pack, packed_labels, pad, positions, split_documents
from moestro.data.sampling import Draw, Sampler, SamplerConfig, example_rng


def test_packing_by_hand() -> None:
    packed = pack([[5, 6, 7], [8], [], [9, 10, 11, 12]], 4, 0)
    assert packed.ids_NS.tolist() == [[5, 6, 7, 0], [8, 0, 9, 10]]  # 11 12 0 are the remainder
    assert packed.starts_NS.tolist() == [[True, False, False, False], [True, False, True, False]]
    starts = torch.from_numpy(packed.starts_NS)
    assert positions(starts).tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    labels = packed_labels(torch.from_numpy(packed.ids_NS).long(), starts)
    assert labels.tolist() == [[-100, 6, 7, 0], [-100, 0, -100, 10]]
    assert list(split_documents([8, 0, 9, 10], [True, False, True, False])) == [[8, 0], [9, 10]]


@given(st.lists(st.lists(st.integers(1, 50), max_size=12), min_size=1, max_size=20), st.integers(2, 9))
def test_packing_keeps_every_token_in_order(documents: list[list[int]], length: int) -> None:
    stream = [token for document in documents if document for token in (*document, 0)]
    if len(stream) < length:
        with pytest.raises(DataError, match=f"hold {len(stream)} tokens"):
            pack(documents, length, 0)
        return
    packed = pack(documents, length, 0)
    kept = len(stream) // length * length
    assert packed.ids_NS.reshape(-1).tolist() == stream[:kept]
    assert packed.num_tokens == kept
    # A document starts at a row's first place and right after a separator, nowhere else.
    flat = packed.ids_NS.reshape(-1)
    for place, start in enumerate(packed.starts_NS.reshape(-1)):
        assert start == (place % length == 0 or flat[place - 1] == 0)


def test_a_documents_logits_do_not_see_its_neighbours() -> None:
    """Transformers keeps documents apart by the restarts of position_ids: packed equals alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    packed = pack([[3, 4, 5], [6, 7, 8, 9, 10]], 10, 0)
    ids = torch.from_numpy(packed.ids_NS).long()
    position = positions(torch.from_numpy(packed.starts_NS))
    together = model(input_ids=ids, position_ids=position, use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in (ids[:, :4], ids[:, 4:])])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    mixed = model(input_ids=ids, use_cache=False).logits[0]
    assert not torch.allclose(mixed[4:], alone[4:], atol=1e-4)


def test_chunks_and_padding() -> None:
    pieces = [piece["input_ids"].tolist() for piece in chunk([[1, 2, 3, 4, 5], [6], [7, 8, 9]], 2)]
    assert pieces == [[1, 2], [3, 4], [7, 8]]
    with pytest.raises(DataError, match="two tokens"):
        chunk([[1], []], 4)
    ids, mask = pad([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def draws(sampler: Sampler, *steps: int) -> list[Draw]:
    return [draw for count in steps for draw in sampler.step(count)]


@pytest.mark.parametrize("kind", ["shuffle", "sequential"])
def test_every_example_once_an_epoch(kind: str) -> None:
    sampler = Sampler({"a": 5, "b": 3}, SamplerConfig(kind=kind), 7)  # type: ignore[arg-type]
    found = draws(sampler, *[3] * 8)
    for epoch in range(3):
        part = found[8 * epoch : 8 * epoch + 8]
        assert {(draw.source, draw.place) for draw in part} == {("a", i) for i in range(5)} | {
            ("b", i) for i in range(3)
        }
        assert {draw.epoch for draw in part} == {epoch}
    if kind == "shuffle":
        assert [d[::2] for d in found[:8]] != [d[::2] for d in found[8:16]]
    else:
        assert [d[::2] for d in found[:8]] == [("a", i) for i in range(5)] + [("b", i) for i in range(3)]


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(),
        SamplerConfig(kind="sequential"),
        SamplerConfig(kind="weighted", weights={"a": 1, "b": 3}),
        SamplerConfig(kind="temperature", temperature=2, one_source_per_step=True),
    ],
)
def test_resumes_at_the_very_next_example(config: SamplerConfig) -> None:
    sizes = {"a": 5, "b": 3}
    whole = draws(Sampler(sizes, config, 7), *[4] * 9)
    for cut in range(9):
        first = Sampler(sizes, config, 7)
        before = draws(first, *[4] * cut)
        second = Sampler(sizes, config, 7)
        second.load_state(first.state())
        assert before + draws(second, *[4] * (9 - cut)) == whole
    assert draws(Sampler(sizes, config, 8), *[4] * 9) != whole or config.kind == "sequential"


def test_weights_and_temperature_are_kept_to() -> None:
    sizes = {"a": 900, "b": 100, "c": 50}
    found = draws(Sampler(sizes, SamplerConfig(kind="weighted", weights={"a": 1, "b": 3}), 0), *[8] * 500)
    share = sum(draw.source == "b" for draw in found) / len(found)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    assert not any(draw.source == "c" for draw in found)
    found = draws(Sampler(sizes, SamplerConfig(kind="temperature", temperature=2), 0), *[8] * 500)
    wanted = 900**0.5 / (900**0.5 + 100**0.5 + 50**0.5)
    assert abs(sum(draw.source == "a" for draw in found) / 4000 - wanted) < 4 * (wanted * (1 - wanted) / 4000) ** 0.5


def test_one_source_per_step() -> None:
    sampler = Sampler({"a": 5, "b": 3}, SamplerConfig(kind="weighted", one_source_per_step=True), 1)
    steps = [{draw.source for draw in sampler.step(4)} for _ in range(30)]
    assert all(len(names) == 1 for names in steps)
    assert {name for names in steps for name in names} == {"a", "b"}


def test_switching_the_sampler_keeps_what_was_given() -> None:
    sampler = Sampler({"a": 6}, SamplerConfig(kind="sequential"), 0)
    sampler.step(4)
    sampler.reconfigure(SamplerConfig(kind="sequential"))
    assert [draw.place for draw in sampler.step(2)] == [4, 5]


def test_bad_samplers() -> None:
    with pytest.raises(ConfigError, match="unknown source 'c'; sources: a, b"):
        Sampler({"a": 1, "b": 1}, SamplerConfig(kind="weighted", weights={"c": 1}), 0)
    with pytest.raises(ConfigError, match="at least one example"):
        Sampler({"a": 0}, SamplerConfig(), 0)
    with pytest.raises(ConfigError, match="belong to kind='weighted'"):
        SamplerConfig(weights={"a": 1})
    with pytest.raises(ConfigError, match="not all 0"):
        SamplerConfig(kind="weighted", weights={"a": 0})
    with pytest.raises(ConfigError, match="one_source_per_step"):
        SamplerConfig(one_source_per_step=True)


def test_an_examples_random_numbers_are_its_own() -> None:
    numbers = {
        example_rng(seed, Draw(s, e, p)).random() for seed in (0, 1) for s in "ab" for e in (0, 1) for p in (0, 1)
    }
    assert len(numbers) == 16
    assert example_rng(0, Draw("a", 0, 1)).random() == example_rng(0, Draw("a", 0, 1)).random()
    assert isinstance(example_rng(0, Draw("a", 0, 1)), np.random.Generator)
