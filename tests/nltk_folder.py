"""An `nltk_data` folder put together from packages that happen to be installed, for tests.

Tokeniser data: the pip package `llama-index-core`; WordNet: Debian's `wordnet-base` and
`wordnet-sense-index`; tagger: the shared test data. RLAIFV_TEST_NLTK_DATA names a complete folder
instead; RLAIFV_TEST_PUNKT and RLAIFV_TEST_WORDNET name single resources.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"
_TAGGER = "averaged_perceptron_tagger_eng"


def make_nltk_folder(folder: Path) -> Path:
    """A complete folder below `folder`; skips the test when a resource is not to be had."""
    complete = os.environ.get("RLAIFV_TEST_NLTK_DATA")
    if complete:
        return Path(complete)
    pytest.importorskip("nltk")
    for name, source in (
        ("tokenizers/punkt_tab", _punkt()),
        (f"taggers/{_TAGGER}", SHARED / "nltk_data" / "taggers" / _TAGGER),
    ):
        if source is None or not source.is_dir():
            pytest.skip(f"no NLTK resource {name}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(source)
    wordnet = Path(os.environ.get("RLAIFV_TEST_WORDNET", "/usr/share/wordnet"))
    if not (wordnet / "data.noun").is_file():
        pytest.skip("no WordNet")
    target = folder / "corpora" / "wordnet"
    target.mkdir(parents=True)
    for file in wordnet.iterdir():
        (target / file.name).symlink_to(file)
    names = "".join(f"{number:02d}\tname.{number}\t1\n" for number in range(45))
    (target / "lexnames").write_text(names)
    return folder


def _punkt() -> Path | None:
    named = os.environ.get("RLAIFV_TEST_PUNKT")
    if named:
        return Path(named)
    found = find_spec("llama_index")
    for place in (found.submodule_search_locations or []) if found else []:
        folder = Path(place) / "core" / "_static" / "nltk_cache" / "tokenizers" / "punkt_tab"
        if folder.is_dir():
            return folder
    return None
