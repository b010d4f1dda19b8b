"""Laws of computing in chunks of tokens: the same numbers, whatever the chunks, and nothing left
behind.
"""

import weakref

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import nn

from tempoquant.errors import UnsupportedError
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.models.hooks import unobtrusive
from tempoquant.models.wan import chunked_blocks
from tempoquant.models.wan.chunked_blocks import chunk_blocks
from tempoquant.planning.allocations import peak_bytes
from tempoquant.runtime.convert import install_layers
from tempoquant.runtime.shared_input import SharedInput
from tests.quantized_wan import BINS, inputs, quantize_all, run, tiny_wan

FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}  # products of other heights may sum in another order


def quantized(model: nn.Module) -> nn.Module:
    layers = quantize_all(model, "mixed", centred_by_bin=True, deflated_by_bin=True)
    install_layers(model, layers, BINS, torch.float32)
    return model


@pytest.mark.parametrize("num_tokens", [1, 7, 16, 32, 100])  # of 32
@pytest.mark.parametrize("prepare", [lambda model: model, quantized], ids=["16-bit", "quantized"])
def test_chunks_change_nothing(prepare, num_tokens):
    model = prepare(tiny_wan(dtype=torch.float32))
    before = run(model, torch.float32, batch=2)
    undo = chunk_blocks(model, num_tokens)
    chunked = run(model, torch.float32, batch=2)
    if prepare is quantized:  # a last bit may tip a code over to the next level: a few of them, no more
        assert (chunked - before).norm() < 0.02 * before.norm()
    else:
        torch.testing.assert_close(chunked, before, **FLOAT32)
    undo()
    assert torch.equal(run(model, torch.float32, batch=2), before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_in_one_chunk_the_numbers_are_the_same_to_the_last_bit_in_bfloat16():
    model = tiny_wan()
    before = run(model)
    chunk_blocks(model, 32)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize(("backend", "per_block"), [("_native_math", (5, 5)), ("sage", (1, 1))])
def test_kernels_that_quantize_keys_and_values_do_so_once_a_block(monkeypatch, backend, per_block):
    """Self-attention's and the text's: SageAttention quantizes both within each call."""
    calls = []
    own = chunked_blocks.dispatch_attention_fn

    def attend(query, key, value, backend):
        assert query.shape[1] == (32 if backend == "sage" else query.shape[1])
        calls.append(key.shape[1])
        return own(query, key, value, backend=None)  # SageAttention needs a GPU

    monkeypatch.setattr(chunked_blocks, "dispatch_attention_fn", attend)
    model = tiny_wan(dtype=torch.float32)
    before = run(model, torch.float32)
    chunk_blocks(model, 7)
    for block in model.blocks:
        block.attn1.processor._attention_backend = block.attn2.processor._attention_backend = backend
    torch.testing.assert_close(run(model, torch.float32), before, **FLOAT32)
    assert (calls.count(32), calls.count(5)) == tuple(len(model.blocks) * each for each in per_block)


def test_a_hook_that_keeps_a_blocks_tensors_finds_them_as_they_were():
    model = tiny_wan(dtype=torch.float32)
    kept = []

    def keep() -> None:
        for block in model.blocks:
            block.register_forward_hook(lambda _, args, output: kept.extend([args[0], output]))

    keep()
    run(model, torch.float32)
    before = [tensor.clone() for tensor in kept]
    kept.clear()
    chunk_blocks(model, 7)
    run(model, torch.float32)
    for after, expected in zip(kept, before, strict=True):
        torch.testing.assert_close(after, expected, **FLOAT32)


def test_a_hook_inside_a_block_finds_what_it_always_finds():
    model = tiny_wan(dtype=torch.float32)
    kept = []
    for name in ("attn1", "norm3", "ffn"):
        getattr(model.blocks[1], name).register_forward_hook(lambda _module, _args, output: kept.append(output))
    run(model, torch.float32)
    chunk_blocks(model, 7)
    run(model, torch.float32)
    for expected, after in zip(kept[:3], kept[3:], strict=True):
        torch.testing.assert_close(after, expected, **FLOAT32)


def test_a_cache_of_activations_finds_a_blocks_input_as_it_was():
    """diffusers' first-block cache adds what later blocks changed the last time: their output less
    their input.
    """

    plain, model = (tiny_wan(num_layers=3, dtype=torch.float32) for _ in range(2))
    undo = chunk_blocks(model, 7)
    for each in (plain, model):
        each.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    with pytest.raises(UnsupportedError, match="set the memory mode first"):
        chunk_blocks(plain)

    def second_call(model: nn.Module) -> torch.Tensor:
        with model.cache_context("cond"):
            run(model, torch.float32)
            second = run(model, torch.float32, seed=2)
        model._reset_stateful_cache()
        return second

    expected = second_call(plain)
    torch.testing.assert_close(second_call(model), expected, **FLOAT32)
    undo()
    assert torch.equal(second_call(model), expected)


def test_queries_keys_and_values_of_a_chunk_share_one_input_and_none_is_kept(monkeypatch):
    model = tiny_wan(dtype=torch.float32)
    attention, shared, seen = model.blocks[0].attn1, SharedInput(3), []
    linears, forward = (attention.to_q, attention.to_k, attention.to_v), nn.Linear.forward

    def quantize(x: torch.Tensor) -> tuple[QuantizedInput]:
        seen.append(weakref.ref(x))
        return (QuantizedInput(x, None, None, None),)

    def sharing(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if any(linear is each for each in linears):
            shared.quantized(x, quantize)
        return forward(linear, x)

    monkeypatch.setattr(nn.Linear, "forward", sharing)
    chunk_blocks(model, 16)
    run(model, torch.float32)
    assert len(seen) == 2, "chunks"
    assert [each() for each in seen] == [None, None]


def test_chunks_take_half_the_memory_of_a_long_video():
    def peak(model: nn.Module) -> int:
        long = inputs(dtype=torch.bfloat16)
        long = {key: torch.empty_like(value, device="meta") for key, value in long.items() if key != "return_dict"}
        long["hidden_states"] = torch.empty(1, 36, 8, 64, 64, device="meta", dtype=torch.bfloat16)
        return peak_bytes(lambda: model(**long, return_dict=False))

    model = tiny_wan().to("meta")
    for name in ("freqs_cos", "freqs_sin"):
        setattr(model.rope, name, getattr(model.rope, name).to("meta"))
    before = peak(model)
    handle = model.blocks[0].register_forward_pre_hook(unobtrusive(lambda *_: None))
    chunk_blocks(model, 256)
    assert peak(model) < 0.5 * before
    handle.remove()


def test_gradients_and_timesteps_per_token_take_the_usual_way():
    model = tiny_wan(dtype=torch.float32)
    chunk_blocks(model, 7)
    arguments = inputs(dtype=torch.float32)
    arguments["hidden_states"].requires_grad_()
    model(**arguments)[0].sum().backward()
    assert arguments["hidden_states"].grad is not None


def test_another_diffusers_is_refused(monkeypatch):
    chunked_blocks._check_same_results.cache_clear()
    original = chunked_blocks.WanTransformerBlock.forward
    monkeypatch.setattr(chunked_blocks.WanTransformerBlock, "forward", lambda *args: 1.01 * original(*args))
    model = tiny_wan()
    with pytest.raises(UnsupportedError, match="in a way that TempoQuant does not know"):
        chunk_blocks(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    chunked_blocks._check_same_results.cache_clear()
