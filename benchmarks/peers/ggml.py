"""A product by ggml, the library under llama.cpp, through the C functions in the libraries that llama-cpp-python brings."""

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import llama_cpp
import numpy
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from .llama_cpp import silence

_LIBRARIES = ("libggml-base.so", "libggml-cpu.so")


class _Parameters(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Ggml:
    """The functions used here, and a CPU backend."""

    def __init__(self) -> None:
        silence()
        folder = Path(llama_cpp.__file__).parent / "lib"
        self.libraries = [ctypes.CDLL(str(folder / name)) for name in _LIBRARIES]
        self._init = self.function("ggml_init", c_void_p, _Parameters)
        self.tensor = self.function("ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
        self.product = self.function("ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
        self.graph = self.function("ggml_new_graph", c_void_p, c_void_p)
        self.expand = self.function("ggml_build_forward_expand", None, c_void_p, c_void_p)
        self.allocate = self.function("ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, c_void_p, c_void_p)
        self.write = self.function("ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
        self.compute = self.function("ggml_backend_graph_compute", c_int, c_void_p, c_void_p)
        self.threads = self.function("ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)
        self.function("ggml_cpu_init", None)()
        self.backend = self.function("ggml_backend_cpu_init", c_void_p)()
        self.memory = self.function("ggml_backend_cpu_buffer_type", c_void_p)()
        self.repacked = self._repacked()

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        found = next(getattr(library, name) for library in self.libraries if hasattr(library, name))
        found.restype, found.argtypes = result, arguments
        return found

    def context(self) -> Any:
        """Descriptions of tensors and graphs, not their data."""
        return self._init(_Parameters(1 << 24, None, True))

    def _repacked(self) -> Any:
        """The buffer type that interleaves the rows of a weight for the instruction set, as llama.cpp does when it loads a model."""
        registry = self.function("ggml_backend_cpu_reg", c_void_p)()
        device = self.function("ggml_backend_reg_dev_get", c_void_p, c_void_p, c_size_t)(registry, 0)
        address = self.function("ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_char_p)
        types = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address(registry, b"ggml_backend_dev_get_extra_bufts"))(device)
        name = self.function("ggml_backend_buft_name", c_char_p, c_void_p)
        at = 0
        while types[at]:
            if name(types[at]) == b"CPU_REPACK":
                return types[at]
            at += 1
        return self.memory


_ggml = functools.cache(_Ggml)


def product(kind: str, weight: Tensor, copies: int) -> Callable[[Tensor], list[Callable[[], object]]]:
    """The product with a weight as ``kind``, Q4_0, Q4_1 or Q8_0, in float32 outside, as llama.cpp has it; a call for each copy of it.

    Q4_0 is repacked, which ggml does for no other of these on x86.
    """
    ggml, dtype = _ggml(), GGMLQuantizationType[kind]
    data = numpy.ascontiguousarray(quants.quantize(weight.float().numpy(), dtype))
    outputs, inputs = weight.shape
    context = ggml.context()
    weights = [ggml.tensor(context, int(dtype), inputs, outputs) for _ in range(copies)]
    ggml.allocate(context, ggml.repacked if kind == "Q4_0" else ggml.memory)
    for one in weights:
        ggml.write(one, data.ctypes.data, 0, data.nbytes)

    def calls(x: Tensor) -> list[Callable[[], object]]:
        ggml.threads(ggml.backend, torch.get_num_threads())
        context, values = ggml.context(), x.float().contiguous()
        source = ggml.tensor(context, int(GGMLQuantizationType.F32), inputs, x.shape[0])
        results = [ggml.product(context, one, source) for one in weights]
        ggml.allocate(context, ggml.memory)
        ggml.write(source, values.data_ptr(), 0, values.nbytes)
        graphs = []
        for result in results:
            graphs.append(ggml.graph(context))
            ggml.expand(graphs[-1], result)
        return [functools.partial(ggml.compute, ggml.backend, graph) for graph in graphs]

    return calls
