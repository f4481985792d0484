"""The pre-gating router: causality, padding, decode steps, one choice for all layers, what teaches it, bad input."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import moestro
from moestro.core.cost import Work, cost
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import mixture_layers
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.data.tokens import byte_tokenizer
from moestro.methods.convert.read_me import Masks, refactorize
from moestro.methods.train._parts.pregate import PreGate
from moestro.methods.train.read_me import (
    distillation_loss,
    gate_of,
    graded,
    overlaps,
    route_ahead,
    start_embedding,
    targets,
)
from moestro.observe.neurons import unit_activity
from moestro.testing.tiny import tiny_model
from moestro.training.objectives import Causal, MethodObjective
from moestro.training.recipe import Recipe
from moestro.training.run import train
from tests.surgery.helpers import ids, layers_of, logits


READ_ME = method("train.read_me")


def gate(seed: int = 0) -> PreGate:
    torch.manual_seed(seed)
    made = PreGate(50, 8, 2, 3)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def masks(layers: int = 2, experts: int = 3) -> dict[int, Masks]:
    draw = torch.Generator().manual_seed(7)
    return {
        layer: Masks(torch.stack([torch.randperm(48, generator=draw)[:24].sort().values for _ in range(experts)]))
        for layer in range(layers)
    }


def mixture(**changes: Any) -> Any:
    """A tiny model with three experts of a pool, its gate spread so that choices are clear."""
    model = tiny_model("llama", **changes)
    refactorize(model, masks(model.config.num_hidden_layers))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "read_me_gate" in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def ids_chosen(model: Any, **call: Any) -> list[Tensor]:
    return [routing.expert_N for routing in route_ahead(model, call).values()]


class Seen:
    """Recorder of every site's choices."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def record(self, site: str, routing: Any, ctx: Any) -> None:
        self.found.setdefault(site, []).append(routing.expert_N)


# -- the gate -------------------------------------------------------------------------------------------------------


def test_a_later_token_changes_no_earlier_logits() -> None:
    made, ids_BS = gate(), ids(2, 9) % 50
    before = made(ids_BS)
    for place in range(1, 9):
        other = ids_BS.clone()
        other[:, place] = (other[:, place] + 1) % 50
        after = made(other)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])
        assert place == 8 or not torch.allclose(after[:, place + 1 :], before[:, place + 1 :])


@pytest.mark.parametrize("steps", [[9], [4, 1, 1, 3], [1] * 9])
def test_step_by_step_is_all_at_once(steps: list[int]) -> None:
    made, ids_BS, cache = gate(), ids(2, 9) % 50, {}
    parts = [made(part, cache=cache) for part in ids_BS.split(steps, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), made(ids_BS), atol=1e-5, rtol=1e-5)


def test_padding_shifts_no_position_in_a_prompt_or_after_it() -> None:
    made, ids_BS = gate(), ids(1, 6) % 50
    padded = F.pad(ids_BS, (3, 0), value=1)
    valid = F.pad(torch.ones_like(ids_BS), (3, 0)).bool()
    torch.testing.assert_close(made(padded, valid)[:, 3:], made(ids_BS), atol=1e-5, rtol=1e-5)
    cache: dict[str, Tensor] = {}
    made(padded[:, :7], valid[:, :7], cache)
    torch.testing.assert_close(made(padded[:, 7:], valid[:, 7:], cache), made(ids_BS)[:, 4:], atol=1e-5, rtol=1e-5)


def test_bfloat16_decides_in_float32_and_a_foreign_id_is_refused() -> None:
    made = gate().bfloat16()
    assert made(ids(1, 5) % 50).dtype == torch.float32
    with pytest.raises(ContextError, match="0 to 49"):
        made(torch.tensor([[50]]))


# -- in a model -----------------------------------------------------------------------------------------------------


def test_all_layers_use_the_choice_that_is_known_before_the_model_runs() -> None:
    model, given = mixture(), {"input_ids": ids(2, 9)}
    ahead, seen = ids_chosen(model, **given), Seen()
    with moestro.session(recorder=seen):
        model(**given)
    during = [found for (found,) in seen.found.values()]
    assert len(during) == len(ahead) == 2
    assert all(torch.equal(one, ahead[0]) for one in (*ahead, *during))
    assert len(ahead[0].unique()) > 1


def test_a_trace_can_be_recorded_without_the_backbone() -> None:
    model, call = mixture(), {"input_ids": ids(2, 9)}
    with moestro.trace(model) as ahead:
        route_ahead(model, call)
    with moestro.trace(model) as during:
        model(**call)
    for layer in (0, 1):
        assert ahead.load(layer).tolist() == during.load(layer).tolist()
        assert int(ahead.load(layer).sum()) == 18


