"""Laws of the table of attention backends: what breaks a model is never chosen, what is missing is
named.
"""

import pytest
from diffusers.models import attention_dispatch

from tempoquant.acceleration import attention
from tempoquant.acceleration.attention import (
    BACKENDS,
    DISPATCHED,
    EIGHT_BITS,
    FOUR_BITS,
    SIXTEEN_BITS,
    candidates,
    choose_attention,
    denied,
    install_line,
)
from tempoquant.acceleration.speeds import SPEEDS
from tempoquant.errors import UnsupportedError
from tempoquant.models.wan.family import WAN, WAN_ANIMATE, WAN_VACE

CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.fixture(params=[True, False], ids=["all installed", "none installed"])
def installed(request, monkeypatch) -> bool:
    monkeypatch.setattr(attention, "is_installed", lambda name: request.param or name.startswith(("native", "_native")))
    return request.param


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("speed", SPEEDS)
def test_a_choice_is_never_denied_and_names_each_better_one_that_is_missing(installed, speed, capability):
    chosen = choose_attention(speed, WAN, capability)
    assert chosen.backend in BACKENDS and denied(chosen.backend, WAN, capability) is None and chosen.reason
    assert attention.is_installed(chosen.backend)
    best = candidates(speed, capability)[0].backend
    if installed:
        assert chosen.backend == best and not chosen.missing
    elif not best.lstrip("_").startswith("native"):
        assert chosen.missing[0].startswith(best)


def test_exact_never_has_fewer_than_16_bits():
    for capability in CAPABILITIES:
        assert all("16 bits" in each.why for each in candidates("exact", capability))


def test_the_kernel_that_breaks_wan_is_refused_by_each_of_its_names():
    for family in (WAN, WAN_VACE, WAN_ANIMATE):
        for name in ("_sage_qk_int8_pv_fp8_cuda_sm90", "sage", "sage_hub"):
            with pytest.raises(UnsupportedError, match=f"{name} is refused here: .*confetti.*12783.*_flash_3"):
                choose_attention("fast", family, (9, 0), name)
    assert denied("sage", WAN, (8, 9)) is None


def test_what_is_asked_for_and_not_installed_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", False)
    with pytest.raises(UnsupportedError, match=r"sage is not installed: pip install .*SageAttention"):
        choose_attention("exact", WAN, (8, 9), "sage")


def test_every_backend_in_the_tables_is_diffusers_own_and_can_be_installed():
    tables = (SIXTEEN_BITS, EIGHT_BITS, FOUR_BITS)
    named = {each.backend for table in tables for row in table.values() for each in row}
    named |= {name for row in DISPATCHED.values() for pair in row.items() for name in pair}
    assert named <= set(BACKENDS)
    assert all("documentation" not in install_line(name) for name in named)
    assert "PyPI's 1.0.6 is too old" in install_line("sage") and "kernels" in install_line("sage_hub")
    assert "hopper" in install_line("_flash_3") and "flash-attn" in install_line("flash")
