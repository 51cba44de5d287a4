"""The models of the benchmarks, for every peer: SmolLM2-135M, and a Llama of 1B parameters whose weights are random.

What is made at run time, a GGUF file of the one or in another format of the other, goes into the folder of converted models.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_cpu_ext import SparseLinearConfig, optimize
from torch_cpu_ext.core import env
from torch_cpu_ext.integrations import smollm2

SMOLLM2, LLAMA_1B = "SmolLM2-135M", "Llama, 1B shape"
DTYPES = smollm2.DTYPES
SHAPE = dict(  # of Llama 3.2 1B but for the vocabulary, which is SmolLM2's
    vocab_size=49152,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


def load(model: str, dtype: str) -> Any:
    """The model as transformers runs it."""
    return smollm2.load_model(dtype) if model == SMOLLM2 else _random_llama(dtype)


def load_optimized(model: str, config: SparseLinearConfig) -> Any:
    """The model after ``optimize(model, config)``; what is not packed computes in float32."""
    return smollm2.load_optimized(config) if model == SMOLLM2 else optimize(_random_llama("fp32"), config)


def gguf(model: str, kind: str) -> Path:
    """A GGUF file with the layers as ``kind``, Q4_0, Q4_1 or Q8_0, and the head as Q8_0, as llama.cpp's own converter makes them."""
    if model == SMOLLM2:
        source = smollm2.gguf()
        if kind == "Q4_1":  # what the package has
            return source
        return _kept(f"smollm2-135m-{kind}.gguf", lambda target: _requantize(source, target, kind))
    return _kept(f"llama-1b-random-{kind}.gguf", lambda target: _write_random_llama(target, kind))


def prompt(model: str, tokens: int) -> Tensor:
    """``(1, tokens)`` token ids, int64."""
    if model == SMOLLM2:
        text = smollm2.text()[: tokens * 16]
        return smollm2.load_tokenizer()(text, return_tensors="pt")["input_ids"][:, :tokens]
    return (torch.arange(tokens) * 7919 % SHAPE["vocab_size"])[None]


def windows(model: str) -> Tensor | None:
    """``(windows, length)`` token ids to measure perplexity on; random weights have none worth the name."""
    return smollm2.text_windows(smollm2.load_tokenizer()) if model == SMOLLM2 else None


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    return smollm2.once(env.cache_dir() / "models" / name, f"writing {name}", make)


def _requantize(source: Path, target: Path, kind: str) -> None:
    import llama_cpp

    from .llama_cpp import silence

    silence()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[kind]
    options.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not make {kind} of {source}")


def _random_llama(dtype: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None, pad_token_id=2, dtype=DTYPES[dtype]))
    model = model.to(DTYPES[dtype]).to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are computed, not loaded
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def _write_random_llama(target: Path, kind: str) -> None:
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    random = numpy.random.default_rng(0)
    hidden, mlp = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    heads, kv_heads = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    writer = GGUFWriter(target, "llama")
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_vocab_size(SHAPE["vocab_size"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("none")

    def quantized(rows: int, columns: int, name: str) -> tuple[Any, Any]:
        weight = random.standard_normal((rows, columns), dtype=numpy.float32) * 0.02
        return quants.quantize(weight, GGMLQuantizationType[name]), GGMLQuantizationType[name]

    one = numpy.ones(hidden, numpy.float32)
    matrices = {
        "attn_q": quantized(hidden, hidden, kind),
        "attn_k": quantized(hidden * kv_heads // heads, hidden, kind),
        "attn_v": quantized(hidden * kv_heads // heads, hidden, kind),
        "attn_output": quantized(hidden, hidden, kind),
        "ffn_gate": quantized(mlp, hidden, kind),
        "ffn_up": quantized(mlp, hidden, kind),
        "ffn_down": quantized(hidden, mlp, kind),
    }
    data, dtype = quantized(SHAPE["vocab_size"], hidden, "Q8_0")
    writer.add_tensor("token_embd.weight", data, raw_dtype=dtype)
    writer.add_tensor("output_norm.weight", one)
    for layer in range(SHAPE["num_hidden_layers"]):  # all layers alike: only their addresses matter
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", one)
        for name, (data, dtype) in matrices.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
