"""Instruction sets: names, the ladder, the cap and its nesting."""

import pytest
import torch

import torch_cpu_ext as tce
from torch_cpu_ext.core import isa
from torch_cpu_ext.sparse_linear import linear, pack


def test_the_ladder_has_no_gaps():
    found = isa.supported()
    assert found[0] == "scalar"
    assert found == isa.ISAS[: len(found)]
    assert [isa.level(name) for name in isa.ISAS] == list(range(len(isa.ISAS)))


def test_a_machine_without_one_level_has_none_above(monkeypatch):
    everything = {feature: True for needs in isa._NEEDS.values() for feature in needs}
    for missing, expected in [
        ("avx2", ("scalar",)),
        ("bmi2", ("scalar",)),
        ("avx512_bw", ("scalar", "avx2")),
        ("avx512_vbmi2", ("scalar", "avx2", "avx512")),
        ("avx512_bf16", isa.ISAS[:4]),
        ("amx_tile", isa.ISAS[:5]),
        (None, isa.ISAS),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda missing=missing: everything | {missing: False})
        monkeypatch.setattr(isa.platform, "machine", lambda: "x86_64")
        assert isa.supported.__wrapped__() == expected
    monkeypatch.setattr(isa.platform, "machine", lambda: "aarch64")
    assert isa.supported.__wrapped__() == ("scalar",)


def test_isa_nests_and_restores():
    best = isa.supported()[-1]
    assert isa.current() == best
    with tce.isa("scalar"):
        assert tce.kernel_isa("sparse_linear", "fp32") == "scalar"
        with tce.isa(best):
            assert isa.current() == best
        assert isa.current() == "scalar"
        assert tce.kernel_isa("sparse_linear", "fp32") == "scalar"
    assert isa.current() == best
    with pytest.raises(KeyError), tce.isa("scalar"):
        raise KeyError
    assert isa.current() == best
    assert tce.kernel_isa("sparse_linear", "fp32") != "scalar" or best == "scalar"


@pytest.mark.parametrize("name", ["avx1024", "", "AVX2", "sse2"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=f"isa must be one of scalar, avx2, .*, got '{name}'"), tce.isa(name):
        pass


def test_name_the_machine_lacks(monkeypatch):
    monkeypatch.setattr(isa, "supported", lambda: ("scalar", "avx2"))
    with pytest.raises(ValueError, match=r"isa must be an instruction set of this machine \(scalar, avx2\), got 'amx'"), tce.isa("amx"):
        pass


def test_variable(monkeypatch):
    monkeypatch.setenv("TORCH_CPU_EXT_ISA", " scalar ")
    assert isa.current() == "scalar"
    monkeypatch.setenv("TORCH_CPU_EXT_ISA", "best")
    with pytest.raises(ValueError, match=r"TORCH_CPU_EXT_ISA must be one of scalar, avx2, .*, got 'best'"):
        isa.current()
    monkeypatch.setenv("TORCH_CPU_EXT_ISA", "")
    assert isa.current() == isa.supported()[-1]


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel must name a kernel of sparse_linear, got 'fp64'"):
        tce.kernel_isa("sparse_linear", "fp64")


def test_instruction_sets_agree():
    """One packed array serves all; they differ by rounding only."""
    weight, x = torch.randn(50, 130) * (torch.rand(50, 130) < 0.5), torch.randn(6, 130)
    for dtype in ("fp32", "bf16", "int8", "int4"):
        packed, results = pack(weight, dtype=dtype), []
        for name in isa.supported():
            with tce.isa(name):
                assert pack(weight, dtype=dtype).equal(packed)
                results.append(linear(x, packed, None, 50))
        for result in results:
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
