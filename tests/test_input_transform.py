"""Laws of what is done to an input before it is rounded."""

import pytest
import torch

from tempoquant.input_transform import InputTransform
from tests.random_layers import BINS, by_bin, random, random_layer, random_linear


@pytest.fixture(scope="module")
def transform() -> InputTransform:
    """Make the transform of a layer that has everything, by timestep bin."""
    return by_bin(random_layer(random_linear(), rotated=True)).input_transform


def test_the_transform_of_means_is_the_mean_of_what_is_transformed(transform: InputTransform) -> None:
    x = random(BINS.num_bins, 50, 128).double()
    each = torch.stack([transform.at_bin(number)(inputs).mean(0) for number, inputs in enumerate(x)])
    torch.testing.assert_close(transform.of_means(x.mean(1)), each, rtol=1e-12, atol=1e-12)
    assert not torch.equal(each[0], transform.at_bin(1)(x[0]).mean(0))


def test_the_transform_of_a_bin_shares_memory_and_has_no_other_bins(transform: InputTransform) -> None:
    alone = transform.at_bin(2)
    assert alone.deflation.data_ptr() == transform.deflation[2].data_ptr() and alone.at_bin(0) == alone
    assert torch.equal(alone.input_offset, transform.input_offset[2]) and alone.down is transform.down


def test_a_transform_of_nothing_leaves_the_input_alone() -> None:
    x = random(3, 32)
    assert InputTransform()(x) is x and InputTransform().hidden(x) is None
