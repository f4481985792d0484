"""After ``import moestro`` the auto classes of Transformers open Moestro folders, whatever was imported first."""

import importlib
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

import moestro
from moestro.core.errors import LoadError
from moestro.core.layer import mixture_layers
from moestro.models import auto
from moestro.models.hf import MoestroConfig
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_folder


IDS = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))


def own_folder(tmp_path, family, change=None, **changes):
    """A Moestro folder of a family's tiny model and the model it was saved from."""
    tiny_folder(family, tmp_path / "stock", **changes)
    model = moestro.load(tmp_path / "stock")
    if change is not None:
        change(model)
    moestro.save(model, tmp_path / "own")
    return model, tmp_path / "own"


def upcycled(model):
    settings = {"num_experts": 4, "expert_size": 12, "gated": False, "activation": "gelu"}
    swap(model, "train.deepseekmoe", settings, layers=[1])


def start(code):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_import_is_light():
    heavy = ("torch", "transformers", "numpy", "pydantic")
    out, err = start(f"import moestro, sys; print([name for name in {heavy} if name in sys.modules])").communicate()
    assert out.strip() == "[]", err


def test_moestro_first():
    code = (
        "import moestro; from transformers import AutoModelForCausalLM as Auto; "
        "print([config.__name__ for config in Auto._model_mapping._extra_content])"
    )
    out, err = start(code).communicate()
    assert out.strip() == "['MoestroConfig']", err


def test_transformers_first(monkeypatch):
    """As if the tables of Transformers had been loaded without us."""
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    monkeypatch.setattr(AutoModelForCausalLM._model_mapping, "_extra_content", {})
    assert auto.MODEL_TYPE not in CONFIG_MAPPING
    auto.install()
    assert CONFIG_MAPPING[auto.MODEL_TYPE] is MoestroConfig
    assert MoestroConfig in AutoModelForCausalLM._model_mapping


def test_installing_twice_changes_nothing():
    finders = list(sys.meta_path)
    auto.install()
    importlib.reload(moestro)
    assert sys.meta_path == finders


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mixtral", AutoModelForCausalLM),
        ("llama", AutoModelForCausalLM),
        ("bert", AutoModelForMaskedLM),
        ("switch_transformers", AutoModelForSeq2SeqLM),
    ],
)
def test_the_saved_head(tmp_path, family, kind):
    model, folder = own_folder(tmp_path, family)
    again = kind.from_pretrained(folder)
    batch = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        assert (again(**batch).logits - model(**batch).logits).abs().max() <= 1e-6
    assert type(again) is type(model)
    assert mixture_layers(again).keys() == mixture_layers(model).keys()


@pytest.mark.parametrize(
    ("kind", "options", "shape"),
    [
        (AutoModel, {}, (2, 6, 32)),
        (AutoModelForQuestionAnswering, {}, (2, 6)),
        (AutoModelForSequenceClassification, {"num_labels": 5}, (2, 5)),
        (AutoModelForSequenceClassification, {}, (2, 2)),
    ],
)
def test_another_head_on_a_swapped_encoder(tmp_path, kind, options, shape):
    model, folder = own_folder(tmp_path, "bert", upcycled)
    again = kind.from_pretrained(folder, **options)
    with torch.no_grad():
        assert again(IDS)[0].shape == shape
        body = again.base_model(IDS)[0]
        assert (body - model.bert(IDS)[0]).abs().max() <= 1e-6
    assert [layer.site.removeprefix("bert.") for layer in mixture_layers(again).values()] == [
        "encoder.layer.1.intermediate"
    ]
    moestro.save(again, tmp_path / "head")
    third = kind.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        assert (third(IDS)[0] - again(IDS)[0]).abs().max() <= 1e-6


def test_config(tmp_path):
    _, folder = own_folder(tmp_path, "mixtral")
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "moestro"
    assert config.base_config["model_type"] == "mixtral"
    assert config.hidden_size == 32
    assert config.vocab_size == 97
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = config.nonsense
    config.save_pretrained(tmp_path / "config")
    again = AutoConfig.from_pretrained(tmp_path / "config")
    assert again.base_config == config.base_config
    assert again.swaps == config.swaps


def test_options(tmp_path):
    _, folder = own_folder(tmp_path, "mixtral")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map="cpu", attn_implementation="eager", trust_remote_code=True
    )
    assert model.dtype == torch.float16
    assert model.config._attn_implementation == "eager"
    with pytest.raises(LoadError, match="'quantization_config'"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config={"quant_method": "x"})
    with pytest.raises(LoadError, match="one device"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"model": 0, "lm_head": 1})
    with pytest.raises(LoadError, match="from its folder"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def test_tokenizer_and_pipeline(tmp_path):
    model, _ = own_folder(tmp_path, "mixtral")
    vocabulary = {f"w{i}": i for i in range(97)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2", unk_token="w3")
    moestro.save(model, tmp_path / "whole", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert again("w5 w7")["input_ids"] == [5, 7]
    writer = pipeline("text-generation", model=str(tmp_path / "whole"))
    text = writer("w5 w7 w9", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    ids = model.generate(torch.tensor([[5, 7, 9]]), max_new_tokens=3, do_sample=False)
    assert text.replace(" ", "") == tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ", "")
