"""`moestro pack`: a checkpoint as the engine reads it, experts apart, each one contiguous read."""

from pathlib import Path

import typer


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def pack(
        model: str = typer.Argument(help="A folder, hub id, GGUF file, or wheel:NAME; with --verify a packed folder."),
        out: Path | None = typer.Argument(None, help="Folder of the packed model."),
        bits: int = typer.Option(8, "--bits", help="Of matrices: 4, 8, 16 or 32. Packed experts keep their codes."),
        resident_bits: int | None = typer.Option(
            None, "--resident-bits", help="Of what every token needs (attention, embedding, head); else as --bits."
        ),
        exact: bool = typer.Option(
            False, "--exact", help="Refuse experts that are packed already and could not keep codes and scales."
        ),
        verify: bool = typer.Option(False, "--verify", help="Read a packed model whole and compare its hashes."),
        overwrite: bool = typer.Option(False, "--overwrite", help="Replace what was written there before."),
        as_json: bool = typer.Option(False, "--json", help="Print the receipt as JSON."),
    ) -> None:
        """Pack a model for the engine: experts as slabs on 4 KiB boundaries, what every token needs beside them."""
        from moestro.core.errors import ConfigError

        if verify:
            if out is not None:
                raise ConfigError("--verify reads one packed folder; leave OUT away")
            _verify(model)
            return
        if out is None:
            raise ConfigError("name the folder to write: moestro pack MODEL OUT")
        from moestro.engine.pack import pack_model

        receipt = pack_model(
            model,
            out,
            bits=bits,
            resident_bits=resident_bits,
            exact=exact,
            overwrite=overwrite,
            progress=None if as_json else lambda text: print(text, flush=True),
        )
        _show(receipt, out, as_json)


def _verify(path: str) -> None:
    from moestro.engine.packed import Packed

    packed = Packed.open(path)
    print(f"{path}: {packed.verify():,} bytes are what was written")


def _show(receipt: dict, out: Path, as_json: bool) -> None:  # type: ignore[type-arg]
    import json

    if as_json:
        print(json.dumps(receipt, indent=1))
        return
    size, error = receipt["bytes"], receipt["relative_error"]
    print(f"ledger: {receipt['ledger']['rows_touched']} of {receipt['ledger']['rows_expected']} rows written")
    print(
        f"bytes: {size['resident']:,} resident, {size['experts']:,} experts in {', '.join(receipt['expert_layouts'])}"
    )
    print("rounding: " + ", ".join(f"{name} {value:.2%}" for name, value in error.items()) + " of a matrix at most")
    for line in receipt["rounded_again"]:
        print(f"rounded again, no layout holds their codes: {line}")
    if receipt["dialect"] != "native":
        print(f"runs by the Transformers modules: {receipt['why']}")
    print(f"saved {out}")
