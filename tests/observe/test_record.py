"""Recording over texts: real families, exact counts against Transformers' own router logits, the verbs end to end."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moestro
from moestro.cli import main
from moestro.core.errors import DataError, TraceError
from moestro.core.layer import mixture_layers
from moestro.core.trace import RoutingTrace
from moestro.observe import layerwise
from moestro.observe.record import pieces, record, tokenizer_hash
from moestro.testing.tiny import TINY, tiny_folder


LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"
TEXTS = {
    "short": ["a few words.", "and a few more of them, not many."],
    "long": ["the quick brown fox jumps over the lazy dog. " * 4],
}


def make_tokenizer():
    vocabulary = {letter: number + 3 for number, letter in enumerate(LETTERS)} | {"<pad>": 0, "<unk>": 1, "</s>": 2}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_pieces_are_the_documents_cut(tokenizer):
    found = pieces(tokenizer, TEXTS, length=20, limit=30)
    assert [(piece.label, len(piece.ids)) for piece in found] == [
        ("short", 12), ("short", 18), ("long", 20), ("long", 10),
    ]  # fmt: skip
    assert tokenizer.decode(found[0].ids).replace(" ", "") == "afewwords."
    whole = pieces(tokenizer, TEXTS, length=20, limit=None)
    assert sum(len(piece.ids) for piece in whole if piece.label == "long") == len(TEXTS["long"][0])
    with pytest.raises(DataError, match="data 'none' holds no token"):
        pieces(tokenizer, {"none": [""]}, length=4, limit=None)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_counts_equal_the_stock_models_router_logits(kind, tmp_path, tokenizer):
    """Transformers' own router logits of every piece by itself, top-k by hand, against the trace of padded batches."""
    stock = tiny_folder(kind, tmp_path).float()
    model = moestro.load(tmp_path, dtype="float32")
    trace = record(model, tokenizer, TEXTS, None, length=16, rows=3)
    k = TINY[kind]["num_experts_per_tok"]
    loads = {layer: dict.fromkeys(TEXTS, 0) for layer in trace.layers}
    number = 0
    for piece in pieces(tokenizer, TEXTS, length=16, limit=None):
        with torch.no_grad():
            logits = stock(torch.tensor([piece.ids]), output_router_logits=True).router_logits
        assert len(logits) == len(trace.layers)
        view = trace.tokens(number)
        assert view.token_BS[0].tolist() == piece.ids
        for layer, logits_TE in zip(trace.layers, logits, strict=True):
            expert_TK = logits_TE.topk(k).indices
            assert view.expert[layer][0].tolist() == expert_TK.tolist()
            loads[layer][piece.label] += torch.bincount(expert_TK.reshape(-1), minlength=logits_TE.shape[1])
        number += 1
    assert number == trace.header.num_sequences
    for layer, by_tag in loads.items():
        for tag, load in by_tag.items():
            assert trace.load(layer, tag).tolist() == load.tolist()


def test_an_encoder_decoder_records_both_sides(tmp_path, tokenizer):
    tiny_folder("switch_transformers", tmp_path)
    model = moestro.load(tmp_path, dtype="float32")
    trace = record(model, tokenizer, TEXTS, None, length=16, rows=2)
    sites = [info.site for info in trace.header.layers]
    assert sites == list(mixture_layers(model))
    assert {site.split(".")[0] for site in sites} == {"encoder", "decoder"}
    numbers = [info.layer for info in trace.header.layers]
    assert len(set(numbers)) == len(numbers)
    tokens = sum(len(piece.ids) for piece in pieces(tokenizer, TEXTS, length=16, limit=None))
    assert trace.header.num_tokens == 2 * tokens
    assert all(trace.load(layer).sum() <= tokens for layer in numbers)


def test_progress_and_modes_and_facts(tmp_path, tokenizer):
    tiny_folder("mixtral", tmp_path / "model")
    model = moestro.load(tmp_path / "model", dtype="float32").train()
    seen = []
    trace = record(
        model, tokenizer, TEXTS, tmp_path / "x.trace", length=16, rows=2, model="tiny", facts={"by": "hand"},
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert model.training
    assert seen[-1][0] == seen[-1][1] == trace.header.num_tokens
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert trace.header.facts == {"length": 16, "rows": 2, "by": "hand"}
    assert len(trace.header.model_hash) == 64
    with pytest.raises(TraceError, match="exists"):
        record(model, tokenizer, TEXTS, tmp_path / "x.trace")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "cohere", "bert", "mixtral", "deepseek_v3", "gpt_oss",
                                  "switch_transformers"])  # fmt: skip
