"""What a place that runs jobs must offer."""

from collections.abc import Mapping
from typing import Protocol

from controller.plan import JobSpec, ShardId, ShardState, Unit


class Executor(Protocol):
    """Runs shards and says how they ended; retrying is the planner's decision."""

    @property
    def unit(self) -> Unit:
        """What it wants to be handed at a time."""
        ...

    def submit(self, spec: JobSpec) -> None:
        """Takes a job; its shards are `waiting` from now on."""
        ...

    def states(self) -> Mapping[ShardId, ShardState]:
        """Every shard ever submitted. One that is `ended` with 0 has committed its part before."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Lets jobs go on until one of them ends, or the time is over."""
        ...

    def logs(self, shard: ShardId) -> str:
        """The end of a shard's log, and where the rest is."""
        ...

    def close(self) -> None:
        """The controller ends. Local stages end with it; Jobs of a cluster go on."""
        ...

    def cancel(self) -> None:
        """Ends everything that runs; what is not committed is lost, nothing else."""
        ...
