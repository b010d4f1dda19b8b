"""Laws of the model of 8-bit attention: what it may not change, where it is exact, and that nothing
else changes.
"""

import pytest
import torch
from torch.nn import functional

from tempoquant.evaluate.eight_bit_attention import VALUE_DTYPES, eight_bit_attention, watching_attention
from tempoquant.sqnr import sqnr_db
from tests.quantized_wan import inputs, tiny_wan


def draws(num_tokens: int = 150, num_features: int = 32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, num_tokens, num_features, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("values_in", VALUE_DTYPES)
def test_a_mean_that_all_keys_share_changes_no_bit(values_in):
    """Keys and a mean that float32 holds exactly, as the sum of 128 sixteenths."""
    query, key, value = draws(num_tokens=128)
    key = (16 * key).round() / 16
    shifted = key + torch.arange(32.0) * 8 - 100
    plain = eight_bit_attention(query, key, value, values_in=values_in)
    assert torch.equal(eight_bit_attention(query, shifted, value, values_in=values_in), plain)


@pytest.mark.parametrize(("values_in", "least"), [("fp16", 35.0), ("fp8", 25.0)])
def test_it_is_near_exact_attention_and_fp8_values_are_further_off(values_in, least):
    query, key, value = draws()
    exact = functional.scaled_dot_product_attention(query, key, value)
    found = {name: sqnr_db(exact, eight_bit_attention(query, key, value, values_in=name)) for name in VALUE_DTYPES}
    assert least < found[values_in] < 70
    assert found["fp8"] < found["fp16"] - 3


def test_equal_keys_give_the_mean_of_values_that_fp16_holds():
    query, _, _ = draws()
    value = torch.randint(-8, 9, (1, 2, 150, 32), generator=torch.Generator().manual_seed(1)).float()
    key = torch.ones(1, 2, 150, 32)
    found = eight_bit_attention(query, key, value)
    torch.testing.assert_close(found, value.mean(dim=-2, keepdim=True).expand_as(found), rtol=1e-6, atol=1e-6)


def test_a_block_of_queries_does_not_depend_on_the_others():
    query, key, value = draws(num_tokens=300)
    whole = eight_bit_attention(query, key, value)
    torch.testing.assert_close(eight_bit_attention(query[..., 128:256, :], key, value), whole[..., 128:256, :])


def test_a_watched_model_computes_what_it_computes_alone():
    model = tiny_wan(dtype=torch.float32)
    seen: dict[str, float] = {}
    with torch.no_grad():
        before = model(**inputs(dtype=torch.float32))[0]
        with watching_attention(model, lambda name, wanted, found: seen.update({name: sqnr_db(wanted, found)})):
            assert torch.equal(model(**inputs(dtype=torch.float32))[0], before)
        assert torch.equal(model(**inputs(dtype=torch.float32))[0], before)
    kinds = [f"blocks.{i}.attn{j}.int8_{values}" for i in (0, 1) for j in (1, 2) for values in VALUE_DTYPES]
    assert sorted(seen) == sorted(kinds)
    assert all(20 < found < 100 for found in seen.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_is_what_sageattentions_triton_kernel_computes_up_to_its_fp16_sums():
    pytest.importorskip("sageattention", reason="PyPI's 1.0.6: pip install --no-deps sageattention")
    from benchmarks.attention_numerics import row

    found = row(2, 128, 64)
    assert found["kernel_against_model_db"] > found["model_db"] + 6
