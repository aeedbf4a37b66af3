"""Pictures small enough to lie in a page."""

import base64
import io

from PIL import Image

from rlaifv.images import BadImageError, decode

LONGEST = 320
"""Pixels of the longer side at most: some 20 kB of a photograph, 27 kB in the page."""
DRAWN = 160
"""Pictures smaller than this are shown without smoothing."""


def img(data: bytes | None) -> str:
    """An `<img>` that holds the picture itself; a sentence when it cannot be decoded."""
    if data is None:
        return ""
    try:
        picture = decode(data)
    except BadImageError:
        return '<p class="soft small">(the picture cannot be decoded)</p>'
    drawn = max(picture.size) < DRAWN
    stream = io.BytesIO()
    if drawn:
        picture.save(stream, "PNG")
    else:
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        picture.save(stream, "JPEG", quality=75)
    kind, name = ("png", ' class="drawn"') if drawn else ("jpeg", "")
    encoded = base64.b64encode(stream.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img{name} {size} alt="" loading="lazy" src="data:image/{kind};base64,{encoded}">'
