"""Codes to bytes and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.formats import FORMATS, INT4, MXFP4, NVFP4, Format, pack, unpack

ALL_PAIRS = torch.cartesian_prod(*[torch.arange(-7, 8, dtype=torch.int8)] * 2)
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


@each_format
def test_every_pair_of_codes_survives_packing(format: Format):
    packed = pack(ALL_PAIRS, format)
    assert packed.dtype == torch.uint8 and packed.shape == (225, 1)
    assert torch.equal(unpack(packed, format), ALL_PAIRS)
    assert len(set(packed.flatten().tolist())) == 225


@each_format
@given(rows=st.integers(0, 5), pairs=st.integers(0, 9), seed=st.integers(0, 99))
def test_unpack_inverts_pack_for_every_shape(format: Format, rows: int, pairs: int, seed: int):
    codes = torch.randint(-7, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(unpack(pack(codes, format), format), codes)


@each_format
def test_the_even_feature_is_the_low_nibble_and_rows_keep_their_order(format: Format):
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]], dtype=torch.int8)
    assert pack(codes, format).tolist() == [[0x21, 0x43], [0x65, 0x07]]


@pytest.mark.parametrize("format", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])
def test_e2m1_nibbles_are_sign_exponent_and_mantissa(format: Format):
    codes = torch.arange(-7, 8, dtype=torch.int8)
    for code in codes.tolist():
        nibble = int(pack(torch.tensor([[code, 0]], dtype=torch.int8), format)[0, 0])
        assert nibble == (8 if code < 0 else 0) + abs(code)


def test_int4_nibbles_are_twos_complement():
    for code in range(-7, 8):
        assert int(pack(torch.tensor([[code, 0]], dtype=torch.int8), INT4)[0, 0]) == code % 16


def test_nibble_eight_is_never_written_and_reads_as_minus_zero_or_minus_eight():
    for format, code in ((MXFP4, 0), (NVFP4, 0), (INT4, -8)):
        nibbles = pack(ALL_PAIRS, format)
        assert not bool(((nibbles & 15 == 8) | (nibbles >> 4 == 8)).any())
        assert unpack(torch.tensor([[0x88]], dtype=torch.uint8), format).tolist() == [[code, code]]
