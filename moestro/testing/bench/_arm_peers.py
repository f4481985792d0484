"""The arms that are not ours; see ``_arm``."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError


class LlamaCpp:
    """A GGUF file in llama.cpp, through the C functions of llama-cpp-python.

    Options: file, context, threads, mmap. Logits are computed for the last token of each call, as on our side.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        api: Any = llama_cpp
        self.quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        settings.use_mmap = options["mmap"]
        self.model = api.llama_model_load_from_file(options["file"].encode(), settings)
        if not self.model:
            raise ConfigError(f"{options['file']}: llama.cpp does not read it")
        wanted = api.llama_context_default_params()
        wanted.n_ctx = options["context"]
        wanted.n_batch = wanted.n_ubatch = min(512, options["context"])
        wanted.n_threads = wanted.n_threads_batch = options["threads"]
        self.context = api.llama_init_from_model(self.model, wanted)
        if not self.context:
            raise ConfigError(f"{options['file']}: llama.cpp makes no context of {options['context']} positions")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.about = {"version": api.__version__}

    def feed(self, tokens: npt.NDArray[np.int32], start: int, at: int) -> npt.NDArray[np.float32]:
        """See ``Arm``."""
        api, n = self.api, len(tokens)
        api.llama_memory_seq_rm(api.llama_get_memory(self.context), 0, start, -1)
        batch = api.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for index, token in enumerate(tokens.tolist()):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == n - 1
        status = api.llama_decode(self.context, batch)
        if status:
            raise ConfigError(f"llama_decode: {status}")
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, n - 1), (self.vocab,)).copy()
        api.llama_batch_free(batch)
        return np.asarray(logits, dtype=np.float32)

    def counters(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}


class Transformers:
    """The checkpoint in float32 on Transformers' own modules. Options: folder, threads."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(options["threads"])
        torch.set_grad_enabled(False)
        self.torch: Any = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=torch.float32).eval()
        self.cache: Any = DynamicCache(config=self.model.config)
        self.about = {"experts": self.model.config._experts_implementation}

    def feed(self, tokens: npt.NDArray[np.int32], start: int, at: int) -> npt.NDArray[np.float32]:
        """See ``Arm``."""
        if start == 0:
            self.cache = type(self.cache)(config=self.model.config)
        elif self.cache.get_seq_length() > start:
            self.cache.crop(start - self.cache.get_seq_length())  # counted from the end
        ids = self.torch.from_numpy(tokens.astype(np.int64))[None]
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return np.asarray(out.logits[0, -1].numpy(), dtype=np.float32)

    def counters(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {"llama.cpp": LlamaCpp, "transformers": Transformers}
