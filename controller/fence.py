"""A number per controller in the run's store: one that woke up late finds a higher one, and ends.

A lease alone cannot stop a controller that was paused between looking at it and writing. What is
still written after the check is the same whoever writes it (first writer wins, and manifests and
choices are functions of what is stored).
"""

import re

from rlaifv.errors import RlaifvError
from rlaifv.records import Record
from rlaifv.store import Store

FOLDER = "controllers"
_NUMBER = re.compile(rf"{FOLDER}/(\d+)\.json")


class TakenOver(RlaifvError):
    """A later controller has begun; being started again must not bring this one back."""


class Holder(Record):
    """Who took the number."""

    holder: str


class Fence:
    """This controller's number in one run."""

    def __init__(self, run: Store, holder: str) -> None:
        """Takes the next number; every controller with a lower one ends at its next `check`."""
        self._run = run
        taken = [int(m[1]) for item in run.objects(FOLDER) if (m := _NUMBER.fullmatch(item.key))]
        self.number = max(taken, default=0) + 1
        while not run.write_json_once(_key(self.number), Holder(holder=holder)):
            self.number += 1

    def check(self) -> None:
        """Raises TakenOver when a later controller has begun."""
        if self._run.exists(_key(self.number + 1)):
            later = self._run.read_json(_key(self.number + 1), Holder)
            raise TakenOver(
                f"{self._run}: {later.holder} has taken over (controller {self.number + 1}, this "
                f"one is {self.number}); this one ends"
            )


def _key(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"
