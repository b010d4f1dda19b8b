"""`tempoquant generate`: from a prompt and the model's other conditions to a video."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from tempoquant.cli.options import (
    ActivationBits,
    Activations,
    Device,
    FlowShift,
    Folder,
    Frames,
    GenerationMemory,
    InChunks,
    MemoryMode,
    Seed,
    Size,
    Steps,
    sampling_changes,
)
from tempoquant.cli.running import Outcome, run_command
from tempoquant.cli.speed_options import (
    AttentionOption,
    CacheName,
    CompileOption,
    SpeedOption,
    check_choices,
    choices_of,
)
from tempoquant.progress import Progress

if TYPE_CHECKING:
    from tempoquant.acceleration.accelerate import Acceleration
    from tempoquant.acceleration.choices import Choices
    from tempoquant.models.sampling_settings import SamplingSettings
    from tempoquant.models.source import SourceModel
    from tempoquant.planning.chunking import Chunking


def command(  # noqa: PLR0913 (one argument per option)
    folder: Folder,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Description of the video.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="An .mp4 file; for an image model a .png file.")
    ],
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The first frame, or a picture of the person in the video."),
    ] = None,
    pose: Annotated[Path | None, typer.Option(metavar="FILE|FOLDER", help="Animate: a clip of the pose.")] = None,
    face: Annotated[Path | None, typer.Option(metavar="FILE|FOLDER", help="Animate: a clip of the face.")] = None,
    negative_prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the video should not show.")] = "",
    steps: Steps = None,
    frames: Frames = None,
    size: Size = None,
    seed: Seed = 0,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0.0, help="Scale of classifier-free guidance; 1 for none.")
    ] = None,
    flow_shift: FlowShift = None,
    activation_bits: Activations = None,
    memory: GenerationMemory = MemoryMode.RESIDENT,
    in_chunks: InChunks = None,
    speed: SpeedOption = None,
    attention: AttentionOption = None,
    cache: CacheName = None,
    compile_blocks: CompileOption = None,
    device: Device = None,
) -> None:
    """Generate one video.

    Size, frames, steps, guidance and flow shift default to the model's own.
    """
    changes = sampling_changes(size, frames, steps, guidance_scale, flow_shift)

    clips = {name: clip for name, clip in (("pose", pose), ("face", face)) if clip is not None}

    def work(progress: Progress) -> Outcome:
        from tempoquant.device import default_device
        from tempoquant.errors import ModelError
        from tempoquant.evaluate.files import check_place
        from tempoquant.hosts.diffusers.pipeline import open_pipeline
        from tempoquant.hosts.diffusers.sampling import generate_video
        from tempoquant.images import open_image
        from tempoquant.models.prompt_needs import require_given
        from tempoquant.models.sampling_file import settings_of
        from tempoquant.models.schedule import sampling_steps
        from tempoquant.placement.cpu_threads import suited_threads
        from tempoquant.prompts import Prompt

        check_place(output, ".png" if output.suffix.lower() == ".png" else ".mp4")
        item = Prompt(output.stem, None if image is None else open_image(image), prompt, clips=clips)
        model = open_pipeline(folder)
        is_image = model.geometry.is_image
        check_place(output, ".png" if is_image else ".mp4")
        require_given(model, item)
        settings = settings_of(model, changes)
        sampling_steps(model, settings)  # refuses a scheduler before anything is loaded
        place = device or default_device()
        choices = choices_of(speed, attention, cache, compile_blocks)
        loaded = _load(model, settings, memory, place, in_chunks, choices, activation_bits, progress)
        on_step = progress.start("Generating", settings.num_steps)
        try:
            with suited_threads(model, place):
                video = generate_video(loaded.pipeline, item, settings, seed, negative_prompt, on_step)
        except ValueError as error:  # the pipeline's own checks of sizes and texts
            raise ModelError(f"the pipeline refuses these settings: {error}") from error
        what = _write(output, video, is_image, settings.fps)
        return loaded.outcome(output, f"{what}, {settings.num_steps} steps, seed {seed}")

    run_command(work)


class _Loaded(NamedTuple):
    """A pipeline that is ready to generate, and how its blocks will compute."""

    pipeline: Any
    chunking: "Chunking"
    in_force: "Acceleration | None"

    def outcome(self, output: Path, words: str) -> Outcome:
        """Describe the generated file, beginning with `words`, and how its blocks computed."""
        calls = "" if self.in_force is None else self.in_force.calls_in_words()
        about = {} if self.in_force is None else {"acceleration": self.in_force.to_dict()}
        record = {"output": str(output), "in_chunks": self.chunking.in_chunks, "why": self.chunking.reason, **about}
        return Outcome(record, f"{output}: {words}. Blocks computed {self.chunking.reason}.{calls}")


def _load(
    model: "SourceModel",
    settings: "SamplingSettings",
    memory: MemoryMode,
    place: str,
    in_chunks: bool | None,
    choices: "Choices | None",
    activation_bits: ActivationBits | None,
    progress: Progress,
) -> _Loaded:
    """Load a pipeline in a memory mode, and print its chunking and acceleration before hours of
    work.

    Raises as `check_choices` and `require_readable`, before a weight is loaded.
    """
    from tempoquant.acceleration.accelerate import accelerate_by
    from tempoquant.placement.disk_mode import require_readable
    from tempoquant.placement.memory_modes import load_in_mode
    from tempoquant.planning.chunking import choose_chunking
    from tempoquant.runtime.activation_bits import set_activation_bits

    has_eight_bits = activation_bits is not None and activation_bits.bits == 8
    chunking = choose_chunking(model, settings, memory.value, place, in_chunks, has_eight_bits)
    if choices is not None:
        check_choices(choices, model, memory.value, place, chunking.in_chunks)
    require_readable(model, memory.value)
    print(f"Blocks compute {chunking.reason}.")
    on_loaded = progress.start("Loading", 1)
    pipeline = load_in_mode(model, memory.value, place, chunking.in_chunks)
    if activation_bits is not None:
        set_activation_bits(pipeline, activation_bits.bits, activation_bits.timesteps)
    in_force = None if choices is None else accelerate_by(pipeline, choices)
    if in_force is not None:
        print(in_force)
    on_loaded()
    return _Loaded(pipeline, chunking, in_force)


def _write(output: Path, video: Any, is_image: bool, fps: int) -> str:
    """Write frames (frames, height, width, 3) uint8, and return a description. Raises
    OutputError.
    """
    from PIL import Image

    from tempoquant.evaluate.files import write_mp4, write_png

    if is_image:
        write_png(output, Image.fromarray(video[0]))
    else:
        write_mp4(output, video, fps)
    num_frames, height, width = video.shape[:3]
    return f"{'an image' if is_image else f'{num_frames} frames'} of {height}×{width}"
