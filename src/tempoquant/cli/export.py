"""`tempoquant export`: a quantized pipeline in another engine's files."""

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from tempoquant.cli.json_log import JsonLogFile
from tempoquant.cli.options import Folder, Json, Overwrite
from tempoquant.cli.running import GOES_ON, Outcome, run_command
from tempoquant.errors import UnsupportedError
from tempoquant.progress import Progress


class Target(str, Enum):
    """The engine whose files are written."""

    NUNCHAKU_LITE = "nunchaku-lite"
    COMFYUI = "comfyui"
    COMFYUI_NVFP4 = "comfyui-nvfp4"


class _Request(NamedTuple):
    """The requested export, without the target."""

    folder: str
    output: Path
    overwrite: bool
    link: bool


def command(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write; new, or empty.")],
    target: Annotated[
        Target,
        typer.Option("--to", help="diffusers' nunchaku_lite, TempoQuant's nodes in ComfyUI, or ComfyUI's own nvfp4."),
    ],
    overwrite: Overwrite = False,
    link: Annotated[
        bool, typer.Option("--link", help="Link the unquantized components instead of copying them (nunchaku-lite).")
    ] = False,
    json_log: JsonLogFile = None,
    as_json: Json = False,
) -> None:
    """Write all denoisers for another engine.

    --to nunchaku-lite writes a pipeline for stock diffusers, with nunchaku's fused kernels on
    NVIDIA GPUs. DIR must come from `quantize --recipe nunchaku_int4` or `nunchaku_nvfp4`. `compare`
    scores OUT with the kernels' rounding.

    --to comfyui writes a file for each denoiser, of any recipe and with all its features, for
    TempoQuant's nodes in ComfyUI.

    --to comfyui-nvfp4 writes a model file and a branch file for each denoiser, which ComfyUI loads
    without a node pack. DIR must come from `quantize --recipe comfyui_nvfp4`.

    Layers that the target cannot hold are refused by name. Only comfyui carries clip ratios.
    """
    request = _Request(folder, output, overwrite, link)
    run_command(lambda progress: _TARGETS[target](request, progress), as_json, json_log, interrupted=GOES_ON)


def _to_nunchaku_lite(request: _Request, progress: Progress) -> Outcome:
    from rich.console import Group

    from tempoquant.cli.quantize import is_finished
    from tempoquant.cli.tables import contents_table
    from tempoquant.hosts.contents import contents_of
    from tempoquant.hosts.nunchaku.export import export
    from tempoquant.plain_values import plain

    was_there = is_finished(request.output) and not request.overwrite
    path = export(request.folder, request.output, overwrite=request.overwrite, link=request.link, progress=progress)
    contents = contents_of(path)
    record = _record(path, was_there, Target.NUNCHAKU_LITE)
    notes = [f"{denoiser.denoiser}: {note}" for denoiser in contents.denoisers for note in denoiser.notes]
    return Outcome({**record, **plain(contents)}, Group(contents_table(contents), *notes, _words(path, was_there)))


def _to_comfyui(request: _Request, progress: Progress) -> Outcome:
    from tempoquant.checkpoint.manifest import MANIFEST_NAME
    from tempoquant.hosts.comfyui.export import export

    if request.link:
        raise UnsupportedError("--link links unquantized components, and comfyui writes none: leave it out.")
    was_there = (request.output / MANIFEST_NAME).is_file() and not request.overwrite
    path = export(request.folder, request.output, overwrite=request.overwrite, progress=progress)
    files = {file.name: file.stat().st_size for file in sorted(path.glob("*.safetensors"))}
    record = {**_record(path, was_there, Target.COMFYUI), "clip_ratios_carried": True, "files": files}
    lines = [f"{name}: {size / 2**20:,.1f} MiB" for name, size in files.items()]
    return Outcome(record, "\n".join([*lines, _words(path, was_there)]))


def _to_comfyui_nvfp4(request: _Request, progress: Progress) -> Outcome:
    from rich.console import Group

    from tempoquant.checkpoint.manifest import MANIFEST_NAME
    from tempoquant.cli.tables import comfyui_table
    from tempoquant.hosts.comfyui.nvfp4_export import export
    from tempoquant.plain_values import plain

    if request.link:
        raise UnsupportedError("--link links unquantized components, and comfyui-nvfp4 writes none: leave it out.")
    was_there = (request.output / MANIFEST_NAME).is_file() and not request.overwrite
    denoisers = export(request.folder, request.output, overwrite=request.overwrite, progress=progress)
    path = request.output.expanduser().resolve()
    record = {**_record(path, was_there, Target.COMFYUI_NVFP4), "denoisers": [plain(each) for each in denoisers]}
    notes = [
        f"{each.denoiser}: clip ratios are not carried ({each.num_clipped} of {each.num_layers} layers had one other "
        "than 1)."
        for each in denoisers
        if each.num_clipped
    ]
    return Outcome(record, Group(comfyui_table(denoisers), *notes, _words(path, was_there)))


_TARGETS: dict[Target, Callable[[_Request, Progress], Outcome]] = {
    Target.NUNCHAKU_LITE: _to_nunchaku_lite,
    Target.COMFYUI: _to_comfyui,
    Target.COMFYUI_NVFP4: _to_comfyui_nvfp4,
}


def _record(path: Path, was_there: bool, target: Target) -> dict[str, object]:
    return {"output": str(path), "existed": was_there, "target": target.value, "clip_ratios_carried": False}


def _words(path: Path, was_there: bool) -> str:
    return f"{path} was already finished." if was_there else f"Written to {path}."
