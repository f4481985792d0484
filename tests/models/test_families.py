"""The tables of the families against the modules that Transformers really builds."""

import json
import subprocess
import sys

import pytest

from moestro.core.errors import FamilyError
from moestro.core.registry import method
from moestro.models.families import families, family
from moestro.models.sites import sites, stacks
from moestro.models.skeleton import empty_model, model_class
from moestro.models.spec import KINDS, Get, activation
from moestro.testing.tiny import TINY, tiny_config


NAMES = sorted(families())
MOE = [name for name in NAMES if families()[name].kind == "moe"]


def skeleton(name, **changes):
    config = tiny_config(name, **changes)
    cls = "BertForMaskedLM" if name == "bert" else None
    return empty_model(model_class(config, "masked-lm" if cls else None), config)


def test_every_family_has_a_tiny_model():
    assert set(NAMES) == set(TINY)


@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_of_the_table_finds_a_module(name):
    model = skeleton(name)
    spec = families()[name]
    paths = dict(model.named_modules())
    if name.startswith("deepseek"):  # queries are compressed or not, by a config value
        paths |= skeleton(name, q_lora_rank=None).named_modules()
    for place in stacks(model, spec):
        assert set(place.spec.sites) == set(KINDS) - {"head"}
        for kind, patterns in place.spec.sites.items():
            for pattern in patterns:
                found = [p for layer in range(8) if (p := place.within(pattern.format(layer=layer))) in paths]
                assert found, f"{kind}: {pattern}"


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_outside_the_stacks(name):
    assert [site.path for site in sites(skeleton(name), "head")]


@pytest.mark.parametrize("name", MOE)
def test_mixture_layers_by_config_are_those_of_the_modules(name):
    model = skeleton(name)
    spec = families()[name]
    saved = json.loads(model.config.to_json_string(use_diff=False))
    for place in stacks(model, spec):
        blocks = [
            site.layer
            for site in sites(model, "mlp", stack=place.spec.name)
            if type(site.module).__name__ == spec.moe.block
        ]
        assert blocks
        assert spec.moe_layers(model.config, place.spec.name) == blocks
        assert spec.moe_layers(saved, place.spec.name) == blocks


STEPS = [
    {"num_layers": 6, "num_decoder_layers": 4, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 1},
    {"num_layers": 5, "num_decoder_layers": None, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 5},
    {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 1},
]


@pytest.mark.parametrize("changes", STEPS)
def test_sparse_steps_of_switch_transformers(changes):
    model = skeleton("switch_transformers", **changes)
    spec = families()["switch_transformers"]
    for stack in ("encoder", "decoder"):
        blocks = [s.layer for s in sites(model, "mlp", stack=stack) if type(s.module).__name__ == spec.moe.block]
        assert spec.moe_layers(model.config, stack) == blocks


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 5, "mlp_only_layers": [3]}),
        ("qwen3_moe", {"decoder_sparse_step": 3, "num_hidden_layers": 7, "mlp_only_layers": []}),
        ("deepseek_v3", {"first_k_dense_replace": 2, "num_hidden_layers": 4}),
    ],
)
def test_layer_rules(name, changes):
    model = skeleton(name, **changes)
    spec = families()[name]
    blocks = [s.layer for s in sites(model, "mlp") if type(s.module).__name__ == spec.moe.block]
    assert spec.moe_layers(model.config) == blocks
    assert 0 < len(blocks) < changes["num_hidden_layers"]


@pytest.mark.parametrize("name", MOE)
def test_router_settings_are_accepted_by_the_router(name):
    spec = families()[name]
    get = Get(tiny_config(name))
    count = get(*spec.moe.num_experts)
    router = method(spec.moe.router).configure({"num_experts": count, **spec.moe.router_config(get)})
    assert router.num_experts == count
    for field, key in spec.moe.router_keys.items():
        assert hasattr(router, field)
        assert getattr(get.config, key) == getattr(router, field)


@pytest.mark.parametrize("name", MOE)
def test_losses_are_methods_and_take_their_settings(name):
    for loss in families()[name].moe.losses:
        method(loss.method).configure(dict(loss.config))


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_known(name):
    spec = families()[name]
    assert activation(Get(tiny_config(name)), spec.ffn.activation)


def test_exactly_one_stock_layout():
    for name in MOE:
        layouts = families()[name].moe.layouts
        assert [layout.stock for layout in layouts].count(True) == 1
        assert len({layout.name for layout in layouts}) == len(layouts)


def test_unknown_family_is_one_sentence():
    with pytest.raises(FamilyError) as error:
        family({"model_type": "mamba2"})
    message = str(error.value)
    assert "'mamba2'" in message
    assert "llama" in message
    assert "\n" not in message


def test_missing_config_key_is_named():
    with pytest.raises(FamilyError, match="'num_local_experts' or 'num_experts'"):
        Get({"model_type": "mixtral"})("num_local_experts", "num_experts")


def test_unknown_activation_is_named():
    with pytest.raises(FamilyError, match="'mish'"):
        activation(Get({"hidden_act": "mish"}), "hidden_act")


def test_other_swiglu_constants_are_refused():
    config = {"num_experts_per_tok": 2, "swiglu_limit": 9.0}
    with pytest.raises(FamilyError, match=r"swiglu_limit=9\.0"):
        families()["gpt_oss"].moe.router_config(Get(config))


def test_tables_are_read_without_torch_and_transformers():
    code = (
        "import sys; from moestro.models.families import families; families(); "
        "sys.exit(sorted({'torch', 'transformers'} & set(sys.modules)) != [])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
