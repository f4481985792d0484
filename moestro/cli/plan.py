"""`moestro plan`: will a model fit, what lies in which tier, how fast will it be; no tensor is read."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer


if TYPE_CHECKING:
    from moestro.models.sizing import ModelSize
    from moestro.models.sizing_machine import Machine
    from moestro.models.sizing_plan import Range, Request, Tiers

__all__ = ["register"]

BUSY = 0.7
"""Processes a core from which on a measurement is called into question."""

NUMBERS = {
    "weights": "weights that every token needs",
    "cache": "cache of {context} positions",
    "process": "the process without a model",
    "working": "working space",
    "experts": "experts, {slots} of {num_experts}",
}


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def plan(
        model: str = typer.Argument(help="A folder, a GGUF file, wheel:NAME or a hub id; a config.json alone will do."),
        memory: str = typer.Option(..., "--memory", help="Memory it may take, such as 2GiB or 1500MB."),
        context: int = typer.Option(0, "--context", min=0, help="Positions to keep; 0: 4096, or the model's own."),
        bits: int | None = typer.Option(None, "--bits", help="Store matrices in 4, 8, 16 or 32 bits; else as stored."),
        out: Path | None = typer.Option(None, "--out", help="Write the serving plan to this file."),
        layers: bool = typer.Option(False, "--layers", help="List every layer."),
        measure: bool = typer.Option(False, "--measure", help="Measure this machine anew."),
        verify: bool = typer.Option(False, "--verify", help="Run a packed model and print how far the plan was off."),
        as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    ) -> None:
        """Say whether a model fits, what lies in memory and on disk, and how fast it will be, from headers alone.

        Speeds are estimates from a short measurement of this machine, which is kept for later. The bytes of a packed
        model are those that the engine will take.
        """
        from moestro.core.errors import ConfigError
        from moestro.models.sizing_units import parse_size

        budget = parse_size(memory, "--memory")
        if (Path(model).expanduser() / "pack.json").is_file():
            from moestro.cli._plan_packed import plan_packed

            if bits is not None or layers:
                raise ConfigError(
                    "a packed model has its bits, and its layers stand in pack.json; leave --bits, --layers out"
                )
            path, asked = Path(model).expanduser(), context or None
            plan_packed(path, budget, asked, out, measure=measure, verify=verify, as_json=as_json)
            return
        if verify:
            raise ConfigError("--verify runs a packed model; make one with `moestro pack`")
        from moestro.models.sizing_plan import BITS, Request, decode_speed, place, prompt_speed, serving_plan

        if bits is not None and bits not in BITS:
            raise ConfigError(f"--bits {bits}: matrices are stored in {', '.join(map(str, BITS))} bits")
        from moestro.models.sizing_machine import this_machine
        from moestro.models.sizing_read import read_size

        size = read_size(model)
        asked = context or min(4096, size.positions or 4096)
        request = Request(memory=budget, context=asked, bits=bits)
        machine = this_machine(again=measure, progress=_tell)
        tiers = place(size, request, machine.process_bytes)
        speeds = {
            "decode": decode_speed(size, request, tiers, machine),
            "prompt": prompt_speed(size, request, tiers, machine),
        }
        if out is not None:
            serving_plan(size, request, tiers, speeds).save(out)
        if as_json:
            print(json.dumps(_as_json(size, request, tiers, speeds, machine), indent=1))
        else:
            _show(size, request, tiers, speeds, machine, layers=layers)


def _tell(text: str) -> None:
    import sys

    print(f"measuring this machine (once): {text}", file=sys.stderr)


def _as_json(
    size: "ModelSize", request: "Request", tiers: "Tiers", speeds: dict[str, "Range | None"], machine: "Machine"
) -> dict[str, Any]:
    from dataclasses import asdict

    from moestro.models.sizing_plan import notes

    return {
        **notes(size, tiers, speeds),
        "request": asdict(request),
        "tiers": asdict(tiers),
        "memory_bytes": tiers.memory,
        "parts": {name: asdict(amount) for name, amount in size.parts().items()},
        "stored_bytes": size.whole.nbytes,
        "flops_per_token": size.flops_per_token(request.context),
        "cache_bytes_per_position": size.cache_bytes_per_position(request.itemsize(size)),
        "layers": [_layer(size, index) for index in range(len(size.layers))],
        "machine": machine.model_dump(mode="json"),
    }


def _layer(size: "ModelSize", index: int) -> dict[str, Any]:
    """One row of the table of layers."""
    layer = size.layers[index]
    return {
        "stack": layer.stack,
        "layer": layer.index,
        "parameters": (layer.resident + layer.experts).parameters,
        "active_parameters": layer.active.parameters,
        "stored_bytes": (layer.resident + layer.experts).nbytes,
        "flops_per_token": layer.flops(1),
        "experts": sum(mixture.num_experts for mixture in layer.mixtures),
        "top_k": sum(mixture.top_k for mixture in layer.mixtures),
        "slab_bytes": max((mixture.slab.nbytes for mixture in layer.mixtures), default=0),
        "window": next((a.window for a in layer.attentions), None),
        "cache_numbers_per_position": layer.cache_numbers(1),
    }


def _show(
    size: "ModelSize",
    request: "Request",
    tiers: "Tiers",
    speeds: dict[str, "Range | None"],
    machine: "Machine",
    *,
    layers: bool,
) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from moestro.models.sizing_units import show_count, show_size

    console = Console()
    active = f", {show_count(size.active_parameters)} on the path of a token" if size.mixtures else ""
    console.print(
        f"{size.name}: {size.family}, {show_count(size.whole.parameters)} parameters{active}, "
        f"{show_size(size.whole.nbytes)} as stored, "
        f"{show_count(size.flops_per_token(request.context))} operations a token at {request.context} positions",
        soft_wrap=True,
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    for name in ("tier", "what", "bytes"):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    values = {**asdict(tiers), "context": request.context}
    for name, text in NUMBERS.items():
        if values[name]:
            table.add_row("memory", text.format(**values), show_size(values[name]))
    table.add_row("", "[bold]in memory[/bold]", f"[bold]{show_size(tiers.memory)} of {show_size(request.memory)}")
    if tiers.disk:
        left = tiers.num_experts - tiers.slots
        table.add_row("disk", f"experts, {left} of {tiers.num_experts}", show_size(tiers.disk))
    console.print(table)
    for name, speed in speeds.items():
        if speed is not None:
            what = "decoding" if name == "decode" else f"reading a prompt of {min(512, request.context)}"
            console.print(
                f"{what}: about {speed.estimate:.3g} tokens/s ({speed.low:.3g} to {speed.high:.3g})", highlight=False
            )
    console.print(f"[dim]{_formula(tiers, machine)}[/dim]", soft_wrap=True, highlight=False)
    if layers:
        _show_layers(console, size)


def _formula(tiers: "Tiers", machine: "Machine") -> str:
    disk = " + missing experts / disk rate" if tiers.disk else ""
    rates = (
        f"{machine.row_weights_per_s[32] / 1e9:.2g} G weights/s (one row, float32)",
        f"{machine.gemm_flops_per_s[512] / 1e9:.3g} GFLOP/s (512 rows)",
        f"memory {machine.read_bytes_per_s / 1e9:.2g} GB/s",
        f"disk {machine.disk_bytes_per_s / 1e6:.0f} MB/s",
        f"{machine.layer_s * 1e3:.2g} ms a layer",
    )
    busy = busy_note(machine.busy)
    ends = "The ends are 25 % from the formula."
    if tiers.disk:
        ends = "Slow end: uniform routing, no read hidden; fast end: Zipf routing, all reads hidden; both 25 % wider."
    return (
        f"Seconds = fixed costs + weights met / rate + cache / memory rate{disk}. "
        f"Measured {machine.measured}{busy}: {', '.join(rates)}. {ends}"
    )


def busy_note(busy: float) -> str:
    """What to say of a measurement while so many processes a core wanted to run."""
    return f" while the machine was busy ({busy:.1f} processes a core; --measure does it again)" if busy > BUSY else ""


def _show_layers(console: Any, size: "ModelSize") -> None:
    from rich.table import Table

    from moestro.models.sizing_units import show_count, show_size

    table = Table(box=None, pad_edge=False)
    for name in ("layer", "parameters", "active", "stored", "experts", "slab", "cached", "window"):
        table.add_column(name, justify="right")
    for index in range(len(size.layers)):
        row = _layer(size, index)
        experts = f"{row['top_k']:g} of {row['experts']}" if row["experts"] else ""
        table.add_row(
            f"{row['stack']} {row['layer']}",
            show_count(row["parameters"]),
            show_count(row["active_parameters"]),
            show_size(row["stored_bytes"]),
            experts,
            show_size(row["slab_bytes"]) if row["experts"] else "",
            str(row["cache_numbers_per_position"]),
            "" if row["window"] is None else str(row["window"]),
        )
    console.print(table)
