"""`tempoquant generate`: a prompt and what else the model is conditioned on in, a video out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tempoquant.cli.options import (
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


def command(  # noqa: PLR0913 (one argument per option)
    folder: Folder,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What should happen.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="An .mp4 file; a .png of a model of images.")
    ],
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The first frame, or whom the video shows."),
    ] = None,
    pose: Annotated[Path | None, typer.Option(metavar="FILE|FOLDER", help="Animate: a clip of the pose.")] = None,
    face: Annotated[Path | None, typer.Option(metavar="FILE|FOLDER", help="Animate: a clip of the face.")] = None,
    negative_prompt: Annotated[str, typer.Option(metavar="TEXT", help="What should not.")] = "",
    steps: Steps = None,
    frames: Frames = None,
    size: Size = None,
    seed: Seed = 0,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0.0, help="Of classifier-free guidance; 1 for none.")
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
    """Generate one video. What is not given is the model's own: size, frames, steps, guidance, flow shift."""
    changes = sampling_changes(size, frames, steps, guidance_scale, flow_shift)

    def work(progress: Progress) -> Outcome:
        from tempoquant.acceleration.accelerate import accelerate_by
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
        from tempoquant.placement.memory_modes import load_in_mode
        from tempoquant.planning.chunking import choose_chunking
        from tempoquant.prompts import Prompt
        from tempoquant.runtime.activation_bits import set_activation_bits

        check_place(output, ".png" if output.suffix.lower() == ".png" else ".mp4")
        clips = {name: clip for name, clip in (("pose", pose), ("face", face)) if clip is not None}
        item = Prompt(output.stem, None if image is None else open_image(image), prompt, clips=clips)
        model = open_pipeline(folder)
        is_image = model.geometry.is_image
        check_place(output, ".png" if is_image else ".mp4")
        require_given(model, item)
        settings = settings_of(model, changes)
        sampling_steps(model, settings)  # refuses a scheduler before anything is loaded
        place = device or default_device()
        chunking = choose_chunking(model, settings, memory.value, place, in_chunks)
        choices = choices_of(speed, attention, cache, compile_blocks)
        if choices is not None:
            check_choices(choices, model, memory.value, place, chunking.in_chunks)
        print(f"Blocks compute {chunking.reason}.")  # before hours of work
        on_loaded = progress.start("Loading", 1)
        pipeline = load_in_mode(model, memory.value, place, chunking.in_chunks)
        if activation_bits is not None:
            set_activation_bits(pipeline, activation_bits.bits, activation_bits.timesteps)
        in_force = None if choices is None else accelerate_by(pipeline, choices)
        if in_force is not None:
            print(in_force)  # before hours of work
        on_loaded()
        on_step = progress.start("Generating", settings.num_steps)
        try:
            with suited_threads(model, place):
                video = generate_video(pipeline, item, settings, seed, negative_prompt, on_step)
        except ValueError as error:  # the pipeline's own checks of sizes and texts
            raise ModelError(f"the pipeline refuses these settings: {error}") from error
        what = _write(output, video, is_image, settings.fps)
        words = (
            f"{output}: {what}, {settings.num_steps} steps, seed {seed}. "
            f"Blocks computed {chunking.reason}.{'' if in_force is None else in_force.calls_in_words()}"
        )
        about = {} if in_force is None else {"acceleration": in_force.to_dict()}
        record = {"output": str(output), "in_chunks": chunking.in_chunks, "why": chunking.reason, **about}
        return Outcome(record, words)

    run_command(work)


def _write(output: Path, video: Any, is_image: bool, fps: int) -> str:
    """Write frames of (frames, height, width, 3), uint8; what they are, in words. Raises OutputError."""
    from PIL import Image

    from tempoquant.evaluate.files import write_mp4, write_png

    if is_image:
        write_png(output, Image.fromarray(video[0]))
    else:
        write_mp4(output, video, fps)
    num_frames, height, width = video.shape[:3]
    return f"{'an image' if is_image else f'{num_frames} frames'} of {height}×{width}"
