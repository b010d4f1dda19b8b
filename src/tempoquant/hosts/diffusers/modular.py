"""Modular pipelines, which are made of blocks: loaded from a folder, and run with some of their blocks left out."""

from collections.abc import Mapping
from typing import Any

from diffusers.modular_pipelines import ModularPipeline
from diffusers.modular_pipelines.modular_pipeline_utils import InsertableDict

from tempoquant.errors import ModelError
from tempoquant.models.source import SourceModel

_DECODING, _ENCODING = "decode", "text_encoder"
_EMBEDDING = "prompt_embeds"


class Interrupted(BaseException):
    """Ends a generation early. No Exception, for which diffusers would log an error of the block that it came from."""


def is_modular(pipeline: Any) -> bool:
    """Whether a pipeline is made of blocks."""
    return isinstance(pipeline, ModularPipeline)


def put_together(source: SourceModel, kind: Any, components: Mapping[str, Any]) -> Any:
    """Return a modular pipeline of components that are loaded, or left out as None.

    Raises:
        ModelError: its index describes no pipeline of its class, or it wants a component that the folder has not.
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
    """Run a modular pipeline: the videos, or the latents of an `output_type` "latent", for which nothing is decoded.

    Texts that come as embeddings are not encoded. Of the arguments those are given that its blocks take. None where
    `Interrupted` ended it.
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
