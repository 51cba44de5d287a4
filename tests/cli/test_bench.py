"""`torch-cpu-ext bench`, and what benchmarks share."""

import json
from pathlib import Path

import pytest

from support import ROOT

pytest.importorskip("typer")
from typer.testing import CliRunner

import torch_cpu_ext.cli.bench as cli_bench
from torch_cpu_ext.cli.app import app


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_lists_the_benchmarks():
    result = invoke()
    assert result.exit_code == 0
    assert result.stdout.split() == sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py") if file.stem != "common")


def test_an_unknown_name_lists_them_too():
    result = invoke("sparse_lunar")
    assert result.exit_code == 1
    assert "llm_decode" in result.output
    assert "got sparse_lunar" in result.output


def test_arguments_go_to_the_benchmark_and_its_exit_code_comes_back(tmp_path, monkeypatch):
    (tmp_path / "common.py").touch()
    (tmp_path / "one.py").write_text(f"import sys; open({str(tmp_path / 'seen')!r}, 'w').write(' '.join(sys.argv[1:])); sys.exit(7)")
    monkeypatch.setattr(cli_bench, "FOLDER", tmp_path)
    for arguments in (["--quick", "--threads", "1"], ["--", "--quick", "--threads", "1"]):
        assert invoke("one", *arguments).exit_code == 7
        assert (tmp_path / "seen").read_text() == "--quick --threads 1"


def test_the_start_of_a_name_will_do(tmp_path, monkeypatch):
    (tmp_path / "common.py").touch()
    for name, code in (("kv_cache", 3), ("kv_cache_speed", 4)):
        (tmp_path / f"{name}.py").write_text(f"import sys; sys.exit({code})")
    monkeypatch.setattr(cli_bench, "FOLDER", tmp_path)
    assert [invoke(name).exit_code for name in ("kv", "kv_cache", "kv_cache_s", "kv_cache_speed")] == [3, 3, 4, 4]


def test_says_that_a_wheel_has_no_benchmarks(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_bench, "FOLDER", tmp_path)
    result = invoke("llm_decode")
    assert result.exit_code == 1
    assert "clone the repository" in result.output


def test_every_bar_has_a_benchmark_and_a_number(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common

    names = [line.strip("[]") for line in Path(common.FOLDER / "bars.toml").read_text().splitlines() if line.startswith("[")]
    assert names
    for name in names:
        source = (ROOT / "benchmarks" / f"{name}.py").read_text()
        for bar, promise in common.promised(name).items():
            assert f'"{bar}"' in source
            ((bound, limit),) = promise.items()
            assert bound in ("at_least", "at_most")
            assert limit > 0


def test_interleave_gives_medians_and_spreads(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common

    turns = []
    times = common.interleave({name: lambda name=name: turns.append(name) for name in "ab"}, 3, warmup=1, sample_s=0)
    assert "".join(turns) == "aa" + "bb" + "ababab"
    assert all(times[name] >= 0 and times[name].iqr >= 0 for name in "ab")
    row = common.row("case", 1e-3, "peer", 2e-3, {"k": 1})
    assert row == {"case": "case", "ours_ms": 1.0, "peer": "peer", "peer_ms": 2.0, "ratio": 2.0, "config": {"k": 1}}


def test_a_bar_that_a_missing_peer_keeps_from_being_measured_is_null(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common

    monkeypatch.setattr(common, "promised", lambda name: {"speed": {"at_least": 2.0}, "size": {"at_most": 1.0}})
    common._print_bars("one", lambda: {"speed": None, "size": 0.5}, {})
    speed, size = json.loads(capsys.readouterr().out)
    assert (speed["measured"], speed["met"]) == (None, None)
    assert (size["measured"], size["met"]) == (0.5, True)


def test_a_peer_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers

    assert peers.Peer("models", "none", packages=("json",)).missing() == ""
    assert peers.Peer("models", "none", packages=("json", "no_such_package"), install="pip install it").missing() == (
        "no_such_package not installed (pip install it)"
    )


def test_a_peer_that_fails_says_why(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers
    from peers.workers import Worker, WorkerError

    with Worker(peers.Peer("models", "NoSuchRunner"), "model", 1) as worker, pytest.raises(WorkerError, match="NoSuchRunner"):
        worker.ask()
    assert worker.process.exitcode == 0


def test_weights_that_are_shared_count_once(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import torch

    from peers.torch_models import _bytes

    embedding, head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
    assert sum(_bytes([embedding, head]).values()) == 320
    head.weight = embedding.weight
    assert sum(_bytes([embedding, head]).values()) == 160
