"""The time of one transformer block of Wan2.2's 14B denoiser on this machine, stage by stage,
beside its floor.

    python -m benchmarks.methods_time                       # the three real shapes, MXFP4, rank 16
    python -m benchmarks.methods_time --rank 32 --json      # one JSON line

Weights are random with planted outlier channels, inputs random and correlated. The floor of a stage
is its number of operations at the rate of this machine's large float32 products. Every result is
checked before it is timed: GPTQ's error on held-out inputs must be below rounding's, and the branch
close to the best of its rank.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from tempoquant.formats import (
    Format,
    ScaleRule,
    from_codes,
    get_format,
    pack,
    quantize_activation,
    weight_scale,
)
from tempoquant.methods import (
    HessianAccumulator,
    clip_errors,
    feedback_matrix,
    gptq,
    round_to_nearest,
    smoothing_factor,
    svdquant,
)
from tempoquant.methods.products import product

RULE = ScaleRule.CEIL
BINS, TOKENS_PER_BIN = 3, 256
CANDIDATES = tuple(clip_ratio * 2.0**offset for clip_ratio in (0.6, 0.7, 0.8, 0.9, 1.0) for offset in (-1, 0, 1))
BRANCH_PASSES, BRANCH_OVERSAMPLING = 18, 32  # of the randomized SVD: products with the whole weight, and their width


class Shape(NamedTuple):
    """Linears of one size in a block, and how many different inputs they read between them."""

    name: str
    out_features: int
    in_features: int
    num_linears: int
    num_inputs: int


SHAPES = (
    Shape("attention", 5120, 5120, 8, 5),
    Shape("ffn up", 13824, 5120, 1, 1),
    Shape("ffn down", 5120, 13824, 1, 1),
)


class Stage(NamedTuple):
    """One stage's time.

    Attributes:
        seconds: best of the repeats.
        flops: the least operations.
        repeats_in_block: how often a block does it.
    """

    name: str
    seconds: float
    flops: float
    repeats_in_block: int


class Problem(NamedTuple):
    """weight: (out, in). x, held_out: (tokens, in), raw inputs. All float32."""

    weight: torch.Tensor
    x: torch.Tensor
    held_out: torch.Tensor


def make_problem(shape: Shape, num_tokens: int, seed: int = 0) -> Problem:
    """Make outliers in one of 200 weight columns and one of 100 input channels; features depend on
    64 hidden ones.
    """
    generator = torch.Generator().manual_seed(seed)
    size = shape.in_features
    weight = torch.randn(shape.out_features, size, generator=generator) * 0.02
    weight[:, torch.randperm(size, generator=generator)[: size // 200]] *= 8
    mixing = torch.randn(64, size, generator=generator) / 8
    channel = torch.ones(size)
    channel[torch.randperm(size, generator=generator)[: size // 100]] = 30

    def inputs(count: int) -> torch.Tensor:
        hidden = torch.randn(count, 64, generator=generator) @ mixing
        return (hidden + 0.5 * torch.randn(count, size, generator=generator)).mul_(channel)

    return Problem(weight, inputs(num_tokens), inputs(512))


def timed(repeats: int, work: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]] = tuple) -> tuple[float, Any]:
    """Return (best seconds, last result) of work(*prepare()); preparing is not timed."""
    best, result = float("inf"), None
    for _ in range(repeats):
        arguments, result = prepare(), None
        start = time.perf_counter()
        result = work(*arguments)
        best = min(best, time.perf_counter() - start)
        del arguments
    return best, result


def measure(shape: Shape, format: Format, rank: int, num_tokens: int, repeats: int) -> list[Stage]:
    """Measure every stage of one shape, checked."""
    weight, x, held_out = make_problem(shape, num_tokens)
    size, out = shape.in_features, shape.out_features

    def decompose() -> tuple[Any, ...]:
        factor = smoothing_factor(x.abs().amax(0), weight.abs().amax(0), 0.5)
        branch, residual = svdquant(weight, factor, rank)
        return factor.float(), branch, residual, weight_scale(residual, format, RULE)

    def gather() -> HessianAccumulator:
        running = HessianAccumulator(size)
        for rows in x.split(4096):
            running.add(quantize_activation(rows / factor, format, RULE))
        return running

    branch_time, (factor, _, residual, scale) = timed(repeats, decompose)
    check_branch(weight * factor, residual, rank)
    hessian_time, running = timed(repeats, gather)
    factor_time, feedback = timed(repeats, lambda matrix: feedback_matrix(matrix, 0.01), lambda: (running.hessian,))
    gptq_time, codes = timed(repeats, lambda: gptq(residual, feedback, scale, format))
    check_rounding(residual, codes, scale, quantize_activation(held_out / factor, format, RULE), format)
    pack_time, _ = timed(repeats, lambda: pack(codes, format))
    rounded = from_codes(codes, scale.effective, format)
    tokens = (x / factor)[: BINS * TOKENS_PER_BIN].split(TOKENS_PER_BIN)
    clip_time, _ = timed(repeats, lambda: [clip_errors(part, rounded, format, RULE, CANDIDATES) for part in tokens])
    searched = BINS * TOKENS_PER_BIN * len(CANDIDATES)
    branch_flops = 2.0 * BRANCH_PASSES * out * size * (rank + BRANCH_OVERSAMPLING)
    return [
        Stage("smoothing, branch, scales", branch_time, branch_flops, shape.num_linears),
        Stage(f"Hessian, {num_tokens} tokens", hessian_time, float(num_tokens) * size**2, shape.num_inputs),
        Stage("factorization", factor_time, size**3 / 3, shape.num_inputs),
        Stage("GPTQ", gptq_time, float(out) * size**2, shape.num_linears),
        Stage("packing", pack_time, 0.0, shape.num_linears),
        Stage(f"clip search, {searched} rows", clip_time, 2.0 * searched * out * size, shape.num_linears),
    ]


def check_branch(smoothed: torch.Tensor, residual: torch.Tensor, rank: int) -> None:
    """Check that the branch's error is within 0.2 % of that of a wider and longer subspace
    iteration.
    """
    reference = torch.svd_lowrank(smoothed, q=rank + 64, niter=16)[1][:rank]
    least = smoothed.double().square().sum() - reference.double().square().sum()
    found = residual.double().square().sum()
    if found > 1.002 * least:
        raise SystemExit(f"the branch leaves {float(found / least - 1):.2%} more than it must, so no time is reported.")


def check_rounding(
    residual: torch.Tensor, codes: torch.Tensor, scale: Any, held_out: torch.Tensor, format: Format
) -> None:
    """Check that GPTQ makes a smaller error than rounding to nearest on unseen inputs."""
    by_gptq, by_rounding = (
        float(product(held_out, residual - from_codes(c, scale.effective, format)).square().sum())
        for c in (codes, round_to_nearest(residual, scale, format))
    )
    if by_gptq >= by_rounding:
        raise SystemExit(
            f"GPTQ's error is {by_gptq / by_rounding:.2f} of the error of rounding, so no time is reported."
        )


def product_rates(repeats: int) -> dict[str, float]:
    """Return GFLOP/s of a 4096 × 5120 × 5120 product in float32: PyTorch's own BLAS, and `product`,
    which the floors use.
    """
    left, right = torch.randn(4096, 5120), torch.randn(5120, 5120)
    work = {"blas": lambda: left @ right.T, "product": lambda: product(left, right)}
    return {name: 2 * 4096 * 5120**2 / 1e9 / timed(repeats + 3, run)[0] for name, run in work.items()}


def processor() -> str:
    """Return the processor's name from /proc/cpuinfo, elsewhere from Python."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def summarize(measured: dict[Shape, list[Stage]], rate: float) -> dict[str, Any]:
    """Compute seconds and floors of every stage, of a whole block, and of the part that does not
    depend on tokens.
    """
    rows, totals = [], {"block": [0.0, 0.0], "block without Hessian and clip search": [0.0, 0.0]}
    for shape, stages in measured.items():
        for stage in stages:
            floor = stage.flops / 1e9 / rate
            rows.append(
                {
                    "shape": shape.name,
                    "stage": stage.name,
                    "seconds": stage.seconds,
                    "floor_seconds": floor,
                    "repeats_in_block": stage.repeats_in_block,
                }
            )
            depends_on_tokens = stage.name.startswith(("Hessian", "clip"))
            for name, total in totals.items():
                if name == "block" or not depends_on_tokens:
                    total[0] += stage.seconds * stage.repeats_in_block
                    total[1] += floor * stage.repeats_in_block
    return {"stages": rows, "totals": {n: {"seconds": s, "floor_seconds": f} for n, (s, f) in totals.items()}}


