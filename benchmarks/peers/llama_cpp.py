"""llama.cpp, through the functions of its C library that llama-cpp-python wraps."""

import ctypes
import math
import time
from typing import Any

import llama_cpp
import numpy
import torch

from . import Run, Runner, Weights, models

_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)


def silence() -> None:
    """Keeps llama.cpp from printing."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


class LlamaCpp(Runner):
    """``llama_decode`` and the largest logit, with flash attention where that is faster; keys and values in fp16, its default.

    The prompt is computed once; later calls of `decode` drop what they added to the cache.
    """

    def __init__(self, model: str, threads: int, kind: str) -> None:
        silence()
        llama_cpp.llama_backend_init()
        self.name, self.threads = model, threads
        self.model = llama_cpp.llama_model_load_from_file(str(models.gguf(model, kind)).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {models.gguf(model, kind)}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts: dict[int, Any] = {}
        self.first_s: dict[int, float] = {}

    def prepare(self, context: int, tokens: int) -> None:
        ids = models.prompt(self.name, context)[0].tolist()
        speeds = []
        for flash in (False, True):
            handle = self._context(context + tokens + 1, flash)
            start = time.perf_counter()
            self._compute(handle, ids)
            self._best(handle)
            first_s = time.perf_counter() - start
            self._steps(handle, context, 4)
            speeds.append((min(self._steps(handle, context, tokens)), first_s, handle))
        (_, self.first_s[context], self.contexts[context]), (*_, slower) = sorted(speeds, key=lambda item: item[0])
        llama_cpp.llama_free(slower)

    def decode(self, context: int, tokens: int) -> Run:
        return Run(self.first_s[context], self._steps(self.contexts[context], context, tokens))

    def weights(self) -> Weights:
        size = int(llama_cpp.llama_model_size(self.model))
        return Weights(size, size)  # the tied embedding is the head's own tensor

    def perplexity(self) -> float | None:
        windows = models.windows(self.name)
        if windows is None:
            return None
        length = windows.shape[1]
        handle = self._context(length, flash=False)
        batch = llama_cpp.llama_batch_init(length, 0, 1)
        total = 0.0
        for window in windows:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle), True)
            batch.n_tokens = length
            for at, token in enumerate(window.tolist()):
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = token, at, 1, 0, 1
            self._check(llama_cpp.llama_decode(handle, batch))
            logits = torch.from_numpy(numpy.ctypeslib.as_array(llama_cpp.llama_get_logits(handle), (length, self.vocabulary)))
            total += float(torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum"))
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(handle)
        return math.exp(total / (windows.shape[0] * (length - 1)))

    def _context(self, length: int, flash: bool) -> Any:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = length, length, 512
        options.n_threads = options.n_threads_batch = self.threads
        options.flash_attn_type = int(flash)
        options.no_perf = True
        return llama_cpp.llama_init_from_model(self.model, options)

    def _compute(self, handle: Any, ids: list[int]) -> None:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        self._check(llama_cpp.llama_decode(handle, llama_cpp.llama_batch_get_one(array, len(ids))))

    def _best(self, handle: Any) -> int:
        return int(numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(handle, -1), (self.vocabulary,)).argmax())

    def _steps(self, handle: Any, context: int, tokens: int) -> list[float]:
        """Seconds of each step after the prompt."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(handle), 0, context, -1)
        token, gaps = 1, []
        for _ in range(tokens):
            start = time.perf_counter()
            self._compute(handle, [token])
            token = self._best(handle)
            gaps.append(time.perf_counter() - start)
        return gaps

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise RuntimeError(f"llama_decode failed with code {code}")
