"""GGUF files of tiny random models of every family: config, names, layouts and logits come back exactly.

The files are written as llama.cpp's converter writes them (its permutation, norm offset and stacked experts
are redone here from its source), so that the reader is held against the format and not against itself.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from moestro.core.errors import FamilyError, LoadError
from moestro.models import gguf_source
from moestro.models.atomic import verify_folder
from moestro.models.cache import convert_gguf
from moestro.models.gguf_families import FAMILIES
from moestro.models.gguf_meta import llama3_factors
from moestro.models.gguf_source import GGUFSource, dequantize
from moestro.models.writer import write_source


COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4, "decoder_sparse_step": 1}
# architecture name in the file, config class, what differs from COMMON
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", {"head_dim": 16}),
    "llama, biased and untied": (
        "llama",
        "LlamaConfig",
        {"attention_bias": True, "tie_word_embeddings": False},
    ),
    "llama, Llama 3 rope": (
        "llama",
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "mistral": ("llama", "MistralConfig", {"sliding_window": 8, "head_dim": 16}),
    "mixtral": ("llama", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "qwen2": ("qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2, YaRN": (
        "qwen2",
        "Qwen2Config",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen3": ("qwen3", "Qwen3Config", {"head_dim": 32}),
    "gemma3": (
        "gemma3",
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "sliding_window": 4,
            "rope_parameters": None,
        },
    ),
    "qwen2moe": ("qwen2moe", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 160}),
    "qwen3moe": ("qwen3moe", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
}


def tiny_model(case: str) -> tuple[str, torch.nn.Module]:
    arch, config_class, changes = MODELS[case]
    options = {key: value for key, value in {**COMMON, **changes}.items() if value is not None}
    config = getattr(transformers, config_class)(**options)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Zero biases and unit norms would hide a wrong name, offset or permutation.
            parameter.normal_(0, 0.3 if parameter.dim() == 1 else 0.1)
            if "norm" in name and arch != "gemma3":
                parameter.add_(1)
    return arch, model


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def gguf_tensors(arch: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors as llama.cpp names and stores them, from the in-memory state dict of Transformers."""
    config = model.config
    names = gguf.get_tensor_name_map(
        next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch),
        config.num_hidden_layers,
    )
    tensors = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        prefix = key.rsplit(".mlp.experts.", 1)[0].replace("model.layers.", "blk.")
        if key.endswith("experts.gate_up_proj"):
            gate, up = value.chunk(2, dim=1)
            tensors |= {f"{prefix}.ffn_gate_exps.weight": gate, f"{prefix}.ffn_up_exps.weight": up}
            continue
        if key.endswith("experts.down_proj"):
            tensors[f"{prefix}.ffn_down_exps.weight"] = value
            continue
        if arch == "llama" and ("q_proj" in key or "k_proj" in key):
            value = permute(value, config.num_attention_heads if "q_proj" in key else config.num_key_value_heads)
        if arch == "gemma3" and key.endswith("norm.weight"):
            value = value + 1
        if key.endswith("shared_expert_gate.weight"):
            value = value[0]
        stem, _, suffix = key.rpartition(".")
        mapped = names.get_name(stem)
        assert mapped, key
        tensors[f"{mapped}.{suffix}"] = value
    return tensors


