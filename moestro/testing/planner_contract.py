"""Checks of the entry `plan`, for plans about experts or their bits: each makes one for tiny models and applies it."""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro import surgery
from moestro.core.errors import MoestroError
from moestro.core.layer import mixture_layers
from moestro.core.plan import BitPlan, ExpertPlan, ExpertSource, LayerExperts, MethodUse, Plan
from moestro.core.registry import Method
from moestro.core.session import session
from moestro.methods.planning import make_plan, wanted
from moestro.models.load import load
from moestro.models.save import save
from moestro.surgery.opened import OpenModel
from moestro.testing.contracts import example_config, example_values
from moestro.testing.contracts import settings_round_trip as settings_round_trip
from moestro.testing.operations import operation_counter
from moestro.testing.tiny import VOCAB, tiny_model


FAMILIES = ("llama", "gemma3_text", "cohere", "bert")


AnyPlan = ExpertPlan | BitPlan


def batch() -> Tensor:
    """Token ids [2, 9]."""
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def as_mixture(model: Any) -> Any:
    """The model with a mixture of four different experts in each layer."""
    router = {"method": "train.softmax_topk", "config": {"top_k": 2}}
    module = MethodUse(method="train.moe", config={"num_experts": 4, "router": router})
    layers = [
        LayerExperts(layer=i, experts=[[ExpertSource(layer=i, noise=0.5)]] * 4, router="new", module=module)
        for i in OpenModel(model).shape.layers
    ]
    surgery.apply(model, ExpertPlan(method="test", layers=layers))
    return model


def subjects(method: Method) -> Iterator[tuple[Any, AnyPlan]]:
    """A tiny model of several families and the method's plan for it: dense where the method takes dense models."""
    for family in FAMILIES:
        model = tiny_model(family)
        try:
            plan = planned(method, model)
        except MoestroError:
            model = as_mixture(tiny_model(family))
            plan = planned(method, model)
        yield model, plan


def donors_of(method: Method, model: Any) -> dict[str, Any]:
    """Further models for a method that joins models: the model with other values in its floating tensors."""
    if "models" not in method.card.needs:
        return {}
    donor = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.01)
    return {"donor1": donor}


def planned(method: Method, model: Any, seed: int = 3) -> AnyPlan:
    """The method's plan for an open model with its example settings, calibrated on `batch` where it measures."""
    donors = donors_of(method, model)
    found = make_plan(method, model, example_values(method), donors=donors, batches=[batch()], seed=seed)
    assert isinstance(found, ExpertPlan | BitPlan)
    return found


def applied(method: Method, model: Any, plan: AnyPlan, **more: Any) -> dict[str, Any]:
    """The receipt of a plan that is applied to the model it was made for, calibrated on `batch` where it rounds."""
    if isinstance(plan, BitPlan):
        more.setdefault("calib", [batch()])
    return surgery.apply(model, plan, donors=donors_of(method, model), **more)


def part_of(plan: AnyPlan, layer: int) -> AnyPlan:
    """The plan for one layer only, which leaves everything outside that layer alone."""
    if isinstance(plan, ExpertPlan):
        kept = [entry for entry in plan.layers if entry.layer == layer]
        sites = [entry for entry in plan.sites if entry.layer == layer]
        return plan.model_copy(update={"layers": kept, "sites": sites, "rest": "keep"})
    bits, formats = (
        {key: value for key, value in table.items() if int(key.split("/")[0]) == layer}
        for table in (plan.bits, plan.formats)
    )
    wide = [other for other in (*plan.wide, *layers_of(plan)) if other != layer]
    return plan.model_copy(update={"bits": bits, "formats": formats, "wide": wide})


def layers_of(plan: AnyPlan) -> list[int]:
    """The layers a plan is about, in order."""
    if isinstance(plan, ExpertPlan):
        return sorted(entry.layer for entry in plan.layers)
    return sorted({int(key.split("/")[0]) for key in plan.bits})


def plan_round_trips(method: Method) -> None:
    """See the contract."""
    for _, plan in subjects(method):
        with tempfile.TemporaryDirectory() as folder:
            assert Plan.load(plan.save(Path(folder) / "plan.json")) == plan


def plan_is_repeatable(method: Method) -> None:
    """See the contract."""
    for model, plan in subjects(method):
        torch.manual_seed(99)
        state = torch.random.get_rng_state()
        assert planned(method, model) == plan
        assert torch.equal(torch.random.get_rng_state(), state), "planning drew from the global generator"


