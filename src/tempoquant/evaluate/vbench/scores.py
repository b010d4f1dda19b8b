"""Scores of every video by VBench, made once: a score is stored at once, with the digests of its
inputs and weights.

Each dimension runs in its own process, so that one that crashes or fills the memory affects no
other.
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
"""VBench's output."""

Scores = dict[str, dict[Take, float]]
"""Scores by dimension."""


class Failure(NamedTuple):
    """A missing score of VBench: of one video, or with `take` None of all that remained of a
    dimension.
    """

    dimension: str
    take: Take | None
    why: str


def score_missing(
    folder: EvaluationFolder, plan: Plan, labels: Sequence[str], vbench: VBench, progress: Progress
) -> tuple[Scores, list[Failure]]:
    """Score every finished video of these models without a score of this VBench.

    Returns:
        All scores, those of earlier runs included; and the failures of this run, which the next run
        retries.
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
    """Return the scores of earlier runs: of these very videos, by this version with these
    weights.
    """
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
    """Yield the runner's answers about videos as they come (see `runner.py`). If it dies, that is
    the last answer.

    Args:
        videos: "video" and "prompt" of each, and "image" if the dimension compares with one; paths
            are absolute.
        log_file: VBench's output is appended to it.
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
                        break  # torn: it was killed while writing
                    yield json.loads(line)
            if status := process.wait():
                yield {"why": f"VBench's process ended with status {status}; its output is in {log_file}"}
        finally:
            process.kill()
            process.wait()


def _video(folder: EvaluationFolder, take: Take, text: str, has_image: bool) -> dict[str, str]:
    found = {"video": str(folder.place("videos", take).resolve()), "prompt": text}
    return {**found, "image": str(folder.image(take.id).resolve())} if has_image else found
