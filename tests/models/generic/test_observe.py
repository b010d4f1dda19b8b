"""The generic family's observations of a model with a family agree with that family; some models
are refused.
"""

import json
from pathlib import Path

import pytest

from tempoquant.errors import ModelError
from tempoquant.models.generic.opening import open_generic
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import WAN
from tempoquant.models.with_experts import GenericModel
from tests import ltx2_pipelines, wan_pipelines


@pytest.mark.parametrize("name", ["wan21_t2v", "wan22_ti2v"])
def test_a_known_model_is_observed_as_its_family_says(tmp_path: Path, name: str) -> None:
    observed = open_generic(GenericModel(wan_pipelines.write(tmp_path / "source", name))).family
    assert observed.block_lists == WAN.block_lists
    assert observed.guidance == WAN.guidance
    assert (observed.call.timestep_argument, observed.call.timestep_scale) == ("timestep", 1.0)
    shared = {frozenset(group) for group in observed.call.shared_inputs}
    assert shared == {frozenset(group) for group in WAN.shared_inputs if "attn2.add_k_proj" not in group}
    assert observed.text_linears == {"attn2.to_k", "attn2.to_v"}
    assert observed.text_inputs == WAN.text_inputs
    assert observed.kept_in_16_bits == observed.modulation == frozenset()


def test_a_pipeline_with_two_denoisers_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = wan_pipelines.write(tmp_path / "source", "wan22_t2v")
    with pytest.raises(ModelError, match=r"one denoiser called transformer, and .* has transformer and transformer_2"):
        open_generic(GenericModel(folder))


def test_a_pipeline_that_wants_an_image_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = wan_pipelines.write(tmp_path / "source", "wan21_i2v")
    with pytest.raises(ModelError, match="cannot run a WanImageToVideoPipeline with a prompt alone"):
        open_generic(GenericModel(folder))


def test_a_pipeline_with_guidance_of_its_own_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = ltx2_pipelines.write(tmp_path / "source", "ltx2")
    with pytest.raises(ModelError, match="calls its denoiser 3 times a step with 2 rows"):
        open_generic(GenericModel(folder))


def test_damaged_assumptions_are_refused(tmp_path: Path) -> None:
    folder = wan_pipelines.write(tmp_path / "source", "wan21_t2v")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_generic_family": {"pipeline": "x"}}))
    with pytest.raises(ModelError, match="lacks the generic family's assumptions"):
        SourceModel.open(folder)
