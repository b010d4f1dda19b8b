"""Measurement of missing metrics: each video of one model against the reference's of the same item
and seed.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tempoquant.engines import Crew
from tempoquant.evaluate.evaluation_folder import EvaluationFolder, Take, read_latents
from tempoquant.evaluate.files import read_lossless
from tempoquant.evaluate.metrics.measures import Clip, measures, names_of, take_measures
from tempoquant.evaluate.plan import Model, Plan
from tempoquant.evaluate.text_embeddings import PREFIX
from tempoquant.progress import CombinedProgress, Progress

_VIDEOS = "measuring"


class Pair(NamedTuple):
    """A video to measure.

    Attributes:
        text: the prompt.
        reference: None for a video of the reference itself.
    """

    text: str
    take: Take
    reference: Take | None


@dataclass(frozen=True)
class Measuring:
    """The stage that measures the videos of one model; its items are pairs, their results metrics
    by name.

    Attributes:
        path: of the evaluation folder.
        bundled: whether items are of the bundled world.
    """

    path: Path
    plan: Plan
    label: str
    bundled: bool

    @contextlib.contextmanager
    def open(self, device: str, progress: Progress) -> Iterator[Callable[[Any], Any]]:
        """Prepare a worker; see `Stage.open`."""
        settings = self.plan.settings
        which = measures(self.bundled, settings.height, settings.width, self.plan.keeps_embeddings)

        def measure(pair: Pair) -> dict[str, Any]:
            advance = progress.start(f"{self.label}: {_VIDEOS}", 1)
            reference = None if pair.reference is None else self._clip(pair.text, pair.reference)
            metrics = take_measures(which, self._clip(pair.text, pair.take), reference)
            advance()
            return metrics

        yield measure

    def _clip(self, text: str, take: Take) -> Clip:
        folder = EvaluationFolder(self.path)
        file, latents = folder.place("lossless", take), read_latents(folder.place("latents", take))
        embeddings = {name: latents[name] for name in latents if name.startswith(PREFIX)}
        return Clip(text, read_lossless(file), file, {name: latents[name] for name in self.plan.bin_names}, embeddings)


def measure_missing(stage: Measuring, model: Model, reference: Model, crew: Crew, progress: Progress) -> None:
    """Measure every finished video without metrics, if the reference's is finished too. Raises
    OutputError.
    """
    folder, plan, settings = EvaluationFolder(stage.path), stage.plan, stage.plan.settings
    is_reference = model is reference
    finished = {take for take, line in folder.takes().items() if not line.get("failed")}
    which = measures(stage.bundled, settings.height, settings.width, plan.keeps_embeddings)
    wanted = set(names_of(which, is_reference))
    measured = folder.measured()
    pairs = []
    for item, take in plan.takes(model.label):
        against = None if is_reference else take._replace(label=reference.label)
        can_be = take in finished and (against is None or against in finished)
        if can_be and not wanted <= measured.get(take, {}).keys():
            pairs.append(Pair(item.text, take, against))
    together = CombinedProgress(progress, f"{model.label}: {_VIDEOS}", len(pairs))
    crew.run(stage, pairs, progress=together, on_done=lambda pair, metrics: folder.measure(pair.take, metrics))
