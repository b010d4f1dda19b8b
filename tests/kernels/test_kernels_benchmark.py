"""The kernels benchmark checks before it times, counts a block as Wan2.2 has it, and without a GPU
measures nothing.
"""

import sys

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")

from benchmarks import kernels, kernels_methods, kernels_roofline, kernels_tiles, kernels_timing, registry
from benchmarks.registry import Shape
from tempoquant.kernels import dispatch

SHAPE = Shape(3, 64, 16)
CPU = torch.device("cpu")
PEAKS = {"bytes_per_s": 1e12, "bf16_flops": 1e12, "fp8_flops": 2e12}

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU, and there is one")


@pytest.fixture
def instant_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every call take a millisecond, and the CPU pass for Hopper."""

    def time_ms(function, graph=False):
        function()
        return 1.0

    monkeypatch.setattr(kernels_timing, "time_ms", time_ms)
    monkeypatch.setattr(kernels_timing, "_capability", lambda device: 90)
    monkeypatch.setattr(kernels_timing, "PEERS", kernels_timing.PEERS[:1])


def test_the_registry_holds_every_weight_of_wans_blocks():
    weights = sum(linear.in_features * linear.out_features for linear in registry.BLOCK_LINEARS)
    assert registry.NUM_BLOCKS * weights == 14_050_918_400
    assert len({linear.name for linear in registry.BLOCK_LINEARS}) == 10


@on_cpu
@pytest.mark.usefixtures("instant_times")
def test_every_method_passes_its_check_and_gets_a_row(monkeypatch):
    every = [*kernels_methods.our_methods(90), kernels_methods.our_methods(120)[0]]
    assert every[-1].backend == "fp4"
    monkeypatch.setattr(kernels_timing, "our_methods", lambda capability: every)
    rows = list(kernels_timing.rows_of_shape(SHAPE, PEAKS, CPU))
    timed = {row["method"] for row in rows if "note" not in row}
    assert timed >= {method.name for method in every}
    assert rows[0]["method"].startswith("BF16") and rows[0]["ratio_to_bf16"] == 1.0


@on_cpu
@pytest.mark.usefixtures("instant_times")
@pytest.mark.parametrize("backend", ["fp8", "bf16"])
def test_the_backend_that_the_runtime_takes_has_a_row_of_its_own(backend, monkeypatch):
    monkeypatch.setattr(kernels_timing, "our_methods", lambda capability: [])
    with dispatch.forced(backend):
        rows = {row["method"]: row for row in kernels_timing.rows_of_shape(SHAPE, PEAKS, CPU)}
    assert rows[f"as the runtime runs nvfp4_m1: {backend}"]["whole_ms"] == 1.0


@on_cpu
@pytest.mark.parametrize("fault", ["product", "quantize"])
@pytest.mark.usefixtures("instant_times")
def test_a_method_that_is_wrong_is_not_timed(fault, monkeypatch):
    right = kernels_methods.our_methods(90)[1]

    def wrong_product(*operands):
        return right.product(*operands) * 1.01

    def wrong_quantize(x, *others):
        return right.quantize(x.roll(1, 0), *others)

    wrong = right._replace(**{fault: {"product": wrong_product, "quantize": wrong_quantize}[fault]})
    monkeypatch.setattr(kernels_timing, "our_methods", lambda capability: [wrong])
    row = list(kernels_timing.rows_of_shape(SHAPE, PEAKS, CPU))[1]
    assert row["note"].startswith("WRONG") and not [name for name in row if name.endswith("_ms")]
    assert kernels.has_wrong_rows({"results": [{"shapes": [{"rows": [row]}]}]})


def test_a_block_quantizes_what_linears_share_once_and_leaves_out_methods_that_miss_a_shape():
    shapes = registry.shapes_of_block(1000)
    ours = {"method": "ours", "whole_ms": 1.0, "project_ms": 0.125, "quantize_ms": 0.25}
    rows = {shape: [{"method": "BF16", "whole_ms": 2.0}, ours] for shape in shapes}
    rows[next(iter(shapes))].append({"method": "one shape only", "whole_ms": 0.5})
    totals = kernels.block_totals(1000, rows)
    assert totals == {
        "BF16": {"ms": 20.0, "ratio_to_bf16": 1.0},
        "ours": {"ms": 10 - 3 * 0.375, "ratio_to_bf16": 20 / (10 - 3 * 0.375)},  # q, k, v share; so do the text's k, v
    }


def test_least_times_follow_the_longer_of_operations_and_bytes():
    rates = kernels_roofline.Rates("one", bytes_per_s=1.0, bf16_flops=1.0, fp8_flops=2.0)
    assert kernels_roofline.Work(flops=8.0, bytes=3.0).floor_s(rates) == 8.0
    assert kernels_roofline.Work(flops=8.0, bytes=3.0, is_fp8=True).floor_s(rates) == 4.0
    assert kernels_roofline.Work(flops=8.0, bytes=9.0, is_fp8=True).floor_s(rates) == 9.0
    bf16, ours = kernels_roofline.block_floors(32_760, kernels_roofline.H100_SXM)
    assert bf16 == pytest.approx(19.8e-3, rel=0.01)  # 1.96e13 operations at 989e12
    assert bf16 / 2 < ours < bf16


@on_cpu
def test_without_a_gpu_the_command_says_so_and_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", "--tokens", "32760"])
    monkeypatch.setattr(kernels, "counted_tables", lambda capability: f"counted for {capability}")
    assert kernels.main() == 0
    printed = capsys.readouterr().out
    assert "counted for 90" in printed and "nothing was measured" in printed


@on_cpu
@pytest.mark.usefixtures("instant_times")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_every_candidate_tile_gives_the_tables_result(dtype, capsys):
    assert kernels_tiles.print_times(Shape(3, 80, 48), dtype, CPU, Console(width=120))
    assert capsys.readouterr().out.count("1.000") == 2 * len(kernels_tiles.CANDIDATES[dtype.itemsize])
