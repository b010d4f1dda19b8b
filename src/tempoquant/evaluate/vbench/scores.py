"""Scores every video with VBench, once: a score is kept as soon as it is there, with what it was made of and with.

One process for each dimension, so that one that crashes or fills the memory takes no other with it.
"""

import contextlib
import functools
import json
import subprocess
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tempoquant.evaluate.evaluation_folder import EvaluationFolder, Take
from tempoquant.evaluate.plan import Plan
from tempoquant.evaluate.vbench.dimensions import DIMENSIONS, DREAMSIM_FOLDER
from tempoquant.evaluate.vbench.settings import VBench, runner_command, sha256
from tempoquant.progress import Progress

LOG = "vbench/log.txt"
"""What VBench printed."""

Scores = dict[str, dict[Take, float]]
"""By dimension."""


class Failure(NamedTuple):
    """Something that VBench did not score: one video, or with `take` None all that were left of a dimension."""

    dimension: str
    take: Take | None
    why: str


def score_missing(
    folder: EvaluationFolder, plan: Plan, labels: Sequence[str], vbench: VBench, progress: Progress
) -> tuple[Scores, list[Failure]]:
    """Score every finished video of these models that has no score of this VBench yet.

    Returns:
        All scores, those of earlier runs included; and what failed in this one, which the next run tries again.
    """
    finished = {take for take, line in folder.takes().items() if not line.get("failed")}
    texts = {take: item.text for label in labels for item, take in plan.takes(label) if take in finished}
    with_image = {take for label in labels for item, take in plan.takes(label) if item.image is not None}
    digests = {take: sha256(folder.place("videos", take)) for take in texts}
    scores, failures, log_file = _known(folder, vbench, digests), [], folder.path / LOG
    log_file.parent.mkdir(exist_ok=True)
    for dimension in vbench.settings.dimensions:
        of_image = DIMENSIONS[dimension].of_image
        asked = {take: text for take, text in texts.items() if not of_image or take in with_image}
        todo = {take: text for take, text in asked.items() if take not in scores[dimension]}
        on_scored = progress.start(f"VBench: {dimension}", len(asked), len(asked) - len(todo))
        if not todo:
            continue
        takes, videos = list(todo), [_video(folder, take, text, take in with_image) for take, text in todo.items()]
        with contextlib.closing(answers_of(vbench, dimension, videos, log_file)) as answers:
            for answer in answers:
                take = takes[answer["video"]] if "video" in answer else None
                if take is None or "score" not in answer:
                    failures.append(Failure(dimension, take, answer["why"]))
                    if take is not None:
                        on_scored()
                    continue
                made = {"video_sha256": digests[take], "made_with": vbench.made_with(dimension)}
                folder.score(take, dimension, answer["score"], made)
                scores[dimension][take] = answer["score"]
                on_scored()
    return scores, failures


def _known(folder: EvaluationFolder, vbench: VBench, digests: Mapping[Take, str]) -> Scores:
    """What earlier runs scored: of these very videos, by this version with these weights."""
    found: Scores = {dimension: {} for dimension in vbench.settings.dimensions}
    for take, line in folder.scored():
        dimension = line["dimension"]
        if dimension not in found or line["video_sha256"] != digests.get(take):
            continue
        if line["made_with"] == vbench.made_with(dimension):
            found[dimension][take] = line["score"]
    return found


def answers_of(
    vbench: VBench, dimension: str, videos: Sequence[Mapping[str, str]], log_file: Path
) -> Generator[dict[str, Any], None, None]:
    """What the runner says of videos, as soon as it says it (see `runner.py`). If it dies, that is the last answer.

    Args:
        videos: "video" and "prompt" of each, and "image" where the dimension compares with one; paths are absolute.
        log_file: what VBench prints is appended to it.
    """
    settings = vbench.settings
    cwd = settings.cache / DREAMSIM_FOLDER if dimension == "i2v_background" else None
    with log_file.open("ab") as log:
        start = functools.partial(
            subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        process = start(runner_command(settings, "score"), env=vbench.environment, cwd=cwd)
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                json.dump({"dimension": dimension, "device": vbench.device, "videos": videos}, stdin)
            with process.stdout as stdout:
                for line in stdout:
                    if not line.endswith("\n"):
                        break  # torn: it was killed while it spoke
                    yield json.loads(line)
            if status := process.wait():
                yield {"why": f"VBench's process ended with status {status}; its last words are in {log_file}"}
        finally:
            process.kill()
            process.wait()


def _video(folder: EvaluationFolder, take: Take, text: str, has_image: bool) -> dict[str, str]:
    found = {"video": str(folder.place("videos", take).resolve()), "prompt": text}
    return {**found, "image": str(folder.image(take.id).resolve())} if has_image else found
