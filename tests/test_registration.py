"""Laws of registering: plain diffusers knows our configs, whichever of the two is imported
first.
"""

import subprocess
import sys

import pytest
from diffusers.quantizers import auto

from tempoquant.errors import CheckpointError
from tempoquant.hosts.diffusers.loader import TempoQuantConfig, TempoQuantQuantizer
from tempoquant.registration import DeferredConfig, register_on_import

FIRST_TEMPOQUANT = """
import sys
import tempoquant
assert "diffusers" not in sys.modules and "torch" not in sys.modules
from diffusers.quantizers import auto
print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING["tempoquant"].__name__)
"""


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, "tempoquant", raising=False)


def test_diffusers_imported_later_knows_our_configs() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_TEMPOQUANT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == DeferredConfig.__name__


@pytest.mark.usefixtures("unregistered")
def test_the_first_config_that_is_read_brings_the_loader_and_its_errors() -> None:
    register_on_import()  # diffusers is there already
    with pytest.raises(CheckpointError, match=r"quantization_config in config\.json"):
        auto.DiffusersAutoQuantizer.from_config({"quant_method": "tempoquant"})
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["tempoquant"] is TempoQuantConfig
    assert auto.AUTO_QUANTIZER_MAPPING["tempoquant"] is TempoQuantQuantizer


def test_registering_again_does_not_take_the_loader_away() -> None:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["tempoquant"] = TempoQuantConfig
    register_on_import()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["tempoquant"] is TempoQuantConfig
