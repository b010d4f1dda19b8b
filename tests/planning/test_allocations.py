"""Laws of counting allocations: what is alive counts once, in full, until it is dropped."""

import torch
from torch.nn import functional

from tempoquant.planning.allocations import peak_bytes

KIB = 1024


def floats(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB // 4, device="meta")


def test_what_is_alive_at_once_counts_and_what_was_dropped_does_not():
    def compute() -> None:
        a = floats(8)
        del a
        b = floats(4)
        c = b + 1  # 8 KiB now
        del b, c
        floats(6)

    assert peak_bytes(compute) == 8 * KIB


def test_views_and_operations_in_place_allocate_nothing():
    def compute() -> None:
        a = floats(4)
        a.view(2, -1).t()[1:].mul_(2)

    assert peak_bytes(compute) == 4 * KIB


def test_inputs_are_not_counted_even_when_their_memory_is_given_away_meanwhile():
    held = [floats(16)]

    def compute() -> None:
        held.pop().add_(1)
        for _ in range(3):
            floats(4)

    assert peak_bytes(compute) == 4 * KIB


def test_a_slice_keeps_its_whole_storage_alive():
    def compute() -> None:
        part = floats(8)[:1]
        floats(4)
        del part

    assert peak_bytes(compute) == 12 * KIB


def test_attention_allocates_its_output_and_no_matrix_of_tokens_by_tokens():
    query = torch.empty(1, 2, 64, 8, device="meta")  # 4 KiB; a matrix of 64 × 64 for two heads would be 32
    peak = peak_bytes(lambda: functional.scaled_dot_product_attention(query, query, query))
    assert peak == 4 * KIB


def test_the_count_is_the_same_with_memory_behind_it():
    def compute(device: str) -> None:
        x = torch.ones(64, 64, device=device)
        y = functional.gelu(x @ x.t()).float() + 1
        y.softmax(-1)

    assert peak_bytes(lambda: compute("cpu")) == peak_bytes(lambda: compute("meta")) > 0
