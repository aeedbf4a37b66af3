"""`python -m jobs._gang jobs.train ...`: this pod's part of a stage that several pods do together.

Waits for rank 0, then becomes torchrun, which takes the rest from the `PET_` variables. The name
of a pod may not resolve at first, and resolves before the port listens; both are waited for.
"""

import logging
import os
import socket
import sys
import time

from rlaifv.errors import TransientError

log = logging.getLogger(__name__)
TIMEOUT = "RLAIFV_GANG_TIMEOUT"
PAUSE_S = 0.5


def await_rank_0(address: str, port: int, *, timeout_s: float, dial: bool) -> None:
    """Returns when `address` resolves and, with `dial`, answers at `port`.

    Raises TransientError when it does not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            if dial:
                socket.create_connection((address, port), timeout=3).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TransientError(
                    f"rank 0 at {address}:{port} is not there after {timeout_s:.0f} s: {error}"
                ) from error
        time.sleep(PAUSE_S)


def main(words: list[str]) -> int:
    """Becomes torchrun; returns only when rank 0 does not come."""
    rank = int(os.environ["JOB_COMPLETION_INDEX"])
    address, port = os.environ["PET_MASTER_ADDR"], int(os.environ["PET_MASTER_PORT"])
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    try:
        await_rank_0(address, port, timeout_s=float(os.environ[TIMEOUT]), dial=rank > 0)
    except TransientError as error:
        log.error("%s", error)
        return error.exit_code
    environment = os.environ | {"PET_NODE_RANK": str(rank), "PET_RDZV_BACKEND": "static"}
    program = [sys.executable, "-m", "torch.distributed.run", "-m", "--", *words]
    os.execve(sys.executable, program, environment)  # noqa: S606


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
