"""A stage queues its next group while one is computed."""

import gc
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

import jobs._groups
import rlaifv.models
from jobs._entry import Job
from jobs._groups import ahead, in_groups, progress
from rlaifv.config import ModelSpec, RunConfig
from rlaifv.errors import ArtifactError
from rlaifv.models.branches import TrainableModel
from rlaifv.pipeline import CONFIG, Shard, part_key, quarantine_key
from rlaifv.records import Answer, PreferencePair, Quarantined, Record, ReferenceLogps, Verdict
from rlaifv.store import Store, open_store
from tests.jobs_support import make_config, make_run, make_source, run_job
from tests.models_kit import load_engine
from tests.tiny import make_tiny_llava

ONE = Shard(0, 1)
GROUPS = [[0, 1], [2, 3], [4]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    config = make_config(tmp_path / "source.jsonl", model=tmp_path)
    return Job(make_run(tmp_path / "run", config), stage="sample", iteration=0, shard=ONE)


class Device:
    """Doubles numbers, and remembers what was asked of it when."""

    def __init__(self, *, refuses: Iterable[int] = (), breaks: Iterable[int] = ()) -> None:
        self.refuses, self.breaks = set(refuses), set(breaks)
        self.events: list[str] = []

    def queue(self, group: list[int]) -> Callable[[], list[int]]:
        self.events.append(f"queue {group[0]}")
        if self.refuses.intersection(group):
            raise ArtifactError(f"refused {group[0]}")

        def results() -> list[int]:
            self.events.append(f"wait {group[0]}")
            if self.breaks.intersection(group):
                raise ArtifactError(f"broken {group[0]}")
            return [2 * number for number in group]

        return results


def test_the_next_group_is_queued_before_results_are_waited_for_and_no_more(job: Job) -> None:
    device, seen = Device(), list[Any]()
    for group, results in ahead(job, GROUPS, device.queue):
        assert job.group == group
        device.events.append(f"out {group[0]}")
        seen.append((group, results))
    assert seen == [([0, 1], [0, 2]), ([2, 3], [4, 6]), ([4], [8])]
    expected = "queue 0, queue 2, wait 0, out 0, queue 4, wait 2, out 2, wait 4, out 4"
    assert ", ".join(device.events) == expected
    assert job.group == ()
    assert list(ahead(job, [], device.queue)) == []


def until_it_fails(job: Job, groups: Iterable[list[int]], device: Device) -> tuple[list[Any], str]:
    """The groups that were handed out, and the error."""
    out = list[list[int]]()
    with pytest.raises(ArtifactError) as error:
        out.extend(group for group, _ in ahead(job, groups, device.queue))
    return out, str(error.value)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_group_that_cannot_be_queued_is_named_after_those_before_it(
    job: Job, number: int
) -> None:
    first = GROUPS[number][0]
    out, error = until_it_fails(job, GROUPS, Device(refuses=[first]))
    assert (out, error) == (GROUPS[:number], f"refused {first}")
    assert job.group == GROUPS[number]


@pytest.mark.parametrize("refuses", [(), (2,)])
def test_a_group_without_results_is_named_though_the_next_one_is_queued(
    job: Job, refuses: tuple[int, ...]
) -> None:
    out, error = until_it_fails(job, GROUPS, Device(breaks=[0], refuses=refuses))
    assert (out, error) == ([], "broken 0")
    assert job.group == GROUPS[0]


def test_a_group_that_cannot_be_read_comes_after_the_one_before_it(job: Job) -> None:
    def groups() -> Iterator[list[int]]:
        yield from GROUPS[:2]
        raise ArtifactError("out of order")

    assert until_it_fails(job, groups(), Device()) == (GROUPS[:2], "out of order")
    assert job.group == GROUPS[1]


@pytest.mark.parametrize("end", [SystemExit, GeneratorExit, ArtifactError])
def test_what_is_queued_is_dropped_when_a_stage_ends(job: Job, end: type[BaseException]) -> None:
    queued: list[weakref.ref[Any]] = []

    def queue(group: list[int]) -> Callable[[], list[int]]:
        def results() -> list[int]:
            if end is not GeneratorExit:
                raise end
            return group

        queued.append(weakref.ref(results))
        return results

    groups = ahead(job, GROUPS, queue)
    error: BaseException | None = None
    try:
        next(groups)
        groups.close()  # type: ignore[attr-defined]  # a generator
    except (SystemExit, ArtifactError) as raised:
        error = raised  # keeps the traceback, and with it the frames
    gc.collect()
    assert len(queued) == 2
    assert queued[1]() is None
    assert (error is None) == (end is GeneratorExit)


@pytest.mark.parametrize("how", ["ahead", "progress"])
def test_progress_counts_finished_groups(
    job: Job, how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs._groups, "PROGRESS_SECONDS", -1.0)
    caplog.set_level(logging.INFO)
    job.total = 5
    groups = ahead(job, GROUPS, Device().queue) if how == "ahead" else progress(job, GROUPS)
    counts = [[record.args[0] for record in caplog.records if record.args] for _ in groups]  # type: ignore[index]
    assert counts == [[], [2], [2, 4]]
    assert "progress rows=5/5" in caplog.text


def test_groups_are_consecutive_and_the_last_one_is_shorter() -> None:
    assert list(in_groups(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]


class Spy:
    """Puts itself around a real model's queues."""

    def __init__(self, model: TrainableModel) -> None:
        self.events: list[str] = []
        self._calls = 0
        for name in ("queue_answer", "queue_yes_no", "queue_sequence_logps"):
            setattr(model, name, self._around(getattr(model, name)))

    def _around(self, queue: Callable[..., Callable[[], Any]]) -> Callable[..., Any]:
        def queued(*rows: Any, **options: Any) -> Callable[[], Any]:
            number, self._calls = self._calls, self._calls + 1
            self._note(f"queue {number}")
            wait = queue(*rows, **options)

            def results() -> Any:
                self._note(f"wait {number}")
                return wait()

            return results

        return queued

    def _note(self, event: str) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run of three groups up to its pairs."""
    folder = tmp_path_factory.mktemp("run")
    source = make_source(folder / "source", num_rows=10)
    run = make_run(folder / "run", make_config(source, model=make_tiny_llava(folder / "model")))
    for stage in ("prepare", "sample", "claim", "verify", "pair"):
        assert run_job(run, stage) == 0
    return run


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> list[Spy]:
    """One for each model that is loaded."""
    made, load = list[Spy](), rlaifv.models.load_trainable

    def spied(spec: ModelSpec, *, spread: bool = False) -> TrainableModel:
        model = load(spec, spread=spread)
        made.append(Spy(model))
        return model

    monkeypatch.setattr(rlaifv.models, "load_trainable", spied)
    return made


PARTS: dict[str, tuple[str, type[Record]]] = {
    "sample": ("answers", Answer),
    "verify": ("verdicts", Verdict),
    "reflogp": ("reflogps", ReferenceLogps),
}


def again(run: Store, folder: Path, stage: str) -> Store:
    """The same run without the stage's part."""
    copy = Path(copytree(str(run).removeprefix("file://"), folder / "copy"))
    (copy / part_key(0, PARTS[stage][0], ONE)).unlink(missing_ok=True)
    return open_store(str(copy))


@pytest.mark.slow
@pytest.mark.parametrize("stage", PARTS)
def test_stages_work_one_group_ahead_and_write_what_they_would_without(
    pairs: Store, tmp_path: Path, spies: list[Spy], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    run = again(pairs, tmp_path, stage)
    assert run_job(run, stage) == 0
    (spy,) = spies
    last = len(spy.events) // 2 - 1
    assert last >= 1
    between = [event for n in range(last) for event in (f"queue {n + 1}", f"wait {n}")]
    assert spy.events == ["queue 0", *between, f"wait {last}"]
    one_by_one = again(pairs, tmp_path / "plain", stage)

    def plainly(
        job: Job, groups: Iterable[Any], queue: Callable[[Any], Callable[[], Any]]
    ) -> Iterator[Any]:
        return ((group, queue(group)()) for group in groups)

    monkeypatch.setattr(f"jobs.{stage}.ahead", plainly)
    assert run_job(one_by_one, stage) == 0
    key, record = part_key(0, PARTS[stage][0], ONE), PARTS[stage][1]
    assert run.provenance(key).rows_sha256 == one_by_one.provenance(key).rows_sha256
    assert list(run.read_part(key, record)) == list(one_by_one.read_part(key, record))


@pytest.mark.slow
def test_pairs_that_are_too_long_are_set_aside_in_every_group(pairs: Store, tmp_path: Path) -> None:
    run = again(pairs, tmp_path, "reflogp")
    assert run_job(run, "reflogp") == 0
    key = part_key(0, "reflogps", ONE)
    every = list(run.read_part(key, ReferenceLogps))
    asked = list(run.read_part(part_key(0, "pairs", ONE), PreferencePair))
    longest = [max(len(row.chosen_token_nats), len(row.rejected_token_nats)) for row in every]
    most = sorted(longest)[len(longest) // 2]
    engine = load_engine(run.read_json(CONFIG, RunConfig).policy)
    before = {engine.count_prompt(pair.image.bytes, pair.question) for pair in asked}
    assert len(before) == 1
    tight = again(pairs, tmp_path / "tight", "reflogp")
    path = tmp_path / "tight" / "copy" / CONFIG
    values = json.loads(path.read_text())
    values["train"]["max_length"] = most - 1 + before.pop()
    path.write_text(json.dumps(values))
    assert run_job(tight, "reflogp") == 0
    fits = [length < most for length in longest]
    assert len({n // 4 for n, fit in enumerate(fits) if not fit}) > 1
    kept = [row for row, fit in zip(every, fits, strict=True) if fit]
    for row, expected in zip(tight.read_part(key, ReferenceLogps), kept, strict=True):
        assert row.pair_id == expected.pair_id
        assert row.rejected_token_nats == pytest.approx(expected.rejected_token_nats, abs=1e-4)
    aside = tight.read_part(quarantine_key(0, "reflogp", ONE), Quarantined)
    assert [row.row for row in aside] == [n for n, fit in enumerate(fits) if not fit]


@pytest.mark.slow
@pytest.mark.parametrize(("event", "group"), [("queue 1", 1), ("wait 0", 0), ("wait 1", 1)])
def test_a_stage_that_fails_names_the_group(
    pairs: Store,
    tmp_path: Path,
    spies: list[Spy],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    event: str,
    group: int,
) -> None:
    def fail_at(self: Spy, about: str) -> None:
        if about == event:
            raise ArtifactError(f"failed: {about}")

    monkeypatch.setattr(Spy, "_note", fail_at)
    run = again(pairs, tmp_path, "reflogp")
    assert run_job(run, "reflogp") == 65
    rows = list(run.read_part(part_key(0, "pairs", ONE), PreferencePair))[4 * group :][:4]
    ids = f"{rows[0].instruction_id} to {rows[-1].instruction_id}"
    assert f"failed: {event} (in the group {ids}, counted from 0)" in capsys.readouterr().err
    assert spies
