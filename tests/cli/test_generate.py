"""`moestro generate`: the text Transformers' generation gives, streamed; deterministic; one-line errors."""

import io
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from moestro.cli import main
from moestro.testing.tiny import VOCAB, tiny_folder


TEMPLATE = "{% for m in messages %}w05 {{ m['content'] }} w06{% endfor %}{% if add_generation_prompt %} w07{% endif %}"


def folder_of(family: str, folder: Path, **options: object) -> Path:
    """A tiny model with a tokenizer of the words w00 to w96."""
    tiny_folder(family, folder, **options)
    tokenizer = Tokenizer(models.WordLevel({f"w{i:02d}": i for i in range(VOCAB)}, unk_token="w03"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w01", eos_token="w02", pad_token="w00", chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("mixtral", tmp_path_factory.mktemp("mixtral") / "model")


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    assert main(["generate", str(folder), *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("flags", "prompt"), [((), [10, 20, 30]), (("--chat",), [5, 10, 20, 30, 6, 7])])
def test_greedy_text_is_transformers_own(
    flags: tuple[str, ...], prompt: list[int], mixtral: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run(capsys, mixtral, "--prompt", "w10 w20 w30", "--max-tokens", "12", *flags)
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    tokenizer = AutoTokenizer.from_pretrained(mixtral)
    assert told.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert len(told.split()) > 3


def test_draws_follow_the_seed(mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draws = ("--prompt", "w10", "--max-tokens", "20", "--temperature", "1.5", "--top-p", "0.95", "--top-k", "50")
    first = run(capsys, mixtral, *draws, "--seed", "7")
    torch.manual_seed(99)
    assert run(capsys, mixtral, *draws, "--seed", "7") == first
    assert run(capsys, mixtral, *draws, "--seed", "8") != first
    one = run(capsys, mixtral, "--prompt", "w10", "--max-tokens", "20", "--temperature", "1.5", "--top-k", "1")
    assert one == run(capsys, mixtral, "--prompt", "w10", "--max-tokens", "20"), "drawing from one token is no draw"


def test_the_prompt_may_come_from_standard_input(
    mixtral: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(capsys, mixtral, "--prompt", "w10 w11", "--max-tokens", "4")
    monkeypatch.setattr("sys.stdin", io.StringIO("w10 w11\n"))
    assert run(capsys, mixtral, "--prompt", "-", "--max-tokens", "4") == expected


def test_an_empty_prompt_begins_with_the_begin_token(mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, mixtral, "--prompt", "", "--max-tokens", "5") == run(
        capsys, mixtral, "--prompt", "w01", "--max-tokens", "5"
    )


def test_an_encoder_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("switch_transformers", tmp_path / "model", expert_capacity=64, seed=5)
    told = run(capsys, folder, "--prompt", "w10 w20", "--max-tokens", "6")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    expected = model.generate(torch.tensor([[10, 20]]), max_new_tokens=6, do_sample=False)[0]
    assert told.split() == [f"w{i:02d}" for i in expected.tolist() if i > 2]
    assert told.split()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-tokens", "62"], "3 tokens of prompt and --max-tokens 62 are more than the model's 64 positions"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--top-k", "5"], "set it above 0"),
        (["--top-p", "0", "--temperature", "1"], "--top-p 0"),
        (["--top-p", "1.5", "--temperature", "1"], "--top-p"),
        (["--dtype", "int7"], "int7"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], said: str, mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(mixtral), "--prompt", "w10 w20 w30", *flags]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_models_that_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder("bert", tmp_path / "bert")
    tiny_folder("llama", tmp_path / "mute")
    folder = folder_of("llama", tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    capsys.readouterr()
    for arguments, said in (
        ([str(tmp_path / "bert")], "does not write text"),
        ([str(tmp_path / "mute")], "tokenizer cannot be opened"),
        ([str(folder), "--chat"], "no chat template"),
        ([str(tmp_path / "none")], "no such file or folder"),
    ):
        assert main(["generate", *arguments, "--prompt", "w10"]) == 2
        told = capsys.readouterr()
        assert said in told.err
        assert told.err.count("\n") == 1


def test_a_prompt_that_is_no_text_is_one_line(mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(mixtral), "--prompt", "w10 \udcff"]) == 2  # what the shell's byte 0xff becomes
    assert capsys.readouterr().err == "error: the prompt holds bytes that are not UTF-8 text\n"