def test_layerwise_knows_the_blocks_of_every_kind_of_family(kind, tmp_path):
    tiny_folder(kind, tmp_path)
    model = moestro.load(tmp_path, dtype="float32")
    torch.manual_seed(0)
    batches = []
    for width in (5, 7):
        ids = torch.randint(3, 90, (2, width))
        mask = torch.ones_like(ids)
        mask[1, width - 2 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        extra = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
        batches.append(batch | extra)
    with torch.no_grad():
        plain = [model(**batch)[0] for batch in batches]
    run = layerwise(model, batches)
    steps = [step.index for step in run]
    assert steps == list(range(len(steps)))
    assert len(steps) >= model.config.num_hidden_layers
    for ours, theirs in zip(run.outputs(), plain, strict=True):
        assert torch.equal(ours[0], theirs)


# -- the verbs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model folder with a tokenizer, two kinds of text, and what a run leaves."""
    where = tmp_path_factory.mktemp("run")
    tiny_folder("mixtral", where / "model")
    tokenizer.save_pretrained(where / "model")
    (where / "a.txt").write_text(TEXTS["long"][0])
    (where / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS["short"]))
    (where / "model" / "receipt.json").write_text(json.dumps({"made": {"by": "a test"}}))
    (where / "model" / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {3 / i}}}\n' for i in (1, 2, 3)))
    return where


def test_trace_and_report_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "x.trace"
    asked = ["trace", str(folder / "model"), "--data", str(folder / "a.txt"), "-o", str(out), "--length", "16"]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{out}: 180 tokens in 12 sequences, 2 routed layers, 720 assignments")
    assert "180 of 180 tokens" in said.err
    trace = RoutingTrace.open(out)
    assert trace.tags == ("a",)
    assert trace.header.tokenizer_hash == tokenizer_hash(folder / "model")
    assert trace.header.facts["data"] == {"a": str(folder / "a.txt")}
    assert main(["report", str(out), str(folder / "model"), "-o", str(tmp_path / "r.html"), "--title", "T & T"]) == 0
    html = (tmp_path / "r.html").read_text()
    assert "<h1>T &amp; T</h1>" in html
    for section in ("load", "tokens", "training", "receipt"):
        assert f'id="{section}-section"' in html
    text = re.sub(r"<[^>]+>", "", re.search(r'<p class="text">(.*?)</p>', html, flags=re.S).group(1))
    assert text.replace(" ", "") == "thequickbrown"


def test_labels_and_fields(folder, tmp_path, capsys):
    out = tmp_path / "x.trace"
    asked = ["trace", str(folder / "model"), "-o", str(out), "--length", "16", "--tokens", "20"]
    two = ["--data", f"prose={folder / 'a.txt'}", "--data", f"talk={folder / 'b.jsonl'}", "--field", "text"]
    assert main([*asked, *two]) == 2
    assert "text" in capsys.readouterr().err
    assert not out.exists()
    assert main([*asked, "--data", f"talk={folder / 'b.jsonl'}", "--field", "body"]) == 0
    trace = RoutingTrace.open(out)
    assert trace.tags == ("talk",)
    assert trace.header.num_tokens == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "{where}/none", "--data", "{where}/a.txt", "-o", "{out}/x"], "none"),
        (["trace", "{where}/model", "--data", "{where}/c.txt", "-o", "{out}/x"], "c.txt"),
        (["trace", "{where}/model", "--data", "{where}/a.txt", "--data", "a={where}/b.jsonl", "-o", "{out}/x"],
         "two sources are called 'a'"),
        (["trace", "{where}/model", "--data", "{where}/a.txt", "-o", "{where}/model"], "exists"),
        (["report", "{where}/none", "-o", "{out}/x"], "no such folder"),
        (["report", "{where}", "-o", "{out}/x"], "nothing to report there"),
        (["report", "{where}/model", "--receipt", "{where}/a.txt", "-o", "{out}/x"], "not a JSON file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_half_written(folder, tmp_path, capsys, arguments, message):
    assert main([item.format(where=folder, out=tmp_path) for item in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("error: ")
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_is_refused(folder, tmp_path, capsys, tokenizer):
    tiny_folder("llama", tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    out = tmp_path / "x.trace"
    assert main(["trace", str(tmp_path / "dense"), "--data", str(folder / "a.txt"), "-o", str(out)]) == 2
    assert "no mixture layer to record" in capsys.readouterr().err
    assert not out.exists()
