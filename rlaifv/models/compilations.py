"""What torch compiles outlives the process: it lies in the run's store, for the stage's next one.

`jobs` says where (`kept`); `lines.compiled` says when (`load`), which is never on a CPU. What goes
wrong here is a warning: the stage then compiles as if nothing were stored.
"""

import logging
import pickle
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlaifv import __version__
from rlaifv.config import RunConfig
from rlaifv.errors import RlaifvError
from rlaifv.pipeline import compiled_key
from rlaifv.store import Store

log = logging.getLogger(__name__)
MOST_BYTES = 512 << 20
"""More is not stored: some ten times what the layers of a 7B take."""
FAILURES = (
    AssertionError, AttributeError, EOFError, ImportError, LookupError, OSError, RlaifvError,
    RuntimeError, TypeError, ValueError, pickle.PickleError,
)  # fmt: skip
"""Of the store, and of torch where it cannot use its own format."""
Keys = frozenset[tuple[str, str]]
"""Kind and key of each thing that was compiled, as torch names them."""


class Compilations:
    """Of one stage of a run. Each process of a gang has its own: the code names its GPU."""

    def __init__(self, run: Store, *, stage: str, rank: int = 0) -> None:
        self._run, self._stage, self._rank = run, stage, rank
        self._lock = threading.Lock()
        self._asked = False
        """Whether something was about to be compiled."""
        self._key = ""
        self._loaded: Keys = frozenset()

    def load(self) -> None:
        """Hands what is stored to torch; at the first call, before anything is compiled."""
        with self._lock:
            if self._asked:
                return
            self._asked = True
            try:
                self._key = compiled_key(self._stage, _environment(self._rank))
                self._load()
            except FAILURES as error:
                log.warning("what was compiled cannot be used: %s", _said(error))

    def _load(self) -> None:
        import torch  # here, so that stages without it do not load it

        if not self._run.exists(self._key):
            log.info("nothing compiled is stored yet: %s", self._key)
            return
        started = time.monotonic()
        data = self._run.read_bytes(self._key)
        found = torch.compiler.load_cache_artifacts(data)
        if found is None:
            log.warning("what was compiled cannot be used: %s is broken", self._key)
            return
        self._loaded = _keys(found)
        log.info(
            "compiled before: %d pieces, %.1f MB, loaded in %.1f s from %s",
            len(self._loaded),
            len(data) / 1e6,
            time.monotonic() - started,
            self._key,
        )

    def store(self) -> None:
        """Stores what was compiled, if any of it was not loaded; replaces what is there."""
        if not self._key:
            return
        try:
            self._store()
        except FAILURES as error:
            log.warning("what was compiled is not stored: %s", _said(error))

    def _store(self) -> None:
        import torch  # here, so that stages without it do not load it

        started = time.monotonic()
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            log.info("nothing was compiled that torch keeps")
            return
        data, made = saved
        new = _keys(made) - self._loaded
        if not new:
            log.info("nothing was compiled that was not stored")
        elif len(data) > MOST_BYTES:
            log.warning("what was compiled is not stored: %.0f MB", len(data) / 1e6)
        else:
            self._run.write_bytes(self._key, data)
            log.info(
                "compiled: %d new pieces, %.1f MB in all, stored in %.1f s as %s",
                len(new),
                len(data) / 1e6,
                time.monotonic() - started,
                self._key,
            )


_of_stage: Compilations | None = None


@contextmanager
def kept(run: Store, config: RunConfig, *, stage: str, rank: int = 0) -> Iterator[None]:
    """What is compiled inside is looked up in the run first, and stored if the block succeeds."""
    global _of_stage
    if not config.keep_compiled:
        yield
        return
    mine = _of_stage = Compilations(run, stage=stage, rank=rank)
    try:
        yield
    finally:
        _of_stage = None
    mine.store()


def load() -> None:
    """Before something is compiled; nothing outside of a stage."""
    if _of_stage is not None:
        _of_stage.load()


def _environment(rank: int) -> str:
    """Whose code it is: a name of code, torch, GPU and process."""
    import torch  # here, so that stages without it do not load it

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name = f"{__version__}-torch-{torch.__version__}-{device}-{rank}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


def _keys(info: Any) -> Keys:
    return frozenset((kind, key) for kind, keys in info.artifacts.items() for key in keys)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