def print_table(summary: dict[str, Any], title: str) -> None:
    table = Table(title=title)
    for heading in ("", "stage", "s", "floor, s", "ratio", "times", "s in a block"):
        table.add_column(heading, justify="left" if heading in ("", "stage") else "right")
    for row in summary["stages"]:
        seconds, floor = row["seconds"], row["floor_seconds"]
        ratio = f"{seconds / floor:.1f}" if floor else "–"
        in_block = f"{seconds * row['repeats_in_block']:.1f}"
        cells = (f"{seconds:.2f}", f"{floor:.2f}", ratio, str(row["repeats_in_block"]), in_block)
        table.add_row(row["shape"], row["stage"], *cells)
    table.add_section()
    for name, total in summary["totals"].items():
        seconds, floor = total["seconds"], total["floor_seconds"]
        table.add_row(name, "", "", f"{floor:.1f}", f"{seconds / floor:.1f}", "", f"{seconds:.1f}")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="mxfp4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096, help="of each Hessian")
    parser.add_argument("--repeats", type=int, default=2, help="the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON line in place of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rates = product_rates(arguments.repeats)
    measured = {
        shape: measure(shape, get_format(arguments.format), arguments.rank, arguments.tokens, arguments.repeats)
        for shape in SHAPES
    }
    summary = summarize(measured, rates["product"])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if not arguments.json:
        speed = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        print_table(summary, f"One block of the 14B denoiser, {arguments.format}, rank {arguments.rank}. {machine}")
        print(f"float32 products, GFLOP/s: {speed}; commit {commit}")
    print(
        json.dumps(
            {
                "benchmark": "methods_time",
                **vars(arguments),
                "commit": commit,
                "machine": machine,
                "gflop_per_second": rates,
                **summary,
            }
        )
    )


if __name__ == "__main__":
    main()