def write_gguf(
    path: Path,
    arch: str,
    config: Any,
    tensors: dict[str, torch.Tensor],
    *,
    quant: gguf.GGMLQuantizationType | None = None,
    leave_out: str = "",
    extra: dict[str, Any] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(str(path), arch)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.value_length": getattr(config, "head_dim", None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "expert_count": getattr(config, "num_local_experts", getattr(config, "num_experts", None)),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", None),
    }
    if rope["rope_type"] == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    if rope["rope_type"] == "llama3":
        factors = llama3_factors(config.head_dim, rope)
        tensors = {**tensors, "rope_freqs.weight": torch.tensor(factors, dtype=torch.float32)}
    for key, value in {**values, **(extra or {})}.items():
        if value is None or key == leave_out:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    for key in ("bos", "eos", "padding"):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", {"bos": 1, "eos": 2, "padding": 0}[key])
    for name, tensor in tensors.items():
        data = tensor.detach().contiguous().numpy()
        if quant is not None and data.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(data, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("case", MODELS)
def test_a_model_comes_back_with_equal_logits(tmp_path: Path, cache: Path, case: str) -> None:
    arch, model = tiny_model(case)
    tensors = gguf_tensors(arch, model)
    folder = convert_gguf(write_gguf(tmp_path / "tiny.gguf", arch, model.config, tensors))
    assert folder.parent == cache
    verify_folder(folder, deep=True)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(model)
    for key in (
        "rope_parameters",
        "rms_norm_eps",
        "layer_types",
        "head_dim",
        "query_pre_attn_scalar",
        "norm_topk_prob",
    ):
        assert getattr(loaded.config, key, None) == getattr(model.config, key, None), key
    expected = logits(model)
    assert expected.abs().max() > 0.1
    # The norm offset of gemma3 is rounded once in float32; everything else is exact.
    assert (logits(loaded) - expected).abs().max() <= (1e-5 if arch == "gemma3" else 0)


@pytest.mark.parametrize("case", ["qwen2moe", "qwen3moe", "llama", "gemma3"])
def test_transformers_own_reader_gives_the_same_weights(tmp_path: Path, case: str) -> None:
    arch, model = tiny_model(case)
    path = write_gguf(
        tmp_path / "tiny.gguf",
        arch,
        model.config,
        gguf_tensors(arch, model),
        quant=gguf.GGMLQuantizationType.Q4_1,
        extra={"vocab_size": model.config.vocab_size},
    )
    # The config is given: Transformers does not read the inner sizes of experts from the file.
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=model.config).state_dict()
    source = GGUFSource(path)
    write_source(source, tmp_path)
    (tmp_path / "config.json").write_text(transformers.AutoConfig.for_model(**source.config).to_json_string())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert ours.keys() == peer.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, peer[key]), key


QUANTS = [
    quant
    for quant in gguf.GGMLQuantizationType
    if quant.name not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0")
]


@pytest.mark.parametrize("quant", QUANTS, ids=lambda quant: quant.name)
@pytest.mark.parametrize("num_blocks", [1, 37, 3001])
def test_dequantising_in_large_blocks_is_bit_equal(
    monkeypatch: pytest.MonkeyPatch, quant: gguf.GGMLQuantizationType, num_blocks: int
) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
    monkeypatch.setattr(gguf_source, "_CHUNK_BYTES", 1 << 14)  # so that many chunks and a rest are met
    raw = np.random.default_rng(0).integers(0, 256, num_blocks * block_bytes, dtype=np.uint8)
    tensor = type("Tensor", (), {"type": int(quant), "name": "x"})()
    with np.errstate(all="ignore"):
        found = dequantize(raw, tensor)
        expected = gguf.quants.dequantize(raw.reshape(num_blocks, block_bytes), quant).reshape(-1)
    assert found.shape == (num_blocks * block,)
    # Random bits hold NaNs: compare bits.
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    arch, model = tiny_model("qwen3moe")
    path = write_gguf(
        tmp_path / "t.gguf",
        arch,
        model.config,
        gguf_tensors(arch, model),
        quant=gguf.GGMLQuantizationType.Q8_0,
    )
    source = GGUFSource(path)
    stacked = source.header.tensors["blk.1.ffn_down_exps.weight"]
    raw = np.fromfile(path, np.uint8, stacked.nbytes, offset=stacked.start)
    whole = gguf.quants.dequantize(raw.reshape(4 * 64, -1), gguf.GGMLQuantizationType.Q8_0).reshape(4, 64, 32)
    for expert in range(4):
        key = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        assert source.shape(key) == (64, 32)
        assert np.array_equal(source.get(key).numpy(), whole[expert])


