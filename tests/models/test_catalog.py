"""The catalogue: every published size follows from the shapes, or the entry says why it cannot."""

import copy
import warnings

import pytest

from moestro.core.datafiles import read_yaml
from moestro.core.errors import ConfigError
from moestro.models.catalog import (
    TOLERANCE,
    CatalogEntry,
    GroupedAttention,
    LatentAttention,
    Mamba,
    active_parameters,
    count_parameters,
    deviations,
    load_catalog,
    parse_catalog,
    total_parameters,
)


ENTRIES = {entry.name: entry for entry in load_catalog()}


@pytest.fixture
def rows() -> list[dict]:
    return copy.deepcopy(read_yaml("moestro.models", "catalog.yaml"))


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_published_sizes_follow_from_the_shapes(entry: CatalogEntry) -> None:
    assert entry.published.total is not None
    for figure, deviation in deviations(entry).items():
        if figure in entry.unmatched:
            # A reason may only stand where it is needed, so that it cannot outlive a corrected shape.
            assert abs(deviation) > TOLERANCE, f"{figure} is within 3 %: drop the reason"
            assert len(entry.unmatched[figure].split()) >= 8
        else:
            assert abs(deviation) <= TOLERANCE, f"{figure} is off by {deviation:+.1%}"


def test_most_figures_are_reproduced() -> None:
    figures = [(entry, figure) for entry in ENTRIES.values() for figure in deviations(entry)]
    explained = [(entry.name, figure) for entry, figure in figures if figure in entry.unmatched]
    assert len(figures) >= 55
    assert len(explained) <= len(figures) // 5, explained


def test_the_catalogue_holds_the_survey_and_the_supported_families() -> None:
    types = {entry.about.hf_model_type for entry in ENTRIES.values()}
    assert {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"} <= types
    assert {"gpt_oss", "granitemoe", "switch_transformers", "dbrx", "jamba", None} <= types
    assert sum(entry.verified for entry in ENTRIES.values()) >= 12
    assert all(entry.source for entry in ENTRIES.values())
    assert not any("recalled" in entry.source for entry in ENTRIES.values() if entry.verified)


def test_facts_that_parity_needs() -> None:
    v3 = ENTRIES["deepseek-v3"].router
    assert (v3.score, v3.selection_bias, v3.groups, v3.keep_groups, v3.scale) == ("sigmoid", True, 8, 4, 2.5)
    assert ENTRIES["mixtral-8x7b"].router.normalise is True
    assert ENTRIES["olmoe"].router.normalise is False
    assert ENTRIES["llama4-scout"].router.applies_to == "input"
    assert ENTRIES["olmoe"].losses.f_over == "tokens"
    assert ENTRIES["deepseekmoe-16b"].losses.f_over == "slots"


def test_counts_of_a_layer_by_hand() -> None:
    assert GroupedAttention(layers=1, heads=4, kv_heads=2, head_dim=8).parameters(32) == 32 * 32 * 2 + 32 * 16 * 2
    plain = LatentAttention(layers=1, heads=2, q_rank=None, kv_rank=8, nope_dim=4, rope_dim=2, v_dim=4)
    assert plain.parameters(16) == 16 * 12 + 16 * 10 + 8 * 16 + 8 * 16
    ranked = LatentAttention(layers=1, heads=2, q_rank=6, kv_rank=8, nope_dim=4, rope_dim=2, v_dim=4)
    assert ranked.parameters(16) - plain.parameters(16) == 6 * 16 + 6 * 12 - 16 * 12
    mamba = Mamba(layers=1, inner=32, state=4, conv=3, dt_rank=2)
    assert mamba.parameters(16) == 16 * 64 + 32 * 3 + 32 * 10 + 2 * 32 + 32 * 4 + 32 + 32 * 16


def test_parts_add_up() -> None:
    for entry in ENTRIES.values():
        count = count_parameters(entry)
        assert count.total == total_parameters(entry)
        assert 0 < count.experts_active < count.experts
        assert active_parameters(entry) < total_parameters(entry)
        embeddings = count.input_embedding + count.output_embedding
        assert count.active("all") == embeddings + count.backbone + count.experts_active
        skipped = 0 if count.tied else count.input_embedding
        assert count.active("no-input") == count.active("all") - skipped


SMALL = {
    "olmoe": {"intermediate_size": 1024},
    "jamba": {},
    "deepseek-v2-lite": {
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 6,
        "n_routed_experts": 64,
    },
    "granite-3.1-3b-a800m": {
        "hidden_size": 1536,
        "intermediate_size": 512,
        "num_hidden_layers": 32,
        "vocab_size": 49155,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 40,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("name", SMALL)
def test_counts_equal_the_real_model(name: str) -> None:
    """The formulas against Transformers' own modules, built without memory."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[ENTRIES[name].about.hf_model_type](**SMALL[name])
        model = AutoModelForCausalLM.from_config(config)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert total_parameters(ENTRIES[name]) == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("verified",), "yes", "verified='yes'"),
        (("ffns", 0, "top_k"), 9999, "top_k=9999 of 2048 experts"),
        (("ffns", 0, "matrices"), 4, "matrices=4"),
        (("ffns", 0, "kind"), "dense", "no routed experts"),
        (("ffns", 1, "kind"), "wide", "kind 'wide' is unknown"),
        (("mixers", 0, "kind"), "conv", "kind 'conv' is unknown; known: grouped, latent, mamba"),
        (("mixers", 0, "rank"), 4, "unknown key rank"),
        (("model", "vocab"), -1, "vocab=-1"),
        (("model", "vocab"), "32k", "vocab='32k': expected a whole number"),
        (("published", "total"), "600B", "total='600B': expected a number or null"),
        (("unmatched", "active"), "because", "unmatched.active: needs a published figure"),
        (("name",), "switch-base-128", "switch-base-128 appears twice"),
        (("colour",), "red", "unknown key colour"),
    ],
)
def test_a_broken_entry_is_refused(rows: list[dict], path: tuple, value: object, message: str) -> None:
    place = rows[0]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        parse_catalog(rows)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_refused(rows: list[dict]) -> None:
    with pytest.raises(ConfigError, match="expected a list of models"):
        parse_catalog({})
    del rows[2]["router"]
    with pytest.raises(ConfigError, match="switch-large-128: router missing"):
        parse_catalog(rows)
