"""Write the generated pages from cards, papers, results and the command line; with --check only compare.

    docs/papers.md            the fifty papers with the verdicts of their studies
    docs/methods/index.md     every method by stage;  docs/methods/<stage>.md  their formulas and settings
    docs/verbs/<verb>.md      one page a verb, from its own help
    README.md                 the table between the two marks

Nothing here imports PyTorch.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from moestro.cli import app
from moestro.cli.papers import rows as paper_rows
from moestro.core.card import STAGES
from moestro.core.papers import load_papers
from moestro.core.registry import MethodInfo, infos
from moestro.studies._results import load


ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by scripts/generate_docs.py; edit the source it reads, then run `make generate`. -->\n\n"
MARKS = ("<!-- methods -->", "<!-- /methods -->")
STAGE_WORDS = {
    "train": "routers, losses and layers for training",
    "convert": "dense models to mixtures and back",
    "adapt": "adapters and prompts on frozen models",
    "compress": "fewer, smaller or coarser experts",
    "place": "which device holds which expert",
    "serve": "what acts while a model serves",
    "compose": "several models behind one router",
    "inspect": "what a mixture does, measured",
    "simulate": "what a machine would do",
}


def pages() -> dict[Path, str]:
    """Every generated file with its text."""
    docs = ROOT / "docs"
    made = {docs / "papers.md": papers_page(), docs / "methods" / "index.md": methods_page()}
    for stage in STAGES:
        if of_stage(stage):
            made[docs / "methods" / f"{stage}.md"] = stage_page(stage)
    group = typer.main.get_command(app())
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        made[docs / "verbs" / f"{name}.md"] = verb_page(name, command)
    made[docs / "verbs" / "index.md"] = verbs_page(group.commands)  # type: ignore[attr-defined]
    made[ROOT / "README.md"] = readme()
    return made


def of_stage(stage: str) -> list[MethodInfo]:
    """The stage's methods of this repository (not those of other packages), by id."""
    return [
        info for info in infos().values()
        if info.stage == stage and (ROOT / "moestro" / "methods" / stage / f"{info.id.split('.')[1]}.py").exists()
    ]  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def arxiv(number: str | None) -> str:
    """A link to the paper."""
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""


def papers_page() -> str:
    """docs/papers.md."""
    records = load(ROOT / "results")
    by_key = {paper.key: paper for paper in load_papers()}
    rows = []
    for row in paper_rows():
        paper, study = by_key[row["key"]], row["study"]
        verdict = f"[{study['verdict'].replace('_', ' ')}](#{study['parts'][0]})" if study else ""
        methods = ", ".join(f"`{method}`" for method in row["methods"]) or "open"
        rows.append([f"`{paper.key}`", paper.title, str(paper.year), arxiv(paper.arxiv), methods, verdict])
    text = NOTE + "# Papers\n\nWhat Moestro builds from. A paper without a method is open. The verdicts come from the "
    text += "[studies](studies.md): each claim was measured here against a control, at the scale of a laptop.\n\n"
    text += table(["key", "title", "year", "arXiv", "methods", "study"], rows)
    if records:
        text += "\n## Studies\n"
    for key, record in records.items():
        text += "\n" + study_section(key, record)
    return text


def study_section(key: str, record: dict[str, Any]) -> str:
    """What one study measured."""
    text = (
        f"### {key} {{#{key}}}\n\n**{record['title']}**: {record['verdict'].replace('_', ' ')}. {record['setting']}\n\n"
    )
    claims = []
    for claim in record["claims"]:
        between = claim["interval"]
        spread = f" [{between[0]:.4g}, {between[1]:.4g}]" if between else ""
        verdict = claim["verdict"].replace("_", " ")
        measured = f"{claim['metric']}: {claim['measured']:.4g}{spread}"
        claims.append([claim["text"], f"{claim['claimed']} ({claim['where']})", claim["rule"], measured, verdict])
    text += table(["claim", "in the paper", "rule", "measured", "verdict"], claims) + "\n"
    for claim in record["claims"]:
        if claim["tells"]:
            text += f"*{claim['text']}* {claim['verdict'].replace('_', ' ').capitalize()}: {claim['tells']}\n\n"
    text += f"![{record['title']}: every arm and seed](../results/{key}.svg)\n\n"
    metrics = list(dict.fromkeys(claim["metric"] for claim in record["claims"]))
    arms = []
    for arm in record["arms"]:
        found = record["measured"][arm["name"]]
        cells = [
            f"{found[m]['mean']:.4g}" + (f" ± {found[m]['std']:.2g}" if found[m]["std"] is not None else "")
            if m in found else ""
            for m in metrics
        ]  # fmt: skip
        arms.append([arm["name"], arm["role"], arm["text"], *cells])
    text += table(["arm", "role", "what it is", *metrics], arms)
    text += f"\n{len(record['seeds'])} seeds, {record['date'][:10]}, commit {record['commit']}, "
    text += f"{record['machine']['processor']}, {record['wall_seconds'] / 60:.1f} minutes: `{record['command']}`.\n"
    return text


