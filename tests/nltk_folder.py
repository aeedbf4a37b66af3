"""An `nltk_data` folder for tests, put together from packages: `make nltk-data`.

Tokeniser data: inside the pip package `llama-index-core`; WordNet: Debian's `wordnet-base` and
`wordnet-sense-index`; tagger: the shared test data. `RLAIFV_TEST_NLTK_DATA` names another complete
folder. Tests whose data is not to be had are skipped, or (`RLAIFV_TEST_REQUIRE=1`) fail.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("RLAIFV_TEST_DATA", ROOT.parent / "shared" / "data"))
"""What a developer's machine has beside the checkout (see its README); never part of the project."""
BUILT = ROOT / "build" / "nltk_data"
_TAGGER = "averaged_perceptron_tagger_eng"
_WHEEL = "llama-index-core==0.14.25"
_PUNKT = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/"
_DEBIAN = ("wordnet-base", "wordnet-sense-index")


def make_nltk_folder(folder: Path) -> Path:
    """A complete folder: the one that is named or built, with the shared tagger laid beside it."""
    named = os.environ.get("RLAIFV_TEST_NLTK_DATA")
    if named:
        return Path(named)
    pytest.importorskip("nltk")
    if not (BUILT / "corpora").is_dir():
        lacking("no NLTK data: make nltk-data")
    tagger = shared_data("nltk_data", "taggers", _TAGGER)
    for name, source in (
        ("tokenizers", BUILT / "tokenizers"),
        ("corpora", BUILT / "corpora"),
        (f"taggers/{_TAGGER}", tagger),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(source)
    return folder


def shared_data(*names: str) -> Path:
    """A folder or file of the shared test data."""
    path = SHARED.joinpath(*names)
    if not path.exists():
        lacking(f"no shared data: {'/'.join(names)}")
    return path


def lacking(what: str) -> NoReturn:
    """Skips the test, or fails it where nothing may be missing."""
    if os.environ.get("RLAIFV_TEST_REQUIRE"):
        pytest.fail(what)
    pytest.skip(what)


def build(target: Path) -> None:
    """Fetches the packages with pip and apt-get, and puts the folder together."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", _WHEEL]
        subprocess.run([*pip, "--dest", scratch], check=True)
        subprocess.run(["apt-get", "download", *_DEBIAN], check=True, cwd=scratch)
        draft = Path(scratch) / "draft"
        punkt, wordnet = draft / "tokenizers/punkt_tab/english", draft / "corpora/wordnet"
        punkt.mkdir(parents=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(_PUNKT) and not name.endswith("/"):
                    (punkt / Path(name).name).write_bytes(archive.read(name))
        for package in Path(scratch).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, scratch], check=True)
        shutil.copytree(Path(scratch) / "usr/share/wordnet", wordnet)
        names = "".join(f"{number:02d}\tname.{number}\t1\n" for number in range(45))
        (wordnet / "lexnames").write_text(names)  # the reader wants 45 lines, whatever they say
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(draft, target)


if __name__ == "__main__":
    build(BUILT)
