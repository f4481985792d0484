"""What a user can get wrong about tokenizers, folders and settings is one line and status 2, never a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moestro.cli import main
from moestro.cli.trace import load_tokenizer as traced_tokenizer
from moestro.core.errors import ConfigError, LoadError
from moestro.data.dataset import DataConfig, Dataset, load_tokenizer
from moestro.data.packing import pack
from moestro.data.tokens import byte_tokenizer
from moestro.models.load import load
from moestro.testing.tiny import TINY, tiny_folder
from moestro.testing.training import recipe
from moestro.training.build import make_model, reference_tokenizer
from moestro.training.loop import Trainer
from moestro.training.objectives import Causal
from moestro.training.validate import heldout_loss


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of 64 tokens with a tokenizer of 259."""
    tiny_folder("llama", tmp_path / "model", vocab_size=64)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def truncate(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:200])


def empty(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def mistype(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": "many"}))
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("damage", [truncate, empty, mistype])
def test_a_damaged_tokenizer_is_one_line(damage: Any, folder: Path) -> None:
    damage(folder)
    config = DataConfig(sources={"a": {"source": "x"}}, tokenizer=str(folder))  # type: ignore[dict-item]
    for opened in (
        lambda: reference_tokenizer(str(folder)),
        lambda: load_tokenizer(config),
        lambda: traced_tokenizer(folder),
    ):
        with pytest.raises(LoadError, match="its tokenizer cannot be opened") as caught:
            opened()
        assert str(caught.value).startswith(str(folder))
        assert "\n" not in str(caught.value)


def wrong_train(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *flags: str, **changes: Any) -> str:
    """What `moestro train` prints of a recipe that cannot work."""
    recipe = {
        "model": {"load": str(folder)},
        "data": {"source": "builtin:german", "sequence_length": 16},
        "precision": "float32",
        "steps": 1,
        "batch_size": 1,
        **changes,
    }
    path = folder.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path), "--out", str(out), *flags]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told.splitlines()[-1]


def test_a_tokenizer_larger_than_the_vocabulary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "the tokenizer has 259 tokens but the model's vocabulary 64"
    assert words in wrong_train(folder, folder.parent / "out", capsys)
    assert words in wrong_train(folder, folder.parent / "out", capsys, "--dry-run")
    assert main(["eval", str(folder), "--data", "builtin:german", "--context", "16"]) == 2
    assert words in capsys.readouterr().err


def test_gpt_oss_does_not_take_packed_documents(tmp_path: Path) -> None:
    """The reason, and the refusal in training and evaluation; one document a row goes through."""
    tiny_folder("gpt_oss", tmp_path / "model", vocab_size=300)
    model = load(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(1, 9)[None]
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with torch.no_grad():
        alone = model(input_ids=ids[:, 4:], use_cache=False).logits
        together = model(input_ids=ids, position_ids=places, use_cache=False).logits[:, 4:]
    assert not torch.allclose(alone, together, atol=1e-4), "Transformers keeps them apart now: lift the refusal"
    two = Dataset({"a": pack([[1, 2, 3], [4, 5, 6]], 8, 0)})
    one = Dataset({"a": pack([list(range(1, 8))], 8, 0)})
    settings = recipe(steps=1, batch_size=1, losses={"balance": 0.0})
    with pytest.raises(ConfigError, match="gpt_oss cannot be trained on packed documents"):
        Trainer(model, settings, two, Causal(), tmp_path / "two").run(silent=True)
    with pytest.raises(ConfigError, match="gpt_oss cannot be trained on packed documents"):
        heldout_loss(model, Causal(), two, limit=1, rows=1)
    assert heldout_loss(model, Causal(), one, limit=1, rows=1)["causal"] > 0
    assert Trainer(model, settings, one, Causal(), tmp_path / "one").run(silent=True).steps == 1


def test_a_file_where_the_run_should_go(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.parent / "out"
    file.write_text("mine")
    assert f"error: {file}: cannot be the folder of a run (File exists)" in wrong_train(folder, file, capsys)
    assert f"{file / 'x'}: cannot be" in wrong_train(folder, file / "x", capsys)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("family", ["bert", "switch_transformers"])
def test_only_models_that_predict_the_next_token_are_scored(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_folder(family, tmp_path / "model", vocab_size=300)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert main(["eval", str(tmp_path / "model"), "--data", "builtin:german", "--context", "16"]) == 2
    assert "does not predict the next token" in capsys.readouterr().err


def test_an_encoder_is_not_trained_to_predict_what_it_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With BERT's mask the loss would fall to nothing and mean nothing."""
    tiny_folder("bert", tmp_path / "model", vocab_size=300)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for flags in ([], ["--dry-run"]):
        assert "use objective: masked" in wrong_train(tmp_path / "model", tmp_path / "out", capsys, *flags)
    assert not (tmp_path / "out").exists(), "a refusal leaves nothing behind"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hiden_size": 64}, "a llama configuration has no 'hiden_size'; did you mean 'hidden_size'?"),
        ({"vocab_size": "many"}, "model.config.vocab_size='many'"),
        ({"hidden_act": "zilu"}, "cannot be built from these values (KeyError: 'zilu')"),
    ],
)
def test_values_of_a_model_from_scratch(
    changes: dict[str, Any], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = {"config": {**small, **changes}}
    data = {"source": "builtin:german", "sequence_length": 16, "tokenizer": "bytes"}
    for flags in ([], ["--dry-run"]):
        assert words in wrong_train(folder, folder.parent / "out", capsys, *flags, model=model, data=data)


@pytest.mark.parametrize("family", list(TINY))
def test_values_that_a_family_knows_are_taken(family: str) -> None:
    head = {"bert": "masked", "switch_transformers": "seq2seq"}.get(family, "causal")
    more = {"num_labels": 3, "dtype": "float32", "attn_implementation": "eager"}
    assert make_model({"model_type": family, **TINY[family], **more}, head, 90).config.num_labels == 3  # type: ignore[arg-type]


def test_a_mixture_of_feed_forwards_is_none_of_attentions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swap = {"sites": "attention", "method": "train.moe", "config": {"num_experts": 2}}
    model = {"load": str(folder), "swaps": [swap]}
    data = {"source": "builtin:german", "sequence_length": 16, "tokenizer": "bytes"}
    told = wrong_train(folder, folder.parent / "out", capsys, model=model, data=data)
    assert "self_attn: a mixture of feed-forwards cannot stand at a site of kind attention" in told


def test_a_plan_that_needs_weights_has_no_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder("llama", folder.parent / "wide", vocab_size=300)
    byte_tokenizer().save_pretrained(folder.parent / "wide")
    plan = {"method": "convert.split", "config": {"partition": "weights", "num_experts": 4}}
    model = {"load": str(folder.parent / "wide"), "plan": plan}
    assert "it needs a real run" in wrong_train(folder, folder.parent / "out", capsys, "--dry-run", model=model)


@pytest.mark.parametrize(
    ("text", "words"), [("1: 2\n", "the key 1 is no name"), ("[" * 20_000, "nested too deeply for a recipe")]
)
def test_recipes_that_are_none(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert main(["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_settings_are_finite() -> None:
    with pytest.raises(ConfigError, match=r"lr=inf: Input should be a finite number"):
        recipe(optimizer={"lr": float("inf")})
    with pytest.raises(ConfigError, match="finite number"):
        recipe(losses={"balance": float("nan")})
