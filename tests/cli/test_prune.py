"""`torch-cpu-ext prune`, with a tiny model in a folder."""

import json

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
import tokenizers
import transformers
from typer.testing import CliRunner

import torch_cpu_ext as tce
from torch_cpu_ext.cli.app import app
from torch_cpu_ext.integrations.language import perplexity

WORDS = ["the", "a", "cat", "dog", "sees", "hears", "small", "large", "and", "runs", "sleeps", "eats", "under", "over", "house", "tree"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of two layers and a tokenizer of whole words, with a text for them."""
    path = tmp_path_factory.mktemp("model")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token=WORDS[0]).save_pretrained(path)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(WORDS)
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    (path / "text.txt").write_text(" ".join(WORDS[i * i % 13] for i in range(1500)))
    return path


def invoke(folder, *arguments):
    options = ["--calibration", str(folder / "text.txt"), "--samples", "8", "--length", "32"]
    return CliRunner().invoke(app, ["prune", str(folder), *options, *arguments])


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["--dtype", "bf16"], "sparsegpt"),
        (["--dtype", "int8", "--sparsity", "0.25"], "sparsegpt, int8 gptq"),
        (["--dtype", "int8", "--pattern", "1:4", "--method", "wanda"], "wanda 1:4, int8 gptq"),
    ],
)
def test_writes_a_checkpoint_that_loads(folder, tmp_path, options, method):
    done = invoke(folder, *options, "--json", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {row["method"] for row in result["rows"]} == {method}
    assert len(result["rows"]) == 14
    assert result["bytes_after"] < result["bytes_before"]

    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tce.load_checkpoint(model, tmp_path / "out" / "packed.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("cat dog")["input_ids"] == [2, 3]
    every = tce.calibration_from_text(tokenizer, [(folder / "text.txt").read_text()], 16, 32)
    assert perplexity(model, every[::2]) == pytest.approx(result["perplexity_after"], rel=1e-5)
    assert result["perplexity_before"] != result["perplexity_after"]


def test_prints_tables_and_goes_on_where_it_was(folder, tmp_path):
    for output in ("one", "two"):
        done = invoke(folder, "--resume", str(tmp_path / "blocks"), "-o", str(tmp_path / output))
        assert done.exit_code == 0, done.output
        assert "model.layers.1.mlp.down_proj" in done.output
        assert "perplexity on held-out text" in done.output
        assert "not pruned: lm_head" in done.output
    assert len(list((tmp_path / "blocks").iterdir())) == 2
    assert (tmp_path / "one" / "packed.safetensors").read_bytes() == (tmp_path / "two" / "packed.safetensors").read_bytes()


def test_magnitude_needs_no_text(folder, tmp_path):
    done = CliRunner().invoke(app, ["prune", str(folder), "--method", "magnitude", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "perplexity" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int3"], "--dtype must be one of bf16, int8"),
        (["--method", "random"], "method must be one of magnitude, wanda, sparsegpt, got 'random'"),
        (["--pattern", "5:4"], "pattern must be unstructured or n:m"),
        (["--pattern", "2:4", "--sparsity", "0.3"], "sparsity must be 0.5 or 0 for the pattern 2:4"),
        (["--samples", "1000"], "texts must have samples * length"),
        (["--calibration", "/no/such/file"], "/no/such/file"),
    ],
)
def test_refuses(folder, tmp_path, arguments, message):
    done = invoke(folder, *arguments, "-o", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_refuses_models_and_outputs(folder, tmp_path):
    done = CliRunner().invoke(app, ["prune", str(folder), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "--calibration must name a text file for --method sparsegpt" in done.output
    done = CliRunner().invoke(app, ["prune", str(tmp_path), "--method", "magnitude", "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "MODEL must be smollm2 or a folder with a config.json" in done.output
    done = invoke(folder, "-o", str(folder))
    assert done.exit_code == 1
    assert "--output must be a new or an empty folder" in done.output
