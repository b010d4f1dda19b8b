"""export --to comfyui: a quantized pipeline becomes one file for each denoiser, for ComfyUI's
models folder.

Tensors stay as they are, under ComfyUI's names. One tensor at a time is in memory, and OUTPUT is
complete or absent. After an interruption, finished files are kept in OUTPUT.unfinished, and the
same call resumes there.
"""

from pathlib import Path

from tempoquant.checkpoint.one_file import OneFileWriter
from tempoquant.checkpoint.writer import library_version
from tempoquant.hosts.comfyui.exported_file import metadata_of
from tempoquant.hosts.comfyui.names import comfy_tensor
from tempoquant.hosts.comfyui.stored import StoredDenoiser, open_denoisers
from tempoquant.hosts.model_card import comfyui_card
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.source import SourceModel
from tempoquant.output.output_folder import ExportIdentity, OutputFolder
from tempoquant.progress import SILENT, Progress

TARGET = "comfyui"


def export(folder: str | Path, output: str | Path, *, overwrite: bool = False, progress: Progress = SILENT) -> Path:
    """Write a file for each denoiser, named after it, with everything that ComfyUI needs of the
    pipeline's denoisers.

    Args:
        folder: that `quantize` wrote.
        output: a folder that does not exist or is empty. A finished export of the same folder is
            left unchanged.
        overwrite: replace the content of `output`.
        progress: shows how far the job is.

    Returns:
        The output folder.

    Raises:
        ModelError: ComfyUI cannot run the model, or it is not quantized; nothing is written then.
        TempoQuantError: see tempoquant.errors.
    """
    source = SourceModel.open(folder)
    stored = open_denoisers(source.folder)
    target = OutputFolder(
        Path(output), ExportIdentity(TARGET, fingerprint(source, progress), library_version(), True), overwrite
    )
    target.refuse_overlap(source.folder)
    unfinished = target.work
    if target.is_finished():
        unfinished.tidy()
        return target.path
    with unfinished.owned(overwrite) as work:
        for denoiser in stored:
            place = target.component(work, f"{denoiser.name}.safetensors")
            if not place.is_file():
                place.parent.mkdir(exist_ok=True)
                _write(denoiser, place, work / f"{place.name}.partial", progress)
        target.complete_alone(work, comfyui_card(source, stored[0].header.quantization))
        unfinished.remove()
    return target.path


def _write(denoiser: StoredDenoiser, place: Path, partial: Path, progress: Progress) -> None:
    """Write one denoiser to `partial`, then move it to its place."""
    names = {name: comfy_tensor(name, denoiser.family) for name in denoiser.places}
    forms = {names[name]: form for name, (_, _, form) in denoiser.places.items()}
    advance = progress.start(f"Exporting {denoiser.name}", len(names))
    with OneFileWriter(partial, forms, metadata_of(denoiser.header)) as writer:
        for name, tensor in denoiser.tensors():
            writer.add(names[name], tensor)
            advance()
    partial.rename(place)
