"""`moestro <stage> <method> INPUTS... OUT`: every planner and meter as a command.

Positional arguments come from the method's card, options from its settings. Listing reads cards only; a method is
imported when its own command is asked for.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperGroup


if TYPE_CHECKING:
    from moestro.core.registry import Method

__all__ = ["command_of", "register", "values_of"]

STAGES = {
    "convert": "Dense models to mixtures, mixtures to other mixtures.",
    "adapt": "Adapters and prompts on frozen models.",
    "compress": "Fewer, smaller or coarser experts.",
    "place": "Which device holds which expert.",
    "compose": "Several models behind one router.",
    "inspect": "What a mixture does, measured.",
    "simulate": "What a machine would do.",
}
ENTRIES = ("plan", "measure")
NEEDS = {
    "model": (str, "Folder, hub id, GGUF file, or wheel:NAME."),
    "models": (list[str], "Two or more models: folders, hub ids, GGUF files, or wheel:NAME."),
    "adapters": (list[Path], "Adapter folders."),
    "trace": (Path, "A trace that `moestro trace` recorded."),
    "data": (str, "Texts: a file, a folder or builtin:NAME."),
    "quality": (Path, "A file of measured qualities."),
    "shape": (str, "A model whose headers are read, not its weights."),
}


def register(app: typer.Typer) -> None:
    """Add one group a stage."""
    for stage, text in STAGES.items():
        app.add_typer(typer.Typer(cls=StageGroup, help=text), name=stage)


class StageGroup(TyperGroup):
    """The commands of a stage, found through the registry."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the stage's planners and meters."""
        return list(self._infos())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in that carries the summary: enough for listings, without importing the method."""
        info = self._infos().get(cmd_name)
        if info is None:
            return None

        def listed() -> None:
            """A stand-in."""

        listed.__doc__ = info.card.summary
        return _built(cmd_name, listed)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is asked for, with its options."""
        self.commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}  # for "did you mean"
        if not self.commands:
            ctx.fail(f"no method of the stage {self.name!r} is there yet")
        args[:1] = [args[0].replace("-", "_")] if not args[0].startswith("-") else args[:1]
        name, _, rest = super().resolve_command(ctx, args)
        return name, command_of(self._infos()[name].id), rest

    def _infos(self) -> dict[str, Any]:
        from moestro.core.registry import infos

        return {
            info.id.partition(".")[2]: info
            for info in infos().values()
            if info.stage == self.name and not set(ENTRIES).isdisjoint(info.entries)
        }


def command_of(method_id: str) -> Any:
    """The command of one method; imports it."""
    from moestro.core.registry import method

    subject = method(method_id)
    fields = subject.config_type.model_fields
    needs = [need for need in subject.card.needs if need != "none"]
    model_comes_out = subject.id.partition(".")[0] in ("convert", "adapt", "compress")
    out = "Folder of the new model." if model_comes_out else "File to write (JSON)."
    out = "Folder to write." if hasattr(subject.module, "learn") else out

    def run(**given: Any) -> None:
        from moestro.cli._stage_run import Request, run_method

        settings = {name: given.pop(f"field_{name}") for name in fields}
        positional: dict[str, Any] = {need: given.pop(need) for need in needs}
        values = values_of(subject, settings, given.pop("config_file"))
        run_method(Request(method_id=method_id, values=values, inputs=positional, **given))

    parameters = [_positional(need) for need in needs]
    parameters.append(_parameter("out", Path, typer.Argument(help=out)))
    parameters += [_option(name, field, _texts(subject.config_type)) for name, field in fields.items()]
    parameters.append(_parameter("config_file", Path | None, typer.Option("--config", help="Settings as YAML."), None))
    free = "--seed" if "seed" not in fields else "--plan-seed"
    parameters.append(_parameter("seed", int, typer.Option(free, help="Of every random choice."), 0))
    if hasattr(subject.module, "plan") and "data" not in needs:
        text = "Calibration texts, for settings that measure: a file, a folder or builtin:NAME."
        parameters.append(_parameter("calibration", str | None, typer.Option("--data", help=text), None))
    parameters.append(_parameter("tokens", int, typer.Option("--tokens", min=1, help="Tokens of the data."), 20_000))
    if model_comes_out:
        text = "Write the plan to this file too (JSON)."
        parameters.append(_parameter("plan_file", Path | None, typer.Option("--plan", help=text), None))
        text = "Open the model before and after and compare answers; left out: where there is memory enough."
        parameters.append(_parameter("compare", bool | None, typer.Option("--compare/--no-compare", help=text), None))
    if not hasattr(subject.module, "plan"):
        text = "Print the report as JSON."
        parameters.append(_parameter("as_json", bool, typer.Option("--json", help=text), False))
    if hasattr(subject.module, "curves"):
        text = "Draw the report into this file (.svg or .png)."
        parameters.append(_parameter("figure", Path | None, typer.Option("--figure", help=text), None))
    replace = typer.Option("--overwrite", help="Replace what was written there before.")
    parameters.append(_parameter("overwrite", bool, replace, False))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = f"{subject.card.summary}\n\n{_source(subject)}"
    return _built(method_id.partition(".")[2], run)


