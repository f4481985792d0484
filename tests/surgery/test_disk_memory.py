"""Peak memory of converting a checkpoint on disk: its largest tensor and what is being written, not the model."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.surgery.peak import grown


def write_dense(folder: Path, layers: int, dim: int, inner: int, vocabulary: int) -> int:
    """A Llama with random weights; returns the bytes of its weights."""
    config = LlamaConfig(
        hidden_size=dim, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


@pytest.mark.slow
def test_a_checkpoint_is_converted_in_the_memory_of_its_largest_tensor_and_layer(tmp_path: Path) -> None:
    """A 60 MB embedding and 16 layers of 20 MB become layers of 75 MB while the process grows by a part of that."""
    embedding, expert, experts = 30_000 * 512 * 4, 3 * 512 * 3072 * 4, 4
    total = write_dense(tmp_path / "in", layers=16, dim=512, inner=3072, vocabulary=30_000)
    assert total > embedding + 16 * expert
    write_dense(tmp_path / "in-small", layers=1, dim=64, inner=32, vocabulary=100)
    paths, flags = [str(tmp_path / "in"), str(tmp_path / "out")], ["--num-experts", "4", "--top-k", "2", "--no-compare"]
    growth = grown(
        ["convert", "upcycle", *(f"{path}-small" for path in paths), *flags], ["convert", "upcycle", *paths, *flags]
    )
    output = 2 * experts * expert  # the layer that is written and the next one, which is being made
    assert growth < 1.3 * embedding + output, f"{growth:,} bytes"
