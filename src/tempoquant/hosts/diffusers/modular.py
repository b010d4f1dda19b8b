"""Modular pipelines, which are made of blocks: loading from a folder, and runs without some of
their blocks.
"""

from collections.abc import Mapping
from typing import Any

from diffusers.modular_pipelines import ModularPipeline
from diffusers.modular_pipelines.modular_pipeline_utils import InsertableDict

from tempoquant.errors import ModelError
from tempoquant.models.source import SourceModel

_DECODING, _ENCODING = "decode", "text_encoder"
_EMBEDDING = "prompt_embeds"


class Interrupted(BaseException):
    """Ends a generation early. It is no Exception, since diffusers would log an error of the block
    that raised it.
    """


def is_modular(pipeline: Any) -> bool:
    """Return whether a pipeline is made of blocks."""
    return isinstance(pipeline, ModularPipeline)


def put_together(source: SourceModel, kind: Any, components: Mapping[str, Any]) -> Any:
    """Return a modular pipeline of loaded components; None leaves one out.

    Raises:
        ModelError: its index describes no pipeline of its class, or it needs a component that the
            folder lacks.
    """
    try:
        pipeline = kind.from_pretrained(str(source.folder), local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"{source.folder} does not load as a {kind.__name__}: {error}") from error
    wanted = {*pipeline.pretrained_component_names} - source.family.unused_components
    if missing := sorted(wanted - components.keys()):
        raise ModelError(
            f"{source.folder} has no folder {missing[0]}, which a {kind.__name__} needs: fetch the model again."
        )
    pipeline.update_components(**{name: each for name, each in components.items() if each is not None})
    return pipeline


def run(pipeline: Any, arguments: Mapping[str, Any], output_type: str) -> Any:
    """Run a modular pipeline: return the videos, or for the `output_type` "latent" the latents,
    without decoding.

    Texts given as embeddings are not encoded. The pipeline gets the arguments that its blocks take.
    The result is None if `Interrupted` ended it.
    """
    is_latent = output_type == "latent"
    left_out = ({_DECODING} if is_latent else set()) | ({_ENCODING} if _EMBEDDING in arguments else set())
    blocks = pipeline._blocks
    own = blocks.sub_blocks
    blocks.sub_blocks = InsertableDict((name, block) for name, block in own.items() if name not in left_out)
    try:
        taken = {name: value for name, value in arguments.items() if name in blocks.input_names}
        if not is_latent:
            taken["output_type"] = output_type
        return pipeline(**taken, output="latents" if is_latent else "videos")
    except Interrupted:
        return None
    finally:
        blocks.sub_blocks = own