def values_of(subject: "Method", flags: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Settings from a file and from flags, flags first; both as they are written, `configure` judges them.

    Raises:
        ConfigError: the file is missing or holds no mapping, or a flag's text is not YAML.
    """
    import yaml

    from moestro.core.datafiles import parse_yaml
    from moestro.core.errors import ConfigError

    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = parse_yaml(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {file}: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"--config {file}: expected settings by name, got {type(values).__name__}")
    for name, text in flags.items():
        if text is None:
            continue
        annotation = subject.config_type.model_fields[name].annotation
        words = get_origin(annotation) is Literal and all(isinstance(word, str) for word in get_args(annotation))
        if isinstance(text, bool) or annotation is str or words:
            values[name] = text
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{name.replace('_', '-')} {text!r}: {' '.join(str(error).split())}") from None
        values[name] = {"method": value} if _is_use(annotation) and isinstance(value, str) else value
    return values


def _built(name: str, function: Callable[..., None]) -> Any:
    single = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    single.command(name)(function)
    return typer.main.get_command(single)


def _parameter(name: str, annotation: Any, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, kind]
    )


def _positional(need: str) -> inspect.Parameter:
    annotation, text = NEEDS[need]
    return _parameter(need, annotation, typer.Argument(help=text))


def _option(name: str, field: Any, texts: dict[str, str]) -> inspect.Parameter:
    """The flag of one setting. Its text is read as YAML, so that lists and mappings can be given too."""
    flag = f"--{name.replace('_', '-')}"
    text = texts.get(name, "")
    if not field.is_required():
        default = field.get_default(call_default_factory=True)
        shown = default.model_dump() if hasattr(default, "model_dump") else default
        text = f"{text} (default: {shown})".strip()
    if field.annotation is bool:
        return _parameter(f"field_{name}", bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text), None)
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    metavar = "|".join(map(str, choices)) or _kind(field.annotation)
    option = typer.Option(flag, help=text, metavar=metavar, show_default=False)
    return _parameter(f"field_{name}", str | None, option, None)


def _kind(annotation: Any) -> str:
    """A setting's type in one word."""
    if _is_use(annotation):
        return "METHOD"
    names = {int: "INT", float: "FLOAT", str: "TEXT"}
    return names.get(annotation, "VALUE")


def _is_use(annotation: Any) -> bool:
    return getattr(annotation, "__name__", "") == "MethodUse"


def _texts(config_type: Any) -> dict[str, str]:
    """What the settings' docstring says of each field, as in ``top_k: choices a token. noise: standard deviation.``"""
    fields = "|".join(config_type.model_fields)
    text = " ".join((config_type.__doc__ or "").split())
    parts = re.split(rf"\b((?:{fields})(?:, (?:{fields}))*): ", text) if fields else [text]
    found: dict[str, str] = {}
    for names, meaning in zip(parts[1::2], parts[2::2], strict=True):
        for name in names.split(", "):
            found[name] = meaning.strip()
    return found


def _source(subject: "Method") -> str:
    card = subject.card
    where = f" (arXiv {card.arxiv})" if card.arxiv else ""
    departs = "".join(f" Departs from the paper: {sentence}." for sentence in card.deviations)
    return f"{card.title}, {card.year}{where}.{departs}"
