"""What a person sees while a run goes on: a line per finished stage, and a live last line."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import TextIO

from controller.loop import Progress, Watcher
from controller.plan import CONFIG_EXIT, DATA_EXIT, ShardId, ShardState
from controller.summary import percent, report_metric
from controller.tables import folded, room
from rlaifv.config import RunConfig
from rlaifv.pipeline import STAGES, num_shards
from rlaifv.records import Choice
from rlaifv.store import Manifest

ERASE = "\r\x1b[K"
INDENT = " " * 8
"""Under the text of a line, beside its minutes."""


class Console(Watcher):
    """Writes to a stream; the live line only when that is a terminal."""

    def __init__(self, config: RunConfig, stream: TextIO) -> None:
        self._config = config
        self._stream = stream
        self._live = stream.isatty()
        self._started = time.monotonic()
        self._failures: dict[ShardId, int] = {}
        self._waits: set[tuple[int, str, str]] = set()

    def look(self, progress: Progress) -> None:
        for line in (*self._new_failures(progress), *self._new_waits(progress)):
            self.say(line)
        if self._live:
            self._stream.write(f"{ERASE}{self._line(progress)[: room() - 1]}")
            self._stream.flush()

    def stage_done(self, iteration: int, manifest: Manifest) -> None:
        rows = sum(part.rows for part in manifest.parts)
        seconds = sum(part.seconds for part in manifest.parts)
        bad = sum(part.quarantined for part in manifest.parts)
        text = (
            f"iteration {iteration}  {manifest.stage:<8} {rows:>7} rows {seconds:>8.1f} s of work"
        )
        self.say(text + (f"  {bad} rows quarantined" if bad else ""))

    def chosen(self, iteration: int, choice: Choice) -> None:
        value = report_metric(self._config, choice.metrics, "response_hallucination")
        figures = f"; {percent(value)} of answers hallucinate" if value is not None else ""
        what = f"step {choice.step}" if choice.step else choice.reason
        if not choice.step and choice.candidates[1:]:  # compared: the reason is long
            what = "the policy stays"
        self.say(f"iteration {iteration}  choose   {what}{figures}")

    def say(self, line: str) -> None:
        """One lasting line, with the minutes since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        erase = ERASE if self._live else ""
        text = folded(f"{minutes:3d}:{seconds:02d}  {line}", INDENT)
        self._stream.write(f"{erase}{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Removes the live line."""
        if self._live:
            self._stream.write(ERASE)
            self._stream.flush()

    def _new_failures(self, progress: Progress) -> Iterator[str]:
        for identity, shard in progress.shards.items():
            if shard.phase != "ended" or not shard.exit_code:
                continue
            if self._failures.get(identity) != shard.attempts:
                self._failures[identity] = shard.attempts
                last = shard.exit_code in (CONFIG_EXIT, DATA_EXIT)  # the run's end gives the reason
                reason = "" if last else f": {shard.reason}"
                yield f"{identity}: attempt {shard.attempts} {ending(shard)}{reason}"

    def _new_waits(self, progress: Progress) -> Iterator[str]:
        """What a stage waits for, once: quota, nodes, images (`<what>: <details>`)."""
        for identity, shard in progress.shards.items():
            what = (identity.iteration, identity.stage, shard.reason.partition(":")[0])
            if shard.phase == "waiting" and ":" in shard.reason and what not in self._waits:
                self._waits.add(what)
                yield f"{identity} waits: {shard.reason}"

    def _line(self, progress: Progress) -> str:
        running = Counter(
            (identity.iteration, identity.stage)
            for identity, shard in progress.shards.items()
            if shard.phase == "running"
        )
        parts = []
        for (iteration, stage), count in sorted(
            running.items(), key=lambda item: list(STAGES).index(item[0][1])
        ):
            done = len(progress.state.done(self._config, iteration, stage))
            total = num_shards(self._config, stage)
            parts.append(f"{stage} {done}/{total} done, {count} running")
        current = min((iteration for iteration, _ in running), default=len(progress.state.choices))
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        head = f"{minutes:3d}:{seconds:02d}  iteration {current} of {self._config.iterations}"
        return f"{head}  {' | '.join(parts)}"


def ending(shard: ShardState) -> str:
    """How the last attempt of a shard ended, in words."""
    code = shard.exit_code or 0
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
