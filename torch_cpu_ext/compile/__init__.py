"""The torch.compile backend ``"torch_cpu_ext"``: packs the Linear layers of an unmodified model in its graph, Inductor does the rest.

``torch.compile(model, backend="torch_cpu_ext")`` works without importing this package first. A layer is packed where

- ``options={"linear": SparseLinearConfig(...)}`` asks for it: every layer that can be, with that config. As in `torch_cpu_ext.swap_linear`,
  a weight with a second use (an embedding, another layer) is not pruned; here only uses in the same graph count.
- without that option, where the zeros its weight has make the sparse layout smaller than the dense weight. Nothing is rounded: float32
  weights are packed as ``"fp32"``, bfloat16 ones as ``"bf16"``, and results are equal up to the order of sums.

Any other option is one of Inductor's (``torch._inductor.list_options()``), and ``mode`` means what it means there.

**Left alone**, with the reason in the log (logger ``torch_cpu_ext.compile``: one INFO line a graph, one DEBUG line a layer):

- layers whose weight trains in this graph: it requires grad, and grad mode is on; run inference under ``torch.no_grad()``;
- layers whose weight is no parameter or buffer of a module (it is computed, or an argument of the compiled function), is used for more than
  linear layers and embeddings, is no plain 2-D CPU tensor, or has another dtype than the result (autocast);
- products that are no ``nn.Linear`` or ``F.linear``, and all that stands in the subgraphs of checkpointing and control flow: the log does
  not count these.

**Fixed at compile time** are the choice of layers and their format, not the values. Packed weights are inputs of the compiled graph:
Inductor's caches never hold them, graphs of the same weight share them, and layers that share one compiled graph each use their own. Every
call looks whether a weight was replaced or changed in place since it was packed, and packs it anew if so. One change stays unseen: a write
through ``weight.data``, or into a weight made in inference mode, which PyTorch does not count; call ``torch.compiler.reset()`` after it.

The model keeps its dense weights beside the packed ones; `torch_cpu_ext.optimize` drops them.
"""

from .backend import backend

__all__ = ["backend"]
