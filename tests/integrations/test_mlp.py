"""Gated MLPs of transformers: one op for gate, up and activation."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torch_cpu_ext as tce

transformers = pytest.importorskip("transformers")

from torch_cpu_ext.integrations.mlp import SparseMLP, fuse_mlps  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
DTYPES = pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])


def model(family="Llama", **config):
    torch.manual_seed(0)
    cls, settings = getattr(transformers, f"{family}ForCausalLM"), getattr(transformers, f"{family}Config")
    return cls(settings(**SIZES, **config)).eval()


def packed(original, dtype="int8", **config):
    return tce.optimize(copy.deepcopy(original), tce.SparseLinearConfig(dtype=dtype, **config))


def mlps(model):
    return [module for module in model.modules() if isinstance(module, SparseMLP)]


TOKENS = torch.arange(20)[None]


@DTYPES
@pytest.mark.parametrize(
    ("family", "config"), [("Llama", {"mlp_bias": True}), ("Gemma", {"head_dim": 16, "num_key_value_heads": 2}), ("Olmo", {})]
)
def test_same_as_layer_by_layer(family, config, dtype):
    original = model(family, **config)
    fused, plain = packed(original, dtype), packed(original, dtype, fuse=False)
    assert len(mlps(fused)) == 2
    assert not mlps(plain)
    with torch.no_grad():
        torch.testing.assert_close(fused(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert sum(row.kind == "gated MLP" for row in tce.report(fused).rows) == 2


def test_names_and_restore():
    original = model()
    fused = packed(original, "fp32")
    assert fused.state_dict().keys() == packed(original, "fp32", fuse=False).state_dict().keys()
    tce.restore(fused)
    assert fused.state_dict().keys() == original.state_dict().keys()
    assert all(a.equal(b) for a, b in zip(fused.state_dict().values(), original.state_dict().values(), strict=True))
    assert [type(module) for module in fused.modules()] == [type(module) for module in original.modules()]


def test_copies_and_checkpoints(tmp_path):
    fused = packed(model())
    tce.save_checkpoint(fused, tmp_path / "model.safetensors")
    others = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), tce.load_checkpoint(model(), tmp_path / "model.safetensors")]
    with torch.no_grad():
        expected = fused(TOKENS).logits
        for other in others:
            assert len(mlps(other)) == 2
            assert other(TOKENS).logits.equal(expected)
            one = mlps(other)[0]
            assert one._modules is one.original()._modules


def test_the_decoder_still_takes_over():
    fused = packed(model())
    assert any(row.kind == "fused decoder" for row in tce.report(fused).rows)
    plain = packed(model(), fuse=False)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert fused.generate(TOKENS[:, 1:4], **options).equal(plain.generate(TOKENS[:, 1:4], **options))


def one_mlp(dtype="int8", bias=True):
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, mlp_bias=bias)
    module = transformers.models.llama.modeling_llama.LlamaMLP(config)
    holder = nn.Sequential(tce.optimize(module, tce.SparseLinearConfig(dtype=dtype)))
    plain = copy.deepcopy(holder[0])
    return fuse_mlps(holder)[0], plain


@DTYPES
def test_gradients_reach_input_and_biases(dtype):
    fused, plain = one_mlp(dtype)
    x = torch.randn(3, 64)
    grads = []
    for module in (fused, plain):
        y = x.clone().requires_grad_()
        module(y).square().sum().backward()
        grads.append([y.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_hooks_and_adapters_run_the_layers():
    fused, plain = one_mlp()
    x, seen = torch.randn(3, 64), []
    handle = fused.gate_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert fused(x).equal(plain(x))
    assert seen == [(3, 96)]
    handle.remove()
    fused(x)
    assert len(seen) == 1

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.own = base, nn.Linear(64, 96)

        def forward(self, x):
            return self.base(x) + self.own(x)

    adapter = Adapter(fused.up_proj)
    fused.up_proj = plain.up_proj = adapter
    assert fused(x).equal(plain(x))
    fused(x).sum().backward()
    assert adapter.own.weight.grad is not None


def test_hooks_of_the_module_itself():
    fused, _ = one_mlp()
    seen = []
    fused.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    fused(torch.randn(1, 64))
    assert seen == [SparseMLP]


def test_compile():
    fused, _ = one_mlp()
    x = torch.randn(5, 64)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (5, 2, 9):
            torch.testing.assert_close(compiled(x[:rows]), fused(x[:rows]))
    torch._dynamo.reset()


def test_left_alone():
    """Other activations, unpacked halves, and modules whose forward does something else."""
    relu = packed(model(hidden_act="relu"))
    assert not mlps(relu)
    half = tce.optimize(model(), tce.SparseLinearConfig(), exclude="up_proj")
    assert not mlps(half)
    strange = model()
    strange.model.layers[0].mlp.forward = lambda x: x
    assert len(mlps(tce.optimize(strange, tce.SparseLinearConfig()))) == 1
