"""Reading data: what is there is read exactly, what is wrong is said in one line."""

import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch

from moestro.core.errors import DataError
from moestro.core.trace import trace
from moestro.data.corpora import CORPORA, corpus, fingerprint, heldout_keys
from moestro.data.dataset import DataConfig, SourceConfig, build_dataset, load_tokenizer
from moestro.data.sources import read_records, read_texts
from moestro.data.tokens import byte_tokenizer, encode, separator_id, train_bpe
from moestro.testing.training import TinyMixture


def test_text_folder_jsonl_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("zwei\nZeilen", "utf-8")
    (tmp_path / "a.md").write_text("﻿eins", "utf-8")
    (tmp_path / "x.bin").write_bytes(b"\0")
    assert read_texts(str(tmp_path)) == ["eins", "zwei\nZeilen"]

    rows = [{"body": "Größe", "n": 1}, {"body": "x", "n": 2}]
    lines = tmp_path / "d.jsonl"
    lines.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    assert read_texts(str(lines), field="body") == ["Größe", "x"]
    assert read_records(str(lines), fields={"text": "body", "label": "n"})[1] == {"text": "x", "label": 2}

    table = tmp_path / "d.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), table, row_group_size=1)
    assert read_texts(str(table), field="body") == ["Größe", "x"]


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("e.txt", b"", r"e\.txt: the file is empty \(0 bytes\)"),
        ("w.txt", b" \n ", "only white space"),
        ("z.txt", b"ab\0c", r"binary file \(zero byte at offset 2\)"),
        ("u.txt", b"abc\xff", r"not UTF-8 text \(byte 0xff at offset 3\)"),
        ("l.jsonl", b'{"text": "a"}\n{"text": ', r"l\.jsonl, line 2: not JSON"),
        ("l.jsonl", b"[1]", "line 1: expected a JSON object, got list"),
        ("l.jsonl", b'{"tekst": "a"}', r"line 1: no field 'text'; did you mean 'tekst'\?"),
        ("l.jsonl", b'{"text": 4}', "field 'text' of record 1 is int, expected a text"),
        ("p.parquet", b"PAR1 nothing", r"p\.parquet: not a readable Parquet file"),
        ("p.parquet", b"", r"empty \(0 bytes\)"),
    ],
)
def test_bad_files(name: str, body: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError, match=message) as caught:
        read_texts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_things(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataError, match=r"no such data file or folder; did you mean .*corpus\.txt"):
        read_texts(str(tmp_path / "corpsu.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in this folder"):
        read_texts(str(tmp_path / "empty"))
    parquet.write_table(arrow.table({"label": [1]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="no field 'text'; it has label"):
        read_texts(str(tmp_path / "p.parquet"))
    parquet.write_table(arrow.table({"text": arrow.array([], arrow.string())}), tmp_path / "q.parquet")
    with pytest.raises(DataError, match="no record in it"):
        read_texts(str(tmp_path / "q.parquet"))
    with pytest.raises(DataError, match="exists for builtin:NAME sources only"):
        read_texts(str(tmp_path / "corpus.txt"), "heldout")
    with pytest.raises(DataError, match="there are german, stdlib-code, stdlib-docs"):
        corpus("german2")


@pytest.mark.parametrize("name", sorted(CORPORA))
def test_corpora_are_split_by_file_without_leakage(name: str) -> None:
    train, heldout, whole = corpus(name, "train"), corpus(name, "heldout"), corpus(name, "all")
    assert heldout
    assert len(train) + len(heldout) <= len(whole)
    assert set(train).isdisjoint(heldout)
    seen = {" ".join(part.split()) for text in train for part in text.split("\n\n")}
    for text in heldout:
        for part in text.split("\n\n"):
            words = " ".join(part.split())
            assert len(words) < 40 or words not in seen
    size = {"german": 10_000, "stdlib-docs": 1_000_000, "stdlib-code": 5_000_000}[name]
    assert sum(map(len, train)) > 0.75 * size
    assert sum(map(len, heldout)) > 0.02 * size
    assert fingerprint(name) == fingerprint(name) != fingerprint(name, "train")


def test_the_corpora_are_what_they_say() -> None:
    code, docs, german = (" ".join(corpus(name, "train")) for name in ("stdlib-code", "stdlib-docs", "german"))
    assert code.count("\n    def ") > 5000
    assert docs.count(">>>") < 500
    assert docs.count(" the ") > 10_000 > docs.count("self.")
    assert german.count(" und ") > 50
    assert german.count(" the ") == 0


def test_heldout_files_depend_on_names_alone() -> None:
    keys = [f"f{i}.py" for i in range(50)]
    held = heldout_keys(keys)
    assert len(held) == 7
    assert heldout_keys(keys[::-1]) == held


def test_byte_tokenizer_is_one_token_a_byte_and_reversible() -> None:
    tokenizer = byte_tokenizer()
    text = "Größe, 日本\n\tund\r \0 {}~" + "".join(map(chr, range(32, 127)))
    (ids,) = encode(tokenizer, [text])
    assert len(ids) == len(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259
    assert separator_id(tokenizer) == tokenizer.eos_token_id


def test_bpe_is_deterministic_reversible_and_shorter(tmp_path: Path) -> None:
    texts = corpus("german", "train")
    tokenizer = train_bpe(texts, 600)
    (ids,) = encode(tokenizer, [texts[0]])
    assert tokenizer.decode(ids) == texts[0]
    assert len(ids) < 0.6 * len(texts[0].encode())
    assert len(tokenizer) == 600
    from moestro.data import tokens

    tokens._cache.clear()
    assert encode(train_bpe(texts, 600), [texts[0]]) == [ids]
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert encode(AutoTokenizer.from_pretrained(tmp_path), [texts[0]]) == [ids]


def test_labels_and_pairs(tmp_path: Path) -> None:
    rows = [{"q": "ab", "y": "cat", "t": "xyz"}, {"q": "a", "y": "ant", "t": "q"}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        sources={"s": SourceConfig(source=str(path), text="q", label="y", target="t")}, tokenizer="bytes"
    )
    tokenizer = load_tokenizer(config)
    labelled = build_dataset(config, tokenizer, "labels")
    assert labelled.labels == ("ant", "cat")
    assert [example["label"] for example in map(labelled.sources["s"].__getitem__, (0, 1))] == [1, 0]
    with pytest.raises(DataError, match="label 'cat' is none of ant, bee"):
        build_dataset(config, tokenizer, "labels", ["ant", "bee"])
    pair = build_dataset(config, tokenizer, "pairs").sources["s"][0]
    assert tokenizer.decode(pair["target_ids"]) == "xyz"


def test_a_trace_is_a_source_of_its_token_ids(tmp_path: Path) -> None:
    model = TinyMixture()
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])
    folder = tmp_path / "run.trace"
    with trace(model, folder):
        model(ids)
    config = DataConfig.parse({"source": str(folder), "tokenizer": "bytes", "sequence_length": 5})
    tokenizer = byte_tokenizer()
    found = build_dataset(config, tokenizer, "packed").sources["data"]
    assert [found[place]["input_ids"].tolist() for place in range(2)] == [[3, 4, 5, 6, 0], [7, 8, 9, 1, 0]]
    limited = DataConfig(sources={"t": SourceConfig(source=str(folder), limit=1)}, sequence_length=5)
    assert len(build_dataset(limited, tokenizer, "packed").sources["t"]) == 1
    with pytest.raises(DataError, match="holds token ids, not text"):
        load_tokenizer(DataConfig.parse({"source": str(folder), "tokenizer": "bpe:300"}))
    with pytest.raises(DataError, match="a trace has no split 'train'"):
        build_dataset(DataConfig.parse({"source": str(folder), "split": "train"}), tokenizer, "packed")
    big = tmp_path / "big.trace"
    with trace(model, big):
        model(torch.tensor([[12, 2]]))
    narrow = train_bpe(["x"], 259)
    narrow_size = type("Narrow", (), {"__len__": lambda self: 12, "eos_token_id": narrow.eos_token_id})()
    with pytest.raises(DataError, match="token ids from 2 to 12 do not fit the tokenizer's 12 tokens"):
        build_dataset(DataConfig.parse({"source": str(big)}), narrow_size, "packed")


def test_data_config_shorthand_and_errors() -> None:
    from moestro.core.errors import ConfigError

    one = DataConfig.parse({"source": "builtin:german", "text": "t", "sequence_length": 9})
    assert one.sources["data"].part == "train"
    assert one.sources["data"].text == "t"
    with pytest.raises(ConfigError, match="no source"):
        DataConfig(sources={})
    with pytest.raises(ConfigError, match="expected a number after 'bpe:'"):
        load_tokenizer(DataConfig.parse({"source": "builtin:german", "tokenizer": "bpe:x"}))
    with pytest.raises(ConfigError, match="under 259"):
        load_tokenizer(DataConfig.parse({"source": "builtin:german", "tokenizer": "bpe:100"}))
    with pytest.raises(ConfigError, match="the model brings none"):
        load_tokenizer(one)
    with pytest.raises(DataError, match=r"source 'data': the data hold .* fewer than one sequence"):
        build_dataset(
            DataConfig.parse({"source": "builtin:german", "split": "heldout", "sequence_length": 99999}),
            byte_tokenizer(),
            "packed",
        )


def test_json_that_no_reader_survives(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "[" * 100_000 + "\n")
    with pytest.raises(DataError, match="line 2: the JSON is nested too deeply"):
        read_texts(str(path))
    path.write_text('{"text": "a\\ud800b"}\n')
    with pytest.raises(DataError, match=r"line 1: field 'text' holds \\ud800, half of a character"):
        read_texts(str(path))
    path.write_text('{"text": "a\\ud83d\\ude00b"}\n')
    assert read_texts(str(path)) == ["a\U0001f600b"]


def test_a_parquet_file_that_is_damaged_inside(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a long text " * 100] * 50}), path)
    body = bytearray(path.read_bytes())
    for place in range(8, 60):
        body[place] ^= 0x5A
    path.write_bytes(body)
    with pytest.raises(DataError, match="the Parquet file is damaged") as caught:
        read_texts(str(path))
    assert "\n" not in str(caught.value)
