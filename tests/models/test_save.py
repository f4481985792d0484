"""Moestro folders: what is in them, that they are whole, that training loops can write them."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

import moestro
from moestro.core.errors import SaveError
from moestro.models.atomic import verify_folder
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_folder, tiny_model


IDS = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path):
    tiny_folder("mixtral", tmp_path / "stock")
    return moestro.load(tmp_path / "stock")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_what_is_in_a_folder(model, tmp_path):
    entry = swap(model, "train.hash_router", {"num_experts": 5, "vocabulary": 97}, layers=[1])
    moestro.save(model, tmp_path / "own", receipt={"parity": 0.0})
    names = {file.name for file in (tmp_path / "own").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "receipt.json", "manifest.json"),
    }
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["model_type"] == "moestro"
    assert config["base_config"]["model_type"] == "mixtral"
    assert config["base_config"]["architectures"] == ["MixtralForCausalLM"]
    assert config["base_config"]["dtype"] == "float32"
    assert config["swaps"] == [entry.model_dump(mode="json")]
    receipt = json.loads((tmp_path / "own" / "receipt.json").read_text())
    assert receipt["parity"] == 0.0
    assert receipt["mixtures"] == {"model.layers.0.mlp": 5, "model.layers.1.mlp": 5}
    assert receipt["swaps"] == ["train.hash_router"]
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert receipt["tensors"] == len(tensors)
    verify_folder(tmp_path / "own", deep=True)


def test_one_expert_is_one_run_of_bytes(model, tmp_path):
    """A reader that wants one expert's gate and up rows finds them end to end in the file."""
    moestro.save(model, tmp_path / "own")
    file = tmp_path / "own" / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])["model.layers.1.mlp.bank.gate_up_proj"]
    whole = model.model.layers[1].mlp.bank.gate_up_proj
    size = whole[3].numel() * 4
    start = 8 + length + entry["data_offsets"][0] + 3 * size
    expert = torch.frombuffer(bytearray(raw[start : start + size]), dtype=torch.float32).view(whole[3].shape)
    assert torch.equal(expert, whole[3])


def test_two_saves_write_the_same_bytes(model, tmp_path):
    def digest(folder):
        moestro.save(model, folder)
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}

    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_an_existing_folder_is_kept(model, tmp_path):
    moestro.save(model, tmp_path / "own")
    with pytest.raises(SaveError):
        moestro.save(model, tmp_path / "own")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    moestro.save(model, tmp_path / "own", overwrite=True)
    assert torch.equal(moestro.load(tmp_path / "own").lm_head.weight, model.lm_head.weight)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(SaveError):
        moestro.save(model, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"


def test_a_folder_saved_over_the_one_it_was_read_from(model, tmp_path):
    moestro.save(model, tmp_path / "own")
    again = moestro.load(tmp_path / "own")
    before = logits(again)
    moestro.save(again, tmp_path / "own", overwrite=True)
    assert (logits(again) - before).abs().max() <= 1e-6
    assert (logits(moestro.load(tmp_path / "own")) - before).abs().max() <= 1e-6


def test_tied_tensors_are_written_once(tmp_path):
    tiny_folder("llama", tmp_path / "stock", tie_word_embeddings=True)
    model = moestro.load(tmp_path / "stock")
    moestro.save(model, tmp_path / "own")
    assert "lm_head.weight" not in load_file(tmp_path / "own" / "model.safetensors")
    again = moestro.load(tmp_path / "own")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_save_pretrained_writes_a_whole_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "own")
    verify_folder(tmp_path / "own", deep=True)
    assert (logits(moestro.load(tmp_path / "own")) - logits(model)).abs().max() <= 1e-6


def test_save_pretrained_into_a_folder_of_a_training_loop(model, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier save")
    for step in range(2):
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)
        model.save_pretrained(folder)
        again = moestro.load(folder)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight), step
    assert (folder / "trainer_state.json").read_text() == "{}"
    assert (folder / "checkpoint-1").is_dir()
    assert {file.name for file in folder.iterdir()} == {
        *("checkpoint-1", "trainer_state.json", "config.json", "generation_config.json", "model.safetensors"),
        *("receipt.json", "manifest.json"),
    }
    verify_folder(folder, deep=True)


def test_save_pretrained_takes_the_tensors_of_a_training_loop(model, tmp_path):
    tensors = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "own", state_dict=tensors)
    assert torch.equal(moestro.load(tmp_path / "own").lm_head.weight, model.lm_head.weight + 1)


def test_only_the_main_process_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "own", is_main_process=False)
    assert not (tmp_path / "own").exists()
    with pytest.raises(SaveError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "own", push_to_hub=True)


def test_tokenizer_files_go_along(tmp_path):
    tiny_folder("mixtral", tmp_path / "stock")
    (tmp_path / "stock" / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "stock" / "notes.md").write_text("not a tokenizer")
    moestro.save(moestro.load(tmp_path / "stock"), tmp_path / "own")
    assert (tmp_path / "own" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (tmp_path / "own" / "notes.md").exists()

    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("mine")

    moestro.save(moestro.load(tmp_path / "stock"), tmp_path / "other", tokenizer=Tokenizer())
    assert (tmp_path / "other" / "tokenizer.json").read_text() == "mine"


def test_a_plain_model_is_refused(tmp_path):
    with pytest.raises(SaveError, match="was not opened by Moestro"):
        moestro.save(tiny_model("llama"), tmp_path / "own")
    assert list(tmp_path.iterdir()) == []
