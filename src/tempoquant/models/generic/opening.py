"""Opening of a pipeline that no family covers, with a report of the assumptions."""

import logging

from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.errors import ModelError
from tempoquant.models.generic.assumptions import Assumptions
from tempoquant.models.generic.family import family_from
from tempoquant.models.generic.observe import observe
from tempoquant.models.generic.static import denoiser_of, lists_of_blocks
from tempoquant.models.hub import fetch, split_revision
from tempoquant.models.pipeline_folder import WHOLE_MODEL, hub_name, local_folder, read_index
from tempoquant.models.source import SourceModel
from tempoquant.models.with_experts import GenericModel

_logger = logging.getLogger(__name__)


def open_generic(model: GenericModel) -> SourceModel:
    """Find a model, run it without its blocks' weights for a few steps, and log the assumptions
    about it.

    Raises:
        ModelError: there is no such model, or the generic family cannot run it; the message says
            why.
    """
    folder = local_folder(model.model)
    hub_id = None if folder is not None else split_revision(hub_name(model.model))[0]
    folder = folder or fetch(hub_name(model.model), WHOLE_MODEL)
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} has no model_index.json: the generic family takes diffusers pipelines.")
    index = read_index(folder)
    component, kind, config = denoiser_of(index)
    before = Assumptions(
        index.class_name,
        kind.__name__,
        component,
        lists_of_blocks(kind, config),
        ModelCall(),
        {},
        (),
        0,
        0,
        ("conditional",),
        (),
        "guidance_scale",
        None,
        (),
        (),
        1,
        1,
        True,
        1,
        {},
        (),
    )
    assumed = observe(SourceModel.of_folder(folder, True, hub_id, "", {}, family_from(before)))
    _logger.warning("The generic family assumes of %s:\n  %s", folder.name, "\n  ".join(assumed.words()))
    return SourceModel.of_folder(folder, True, hub_id, "", {}, family_from(assumed))
