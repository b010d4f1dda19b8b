"""A picture means what a person sees: whatever its orientation, depth, colours and transparency."""

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image, ImageCms

from tempoquant.errors import CalibrationError
from tempoquant.images import as_seen, first_frame, open_image
from tempoquant.prompts import Prompt

SCENE = np.zeros((16, 24, 3), np.uint8)
SCENE[:8], SCENE[8:, :12], SCENE[8:, 12:] = (200, 40, 30), (20, 90, 220), (90, 180, 60)
RGB = Image.fromarray(SCENE)
GREYS = np.tile(np.linspace(0, 255, 24).round().astype(np.uint8), (16, 1))


def error(image: Image.Image, wanted: np.ndarray) -> int:
    """Return the largest difference of a channel, in levels."""
    assert image.mode == "RGB" and image.info == {}
    return int(np.abs(np.asarray(image).astype(int) - wanted.astype(int)).max())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_picture_stands_as_diffusers_sets_it_up(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    RGB.save(tmp_path / f"a.{kind}", exif=exif)
    ours, diffusers = open_image(tmp_path / f"a.{kind}"), load_image(str(tmp_path / f"a.{kind}"))
    assert ours.tobytes() == diffusers.tobytes() and ours.size == diffusers.size
    assert as_seen(ours) is ours  # it is not turned a second time
    with Image.open(tmp_path / f"a.{kind}") as handed_over:
        assert Prompt("a", handed_over, "").image_hash == Prompt("b", ours, "").image_hash
        seen = [first_frame(Prompt("a", image, "").image, 32, 32) for image in (handed_over, ours)]
        assert seen[0] == seen[1] and seen[0].size == (32, 32)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_are_the_same_greys_as_eight(tmp_path, kind):
    Image.fromarray(GREYS.astype(np.uint16) * 257).save(tmp_path / f"a.{kind}")
    assert error(open_image(tmp_path / f"a.{kind}"), np.stack(3 * [GREYS], -1)) == 0


@pytest.mark.parametrize("values", [GREYS.astype(np.int32) * 257, GREYS.astype(np.float32) / 255])
def test_wider_numbers_with_a_known_range_are_greys(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert error(open_image(tmp_path / "a.tiff"), np.stack(3 * [GREYS], -1)) == 0


OUT_OF_RANGE = [np.float32(2.0), np.float32(-0.1), np.float32("nan"), np.int32(65536), np.int32(-1)]


@pytest.mark.parametrize("value", OUT_OF_RANGE, ids=str)
def test_numbers_without_a_range_mean_nothing(tmp_path, value):
    values = np.zeros((4, 4), value.dtype)
    values[1, 2] = value
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(CalibrationError, match=r"^--image: .*a\.tiff cannot be read as an image: its numbers"):
        open_image(tmp_path / "a.tiff")


def transparent(mode: str) -> Image.Image:
    """Return a scene whose left half cannot be seen."""
    alpha = Image.new("L", RGB.size, 255)
    alpha.paste(0, (0, 0, 12, 16))
    image = RGB.convert("L" if mode in ("LA", "La", "L") else "RGB")
    if mode == "P":
        image = RGB.quantize(8)
        black = image.getpixel((0, 0))
        image.info["transparency"] = black
        return image
    if mode == "L":
        image.info["transparency"] = image.getpixel((0, 0))
        return image
    image.putalpha(alpha)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "P", "L"])
def test_transparency_lies_on_white(mode):
    seen = as_seen(transparent(mode))
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    wanted = (90, 180, 60) if "RGB" in mode or mode == "P" else 3 * (RGB.convert("L").getpixel((20, 12)),)
    assert np.abs(np.subtract(seen.getpixel((20, 12)), wanted)).max() <= 1


def test_half_transparency_is_half_white():
    image = Image.new("RGBA", (2, 2), (0, 100, 200, 128))
    assert np.abs(np.subtract(as_seen(image).getpixel((0, 0)), (127, 177, 227))).max() <= 1


def in_mode(mode: str) -> Image.Image:
    if mode == "LAB":
        return ImageCms.profileToProfile(
            RGB, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    return RGB.quantize(8) if mode == "P" else RGB.convert(mode)


@pytest.mark.parametrize(("mode", "levels"), [("CMYK", 0), ("YCbCr", 3), ("HSV", 6), ("LAB", 8), ("P", 1), ("RGBX", 0)])
def test_every_colour_mode_shows_the_same_scene(mode, levels):
    assert error(as_seen(in_mode(mode)), SCENE) <= levels


@pytest.mark.parametrize("mode", ["L", "1"])
def test_greys_and_black_and_white_stay_what_they_are(mode):
    image = RGB.convert(mode)
    assert error(as_seen(image), np.asarray(image.convert("RGB"))) == 0


def test_a_profile_that_is_not_srgb_is_applied_and_srgb_in_other_words_changes_nothing(tmp_path):
    """LittleCMS writes sRGB's own profile, and one of Lab is at hand: swapping channels needs a
    profile of ours.
    """
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    RGB.save(tmp_path / "a.png", icc_profile=srgb)
    assert error(open_image(tmp_path / "a.png"), SCENE) == 0
    red, green = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")  # entries of the tag table: name, place, size
    swapped = bytearray(srgb)
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    RGB.save(tmp_path / "b.png", icc_profile=bytes(swapped))
    assert error(open_image(tmp_path / "b.png"), SCENE[..., [1, 0, 2]]) <= 3
    with Image.open(tmp_path / "b.png") as handed_over:
        assert as_seen(handed_over).tobytes() == open_image(tmp_path / "b.png").tobytes()
    for useless in (b"no profile", srgb[:200]):
        RGB.save(tmp_path / "c.png", icc_profile=useless)
        assert error(open_image(tmp_path / "c.png"), SCENE) == 0


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "mpo"])
def test_of_several_pictures_in_one_file_the_first_counts(tmp_path, kind):
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    quality = {} if kind in ("gif", "png") else {"quality": 95}
    first.save(tmp_path / f"a.{kind}", save_all=True, append_images=[second], **quality)
    assert error(open_image(tmp_path / f"a.{kind}"), np.asarray(first)) <= 2


def test_what_is_no_picture_is_one_sentence(tmp_path, monkeypatch):
    RGB.resize((200, 200)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-200])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "empty.png", "."):
        with pytest.raises(CalibrationError, match=r"^--image: .* cannot be read as an image"):
            open_image(tmp_path / name)
    with pytest.raises(CalibrationError, match=r"^the image .*: it has no pixels \(0 × 8\)"):
        as_seen(Image.new("RGB", (0, 8)))
    RGB.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    open_image(tmp_path / "bomb.png")  # 384 pixels: Pillow only warns below twice the limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CalibrationError, match="decompression bomb"):
        open_image(tmp_path / "bomb.png")
