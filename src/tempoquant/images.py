"""Images as a viewer shows them: upright, in sRGB, eight bits a channel, transparency on white."""

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from tempoquant.errors import CalibrationError

_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for files that are no whole pictures, or would fill the memory."""
_PLAIN = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}
"""The name of each mode's colour space in profiles."""
_LEVELS = np.linspace(0, 255, 6).astype(np.uint8)
_PROBE = Image.fromarray(np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS), -1).reshape(-1, 6, 3))
_ROUNDING = 2
"""The largest difference, in levels, between two computations of sRGB."""


def open_image(path: str | Path, where: str = "--image") -> Image.Image:
    """Return one RGB image from a file: of an animation, or of a file of several pictures, the
    first.

    Raises:
        CalibrationError: the file is missing, damaged, no image, or has undefined colours (see
            `as_seen`). The sentence begins with `where`.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns above 90 megapixels, and phones make such images.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return as_seen(image, f"{where}: {path}")
    except FileNotFoundError as error:
        raise CalibrationError(f"{where}: there is no image {path}.") from error
    except _DAMAGE as error:
        raise CalibrationError(f"{where}: {path} cannot be read as an image ({error}).") from error


def as_seen(image: Image.Image, name: str = "the image") -> Image.Image:
    """Convert an image of any kind to RGB, eight bits a channel, as a viewer shows it on a white
    page.

    The EXIF orientation and the colour profile are applied, and transparency is composited on
    white. 16 bits are rounded to eight. 32-bit integers are read as 16 bits, and floats as 0
    (black) … 1 (white). An RGB image without such metadata is returned unchanged.

    Raises:
        CalibrationError: the image has no pixels, or values outside these ranges. The sentence
            begins with `name`.
    """
    if image.mode == "RGB" and not image.info and 0 not in image.size and not image.getexif():
        image.load()
        return image if type(image) is Image.Image else image.copy()
    if 0 in image.size:
        raise CalibrationError(f"{name} cannot be read as an image: it has no pixels ({image.width} × {image.height}).")
    upright = ImageOps.exif_transpose(image)
    profile = upright.info.get("icc_profile")
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        upright = _in_eight_bits(upright, name)
    elif upright.has_transparency_data:
        upright = upright.convert("LA" if upright.mode in ("1", "L", "LA", "La") else "RGBA")
    else:
        upright = upright.convert(_PLAIN.get(upright.mode, upright.mode))
    alpha = upright.getchannel("A") if upright.mode in ("LA", "RGBA") else None
    colours = _in_srgb(upright if alpha is None else upright.convert(upright.mode[:-1]), profile)
    if alpha is not None:
        colours = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)
    colours.info = {}  # everything in it has been applied
    return colours


def _in_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Convert greys of more than eight bits to L, or to LA where one grey is transparent. Raises
    CalibrationError for values out of range.
    """
    values = np.asarray(image).astype(np.float64)
    most = 1.0 if image.mode == "F" else 65535.0
    if not bool(((values >= 0) & (values <= most)).all()):  # NaN is neither
        raise CalibrationError(
            f"{name} cannot be read as an image: its numbers (mode {image.mode}) lie outside 0 … {most:g}, so nothing "
            "says which is white; save it with 8 or 16 bits."
        )
    grey = Image.fromarray(np.round(values * (255 / most)).astype(np.uint8))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert colours without transparency to sRGB. A damaged profile, or one for other channels,
    is ignored, as viewers do; a profile equivalent to sRGB leaves every pixel unchanged.
    """
    if image.mode == "LAB":
        return _to_srgb(image, ImageCms.createProfile("LAB"))
    if profile:
        try:
            stated = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = stated.profile.xcolor_space
            if image.mode == "L" and space == _SPACES["RGB"]:
                image = image.convert("RGB")
            if space == _SPACES.get(image.mode) and not (image.mode == "RGB" and _is_srgb(stated)):
                return _to_srgb(image, stated)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image.convert("RGB")


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    difference = np.asarray(_to_srgb(_PROBE, profile)).astype(int) - np.asarray(_PROBE).astype(int)
    return int(np.abs(difference).max()) <= _ROUNDING


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    seen = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert seen is not None  # None is returned for in-place changes only
    return seen


def first_frame(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Return an image as a viewer shows it, cropped to a video's aspect ratio and scaled to its
    size.

    Raises CalibrationError as `as_seen` does.
    """
    return ImageOps.fit(as_seen(picture), (width, height))