def methods_page() -> str:
    """docs/methods/index.md."""
    text = NOTE + "# Methods\n\nEvery method is one file; its path is its id. `moestro methods` prints this list.\n"
    for stage in STAGES:
        found = of_stage(stage)
        if not found:
            continue
        text += (
            f"\n## {stage.capitalize()}\n\n{STAGE_WORDS[stage].capitalize()}. [Formulas and settings]({stage}.md)\n\n"
        )
        rows = []
        for info in found:
            mark = "" if info.card.status == "stable" else " *(experimental)*"
            paper = f"`{info.card.paper}`" if info.card.paper else arxiv(info.card.arxiv)
            rows.append([f"`{info.id}`", info.shape, paper, info.card.summary + mark])
        text += table(["id", "shape", "paper", "what it does"], rows)
    return text


def stage_page(stage: str) -> str:
    """docs/methods/<stage>.md: facts from the card, the rest from the file's own docstrings."""
    text = NOTE + f"# {stage.capitalize()}: {STAGE_WORDS[stage]}\n"
    for info in of_stage(stage):
        card = info.card
        text += f"\n## {info.id}\n\n{card.summary}\n\n"
        text += f"*{card.title}* ({card.year}) {arxiv(card.arxiv)}. Place on the map: `{card.taxonomy}`."
        if card.needs != ("none",):
            text += f" Needs: {', '.join(card.needs)}."
        text += "".join(f"\n\nDeparts from the paper: {sentence}." for sentence in card.deviations)
        if card.tolerance is not None:
            text += f"\n\nTolerance {card.tolerance.atol:g}: {card.tolerance.why}."
        text += f"\n\n::: moestro.methods.{info.id}\n    options:\n      heading_level: 3\n"
        text += "      filters: ['!^CARD$', '!^_']\n"
    return text


def verbs_page(commands: dict[str, Any]) -> str:
    """docs/verbs/index.md."""
    text = (
        NOTE + "# Verbs\n\nThe command line, one page a verb. Wrong input is one line on stderr and exit status 2; an "
    )
    text += "interrupt is status 130.\n\n"
    rows = [[f"[`moestro {name}`]({name}.md)", first_line(commands[name])] for name in sorted(commands)]
    return text + table(["verb", "what it does"], rows)


def first_line(command: Any) -> str:
    """The first sentence of a command's help."""
    return str(inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " "))


def verb_page(name: str, command: Any) -> str:
    """docs/verbs/<verb>.md."""
    usage = " ".join([f"moestro {name}", *arguments(command)])
    text = NOTE + f"# moestro {name}\n\n```text\n{usage}\n```\n\n{inspect.cleandoc(command.help or '')}\n"
    below = commands_below(command)
    if name in STAGES and of_stage(name):
        text += f"\nSettings and formulas: [{name} methods](../methods/{name}.md).\n"
    elif name in STAGES:
        text += "\nNo method of this stage is there yet.\n"
    if below:
        text += "\n" + table(["command", "what it does"], [[f"`{key}`", first_line(sub)] for key, sub in below])
    for sub_name, sub in [("", command), *below]:
        rows = list(parameters(sub))
        if rows:
            text += f"\n## {sub_name or 'Parameters'}\n\n" + table(["parameter", "default", "meaning"], rows)
    return text


def commands_below(command: Any) -> list[tuple[str, Any]]:
    """Name and command of each command of a group, by name."""
    if not hasattr(command, "list_commands"):
        return []
    return [(name, command.get_command(None, name)) for name in sorted(command.list_commands(None))]


def arguments(command: Any) -> Iterator[str]:
    """Positional arguments as they are typed, and a word for options."""
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            shown = (parameter.metavar or parameter.name).upper()
            yield shown if parameter.required else f"[{shown}]"
    if hasattr(command, "commands"):
        yield "COMMAND ..."
    yield "[OPTIONS]"


def parameters(command: Any) -> Iterator[list[str]]:
    """One row a parameter."""
    for parameter in command.params:
        if parameter.name == "help":
            continue
        option = parameter.param_type_name == "option"
        shown = ", ".join([*parameter.opts, *parameter.secondary_opts]) if option else parameter.name.upper()
        default = parameter.default
        hidden = default is None or default is False or parameter.required or callable(default)
        yield [f"`{shown}`", "" if hidden else f"`{default}`", parameter.help or ""]


def readme() -> str:
    """README.md with a fresh table between the marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    rows = []
    for stage in STAGES:
        names = ", ".join(f"`{info.id.split('.')[1]}`" for info in of_stage(stage))
        rows.append([f"**{stage}**", STAGE_WORDS[stage], names])
    return f"{before}{MARKS[0]}\n{table(['stage', 'what for', 'methods'], rows)}{MARKS[1]}{after}"


def main(check: bool) -> int:
    """Write, or compare and name what is stale. Returns the exit status."""
    made = pages()
    old = {path for folder in ("methods", "verbs") for path in (ROOT / "docs" / folder).glob("*.md")} - set(made)
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check:
        for path in [*stale, *sorted(old)]:
            print(f"stale: {path.relative_to(ROOT)}; run `make generate`", file=sys.stderr)
        return 1 if stale or old else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    for path in old:
        path.unlink()
        print(f"removed {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