def test_padded_rows_choose_and_answer_as_alone() -> None:
    model, one = mixture(), ids(1, 6)
    mask = F.pad(torch.ones_like(one), (2, 0))
    padded = F.pad(one, (2, 0), value=1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    alone = model(input_ids=one).logits
    together = model(input_ids=padded, attention_mask=mask, position_ids=position).logits[:, 2:]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("storage", ["shared_pool", "copied"])
def test_saved_loaded_and_generated(tmp_path: Path, storage: Any) -> None:
    model = tiny_model("llama")
    refactorize(model, masks(), storage=storage)
    torch.nn.init.normal_(gate_of(model).head.weight)
    torch.nn.init.normal_(gate_of(model).embedding.weight)
    model.eval()
    before = logits(model)
    moestro.save(model, tmp_path / "m")
    for again in (moestro.load(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m")):
        torch.testing.assert_close(logits(again.eval()), before, atol=1e-5, rtol=0)
    assert sum("read_me_gate.embedding" in name for name in model.state_dict()) == 1
    prompt = ids(2, 5)
    call = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    stepwise = again.generate(prompt, use_cache=True, **call)
    assert torch.equal(stepwise, again.generate(prompt, use_cache=False, **call))
    seen = Seen()
    with moestro.session(recorder=seen):
        again.generate(prompt, use_cache=True, num_beams=2, **call)
    assert len(seen.found) == 2


def test_decode_steps_choose_as_the_whole_sequence() -> None:
    model, prompt, seen = mixture(), ids(2, 5), Seen()
    with moestro.session(recorder=seen):
        done = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    whole = ids_chosen(model, input_ids=done[:, :-1])[0].view(2, -1)
    for steps in seen.found.values():
        assert torch.equal(torch.cat([step.view(2, -1) for step in steps], 1), whole)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_padded_prompt_in_a_batch_goes_on_as_alone(beams: int) -> None:
    model, one, other = mixture(), ids(1, 4) + 1, ids(1, 7) + 2
    call = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.cat([F.pad(torch.ones_like(one), (3, 0)), torch.ones_like(other)])
    alone = model.generate(one, attention_mask=torch.ones_like(one), **call)
    together = model.generate(torch.cat([F.pad(one, (3, 0)), other]), attention_mask=mask, **call)
    assert torch.equal(together[0, 7:], alone[0, 4:])
    assert torch.equal(together[1:], model.generate(other, attention_mask=torch.ones_like(other), **call))
    assert torch.equal(alone, model.generate(one, attention_mask=torch.ones_like(one), use_cache=False, **call))


def test_a_cache_that_was_cropped_forgets_what_the_router_saw() -> None:
    model, ids_BS, seen = mixture(), ids(2, 9), Seen()
    wrong_BS = torch.cat([ids_BS[:, :5], (ids_BS[:, 5:8] + 1) % 97], 1)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=wrong_BS, past_key_values=cache)
        cache.crop(-3)
        with moestro.session(recorder=seen):
            found = model(input_ids=ids_BS[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(input_ids=ids_BS).logits[:, 5:], atol=1e-5, rtol=1e-5)
    whole = ids_chosen(model, input_ids=ids_BS)[0].view(2, -1)[:, 5:]
    assert all(torch.equal(one.view(2, -1), whole) for (one,) in seen.found.values())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_gate_costs_once_however_many_layers_borrow_it(layers: int) -> None:
    model, work = mixture(num_hidden_layers=layers), Work(9)
    said = [layer.router.flops_per_token(work) for layer in mixture_layers(model).values()]
    assert said == [gate_of(model).flops_per_token(work)] + [0.0] * (layers - 1)
    rest = cost(model, work) - said[0]
    assert rest == layers * (cost(model.model.layers[0], work) - said[0]) + cost(model.lm_head, work)


def test_checkpointed_backward_is_plain_backward() -> None:
    grads = []
    for checkpointed in (False, True):
        model = mixture().train()
        if checkpointed:
            moestro.checkpoint(model)
        model(input_ids=ids(2, 9), labels=ids(2, 9)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert not any("read_me_gate" in name for name in grads[0])
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, atol=1e-6, rtol=1e-5)


def test_bad_calls_are_refused() -> None:
    model = mixture()
    with pytest.raises(ContextError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, model.config.hidden_size))
    past = model(input_ids=ids(1, 4), use_cache=True).past_key_values
    with pytest.raises(ContextError, match="holds 4 positions, the router has seen 0"):
        model(input_ids=ids(1, 1), past_key_values=past)
    with pytest.raises(ConfigError, match="multiple of 8"):
        READ_ME.configure({"router_dim": 20, "router_heads": 4})
    with pytest.raises(ConfigError, match="input_ids"):
        route_ahead(model, {"inputs_embeds": torch.zeros(1, 3, 32)})


def test_the_embedding_starts_as_the_first_columns_of_the_models() -> None:
    model = tiny_model("llama")
    refactorize(model, masks(), router=MethodUse(method="train.read_me", config={"router_dim": 16}))
    start_embedding(model)
    assert torch.equal(gate_of(model).embedding.weight, model.get_input_embeddings().weight[:, :16])
    with pytest.raises(ConfigError, match="no pre-gating"):
        start_embedding(tiny_model("llama"))


# -- what teaches it ------------------------------------------------------------------------------------------------


def test_grades_and_overlaps_by_hand() -> None:
    activity = torch.tensor([[-9.0, 1.0, 8.0, 7.0, 6.0, 5.0, 0.0]])
    grades = graded(activity, 5)[0] * 15
    assert grades.round().tolist() == [5, 0, 4, 3, 2, 1, 0]  # the magnitude counts, not the sign
    rows = torch.tensor([[0, 1, 2, 3, 6], [0, 1, 3, 4, 6]])  # 0, 1, 3 and 6 are of both and count for none
    one = overlaps([activity], [rows])[0]
    torch.testing.assert_close(one, 10 * torch.tensor([4.0, 2.0]) / 15)
    torch.testing.assert_close(overlaps([activity] * 2, [rows] * 2)[0], 2 * one)


def test_the_loss_is_the_formula() -> None:
    draw = torch.Generator().manual_seed(3)
    given, overlap = torch.randn(4, 3, generator=draw), torch.randn(4, 3, generator=draw)
    total = 0.0
    for z, o in zip(given, overlap, strict=True):
        log_p = z.log_softmax(0)
        smooth = torch.full((3,), 0.5 / 3)
        smooth[o.argmax()] += 0.5
        total += -0.75 * float((smooth * log_p).sum()) - 0.25 * float((o.softmax(0) * log_p).sum())
    assert float(distillation_loss(given, overlap)) == pytest.approx(total, rel=1e-5)


def test_the_objective_teaches_gate_and_experts_apart() -> None:
    model, dense = mixture().train(), tiny_model("llama").requires_grad_(False)
    use = MethodObjective(Causal(), READ_ME.entry("objective"), READ_ME.configure({"num_experts": 3}))
    given = {"input_ids": ids(3, 7), "labels": ids(3, 7)}
    for name, mine in (("causal", False), ("read_me", True)):
        model.zero_grad()
        use(model, given, {"dense": dense})[name].total.backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached
        assert all(("read_me_gate" in n) == mine for n in reached)


def test_targets_leave_padding_out_and_ask_for_index_lists() -> None:
    model, dense = mixture(), tiny_model("llama")
    one = ids(1, 6)
    call = {"input_ids": F.pad(one, (0, 2)), "attention_mask": F.pad(torch.ones_like(one), (0, 2))}
    torch.testing.assert_close(targets(model, dense, call), targets(model, dense, {"input_ids": one}))
    rows = [layer.bank.rows_EW for layer in layers_of(model)]
    plain = overlaps(list(unit_activity(dense, {"input_ids": one}).values()), rows)
    assert torch.equal(plain, targets(model, dense, {"input_ids": one}))
    copied = tiny_model("llama")
    refactorize(copied, masks(), storage="copied")
    with pytest.raises(ConfigError, match="shared_pool"):
        targets(copied, dense, {"input_ids": one})


# -- the recipe -----------------------------------------------------------------------------------------------------


def test_the_recipe_moves_gate_and_experts_in_turn(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    dense = tiny_model("llama", vocab_size=len(tokenizer))
    for name, cut in (("dense", False), ("mixture", True)):
        model = tiny_model("llama", vocab_size=len(tokenizer))
        model.load_state_dict(dense.state_dict())
        if cut:
            router = MethodUse(method="train.read_me", config={"router_dim": 16})
            refactorize(model, masks(), router=router)
            moestro.save(model, tmp_path / name)
        else:
            model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    values = yaml.safe_load((Path(__file__).parents[3] / "recipes" / "read-me.yaml").read_text())
    (tmp_path / "text.txt").write_text("one and two and three\n" * 60)
    (tmp_path / "other.txt").write_text("four and five\n" * 20)
    values["model"]["load"], values["teachers"] = str(tmp_path / "mixture"), {"dense": str(tmp_path / "dense")}
    values["data"] |= {"source": str(tmp_path / "text.txt"), "sequence_length": 16}
    values["eval"] |= {"every": 8, "limit": 2, "data": {"source": str(tmp_path / "other.txt")}}
    for phase in values["phases"][:-1]:
        phase["steps"] = 2
    values |= {"steps": 8, "batch_size": 2, "precision": "float32", "monitor": {"every": 1}}
    values["checkpoint"] = {"every": 2, "keep": 9}
    train(Recipe.parse(values), tmp_path / "run", silent=True)
    tensors = [load_file(tmp_path / "mixture" / "model.safetensors")]
    for step in (2, 4, 6, 8):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08}"
        tensors.append(load_file(next(folder.rglob("model.safetensors"))))
    for number, (before, after) in enumerate(pairwise(tensors)):
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert moved
        assert all(("read_me_gate" if number % 2 == 0 else ".mlp.bank.pool.") in name for name in moved)
