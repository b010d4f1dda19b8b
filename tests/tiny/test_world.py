"""Laws of the procedural world and of the sets drawn from it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tempoquant.tiny import calibration_items, evaluation_items, weights_folder
from tempoquant.tiny.sets import CALIBRATION_SEED_BASE, EVALUATION_SEED_BASE, TRAINING_SEED_BASE, scene_from_seed
from tempoquant.tiny.world import (
    BACKGROUND_KINDS,
    COLORS,
    FRAME_SIZE,
    MARGIN,
    MIN_GAP,
    MOTIONS,
    SHAPES,
    Mover,
    Scene,
    describe,
    render,
    with_other_motions,
)

SCENES = [scene_from_seed(seed) for seed in range(400)]


def test_a_seed_always_draws_the_same_scene() -> None:
    assert [scene_from_seed(seed) for seed in range(20)] == SCENES[:20]


def test_a_clip_has_seventeen_square_frames_of_bytes() -> None:
    clip = render(SCENES[0])
    assert clip.shape == (17, FRAME_SIZE, FRAME_SIZE, 3)
    assert clip.dtype == np.uint8


def test_nothing_leaves_the_frame() -> None:
    for scene in SCENES:
        for mover in scene.movers:
            reach = mover.extent + MARGIN - 1e-6
            assert mover.track().min() >= reach
            assert mover.track().max() <= FRAME_SIZE - reach


def test_two_movers_never_touch() -> None:
    for scene in SCENES:
        if len(scene.movers) == 2:
            one, other = scene.movers
            gaps = np.linalg.norm(one.track() - other.track(), axis=1) - one.extent - other.extent
            assert gaps.min() >= MIN_GAP - 1e-6


def test_every_word_of_the_world_occurs() -> None:
    movers = [mover for scene in SCENES for mover in scene.movers]
    assert {mover.color for mover in movers} == set(COLORS)
    assert {mover.shape for mover in movers} == set(SHAPES)
    assert {(mover.direction, mover.speed) for mover in movers} == set(MOTIONS)
    assert {scene.background.kind for scene in SCENES} == set(BACKGROUND_KINDS)


def test_about_half_the_scenes_have_two_movers() -> None:
    counts = Counter(len(scene.movers) for scene in SCENES)
    assert 0.4 < counts[2] / len(SCENES) < 0.6


def test_a_clip_may_be_drawn_in_parts() -> None:
    clip = render(SCENES[3])
    np.testing.assert_array_equal(render(SCENES[3], num_frames=5, first_frame=7), clip[7:12])


def test_a_still_mover_leaves_all_frames_equal() -> None:
    mover = Mover("red", "circle", "still", None, 30.0, 30.0, 8.0)
    clip = render(Scene(SCENES[0].background, (mover,)))
    assert (clip == clip[:1]).all()


def test_the_prompt_names_every_mover() -> None:
    movers = (
        Mover("red", "circle", "left", "slowly", 40.0, 15.0, 8.0),
        Mover("blue", "square", "still", None, 30.0, 45.0, 8.0),
    )
    scene = Scene(SCENES[0].background, movers)
    assert describe(scene) == "a red circle moves left slowly and a blue square stays still"


def test_other_motions_keep_the_first_frame_and_change_every_mover() -> None:
    rng = np.random.default_rng(0)
    for scene in SCENES[:50]:
        other = with_other_motions(scene, rng)
        if other is scene:
            continue
        np.testing.assert_array_equal(render(other, 1), render(scene, 1))
        for before, after in zip(scene.movers, other.movers, strict=True):
            assert (before.direction, before.speed) != (after.direction, after.speed)


def test_the_first_frame_tells_little_about_the_motion() -> None:
    """Movers that go left start, on average, less than a tenth of the frame from where those that
    go right start.
    """
    movers = [mover for scene in SCENES for mover in scene.movers]
    start = {d: np.mean([m.x for m in movers if m.direction == d]) for d in ("left", "right")}
    assert abs(start["left"] - start["right"]) < 0.35 * FRAME_SIZE


@pytest.mark.parametrize(("color", "direction", "speed"), [("pink", "left", "slowly"), ("red", "left", None)])
def test_words_outside_the_world_are_refused(color: str, direction: str, speed: str | None) -> None:
    with pytest.raises(ValueError, match="unknown"):
        Mover(color, "circle", direction, speed, 30.0, 30.0, 8.0)


def test_sets_are_deterministic_and_named() -> None:
    items = calibration_items(3)
    assert [item.id for item in items] == ["tiny-calibration-0000", "tiny-calibration-0001", "tiny-calibration-0002"]
    assert items[2].prompt == calibration_items(3)[2].prompt
    assert items[0].image.size == (FRAME_SIZE, FRAME_SIZE)
    np.testing.assert_array_equal(np.asarray(items[1].image), render(items[1].scene, 1)[0])


def test_calibration_evaluation_and_training_are_disjoint() -> None:
    bases = sorted([TRAINING_SEED_BASE, CALIBRATION_SEED_BASE, EVALUATION_SEED_BASE])
    assert np.diff(bases).min() >= 10_000_000
    scenes = {item.scene for item in calibration_items(50)} | {item.scene for item in evaluation_items(50)}
    assert len(scenes | set(SCENES)) == 100 + len(SCENES)


def test_a_set_longer_than_its_seed_range_is_refused() -> None:
    with pytest.raises(ValueError, match="9,999,999"):
        calibration_items(10_000_001)


def test_the_weights_lie_inside_the_package() -> None:
    assert weights_folder().parent.name == "tiny"
