"""The effect of the short sums of Hopper's and Ada's FP8 tensor cores on a product's accuracy,
computed on a CPU.

    python -m benchmarks.short_sums

An instruction adds 32 products to the sum so far: all are aligned to the largest of them and cut
after 13 fractional bits (MMA-Sim, arXiv 2511.10909; DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
The sum restarts after a number of products, and the partial sum is added in float32. The bias is
the part of the error along the product itself: the slope of the sums against float64's, less one.
"""

import torch

from tempoquant.formats import NVFP4_M1, ScaleRule, from_codes, quantize_activation, to_codes, weight_scale

NUM_TOKENS = NUM_OUTPUTS = 48
INSTRUCTION, FRACTION_BITS = 32, 13


def short_product(x: torch.Tensor, w: torch.Tensor, summed_apart: int) -> torch.Tensor:
    """Compute x · wᵀ as those tensor cores sum it: (tokens, in) and (out, in) float64 to (tokens,
    out) float64.

    Args:
        summed_apart: products after which the sum is added in float32, a multiple of 32.
    """
    num_inner = x.shape[1]
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    running = torch.zeros_like(total)
    for start in range(0, num_inner, INSTRUCTION):
        end = start + INSTRUCTION
        terms = torch.cat([x[:, None, start:end] * w[None, :, start:end], running[..., None]], dim=-1)
        _, exponent = torch.frexp(terms.abs().amax(-1, keepdim=True))
        unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 1 - FRACTION_BITS)
        running = (torch.trunc(terms / unit) * unit).sum(-1)
        if end % summed_apart == 0 or end >= num_inner:
            total = (total.float() + running.float()).double()
            running.zero_()
    return total


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    print(f"{'in':>6}  {'summed apart':<22}{'relative error':>15}{'bias':>10}{'largest, of the sum of magnitudes':>36}")
    for num_inner in (5120, 13824):
        x = random(NUM_TOKENS, num_inner) * random(num_inner).exp()
        weight = random(NUM_OUTPUTS, num_inner)
        scale = weight_scale(weight, NVFP4_M1, ScaleRule.LEAST_ERROR).effective
        w = from_codes(to_codes(weight, scale, NVFP4_M1), scale, NVFP4_M1).double()
        x = quantize_activation(x, NVFP4_M1, ScaleRule.LEAST_ERROR).double()
        exact, magnitudes = x @ w.T, x.abs() @ w.abs().T
        results = {f"{size} products": short_product(x, w, size) for size in (128, 512)}
        results |= {"never": short_product(x, w, num_inner), "exact, in bfloat16": exact.bfloat16().double()}
        for name, y in results.items():
            error = ((y - exact).norm() / exact.norm()).item()
            bias = ((y * exact).sum() / exact.square().sum() - 1).item()
            largest = ((y - exact).abs() / magnitudes).max().item()
            print(f"{num_inner:>6}  {name:<22}{error:>15.2e}{bias:>10.1e}{largest:>36.1e}")


if __name__ == "__main__":
    main()
