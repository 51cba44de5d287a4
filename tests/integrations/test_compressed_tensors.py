"""Reading sparse checkpoints of compressed-tensors; written by hand here, so that the package is not needed."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torch_cpu_ext as tce
from torch_cpu_ext.integrations.compressed_tensors import CompressedWeights, decompress, load_compressed

FORMATS = ["sparse-bitmask", "sparse-24-bitmask"]


def compress(weight, form):
    """The tensors that stand for a weight, from the format's description."""
    if form == "sparse-bitmask":
        mask = weight != 0
    else:  # the two largest of four
        mask = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool)
        mask = mask.scatter_(1, weight.view(-1, 4).abs().topk(2).indices, True).view(weight.shape)
    bits = nn.functional.pad(mask, (0, -weight.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    bitmask = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    values = weight[mask]
    if form == "sparse-24-bitmask":
        return {
            "shape": torch.tensor(weight.shape).view(-1, 1),
            "compressed": values.view(weight.shape[0], -1),
            "bitmask": bitmask,
        }
    counts = mask.sum(-1)
    return {
        "shape": torch.tensor(weight.shape),
        "compressed": values,
        "bitmask": bitmask,
        "row_offsets": counts.cumsum(0) - counts,
    }


def sparse(shape, form, dtype=torch.bfloat16):
    weight = torch.randn(shape).to(dtype)
    if form == "sparse-24-bitmask":
        weight *= (
            torch.zeros(weight.numel() // 4, 4).scatter_(1, torch.rand(weight.numel() // 4, 4).topk(2).indices, 1).view(shape).to(dtype)
        )
    else:
        weight *= torch.rand(shape) < 0.4
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("form", "shape"),
    [*(("sparse-bitmask", s) for s in [(5, 13), (1, 1), (4, 8), (7,), (2, 3, 9), (3, 0)]), ("sparse-24-bitmask", (5, 12))],
)
def test_decompress(form, shape, dtype):
    weight = sparse(shape, form, dtype)
    dense = decompress(**compress(weight, form))
    assert dense.dtype == dtype
    assert dense.equal(weight)


@pytest.mark.parametrize("form", FORMATS)
def test_known_bytes(form):
    """A row of eight: bits count from the least significant one."""
    shape, bitmask = torch.tensor([1, 8]), torch.tensor([[0b10100101]], dtype=torch.uint8)
    values = torch.tensor([1.0, 2, 3, 4])
    offsets = {"row_offsets": torch.tensor([0])} if form == "sparse-bitmask" else {}
    dense = decompress(shape=shape, bitmask=bitmask, compressed=values if offsets else values.view(1, 4), **offsets)
    assert dense.tolist() == [[1, 0, 2, 0, 0, 3, 0, 4]]


def test_damaged_tensors():
    good = compress(sparse((4, 10), "sparse-bitmask"), "sparse-bitmask")
    for change, message in (
        ({"compressed": good["compressed"][:-1]}, "compressed must hold"),
        ({"bitmask": good["bitmask"][:, :1]}, "bitmask must be uint8"),
        ({"bitmask": good["bitmask"].int()}, "bitmask must be uint8"),
        ({"shape": torch.tensor([4, -10])}, "shape must hold sizes"),
        ({"shape": torch.tensor([1 << 40, 1 << 40])}, "bitmask must be uint8"),
        ({"row_offsets": good["row_offsets"] + 1}, "row_offsets must be"),
        ({"compressed": good["compressed"].to(torch.float8_e4m3fn)}, "quantized weights cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            decompress(**{**good, **change})


def write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    names = list(tensors)
    for i in range(2):  # two files
        save_file(
            {name: tensors[name].contiguous() for name in names[i::2]}, folder / f"model-0000{i + 1}-of-00002.safetensors", {"format": "pt"}
        )
    index = {name: f"model-0000{i + 1}-of-00002.safetensors" for i in range(2) for name in names[i::2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if config:
        (folder / "config.json").write_text(json.dumps(config))


def test_mapping(tmp_path):
    weight, bias = sparse((6, 16), "sparse-bitmask"), torch.randn(6)
    write(tmp_path / "c", {**{f"a.{part}": t for part, t in compress(weight, "sparse-bitmask").items()}, "a.bias": bias})
    weights = CompressedWeights(tmp_path / "c")
    assert dict.fromkeys(weights) == {"a.weight": None, "a.bias": None}
    assert weights["a.weight"].equal(weight)
    assert weights["a.bias"].equal(bias)
    with pytest.raises(KeyError):
        weights["a.bitmask"]
    model = nn.ModuleDict({"a": nn.Linear(16, 6)}).bfloat16()
    tce.optimize(model, tce.SparseLinearConfig(dtype="bf16"))
    model.load_state_dict(weights)  # an optimized model packs what it loads
    assert model["a"].weight.equal(weight)
    assert model["a"].layout == "sparse"


def test_refused_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        CompressedWeights(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(tce.CorruptFileError):
        CompressedWeights(tmp_path / "x.safetensors")
    save_file({"a.weight_packed": torch.zeros(3, dtype=torch.int32), "a.weight_scale": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"without quantization, got a tensor a\.weight_packed"):
        CompressedWeights(tmp_path)
    parts = compress(sparse((4, 8), "sparse-bitmask"), "sparse-bitmask")
    save_file({"a.bitmask": parts["bitmask"], "a.shape": parts["shape"]}, tmp_path / "x.safetensors")
    with pytest.raises(tce.CorruptFileError, match=r"a\.weight must have a bitmask"):
        CompressedWeights(tmp_path)["a.weight"]
    save_file({f"a.{part}": t for part, t in {**parts, "compressed": parts["compressed"][1:]}.items()}, tmp_path / "x.safetensors")
    with pytest.raises(tce.CorruptFileError, match=r"a\.weight: compressed must hold"):
        CompressedWeights(tmp_path)["a.weight"]


def checkpoint(folder, form, dtype=torch.bfloat16):
    """A tiny Llama as compressed-tensors writes one; returns the dense model."""
    transformers = pytest.importorskip("transformers")
    architecture = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, dtype=dtype
    )
    model = transformers.LlamaForCausalLM(architecture).to(dtype).eval()
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(sparse(parameter.shape, form, dtype))
                tensors |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in compress(parameter.detach(), form).items()}
            else:
                tensors[name] = parameter.detach()
    config = architecture.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": form, "ignore": ["lm_head"]}},
    }
    write(folder, tensors, config)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMATS)
def test_load(form, dtype, tmp_path):
    model = checkpoint(tmp_path / "c", form, dtype)
    model.save_pretrained(tmp_path / "dense")
    model = type(model).from_pretrained(tmp_path / "dense")  # casting a model casts more than loading one
    loaded = load_compressed(tmp_path / "c")
    layer = loaded.model.layers[0].mlp.up_proj
    assert layer.layout == ("structured" if form == "sparse-24-bitmask" else "sparse")
    assert layer.weight.equal(model.model.layers[0].mlp.up_proj.weight)
    tokens = torch.tensor([[1, 5, 9]])
    config = tce.SparseLinearConfig(dtype="bf16" if dtype == torch.bfloat16 else "fp32")
    with torch.inference_mode():
        expected = tce.optimize(model, config)(tokens).logits
        assert loaded(tokens).logits.equal(expected)
    loaded.save_pretrained(tmp_path / "packed")
    again = type(loaded).from_pretrained(tmp_path / "packed")
    with torch.inference_mode():
        assert again(tokens).logits.equal(expected)


def test_load_with_a_config(tmp_path):
    checkpoint(tmp_path / "c", "sparse-24-bitmask")
    loaded = load_compressed(tmp_path / "c", tce.SparseLinearConfig())
    assert {row.kind for row in tce.report(loaded).rows} <= {"int8 sparse", "int8 dense", "fused decoder", "gated MLP"}
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"architectures": ["Nothing"]}))
    with pytest.raises(ValueError, match="must name a class of transformers in architectures, got"):
        load_compressed(tmp_path / "c")


@pytest.mark.parametrize("form", FORMATS)
def test_against_the_package(form):
    """Versions up to 0.12 or so can still write them."""
    pytest.importorskip("compressed_tensors")
    compressors = pytest.importorskip("compressed_tensors.compressors.sparse_compressors")
    weight = sparse((16, 64), form)
    if form == "sparse-bitmask":
        tensors = compressors.BitmaskTensor.from_dense(weight).dict("a")
    else:
        tensors = compressors.Sparse24BitMaskTensor.from_dense(weight).dict("a")
    assert decompress(**{name.removeprefix("a."): tensor for name, tensor in tensors.items()}).equal(weight)
    own = compress(weight, form)
    assert tensors.keys() == {f"a.{part}" for part in own}
    assert all(tensors[f"a.{part}"].equal(tensor) and tensors[f"a.{part}"].dtype == tensor.dtype for part, tensor in own.items())
