"""A denoiser with several lists of blocks is predicted from a block of each."""

import pytest

from benchmarks.scale import summary
from benchmarks.scale_shapes import SHAPES


@pytest.mark.parametrize(
    ("name", "seconds", "denoiser_s"),
    [
        ("flux.1-dev", [3.0, 5.0], 1 + 19 * 3 + 38 * 5 + 2),
        ("flux.1-dev", [2.0, 4.0, 4.0, 6.0], 1 + 19 * 3 + 38 * 5 + 2),
        ("z-image", [3.0, 5.0, 7.0], 1 + 2 * 3 + 2 * 5 + 30 * 7 + 2),
        ("qwen-image", [3.0], 1 + 60 * 3 + 2),
    ],
)
def test_a_whole_denoiser_takes_each_list_as_often_as_it_has_blocks(
    name: str, seconds: list[float], denoiser_s: float
) -> None:
    measured = {"start_s": 1.0, "end_s": 2.0, "each_block_s": [{"range": each - 1, "store": 1.0} for each in seconds]}
    assert summary(measured, SHAPES[name])["expert_s"] == denoiser_s


@pytest.mark.parametrize("name", ["flux.1-dev", "qwen-image"])
def test_an_image_of_so_many_tokens_is_one_square_frame(name: str) -> None:
    inputs = SHAPES[name].inputs(0, 500.0, 1024)
    assert inputs["hidden_states"].shape[1] == 1024
    assert float(inputs["timestep"]) == 0.5
    assert inputs.get("img_shapes", [[(1, 32, 32)]]) == [[(1, 32, 32)]]
