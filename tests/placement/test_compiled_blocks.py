"""Laws of modes beside compiled blocks: the same video without a graph break, and what cannot be is
refused by name.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline

from tempoquant.errors import UnsupportedError
from tempoquant.placement import memory_modes
from tempoquant.placement.memory_modes import set_memory_mode
from tests.placement.queues import Queues
from tests.quantized_wan import generate, write_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_pipeline(tmp_path_factory.mktemp("q") / "pipeline", "nvfp4_m1")


@pytest.fixture
def pipeline(folder: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    torch.compiler.reset()
    queues = Queues(computes_at_once=True)
    monkeypatch.setattr(memory_modes, "SideStream", lambda _device: queues)
    yield WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    torch.compiler.reset()


def compile_blocks(pipeline: Any) -> None:
    for model in (pipeline.transformer, pipeline.transformer_2):
        model.compile_repeated_blocks(backend="eager", fullgraph=True)


@pytest.mark.parametrize("mode", [pytest.param("resident", marks=pytest.mark.slow), "swap"])
@pytest.mark.parametrize("is_first", [True, False], ids=["compiled first", "mode first"])
def test_compiled_blocks_move_as_others_do(pipeline: Any, mode: Any, is_first: bool) -> None:
    before = generate(pipeline)
    if is_first:
        compile_blocks(pipeline)
    in_force = set_memory_mode(pipeline, mode, "cpu", in_chunks=is_first)
    if not is_first:
        compile_blocks(pipeline)
    assert torch.equal(generate(pipeline), before)
    in_force.remove()
    assert torch.equal(generate(pipeline), before)
    assert all(block._compiled_call_impl is not None for block in pipeline.transformer.blocks)


def test_what_would_move_weights_within_compiled_code_is_refused_by_name(pipeline: Any) -> None:
    set_memory_mode(pipeline, "lean", "cpu")
    with pytest.raises(UnsupportedError, match="lean and compiled blocks do not go together"):
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    with pytest.raises(UnsupportedError, match="lean and compiled blocks do not go together"):
        set_memory_mode(pipeline, "lean", "cpu")
    pipeline.transformer.compile()
    with pytest.raises(UnsupportedError, match="swap and a model compiled as a whole"):
        set_memory_mode(pipeline, "swap", "cpu")
