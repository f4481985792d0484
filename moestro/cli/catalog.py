"""`moestro catalog`: known mixture-of-experts models, their shapes, routers and losses."""

import difflib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer


if TYPE_CHECKING:
    from moestro.models.catalog import CatalogEntry

__all__ = ["register", "row"]


def register(app: typer.Typer) -> None:
    """Add the verb with its two commands."""
    catalog = typer.Typer(help="Known mixture-of-experts models: shapes, routers, shared experts, loss scalings.")
    app.add_typer(catalog, name="catalog")

    @catalog.command("list")
    def list_models(
        as_json: bool = typer.Option(False, "--json", help="Print the models as JSON."),
        router: str | None = typer.Option(None, "--router", help="Only routers of this score, e.g. sigmoid."),
        shared: bool = typer.Option(False, "--shared", help="Only models with shared experts."),
    ) -> None:
        """List the models with what their shapes add up to, beside what their authors print."""
        from moestro.models.catalog import load_catalog

        found = [row(entry) for entry in load_catalog()]
        found = [one for one in found if (router is None or one["router"] == router) and (not shared or one["shared"])]
        if as_json:
            print(json.dumps(found, indent=1, ensure_ascii=False))
        else:
            _show_list(found)

    @catalog.command("show")
    def show_model(
        name: str = typer.Argument(help="A model's name, as `moestro catalog list` prints it."),
        as_json: bool = typer.Option(False, "--json", help="Print it as JSON."),
    ) -> None:
        """Show everything known of one model, and where it comes from."""
        entry = _find(name)
        facts = asdict(entry) | {"computed": row(entry)}
        if as_json:
            print(json.dumps(facts, indent=1, ensure_ascii=False))
        else:
            _show_one(facts)


def row(entry: "CatalogEntry") -> dict[str, Any]:
    """One line: sizes in billions worked out from the shapes and as printed, experts, top-k, router, balance loss."""
    from moestro.models.catalog import active_parameters, total_parameters

    routed = [ffn for ffn in entry.ffns if ffn.kind == "routed"]
    return {
        "name": entry.name,
        "year": entry.about.year,
        "total": total_parameters(entry) / 1e9,
        "total_printed": entry.published.total,
        "active": active_parameters(entry) / 1e9,
        "active_printed": entry.published.active,
        "experts": routed[0].experts if routed else 0,
        "top_k": routed[0].top_k if routed else 0,
        "shared": any(ffn.kind == "shared" for ffn in entry.ffns),
        "router": entry.router.score,
        "balance": entry.losses.balance,
        "model_type": entry.about.hf_model_type,
        "verified": entry.verified,
    }


def _find(name: str) -> "CatalogEntry":
    from moestro.core.errors import RegistryError
    from moestro.models.catalog import load_catalog

    entries = {entry.name: entry for entry in load_catalog()}
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `moestro catalog list`"
        raise RegistryError(f"no model {name!r} in the catalogue; {hint}")
    return entries[name]


def _show_list(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    def billions(one: dict[str, Any], name: str) -> str:
        printed = one[f"{name}_printed"]
        return f"{one[name]:.3g}" + (f" ({printed:g})" if printed is not None else "")

    table = Table(
        "name", "year", "total B (printed)", "active B (printed)", "experts", "router", box=None, pad_edge=False
    )
    for one in found:
        experts = f"{one['top_k']} of {one['experts']}" + (" + shared" if one["shared"] else "")
        table.add_row(
            one["name"], str(one["year"]), billions(one, "total"), billions(one, "active"), experts, one["router"]
        )
    Console().print(table)
    print(f"{len(found)} models, {sum(one['verified'] for one in found)} compared with a published configuration")


def _show_one(facts: dict[str, Any]) -> None:
    import yaml

    plain = json.loads(json.dumps(facts))  # tuples become lists
    print(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100), end="")
