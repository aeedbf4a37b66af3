"""Decoding images from the wild: every mode becomes RGB, every defect a clear error."""

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError


class BadImageError(ValueError):
    """The bytes are not an image that can be used; the message says why."""


def decode(data: bytes, *, max_pixels: int | None = None) -> Image.Image:
    """An upright RGB picture from encoded bytes.

    16-bit greyscale is scaled to 8 bits, transparency is laid over white, CMYK and palettes are
    converted, EXIF rotation is applied. Raises BadImageError for empty, truncated or unknown data
    and for more than `max_pixels` pixels (checked before decoding, so bombs cost nothing).
    """
    if not data:
        raise BadImageError("the image has 0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
            width, height = picture.size
            if max_pixels is not None and width * height > max_pixels:
                raise BadImageError(f"{width} x {height} pixels are more than {max_pixels}")
            picture.load()
    except UnidentifiedImageError as error:
        raise BadImageError("not an image in a known format") from error
    except Image.DecompressionBombError as error:
        raise BadImageError(str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(f"truncated or corrupt image: {error}") from error
    return _rgb(ImageOps.exif_transpose(picture))


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16- or 32-bit greyscale: PIL's own conversion clips at 255
        scaled = picture.convert("I").point(lambda value: value / 257)
        return scaled.convert("L").convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        over = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(over, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")
