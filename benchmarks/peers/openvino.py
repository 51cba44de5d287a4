"""OpenVINO, through OpenVINO GenAI's ``LLMPipeline``, which reads the GGUF file."""

from typing import Any

import numpy
import openvino
import openvino_genai

from . import Run, Runner, Weights, models


class OpenVino(Runner):
    """``LLMPipeline.generate`` with the attention backend that is faster here; its weights and its logits are not to be seen."""

    def __init__(self, model: str, threads: int, kind: str) -> None:
        self.name = model
        self.pipelines = [
            openvino_genai.LLMPipeline(str(models.gguf(model, kind)), "CPU", INFERENCE_NUM_THREADS=threads, ATTENTION_BACKEND=attention)
            for attention in ("PA", "SDPA")
        ]
        self.best: dict[int, Any] = {}

    def prepare(self, context: int, tokens: int) -> None:
        def speed(pipeline: Any) -> float:
            self._generate(pipeline, context, tokens)
            return min(self._generate(pipeline, context, tokens).gaps_s)

        self.best[context] = min(self.pipelines, key=speed)

    def decode(self, context: int, tokens: int) -> Run:
        run = self._generate(self.best[context], context, tokens)
        return Run(None, run.gaps_s)  # it may remember the prompt

    def weights(self) -> Weights:
        return Weights(None, None)

    def _generate(self, pipeline: Any, context: int, tokens: int) -> Run:
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample = tokens + 1, True, False
        metrics = pipeline.generate(openvino.Tensor(models.prompt(self.name, context).numpy()), options).perf_metrics
        gaps = numpy.array(metrics.raw_metrics.m_durations) / 1e6
        return Run(metrics.get_ttft().mean / 1e3, gaps.tolist())
