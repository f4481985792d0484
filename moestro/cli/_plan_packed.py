"""`moestro plan` of a packed model: the engine's own sums, speeds from a profile of its kernels, and a run to check."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def plan_packed(
    path: Path, memory: int, context: int | None, out: Path | None, *, measure: bool, verify: bool, as_json: bool
) -> None:
    """Print where the bytes go and how fast the model will be; with ``verify`` also what a run says, and the error.

    Raises:
        ConfigError: the memory does not suffice. LoadError: a damaged folder, or no native model.
    """
    import os

    from moestro.core.errors import ConfigError, LoadError
    from moestro.engine.measure import disk as read_slabs
    from moestro.engine.packed import Packed
    from moestro.engine.predict import DECODED, PROMPT, Predictor, layouts
    from moestro.engine.predict import verify as run
    from moestro.engine.profile import busy, facts, this_profile
    from moestro.engine.room import POSITIONS, room, server_bytes

    packed = Packed.open(path)
    if packed.model.dialect != "native":
        raise LoadError(f"{path}: no native forward for this model: {packed.model.why}")
    limit = packed.model.positions
    if context and limit and context > limit:
        raise ConfigError(f"{path}: --context {context} is more than the {limit} positions the model was made for")
    # Refuses before anything is measured. With --verify this process runs the model, else a server will.
    first = room(packed, memory, context, None if verify else server_bytes(path))
    positions = context or min(POSITIONS, limit or POSITIONS)
    prompt = min(PROMPT, positions - 2 * DECODED)
    if prompt < 1:
        raise ConfigError(f"--context {positions}: speeds are those of more than {2 * DECODED} positions; give more")
    profile = this_profile(layouts(packed), len(os.sched_getaffinity(0)), again=measure, progress=_tell)
    disk = read_slabs(packed, first.slots) if first.slots < first.count else None
    found = room(packed, memory, context) if verify else first  # measuring leaves bytes that a server does not have
    predictor = Predictor(packed, found, profile, disk)
    work = {"prompt": predictor.work(prompt), "decode": predictor.work(1, prompt + DECODED)}
    told: dict[str, Any] = {
        "model": str(path),
        "room": {**asdict(found), "slots": found.slots, "held": found.held, "disk": found.disk},
        "prompt_tokens": prompt,
        "tokens_per_second": {name: asdict(one.range()) for name, one in work.items()},
        "profile": facts(profile, disk),
    }
    if verify:
        before, ran = busy(), run(path, found, prompt, {})
        known = {"prompt": predictor.work(prompt, met=ran.met), "decode": work["decode"]}
        hits = {"prompt": ran.prompt_hits, "decode": ran.decode_hits}
        told["verified"] = {
            name: _check(work[name].range().estimate, getattr(ran, name), hits[name], known[name].with_hits(hits[name]))
            for name in work
        }
        told["verified"]["busy"] = before
        told["verified"]["memory"] = {"limit": memory, "measured": ran.peak, "kept": ran.peak <= memory}
    if out is not None:
        _save(out, found, told)
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        _show(told, positions)


def _check(estimate: float, measured: float, hits: float, known: float) -> dict[str, float]:
    """Prediction against measurement; errors as shares of what was measured."""
    return {
        "measured": measured,
        "hits": hits,
        "error": estimate / measured - 1,
        "estimate_at_hits": known,
        "error_at_hits": known / measured - 1,
    }


def _tell(text: str) -> None:
    print(f"measuring the engine (once): {text}", file=sys.stderr)


def _save(out: Path, room: Any, told: dict[str, Any]) -> None:
    from moestro.core.plan import ServingPlan

    ServingPlan(
        method="plan",
        config={"context": room.pages * 16, "bits": None},
        budget_bytes=room.memory,
        tiers={
            "memory.weights": room.weights,
            "memory.cache": room.cache,
            "memory.process": room.process,
            "memory.working": room.working,
            "memory.experts": room.held,
            "disk.experts": room.disk,
        },
        notes={name: told[name] for name in ("model", "tokens_per_second")},
    ).save(out)


def _show(told: dict[str, Any], positions: int) -> None:
    from moestro.cli.plan import BUSY
    from moestro.models.sizing_units import show_size

    room = told["room"]
    rows = [
        ("memory", "weights that every token needs", room["weights"]),
        ("memory", f"keys and values of {positions} positions", room["cache"]),
        ("memory", "the process", room["process"]),
        ("memory", "working space", room["working"]),
        ("memory", f"experts, {room['slots']} of {room['count']}", room["held"]),
        ("", "in memory", sum(room[name] for name in ("weights", "cache", "process", "working", "held"))),
        ("", "the limit", room["memory"]),
        ("disk", f"experts, {room['count'] - room['slots']} of {room['count']}", room["disk"]),
    ]
    print(f"{told['model']}: packed")
    for tier, what, size in rows:
        print(f"{tier:8}{what:44}{show_size(size):>12}  {size:>16,}")
    words = {
        "decode": f"decoding after {told['prompt_tokens']}",
        "prompt": f"reading a prompt of {told['prompt_tokens']}",
    }
    for name, text in words.items():
        speed = told["tokens_per_second"][name]
        print(f"{text}: about {speed['estimate']:.3g} tokens/s ({speed['low']:.3g} to {speed['high']:.3g})")
        if "verified" in told:
            found = told["verified"][name]
            print(
                f"  measured {found['measured']:.3g}, error {found['error']:+.0%}; with the hits of this run "
                f"({found['hits']:.0%}) the formula says {found['estimate_at_hits']:.3g}, error "
                f"{found['error_at_hits']:+.0%}"
            )
    if room["disk"]:
        print("both without reading ahead, which `moestro serve` does where the routers allow it")
    if "verified" in told:
        memory = told["verified"]["memory"]
        print(f"memory at most {show_size(memory['measured'])} of {show_size(memory['limit'])}")
        busy = told["verified"]["busy"]
        if busy > BUSY:
            print(f"the machine was busy ({busy:.1f} processes a core): measured speeds may be too low")
    _show_profile(told["profile"])


def _show_profile(profile: dict[str, Any]) -> None:
    """What the speeds were computed from."""
    from moestro.cli.plan import busy_note

    print(f"profile of {profile['measured']}{busy_note(profile['busy'])}: {profile['signature']}; {profile['file']}")
    for rows, what in (("1", "one row"), ("512", "512 rows, each")):
        rates = profile["weights_per_s"].items()
        shown = (f"{layout} {known[rows] * int(rows) / 1e9:.3g} G weights/s" for layout, known in rates)
        print(f"  matrices, {what}: {', '.join(shown)}")
    names = {"step": "a step", "layer": "a layer", "resident": "a mixture in memory", "stored": "one in the store"}
    shown = (f"{text} {profile[name]['once'] * 1e6:.3g}" for name, text in names.items())
    print(f"  microseconds beside weights: {', '.join(shown)} and {profile['stored']['expert'] * 1e6:.2g} an expert")
    disk = profile["disk"]
    if disk is not None:
        print(f"  disk: {disk['bytes_per_s'] / 1e6:.0f} MB/s after {disk['latency_s'] * 1e3:.2g} ms")
