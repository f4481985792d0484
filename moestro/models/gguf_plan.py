"""From a GGUF header to a Hugging Face config and a list of tensors, each accounted for exactly once."""

from dataclasses import dataclass
from typing import Any

from moestro.core.errors import LoadError
from moestro.models.gguf_families import Row, family_of
from moestro.models.gguf_header import GGUFHeader, GGUFTensor
from moestro.models.gguf_meta import Metadata, rope, rows_of
from moestro.models.headers import shown


@dataclass(frozen=True, slots=True)
class Piece:
    """One Hugging Face tensor: expert `expert` (all of it when None) of a GGUF tensor, with `op` and a final
    shape.
    """

    name: str
    tensor: GGUFTensor
    expert: int | None
    op: str
    heads: int
    shape: tuple[int, ...]


def build_config(header: GGUFHeader) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file, as in `config.json`. Raises `LoadError`, `FamilyError`."""
    family, meta = family_of(header), Metadata(header)
    heads = meta.integer("attention.head_count")
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": rows_of(meta, "token_embd.weight"),
        "hidden_size": meta.integer("embedding_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope(meta),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "float32",
    }
    # A file of experts only may leave the dense width out.
    if meta.has("feed_forward_length") or "moe" not in family.model_type:
        config["intermediate_size"] = meta.integer("feed_forward_length")
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        config[field] = token if type(token) is int and 0 <= token < config["vocab_size"] else None
    return config | family.extra(meta)


def tensor_pieces(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Piece]:
    """Hugging Face name -> piece, for every tensor of the file exactly once. Raises `LoadError` that names
    the tensor.

    A tensor that is missing, unknown, or not of the shape that the config asks for is an error.
    """
    family, sizes = family_of(header), _sizes(config)
    pieces: dict[str, Piece] = {}
    used: set[str] = {"rope_freqs.weight"} & header.tensors.keys()
    for row in family.rows:
        layers = range(config["num_hidden_layers"]) if "{l}" in row.gguf else range(1)
        present = [layer for layer in layers if row.gguf.format(l=layer) in header.tensors]
        if row.optional and not present:
            continue
        for layer in layers:
            tensor = header.tensors.get(row.gguf.format(l=layer))
            if tensor is None:
                raise LoadError(f"{header.path}: tensor {shown(row.gguf.format(l=layer))} is missing")
            used.add(tensor.name)
            pieces |= {piece.name: piece for piece in _row_pieces(header, row, tensor, layer, sizes, config)}
    for name in header.tensors:
        if name not in used:
            raise LoadError(
                f"{header.path}: tensor {shown(name)} is not known for {family.model_type}; nothing is skipped"
            )
    return pieces


def _sizes(config: dict[str, Any]) -> dict[str, int]:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "V": config["vocab_size"],
        "D": config["hidden_size"],
        "H": head,
        "Q": head * config["num_attention_heads"],
        "K": head * config["num_key_value_heads"],
        "I": config.get("intermediate_size", 0),
        "M": config.get("moe_intermediate_size", 0),
        "S": config.get("shared_expert_intermediate_size", 0),
        "E": config.get("num_local_experts", config.get("num_experts", 0)),
    }


def _row_pieces(
    header: GGUFHeader,
    row: Row,
    tensor: GGUFTensor,
    layer: int,
    sizes: dict[str, int],
    config: dict[str, Any],
) -> list[Piece]:
    expected = tuple(sizes[letter] for letter in row.shape)
    # Vectors may stand as [1, D]; the shared expert's gate does in some files.
    if tensor.shape != expected and tensor.shape != (1, *expected):
        raise LoadError(
            f"{header.path}: tensor {shown(tensor.name)} has the shape {list(tensor.shape)}, "
            f"but the metadata asks for {list(expected)}"
        )
    heads = config["num_attention_heads"] if row.shape.startswith("Q") else config["num_key_value_heads"]
    if "{e}" not in row.hf:
        shape = (1, *expected) if row.op == "unsqueeze" else expected
        return [Piece(row.hf.format(l=layer), tensor, None, row.op, heads, shape)]
    return [
        Piece(row.hf.format(l=layer, e=expert), tensor, expert, row.op, heads, expected[1:])
        for expert in range(expected[0])
    ]
