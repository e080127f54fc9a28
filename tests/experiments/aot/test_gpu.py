# SPDX-License-Identifier: Apache-2.0
"""Compiling kernels for a GPU that is not there."""

import json
import re

import jax
import pytest

from experiments.aot import __main__ as aot
from experiments.aot import gpu, kernels

WITH_KERNELS = tuple(name for name in kernels.KERNELS if name not in ("compact",))
needs_compiler = pytest.mark.skipif(bool(gpu.missing()), reason=f"no GPU compiler ({gpu.missing()}): {gpu.INSTALL}")

CODE = """
.visible .entry attend(
{
	cp.async.cg.shared.global [a], [b], 0x10;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {
}
.visible .entry attend_2(
{
	mma.sync.aligned.m16n8k16 {
}
"""
REPORT = """ptxas info    : Compiling entry function 'attend_2' for 'sm_90a'
ptxas info    : Function properties for attend_2
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
LAUNCHES = """001: kCustomKernel [source] attend_2 grid: [4, 1, 1] threads: [128, 1, 1]  shared_memory: 512 bytes
002: kCustomKernel [sink] attend grid: [32, 8, 1] threads: [256, 1, 1]  shared_memory: 98304 bytes
"""


def test_what_kernels_take_is_read_from_code_report_and_launches():
    first, second = gpu.kernels(CODE, REPORT, LAUNCHES)
    assert first == gpu.Kernel("attend", 256, 168, 0, 0, 98304, {"wgmma": 2, "mma": 0}, 1)
    assert second == gpu.Kernel("attend_2", 128, 255, 8, 12, 512, {"wgmma": 0, "mma": 1}, 0)
    with pytest.raises(ValueError, match="ptxas does not say what attend takes"):
        gpu.kernels(CODE, REPORT.replace("'attend'", "'other'"), LAUNCHES)


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_every_case_of_a_kernel_lowers_for_gpus(name):
    """On any machine: what Triton's dialect does not have shows here."""
    for case in kernels.KERNELS[name]("gpu"):
        lowered = jax.jit(case.function).trace(*case.arguments).lower(lowering_platforms=("cuda",))
        calls = re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", lowered.as_text())
        assert calls, case.shape


@pytest.fixture
def uncached():
    """What is compiled for a card that is not there cannot be read back from a cache."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@needs_compiler
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_every_kernel_compiles_for_an_h200_and_spills_nothing(name):
    rows = list(kernels.gpu_rows(name, ("h200",)))
    assert len(rows) == len(list(kernels.KERNELS[name]("gpu")))
    for row in rows:
        assert row["kernels"], row
        for kernel in row["kernels"]:
            assert kernel["spill_stores"] == kernel["spill_loads"] == 0, (row["shape"], kernel)
            assert 0 < kernel["registers"] <= 255 and kernel["threads"] >= 128


@needs_compiler
def test_a_kernel_without_a_gpu_form_says_so_in_its_rows(capsys, tmp_path):
    assert aot.main(["--kernel=compact", "--chips=h200", f"--out={tmp_path}"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert json.loads((tmp_path / "compact.json").read_text()) == rows
    assert all("implementation='xla'" in row["refused"] for row in rows)


def test_an_unknown_card_and_a_missing_compiler_are_said(capsys, monkeypatch):
    with pytest.raises(ValueError, match="unknown card 'b200'; one of h200"):
        gpu.compile_kernels(lambda x: x, (jax.ShapeDtypeStruct((1,), "float32"),), "b200")
    assert aot.main(["--kernel=merge", "--chips=h200,v5e"]) == 2
    assert "['h200'] is not one of" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "missing", lambda: "ptxas")
    assert aot.main(["--kernel=merge", "--chips=h200"]) == 2
    assert "pip install --no-deps jax-cuda13-plugin" in capsys.readouterr().err
