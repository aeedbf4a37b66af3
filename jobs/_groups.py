"""A stage works group by group; while one is computed, the next one is queued already."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from jobs._entry import Job

log = logging.getLogger(__name__)
T = TypeVar("T")
G = TypeVar("G", bound=Sequence[Any])
"""Rows, or several lists of them: then a group is counted and named by the first."""
PROGRESS_SECONDS = 30.0


def in_groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive groups of `size` items, the last one shorter."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def progress(job: Job, groups: Iterable[G]) -> Iterator[G]:
    """The groups, with a bar on a terminal and a log line every half minute."""
    with _counting(job) as finished:
        for group in groups:
            job.group = _rows(group)
            yield group
            finished()


def ahead(
    job: Job, groups: Iterable[G], queue: Callable[[G], Callable[[], T]]
) -> Iterator[tuple[G, T]]:
    """The same, each with its results: what the call returns that `queue` gives for it.

    The next group is queued before that call is made, and no more, so that memory is bounded. What
    is wrong with a group is raised after those before it; `job.group` is then the one it is about.
    """
    iterator = iter(groups)
    waiting: list[tuple[G, Callable[[], T]]] = []

    def queue_next() -> None:
        if group := next(iterator, None):
            job.group = _rows(group)
            waiting.append((group, queue(group)))

    def first() -> tuple[G, T]:
        group, results = waiting.pop(0)
        job.group = _rows(group)
        return group, results()

    with _counting(job) as finished:
        try:
            queue_next()
            while waiting:
                job.group = _rows(waiting[0][0])
                try:
                    queue_next()
                except Exception:  # whatever it is, it may wait until this group is handed out
                    about = job.group
                    yield first()
                    job.group = about
                    raise
                yield first()
                finished()
        finally:
            waiting.clear()  # nobody waits for it any more, also where a traceback keeps this frame
    job.group = ()


@contextmanager
def _counting(job: Job) -> Iterator[Callable[[], None]]:
    """What is called whenever `job.group` is finished."""
    started = reported = time.monotonic()
    done = 0
    with tqdm(desc=job.stage.name, unit="row", disable=None, leave=False) as bar:

        def finished() -> None:
            nonlocal done, reported
            done += len(job.group)
            bar.total = job.total
            bar.update(len(job.group))
            now = time.monotonic()
            if now - reported > PROGRESS_SECONDS:
                rate = done / (now - started)
                log.info("progress rows=%d/%s rate=%.1f/s", done, job.total or "?", rate)
                reported = now

        yield finished


def _rows(group: Sequence[Any]) -> Sequence[Any]:
    return group[0] if isinstance(group, tuple) else group
