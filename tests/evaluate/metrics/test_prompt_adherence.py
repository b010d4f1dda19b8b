"""Laws of the pixel checker: what is drawn as prompted passes, and nothing else does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tempoquant.evaluate.metrics.prompt_adherence import (
    ExpectedMotion,
    check_prompt,
    classify_displacement,
    fraction_followed,
    parse_prompt,
)
from tempoquant.tiny.sets import evaluation_items
from tempoquant.tiny.world import COLORS, MOTIONS, Scene, describe, render, with_other_motions

ITEMS = evaluation_items(40)
CLIPS = [render(item.scene) for item in ITEMS]


def test_every_drawn_scene_follows_its_prompt_and_keeps_its_appearance() -> None:
    results = [check_prompt(clip, item.prompt) for clip, item in zip(CLIPS, ITEMS, strict=True)]
    assert fraction_followed(results) == 1.0
    assert all(result.appearance_kept for result in results)


def test_floats_and_bytes_give_the_same_result() -> None:
    assert check_prompt(CLIPS[0] / 255.0, ITEMS[0].prompt) == check_prompt(CLIPS[0], ITEMS[0].prompt)


def test_another_prompt_is_not_followed() -> None:
    rng = np.random.default_rng(0)
    for item, clip in zip(ITEMS, CLIPS, strict=True):
        other = with_other_motions(item.scene, rng)
        assert other is not item.scene
        assert not check_prompt(clip, describe(other)).motion_followed


def test_a_frozen_video_follows_only_prompts_that_want_it_still() -> None:
    for item, clip in zip(ITEMS, CLIPS, strict=True):
        wants_still = all(expected.motion[1] is None for expected in parse_prompt(item.prompt))
        frozen = np.repeat(clip[:1], len(clip), axis=0)
        result = check_prompt(frozen, item.prompt)
        assert result.motion_followed == wants_still
        assert result.appearance_kept


@pytest.mark.parametrize(
    ("view", "swapped"),
    [
        (lambda clip: clip[:, :, ::-1], {"left": "right", "right": "left"}),
        (lambda clip: clip[::-1], {"left": "right", "right": "left", "up": "down", "down": "up"}),
    ],
    ids=["mirrored", "backwards"],
)
def test_a_mirrored_or_backwards_video_shows_the_opposite_direction(view: object, swapped: dict[str, str]) -> None:
    for item, clip in zip(ITEMS, CLIPS, strict=True):
        for mover in check_prompt(view(clip), item.prompt).movers:  # type: ignore[operator]
            direction, speed = mover.expected.motion
            assert mover.motion == (swapped.get(direction, direction), speed)


def test_noise_follows_no_prompt() -> None:
    rng = np.random.default_rng(0)
    for item in ITEMS:
        result = check_prompt(rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8), item.prompt)
        assert not result.motion_followed
        assert not result.appearance_kept


def test_an_object_that_vanishes_was_not_moved() -> None:
    clip = CLIPS[0].copy()
    clip[-1] = 128
    result = check_prompt(clip, ITEMS[0].prompt)
    assert not result.motion_followed
    assert not result.appearance_kept


def test_an_object_that_changes_colour_is_lost() -> None:
    item = ITEMS[0]
    mover = item.scene.movers[0]
    unused = next(c for c in COLORS if c not in {m.color for m in item.scene.movers})
    recolored = Scene(item.scene.background, (replace(mover, color=unused), *item.scene.movers[1:]))
    clip = np.concatenate([CLIPS[0][:8], render(recolored)[8:]])
    assert check_prompt(clip, item.prompt).movers[0].motion is None


def test_an_object_that_changes_shape_follows_but_does_not_keep_its_appearance() -> None:
    item = next(i for i in ITEMS if i.scene.movers[0].shape == "circle")
    mover = replace(item.scene.movers[0], shape="triangle")
    changed = Scene(item.scene.background, (mover, *item.scene.movers[1:]))
    clip = np.concatenate([render(item.scene)[:8], render(changed)[8:]])
    result = check_prompt(clip, item.prompt)
    assert result.movers[0].motion_followed
    assert not result.appearance_kept


def test_a_little_noise_changes_nothing() -> None:
    """White noise at 34 dB (5 of 255); the errors of a VAE are smooth and may be larger."""
    rng = np.random.default_rng(0)
    for item, clip in zip(ITEMS, CLIPS, strict=True):
        noisy = np.clip(clip / 255.0 + rng.normal(0.0, 0.02, clip.shape), 0.0, 1.0)
        assert check_prompt(noisy, item.prompt).motion_followed


def test_prompts_are_read_back_as_written() -> None:
    for item in ITEMS:
        expected = tuple(ExpectedMotion(m.color, m.shape, (m.direction, m.speed)) for m in item.scene.movers)
        assert parse_prompt(item.prompt) == expected


@pytest.mark.parametrize("prompt", ["", "a dog runs", "a red circle"])
def test_a_prompt_without_a_motion_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="no object"):
        parse_prompt(prompt)


@pytest.mark.parametrize("shape", [(17, 64, 64), (17, 3, 64, 64), (1, 64, 64, 3)])
def test_another_layout_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        check_prompt(np.zeros(shape), "a red circle stays still")


@pytest.mark.parametrize(
    ("displacement", "motion"),
    [
        ((5.9, 0.0), ("still", None)),
        ((6.1, 0.0), ("right", "slowly")),
        ((-18.7, 3.0), ("left", "slowly")),
        ((-18.9, 3.0), ("left", "quickly")),
        ((0.0, -12.0), ("up", "slowly")),
        ((2.0, 25.6), ("down", "quickly")),
        ((10.0, 10.0), None),
    ],
)
def test_thresholds_lie_halfway_between_the_speeds(displacement: tuple[float, float], motion: object) -> None:
    assert classify_displacement(*displacement) == motion
    assert motion is None or motion in MOTIONS
