"""Laws of what lies between two blocks."""

from pathlib import Path

import pytest
import torch

from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.errors import CalibrationError, OutputError


def states(seed: int) -> list[torch.Tensor]:
    """Return two streams of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 7, 2, generator=generator), torch.randn(7, generator=generator)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("ram_bytes", [0, 100, 2**20])
def test_what_is_read_is_what_was_written_here_and_in_a_later_run(tmp_path: Path, ram_bytes: int) -> None:
    written = HiddenStates(tmp_path / "hidden", ram_bytes)
    for sample in range(3):
        written.write(0, sample, states(sample))
    written.commit(0)
    later = HiddenStates(tmp_path / "hidden", ram_bytes)
    for sample in range(3):
        assert equal(written.read(0, sample), states(sample))
        assert equal(later.read(0, sample), states(sample))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays(tmp_path: Path, dtype: torch.dtype) -> None:
    hidden = HiddenStates(tmp_path, ram_bytes=0)
    hidden.write(0, 0, [each.to(dtype) for each in states(0)])
    hidden.commit(0)
    assert {each.dtype for each in hidden.read(0, 0)} == {dtype}


def test_a_sample_that_is_in_no_file_is_one_sentence(tmp_path: Path) -> None:
    hidden = HiddenStates(tmp_path, ram_bytes=0)
    hidden.write(0, 0, states(0))
    hidden.commit(0)
    with pytest.raises(CalibrationError, match="sample 1 is in none of its files"):
        hidden.read(0, 1)


def test_states_that_were_not_committed_do_not_exist(tmp_path: Path) -> None:
    hidden = HiddenStates(tmp_path / "hidden")
    hidden.write(4, 0, states(0))
    assert not hidden.exist_before(4)
    hidden.commit(4)
    assert hidden.exist_before(4) and not hidden.exist_before(3)


def test_forgetting_leaves_one_boundary(tmp_path: Path) -> None:
    hidden = HiddenStates(tmp_path)
    for block in range(3):
        hidden.write(block, 0, states(block))
        hidden.commit(block)
    hidden.write(3, 0, states(3))  # never committed
    hidden.keep_only(1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["0001"]
    assert equal(hidden.read(1, 0), states(1))


def test_ram_is_not_overdrawn(tmp_path: Path) -> None:
    each = sum(state.nbytes for state in states(0))
    hidden = HiddenStates(tmp_path, ram_bytes=6 * each)
    for block in range(5):  # and every boundary has its half, not every second one all
        for sample in range(10):
            hidden.write(block, sample, states(sample))
        hidden.commit(block)
        in_ram = [boundary for boundary, _ in hidden._in_ram]
        assert in_ram.count(block) == 3 and len(in_ram) <= 6
        hidden.keep_only(block)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    hidden = HiddenStates(tmp_path, ram_bytes=0)
    hidden.write(0, 0, states(0))
    hidden.commit(0)
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CalibrationError, match=r"hidden states in .*0000 cannot be read"):
        hidden.read(0, 0)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    hidden = HiddenStates(tmp_path / "file")
    hidden.write(0, 0, states(0))
    with pytest.raises(OutputError, match="hidden states cannot be written"):
        hidden.commit(0)


@pytest.mark.parametrize("sizes", [[1] * 10, [2**22] * 10, [3, 2**25, 5, 2**24, 7]])
def test_small_states_share_files_and_large_ones_do_not(tmp_path: Path, sizes: list[int]) -> None:
    hidden = HiddenStates(tmp_path, ram_bytes=0)
    for sample, size in enumerate(sizes):
        hidden.write(0, sample, [torch.full((size,), float(sample))])
    hidden.commit(0)
    again = HiddenStates(tmp_path, ram_bytes=0)
    for sample, size in enumerate(sizes):
        assert equal(again.read(0, sample), [torch.full((size,), float(sample))])
    num_files = len(list(tmp_path.rglob("*.safetensors")))
    assert num_files <= 1 + 4 * sum(sizes) / 2**26 and (num_files > 1) == (4 * sum(sizes) > 2**26)