def test_every_name_of_the_tables_is_the_packages_name() -> None:
    """Hugging Face name -> GGUF name, by the `gguf` package's own map."""
    archs = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    for arch, family in FAMILIES.items():
        names = gguf.get_tensor_name_map(archs[{"mistral": "llama", "mixtral": "llama"}.get(arch, arch)], 1)
        for row in family.rows:
            stem, _, suffix = row.hf.format(l=0, e="E").rpartition(".")
            stem = stem.replace("experts.E.", "experts.")
            assert f"{names.get_name(stem)}.{suffix}" == row.gguf.format(l=0), row


@pytest.fixture(scope="module")
def llama() -> tuple[str, torch.nn.Module, dict[str, torch.Tensor]]:
    arch, model = tiny_model("llama")
    return arch, model, gguf_tensors(arch, model)


DAMAGE = {
    "missing": (lambda t: t.pop("blk.1.attn_k.weight"), "tensor 'blk.1.attn_k.weight' is missing"),
    "unknown": (
        lambda t: t.update({"blk.0.extra.weight": torch.zeros(4)}),
        "'blk.0.extra.weight' is not known for llama",
    ),
    "layer too many": (
        lambda t: t.update({"blk.2.attn_k.weight": torch.zeros(4)}),
        "'blk.2.attn_k.weight' is not known",
    ),
    "transposed": (
        lambda t: t.update({"blk.0.ffn_up.weight": t["blk.0.ffn_up.weight"].t().contiguous()}),
        r"'blk.0.ffn_up.weight' has the shape \[64, 96\], but the metadata asks for \[96, 64\]",
    ),
    "embedding missing": (lambda t: t.pop("token_embd.weight"), "tensor 'token_embd.weight' is missing"),
    "a bias in one layer of two": (
        lambda t: t.update({"blk.1.attn_q.bias": torch.zeros(64)}),
        "'blk.0.attn_q.bias' is missing",
    ),
    "a bias for queries alone": (
        lambda t: t.update({f"blk.{layer}.attn_q.bias": torch.zeros(64) for layer in range(2)}),
        "'blk.0.attn_k.bias' is missing, though other biases are there",
    ),
    "foreign rope factors": (
        lambda t: t.update({"rope_freqs.weight": torch.linspace(1, 2, 8)}),
        "not Llama 3's scaling",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_list_of_tensors_is_refused(tmp_path: Path, llama: Any, case: str) -> None:
    arch, model, tensors = llama
    damage, message = DAMAGE[case]
    changed = dict(tensors)
    damage(changed)
    write_gguf(tmp_path / "t.gguf", arch, model.config, changed)
    with pytest.raises(LoadError, match=message):
        GGUFSource(tmp_path / "t.gguf")


METADATA = [
    ({"leave_out": "block_count"}, r"llama\.block_count is missing"),
    ({"leave_out": "embedding_length"}, r"llama\.embedding_length is missing"),
    ({"extra": {"block_count": 0}}, "must be one whole number >= 1"),
    ({"extra": {"block_count": "two"}}, "must be one whole number >= 1"),
    ({"extra": {"attention.layer_norm_rms_epsilon": 0.0}}, "must be a number > 0"),
    ({"extra": {"attention.value_length": 8}}, r"must equal attention\.key_length"),
    ({"extra": {"rope.dimension_count": 8}}, "must equal the head width"),
    ({"extra": {"rope.scaling.type": "longrope"}}, "none, linear or yarn"),
    ({"extra": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping is .* not supported"),
    ({"extra": {"block_count": 1 << 31}}, "must be one whole number"),
]


@pytest.mark.parametrize(("options", "message"), METADATA)
def test_metadata_that_cannot_be_is_refused(tmp_path: Path, llama: Any, options: Any, message: str) -> None:
    arch, model, tensors = llama
    write_gguf(tmp_path / "t.gguf", arch, model.config, tensors, **options)
    with pytest.raises(LoadError, match=message):
        GGUFSource(tmp_path / "t.gguf")


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, llama: Any) -> None:
    _, model, tensors = llama
    write_gguf(tmp_path / "t.gguf", "mamba", model.config, tensors)
    with pytest.raises(FamilyError, match=r"'mamba' is not known \(known: llama, "):
        GGUFSource(tmp_path / "t.gguf")