def model_is_only_read(method: Method) -> None:
    """See the contract."""
    for model, plan in subjects(method):
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modules = [id(module) for module in model.modules()]
        planned(method, model, plan.seed)
        assert modules == [id(module) for module in model.modules()]
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def every_row_is_filled(method: Method) -> None:
    """See the contract."""
    for model, plan in subjects(method):
        shape = OpenModel(model).shape
        receipt = applied(method, model, plan)
        rows = (
            len(plan.bits)
            if isinstance(plan, BitPlan)
            else sum(
                len(shape.layers[entry.layer].names) * (len(entry.experts) + (entry.shared is not None))
                for entry in plan.layers
            )
        )
        assert receipt["ledger"]["rows_touched"] == receipt["ledger"]["rows_expected"] >= rows


def parent_is_kept(method: Method) -> None:
    """See the contract."""
    tolerance = method.card.tolerance
    atol = 1e-5 if tolerance is None else tolerance.atol
    for model, plan in subjects(method):
        keeps = plan.notes.get("keeps")
        assert keeps in ("as_routed", "all_on", "nothing"), "the plan's notes do not say what it keeps"
        parity = applied(method, model, plan, calib=[batch()])["parity"]
        if keeps != "nothing":
            found = parity[keeps]
            assert found["max_abs_diff"] <= atol, f"logits moved by {found['max_abs_diff']}, allowed are {atol}"
            assert found["max_abs_before"] > 0.1


def others_keep_their_bits(method: Method) -> None:
    """See the contract."""
    for model, plan in subjects(method):
        shape = OpenModel(model).shape
        first = layers_of(plan)[0]
        plan = part_of(plan, first)
        block = shape.layers[first].site.rpartition(".")[0]
        before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(block)}
        applied(method, model, plan)
        after = model.state_dict()
        assert before
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def saves_and_reopens(method: Method) -> None:
    """See the contract."""
    for model, plan in subjects(method):
        applied(method, model, plan)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "model")
            again = load(Path(folder) / "model")
            mine, theirs = model.state_dict(), again.state_dict()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())
            # Where a tensor begins in memory decides which vector code multiplies its edges: put both models at fresh
            # addresses, then their logits have the same bits.
            for parameter in (*model.parameters(), *again.parameters()):
                parameter.data = parameter.data.clone()
            gap = (again(input_ids=batch()).logits - model(input_ids=batch()).logits).abs().max()
            assert gap == 0, f"logits moved by {gap} when the model was saved and reopened"


def calibration_is_noted(method: Method) -> None:
    """See the contract."""
    if "experts" not in wanted(method, example_config(method)):
        return
    for model, plan in subjects(method):
        receipt = applied(method, model, plan)
        note = receipt["notes"]["calibration"]
        assert note == plan.notes["calibration"]
        assert note["tokens"] == batch().numel()
        assert {row["layer"] for row in note["layers"]} >= set(layers_of(plan))


def experts_shrink(method: Method) -> None:
    """See the contract."""
    for model, plan in subjects(method):
        sizes = []
        for _ in range(2):
            layers = list(mixture_layers(model).values())
            experts = sum(layer.bank.nbytes(i) for layer in layers for i in range(layer.bank.num_experts))
            shared = sum(p.nbytes for layer in layers if layer.shared is not None for p in layer.shared.parameters())
            sizes.append({"bytes": experts, "shared": shared, "operations": run_operations(model)})
            if len(sizes) == 1:
                applied(method, model, plan)
        before, after = sizes
        saved = plan.notes.get("saves", "bytes")
        assert saved in ("bytes", "operations"), f"the plan's notes say that it saves {saved!r}"
        assert after[saved] < before[saved], f"experts take {after[saved]} {saved}, before {before[saved]}"
        assert after["shared"] == before["shared"], "a shared branch changed its size"


@torch.no_grad()
def run_operations(model: Any) -> int:
    """Operations of a forward of ``batch``, counted while it runs."""
    with operation_counter() as run:
        model(input_ids=batch())
    return int(run.get_total_flops())


def choices_exist(method: Method) -> None:
    """See the contract."""
    for model, plan in subjects(method):
        applied(method, model, plan)
        counts = {site: layer.bank.num_experts for site, layer in mixture_layers(model).items()}
        for ids in (batch(), batch()[:1, :1]):
            with torch.no_grad(), session(collect=True) as opened:
                assert torch.isfinite(model(input_ids=ids).logits).all()
            for site, routing in opened.take()[0].routings.items():
                assert routing is not None
                real = routing.real()
                pairs = real.token_N * counts[site] + real.expert_N
                assert real.expert_N.max() < counts[site]
                assert torch.bincount(real.token_N, minlength=ids.numel()).min() > 0, "a token without an expert"
                assert len(pairs.unique()) == len(pairs), "a token runs an expert twice"
