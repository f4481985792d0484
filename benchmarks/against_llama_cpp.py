"""Decode and prefill of reference model R, all resident, beside llama.cpp in the same run.

    python benchmarks/build_reference_model.py OUT
    pip install llama-cpp-python            # built from source; a benchmark's need, not a dependency
                                            # (0.3.36 with GCC 12 needs its AMX path off: it crashes on prompts)
    python benchmarks/against_llama_cpp.py OUT [--bits 4 8] [--rounds 7] [--threads 2] [--json]

Arms take turns within every round and their order rotates; figures are medians over rounds, ratios medians of the ratio
within a round. Before that both must agree on the logits of a prompt (each rounds the weights in its own way:
correlation at least 0.99 with 8 bits, 0.95 with 4). Token ids are a fixed random stream, not what random weights would
say (loops flatter caches). Both sides compute the logits of every decoded token and of the last prompt token.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moestro.engine.describe import describe
from moestro.engine.kernels import choose
from moestro.engine.layout import aligned
from moestro.engine.native_forward import NativeForward
from moestro.engine.packed import EXPERTS, Packed
from moestro.engine.sequences import Batch


PROMPT, CONTEXT = 512, 1024


class Ours:
    """A packed folder, every slab in memory."""

    name = "moestro"

    def __init__(self, folder: Path, threads: int, isa: str | None) -> None:
        packed = Packed.open(folder)
        description = describe(packed, packed.resident())
        size = packed.files[EXPERTS][0]
        self.memory = aligned(size, 1 << 21)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(self.memory.ctypes.data), ctypes.c_size_t(size), 14)  # huge pages
        with (folder / EXPERTS).open("rb") as file:
            file.readinto(memoryview(self.memory))
        base = self.memory.ctypes.data
        slabs = {
            layer: base + there.offset + there.stride * np.arange(there.num, dtype=np.int64)
            for layer, there in packed.experts.items()
        }
        kernels = choose("native", isa=isa)
        self.isa = kernels.features()["isa"]
        self.forward = NativeForward(description, pages=CONTEXT // 16, slabs=slabs, kernels=kernels, threads=threads)
        self.table = np.arange(CONTEXT // 16, dtype=np.int32)[None]

    def feed(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """Logits of the last of these tokens, which stand at ``start`` and after."""
        n = len(tokens)

        batch = Batch(
            tokens=tokens,
            positions=np.arange(start, start + n, dtype=np.int32),
            rows_of=np.zeros(n, np.int32),
            sequences=[0],
            tables=self.table,
            want=np.array([n - 1], np.int32),
            routes=None,
        )
        return self.forward.step(batch)[0]


class LlamaCpp:
    """A GGUF file in llama.cpp, through the C functions of llama-cpp-python."""

    name = "llama.cpp"

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.api = api = llama_cpp
        self.quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        settings.use_mmap = False
        self.model = api.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not read it")
        options = api.llama_context_default_params()
        options.n_ctx = CONTEXT
        options.n_batch = options.n_ubatch = PROMPT
        options.n_threads = options.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, options)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def feed(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """As ``Ours.feed``."""
        api, n = self.api, len(tokens)
        memory = api.llama_get_memory(self.context)
        api.llama_memory_seq_rm(memory, 0, start, -1)
        batch = api.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for index, token in enumerate(tokens.tolist()):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == n - 1
        status = api.llama_decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode: {status}")
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, n - 1), (self.vocab,)).copy()
        api.llama_batch_free(batch)
        return logits


def check_agreement(ours: Ours, peer: LlamaCpp, bits: int) -> None:
    """Stop unless both compute the same model."""
    tokens = np.random.default_rng(2).integers(0, 49152, 64).astype(np.int32)
    found = float(np.corrcoef(ours.feed(tokens, 0), peer.feed(tokens, 0))[0, 1])
    if not found >= {8: 0.99, 4: 0.95}[bits]:
        raise SystemExit(f"{bits} bits: logits correlate by {found:.4f}; the two do not compute the same model")


def measure(arms: list[Any], rounds: int, tokens: int, clock: Callable[[], float]) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of every arm in every round."""
    stream = np.random.default_rng(1).integers(0, 49152, PROMPT + tokens).astype(np.int32)
    rates: dict[str, dict[str, list[float]]] = {arm.name: {"prefill": [], "decode": []} for arm in arms}

    def prefill(arm: Any) -> float:
        begin = clock()
        arm.feed(stream[:PROMPT], 0)
        return PROMPT / (clock() - begin)

    def decode(arm: Any) -> float:
        begin = clock()
        for index in range(tokens):
            arm.feed(stream[PROMPT + index : PROMPT + index + 1], 64 + index)
        return tokens / (clock() - begin)

    work: dict[str, Callable[[Any], float]] = {"prefill": prefill, "decode": decode}
    for arm in arms:  # first touch
        prefill(arm), decode(arm)
    for turn in range(rounds):
        for what, run in work.items():
            for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
                rates[arm.name][what].append(run(arm))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=[4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", help="instruction set of our kernels; the best when not given")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, processor time: for a machine that others use as well"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    clock = time.thread_time if given.cpu_time else time.perf_counter
    if given.cpu_time:
        given.threads = 1
    rows = []
    for bits in given.bits:
        ours = Ours(given.folder / f"packed-{bits}", given.threads, given.isa)
        peer = LlamaCpp(given.folder / f"q{bits}_0.gguf", given.threads)
        check_agreement(ours, peer, bits)
        rates = measure([ours, peer], given.rounds, given.tokens, clock)
        for what in ("decode", "prefill"):
            a, b = rates[ours.name][what], rates[peer.name][what]
            ratio = [x / y for x, y in zip(a, b, strict=True)]
            row = {"case": f"{what} {bits} bit", "unit": "tokens/s", "ours": statistics.median(a)}
            row |= {"peer_name": peer.name, "peer": statistics.median(b), "ratio": statistics.median(ratio)}
            rows.append({**row, "spread": [min(ratio), max(ratio)], "isa": ours.isa, "threads": given.threads})
        del ours, peer
    if given.json:
        json.dump(rows, sys.stdout, indent=1)
        return
    for row in rows:
        low, high = row["spread"]
        print(
            f"{row['case']:16} ours {row['ours']:8.1f}  {row['peer_name']} {row['peer']:8.1f} tokens/s  "
            f"ratio {row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
