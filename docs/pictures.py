"""Pictures of the docs from a finished run: `python docs/pictures.py RUN` (needs chromium).

Writes docs/report.png, the top of the run's report, docs/examples.png, its example browser, and
docs/status.png, what `status` says of the run.
"""

import html
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
COLOURS = {"1": "#ffffff", "2": "#8b929b", "31": "#ff8593", "32": "#7fd38f"}
COLOURS |= {"33": "#f2b44c", "36": "#6cc7e0"}
PAGE = """<!doctype html><meta charset="utf-8"><body style="margin:0;background:#15171a">
<pre style="margin:0;padding:24px 28px;color:#d7dade;font:15px/1.45 'DejaVu Sans Mono',monospace">{}
</pre>"""
ONLY_EXAMPLES = (
    "<style>section:not(#examples), header { display: none } main { padding-top: 0 }</style>"
)
REPORT_SIZE, EXAMPLES_SIZE, STATUS_SIZE = (1200, 1115), (1200, 652), (1000, 900)
COLOURS_KEPT = 128
"""Of the palette: the pictures stay below 200 kB."""


def take(page: str, target: Path, size: tuple[int, int]) -> None:
    """A screenshot of a URI, without the empty rows below, in few colours."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw.png")
        flags = (*FLAGS, f"--user-data-dir={folder}/profile")
        window = f"--window-size={size[0]},{size[1]}"
        command = ["chromium", *flags, window, f"--screenshot={raw}", page]
        subprocess.run(command, check=True, capture_output=True)
        picture = Image.open(io.BytesIO(raw.read_bytes())).convert("RGB")
    ground = Image.new("RGB", picture.size, picture.getpixel((1, picture.height - 1)))
    different = [
        y
        for y in range(picture.height)
        if picture.crop((0, y, picture.width, y + 1)).tobytes()
        != ground.crop((0, y, picture.width, y + 1)).tobytes()
    ]
    bottom = min(picture.height, max(different, default=0) + 24)
    small = picture.crop((0, 0, picture.width, bottom)).quantize(COLOURS_KEPT)
    small.save(target, "PNG", optimize=True)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def painted(text: str) -> str:
    """A terminal's colours as HTML."""
    parts = re.split(r"\x1b\[([\d;]+)m", text)
    out, depth = [html.escape(parts[0])], 0
    for codes, words in zip(parts[1::2], parts[2::2], strict=True):
        if codes == "0":
            out.append("</span>" * depth)
            depth = 0
        else:
            last = codes.split(";")[-1]
            weight = "bold" if "1" in codes.split(";") else "normal"
            out.append(f'<span style="color:{COLOURS[last]};font-weight:{weight}">')
            depth += 1
        out.append(html.escape(words))
    return "".join(out)


def main(run: str) -> None:
    from controller.paint import Paint
    from controller.places import existing_run, shown
    from controller.screen import status_text
    from controller.status import read_status

    place = existing_run("runs", run)
    said = status_text(read_status(place), Paint(on=True))
    name = place.uri.rpartition("/")[2]
    said = said.replace(shown(place.uri, "").rstrip("/"), f"runs/{name}")
    text = f"$ python -m controller status {name}\n{said}"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "status.html")
        page.write_text(PAGE.format(painted(text)))
        take(page.as_uri(), FOLDER / "status.png", STATUS_SIZE)
    report = Path(shown(place.uri, "report/index.html"))
    take(report.as_uri(), FOLDER / "report.png", REPORT_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "examples.html")
        page.write_text(report.read_text() + ONLY_EXAMPLES)
        take(page.as_uri(), FOLDER / "examples.png", EXAMPLES_SIZE)


if __name__ == "__main__":
    main(sys.argv[1])
