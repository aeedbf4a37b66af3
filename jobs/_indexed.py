"""`python -m jobs._indexed 2,5,7/8 jobs.sample ... --shard {shard}`: the shard of this pod.

An Indexed Job numbers its pods from 0; when only some shards are missing, the list says which one
is this pod's. Everything after the list is run in its place.
"""

import os
import sys


def command(words: list[str], index: int) -> list[str]:
    """The stage's command line for the pod with `index`."""
    numbers, _, count = words[0].partition("/")
    shard = f"{numbers.split(',')[index]}/{count}"
    return [word.replace("{shard}", shard) for word in words[1:]]


if __name__ == "__main__":
    stage = command(sys.argv[1:], int(os.environ["JOB_COMPLETION_INDEX"]))
    os.execv(sys.executable, [sys.executable, "-m", *stage])  # noqa: S606
