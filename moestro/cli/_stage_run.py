"""What the command of a planner or a meter does: open, plan, apply, save; or write the plan or the report."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.core.errors import ConfigError, SaveError


if TYPE_CHECKING:
    from moestro.core.plan import Plan

__all__ = ["Request", "account", "parity_batch", "run_method"]

CHANGES_MODELS = ("convert", "adapt", "compress")
SERVED_NEEDS = {"model", "models", "trace", "data", "none"}
PARITY_SHAPE = (2, 32)
MOST_ROWS = 60


@dataclass(frozen=True, kw_only=True)
class Request:
    """What stood on the command line.

    Attributes:
        method_id: of the method. values: its settings, as they were written.
        inputs: need -> argument. out: what to write. seed: of random choices.
        calibration: texts to measure on, or None. tokens: of them at most. overwrite: replace `out`.
        plan_file: where the plan itself goes, or None.
        compare: open the model before and after for parity figures; None: where there is memory enough.
        as_json: print a report as JSON. figure: file for the figure of a report, or None.
    """

    method_id: str
    values: dict[str, Any]
    out: Path
    inputs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    calibration: str | None = None
    tokens: int = 20_000
    overwrite: bool = False
    plan_file: Path | None = None
    compare: bool | None = None
    as_json: bool = False
    figure: Path | None = None


def run_method(request: Request) -> None:
    """Run a method and print what it did.

    Raises:
        ConfigError: wrong settings, or inputs this verb does not read. PlanError: the plan does not fit the model.
        SaveError: `out` or the plan file exists.
    """
    from moestro.core.registry import method

    used = method(request.method_id)
    used.configure(request.values)  # refused before anything is opened
    odd = [need for need in used.card.needs if need not in SERVED_NEEDS]
    if odd:
        raise ConfigError(f"{used.id} needs {odd[0]}; this command reads {', '.join(sorted(SERVED_NEEDS))}")
    if request.out.exists() and not request.overwrite:
        raise SaveError(f"{request.out} exists; give another name, or --overwrite")
    if request.plan_file is not None and request.plan_file.exists():
        raise SaveError(f"{request.plan_file} exists; give --plan another name")
    if hasattr(used.module, "learn"):
        _write_learned(request)
    elif not hasattr(used.module, "plan"):
        _write_report(request)
    elif used.id.partition(".")[0] in CHANGES_MODELS:
        if _reads_matrices_only(request):
            _change_on_disk(request)
        else:
            _change_model(request)
    else:
        _write_plan(request)


def _reads_matrices_only(request: Request) -> bool:
    """Whether the plan asks for nothing that only an open model tells, so that the model may be larger than memory."""
    from moestro.core.registry import method
    from moestro.methods.planning import wanted

    used = method(request.method_id)
    settings = used.configure(request.values)
    streams = getattr(used.module, "streams", None)
    if streams is not None:
        found: bool = streams(settings)
        return found
    return used.id.startswith("convert.") and not wanted(used, settings) and request.calibration is None


def _change_model(request: Request) -> None:
    from moestro import surgery
    from moestro.models.atomic import check_room
    from moestro.models.save import save
    from moestro.surgery.room import nbytes_after, nbytes_of

    model, donors = _load_all(request)
    check_room(request.out, nbytes_of(model, experts=False))  # before anything is measured: whatever the plan will be
    batches = _batches(request)
    plan = _plan(request, model, donors, batches)
    check_room(request.out, nbytes_after(model, plan, donors))
    calibrates = getattr(plan, "rounding", None) is not None and batches
    parity = None if request.compare is False else [parity_batch(model)]
    receipt = surgery.apply(model, plan, donors=donors, calib=batches if calibrates else parity)
    with _plan_beside(plan, request.plan_file):
        save(model, request.out, overwrite=request.overwrite)
    for line in account(receipt):
        print(line)
    print(f"saved {request.out}")


def _change_on_disk(request: Request) -> None:
    """For planners that read matrices only: the model is never opened, so it may be larger than memory."""
    from moestro import surgery
    from moestro.core.inputs import PlanInputs
    from moestro.core.registry import method
    from moestro.surgery.disk import Folder
    from moestro.surgery.opened import OpenModel

    used, refs = method(request.method_id), _refs(request)
    if len(refs) > 1:
        refuse_other_tokenizers(refs)
    folders = [Folder(ref) for ref in refs]
    print(f"{request.method_id}: plan", flush=True)
    subject, *others = [OpenModel(folder.model, folder.name, folder.read) for folder in folders]
    donors = {f"donor{number}": donor for number, donor in enumerate(others, 1)}
    inputs = PlanInputs(subject=subject, donors=donors, seed=request.seed)
    plan = used.plan(inputs, used.configure(request.values))
    for line in plan.notes.get("lines", ()):
        print(line, flush=True)
    batches = _batches(request)
    if not batches and (_can_be_opened(folders[0]) if request.compare is None else request.compare):
        batches = [parity_batch(folders[0].model)]
    for folder in folders:
        folder.release()
    taken = dict(zip(donors, refs[1:], strict=True)) or None
    with _plan_beside(plan, request.plan_file):
        receipt = surgery.apply(
            refs[0], plan, request.out, donors=taken, calib=batches or None, overwrite=request.overwrite
        )
    for line in account(receipt):
        print(line)
    if receipt["parity"] is None:
        print("answers were not compared, that opens the model before and after; --compare or --data TEXTS does it")
    print(f"saved {request.out}")


@contextmanager
def _plan_beside(plan: "Plan", file: Path | None) -> Iterator[None]:
    """The plan and the model appear together or not at all."""
    if file is not None:
        plan.save(file)
    try:
        yield
    except BaseException:
        if file is not None:
            file.unlink(missing_ok=True)
        raise


def _can_be_opened(folder: Any) -> bool:
    """Whether a quarter of the memory that is free holds the checkpoint: what comes out may be larger than it."""
    from moestro.cli.doctor import memory

    return 4 * sum(folder.nbytes(name) for name in folder.entries) < memory()[1]


def _write_plan(request: Request) -> None:
    plan = _plan(request, *_load_all(request), _batches(request))
    plan.save(request.out)
    print(f"saved {request.out}")


def _write_learned(request: Request) -> None:
    from moestro.core.inputs import MeterInputs
    from moestro.core.registry import method
    from moestro.models.atomic import atomic_folder

    used = method(request.method_id)
    subject = MeterInputs(name=str(request.inputs.get("trace", "")), trace=_trace(request), seed=request.seed)
    with atomic_folder(request.out, overwrite=request.overwrite) as draft:
        scores = used.entry("learn")(subject, used.configure(request.values), draft)
    if request.as_json:
        print(json.dumps(scores, indent=1))
        return
    for key, number in scores.items():
        print(f"{key}: {number:.6g}")
    print(f"saved {request.out}")


def _write_report(request: Request) -> None:
    from moestro.core.inputs import MeterInputs
    from moestro.core.registry import method

    used = method(request.method_id)
    model = _load(request.inputs["model"]) if "model" in request.inputs else None
    batches = [{"input_ids": ids} for ids in _batches(request)]
    name = str(request.inputs.get("model") or request.inputs.get("trace") or "")
    subject = MeterInputs(name=name, model=model, batches=batches, trace=_trace(request), seed=request.seed)
    report = used.entry("measure")(subject, used.configure(request.values))
    if request.figure is not None:
        from moestro.report import figures

        found = used.module.curves(report)
        figure, (axes,) = figures.new(1, width=6.0, height=3.6)
        lines = {name: ([x for x, _ in line], [[y for _, y in line]]) for name, line in found["series"].items()}
        figures.curves(axes, lines, x_name=found["x"], y_name=found["y"])
        figures.save(figure, request.figure)
    report.save(request.out)
    if request.as_json:
        print(json.dumps(report.model_dump(mode="json"), indent=1))
        return
    _show_tables(report)
    for key, number in report.numbers.items():
        print(f"{key}: {number:.6g}")
    print(f"saved {request.out}")


def _show_tables(report: Any) -> None:
    """The short tables of a report; long ones are for those who open the file."""
    from rich.console import Console
    from rich.table import Table

    for name, table in report.tables.items():
        if len(table.rows) > MOST_ROWS:
            print(f"{name}: {len(table.rows)} rows, in the file")
            continue
        shown = Table(box=None, pad_edge=False)
        for place, column in enumerate(table.columns):
            words = any(isinstance(row[place], str) for row in table.rows)
            shown.add_column(column, justify="left" if words else "right")
        for row in table.rows:
            shown.add_row(*(_cell(cell) for cell in row))
        Console(highlight=False, width=max(Console().width, 120)).print(shown)


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 10000 else f"{cell:.4g}"
    return "" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell


def _load(ref: str) -> Any:
    from moestro.models.load import load

    print(f"load {ref}", flush=True)
    return load(ref)


def _load_all(request: Request) -> tuple[Any, dict[str, Any]]:
    """The model a plan is for, and its donors: of several models the first is the one that changes."""
    refs = _refs(request)
    if "models" in request.inputs:
        refuse_other_tokenizers(refs)
    model, *others = [_load(ref) for ref in refs]
    return model, {f"donor{number}": donor for number, donor in enumerate(others, 1)}


def _refs(request: Request) -> list[str]:
    """The models on the command line.

    Raises:
        ConfigError: a method that joins models got fewer than two.
    """
    if "models" not in request.inputs:
        return [request.inputs["model"]]
    refs = list(request.inputs["models"])
    if len(refs) < 2:
        raise ConfigError(f"{request.method_id} joins models and got {len(refs)}; give two or more, then the output")
    return refs


def refuse_other_tokenizers(refs: list[str]) -> None:
    """Raise ConfigError unless all models that carry a tokenizer read the same tokens as the first of them.

    Args:
        refs: folders, hub ids, GGUF files, or wheel:NAME.
    """
    from moestro.cli.trace import load_tokenizer
    from moestro.core.errors import MoestroError
    from moestro.models.refs import resolve

    known: tuple[str, dict[str, int]] | None = None
    for ref in refs:
        try:
            vocabulary = load_tokenizer(resolve(ref).folder).get_vocab()
        except MoestroError:
            continue  # a model without a tokenizer is held to the shape of its embedding by surgery
        if known is None:
            known = ref, vocabulary
        elif vocabulary != known[1]:
            differ = len(vocabulary.items() ^ known[1].items())
            raise ConfigError(
                f"{ref} and {known[0]} have different tokenizers ({differ} of {len(known[1])} entries differ); models "
                "can be joined only if they descend from one model"
            )


def _plan(request: Request, model: Any, donors: dict[str, Any], batches: list[Any]) -> "Plan":
    from moestro.methods.planning import make_plan
    from moestro.observe.calibrate import coverage_table

    print(f"{request.method_id}: plan", flush=True)
    plan = make_plan(
        request.method_id,
        model,
        request.values,
        donors=donors,
        batches=batches or None,
        trace=_trace(request),
        seed=request.seed,
    )
    if "calibration" in plan.notes:
        print(coverage_table(plan.notes["calibration"]))
    for line in plan.notes.get("lines", ()):
        print(line, flush=True)
    return plan


def _trace(request: Request) -> Any:
    if "trace" not in request.inputs:
        return None
    from moestro.core.trace import RoutingTrace

    return RoutingTrace.open(request.inputs["trace"])


def _batches(request: Request, length: int = 512) -> list[Any]:
    """Token ids [1, S] of the texts on the command line, `request.tokens` in all at most; none without texts."""
    source = request.inputs.get("data", request.calibration)
    if source is None:
        return []
    import torch

    from moestro.cli.trace import load_tokenizer
    from moestro.data.sources import read_texts
    from moestro.models.refs import resolve
    from moestro.observe.record import pieces

    tokenizer = load_tokenizer(resolve(_refs(request)[0]).folder)
    chosen = pieces(tokenizer, {"calibration": read_texts(source)}, length=length, limit=request.tokens)
    print(f"{source}: {sum(len(piece.ids) for piece in chosen)} tokens", flush=True)
    return [torch.tensor([piece.ids]) for piece in chosen]


def parity_batch(model: Any) -> dict[str, Any]:
    """Fixed token ids [2, 32] on which the model is compared before and after."""
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, PARITY_SHAPE, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids if model.device.type == "meta" else ids.to(model.device)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch


def account(receipt: dict[str, Any]) -> list[str]:
    """What a receipt says, in a few lines."""
    layers, ledger, count = receipt["layers"], receipt["ledger"], receipt["parameters"]
    experts = sorted({layer["experts_after"] for layer in layers})
    lines = [
        f"layers {', '.join(str(layer['layer']) for layer in layers)}: {', '.join(map(str, experts))} experts",
        f"ledger: {ledger['rows_touched']} of {ledger['rows_expected']} rows written",
        f"parameters: {count['before']:,} before, {count['after']:,} after",
    ]
    if "bits_per_weight" in receipt:
        sizes = receipt["bytes"]
        before, after = (sum(size[when] for size in sizes.values()) for when in ("before", "after"))
        bits = receipt["bits_per_weight"]
        lines += [
            f"experts: {bits['before']:.3f} bits a weight before, {bits['after']:.3f} after",
            f"bytes: {before:,} before, {after:,} after ("
            + ", ".join(f"{what} {size['after']:,}" for what, size in sizes.items())
            + ")",
        ]
    if "changed_choices" in receipt:
        lines.append(f"choices of experts that changed: {receipt['changed_choices']['mean']:.2%}")
    lines += [f"warning: {text}" for text in receipt.get("warnings", ())]
    for name, gap in (receipt["parity"] or {}).items():
        what = name.replace("_", " ")
        lines.append(
            f"logits against before, {what}: largest difference {gap['max_abs_diff']:.2e} where the largest logit is "
            f"{gap['max_abs_before']:.3g} ({gap['rows']} tokens)"
        )
    return lines
