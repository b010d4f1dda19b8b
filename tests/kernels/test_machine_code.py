"""The counts of the kernels' machine code: no change slows a kernel unseen; and how counts become
times.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.machine_code.counting import Counted, Work, drains_tensor_cores, times
from benchmarks.machine_code.gpus import GPUS
from benchmarks.machine_code.listing import Listing, Loop, parse
from tempoquant.kernels.launch import Launch

ROOT = Path(__file__).parent.parent.parent
AIR = 1.05
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 FADD R4, R4, R5 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
{}
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   STG.E.64 desc[UR4][R2.64], R4 ;
.L_x_1:
        /*0060*/                   BRA `(.L_x_1) ;
"""


def counted(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Return the records of the command, run where Triton compiles and does not interpret."""
    file = folder / "counted.jsonl"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "benchmarks.machine_code", "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(record["how"] == "counted" and record["commit"] and record["machine"] for record in records)
    return records


def by_kernel(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["kernel"]: record for record in records if "kernel" in record}


def assert_no_more(found: float, counted_then: float) -> None:
    """Assert with five percent of slack; a kernel that got faster than that should change the
    number here.
    """
    assert counted_then / AIR / AIR <= found <= counted_then * AIR


@pytest.mark.timeout(300)
def test_hoppers_kernels_have_no_more_instructions_than_when_they_were_counted(tmp_path: Path) -> None:
    records = counted(tmp_path, "--capability", "90")
    kernels = by_kernel(records)
    four, eight = (kernels[f"quantize: fp8 nvfp4_m1, rank 32, {bits} bits, cc 80"] for bits in (4, 8))
    assert_no_more(four["instructions_a_number"], 35.6)
    assert_no_more(eight["instructions_a_number"], 22.4)
    for each in (four, eight):
        assert each["spilled"] == 0 and each["registers"] <= 128
        assert set(each["loops"][0]["load_bytes"]) == {"16"}
    assert set(four["loops"][0]["store_bytes"]) == {"16"}
    product = kernels["fp8: cc 90, 32760 tokens, rank 32, described"]
    (loop,) = product["loops"]
    assert_no_more(loop["instructions"], 117)
    assert product["spilled"] == 0 and not any(wait.endswith("gsb0, 0x0") for wait in loop["waits"])


@pytest.mark.timeout(300)
def test_on_ada_rounding_to_int4_has_no_more_instructions_than_when_it_was_counted(tmp_path: Path) -> None:
    for bits, counted_then in ((4, 37.1), (8, 28.8)):
        name = f"int8 int4, rank 32, {bits} bits, cc 80"
        (record,) = by_kernel(counted(tmp_path, "--capability", "89", "--only", name)).values()
        assert_no_more(record["instructions_a_number"], counted_then)
        assert record["spilled"] <= (0 if bits == 4 else 48)
        tmp_path.joinpath("counted.jsonl").unlink()


@pytest.mark.timeout(300)
def test_blackwells_product_multiplies_packed_codes_with_their_scales(tmp_path: Path) -> None:
    names = ("fp4: cc 120, nvfp4_m1, 32760", "fp4 nvfp4_m1, rank 32, 4 bits, cc 110")
    kernels = by_kernel(counted(tmp_path, "--capability", "120", "--only", *names))
    rounding, product = (next(each for name, each in kernels.items() if part in name) for part in ("quantize", "32760"))
    assert_no_more(rounding["instructions_a_number"], 31.1)
    (loop,) = product["loops"]
    assert set(loop["tensor"]) == {"OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"} and product["spilled"] == 0
    assert_no_more(loop["instructions"], 179)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_other_generations_too_are_counted_and_faster_than_bf16(tmp_path: Path) -> None:
    records = counted(tmp_path)
    kernels = by_kernel(records)
    (loop, *_) = kernels["fp4: cc 100, nvfp4_m1, 32760 tokens, rank 32"]["loops"]
    assert any(name.startswith("UTCOMMA") for name in loop["tensor"])
    ratios = {(record["capability"], record["way"]): record["ratio_to_bf16"]["expected"]
              for record in records if record.get("video_tokens") == 32_760}  # fmt: skip
    assert ratios[90, "nvfp4_m1, W4A4, fp8 products"] >= 1.35
    assert ratios[89, "int4, W4A4, int8 products"] >= 1.3


def test_a_loop_is_what_a_branch_goes_back_over_and_a_wait_is_none() -> None:
    listing = parse(LISTING.format("\n".join(f"        /*{at:04x}*/   FMUL R{at}, R1, R2 ;" for at in range(24))))
    (loop,) = listing.loops
    assert loop.size == 28 and loop.units["float32"] == 25 and loop.loads == {16: 1} and loop.stores == {}
    assert drains_tensor_cores(loop) and loop.waits == {"WARPGROUP.DEPBAR.LE gsb0, 0x0": 1}
    assert listing.outside == {"MOV": 1, "STG.E.64": 1, "BRA": 1}


def kernel_of(loop: Loop, outside: int, programs: int) -> Counted:
    names = ("FADD",) * (loop.size + outside)

    launch = Launch(None, (1,), {}, {"num_warps": 4})
    return Counted("one", GPUS[90], launch, 32, 0, 0, programs, Listing(names, (loop,)))


def test_waiting_for_idle_tensor_cores_adds_what_is_otherwise_hidden() -> None:
    """A hundred steps of 30 instructions of four warps and 60 cycles of tensor cores; then 10
    instructions.
    """
    step = Counter({"FADD": 29})
    calm, waiting = (Loop(0, 29, step + Counter({name: 1})) for name in ("BRA", "WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    operations = 100 * 60 / GPUS[90].tensor_cycles(1.0, "fp8")
    work = Work(132, (100,), operations, "fp8", 0.0)
    seconds = {
        "beside": times(kernel_of(calm, 10, 1), work).expected,
        "one after the other": times(kernel_of(waiting, 10, 1), work).expected,
        "others fill the gaps": times(kernel_of(waiting, 10, 2), work).expected,
    }
    cycles = {name: round(each * GPUS[90].clock) for name, each in seconds.items()}
    assert cycles == {"beside": 6010, "one after the other": 9010, "others fill the gaps": 6000}
