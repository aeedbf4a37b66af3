"""What DeepSpeed compiles when it is first used, and what a process killed meanwhile leaves behind.

torch keeps a lock file beside such a build and waits for its removal without end. A process that is
killed during the build never removes it: every later training on the machine would hang.
"""

import logging
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)

STALE_S = 600.0
"""Age of a lock that no process here holds; another machine's may, on a shared home. A build of
DeepSpeed's takes one to two minutes."""
LOOK_S = 1.0


def wait_for_builds(*, stale_s: float = STALE_S) -> None:
    """Waits while other processes compile, and removes locks whose process is gone."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    told: set[Path] = set()
    while locks := [lock for lock in folder.glob("**/lock") if not _removed(lock, stale_s)]:
        for lock in set(locks) - told:
            log.warning("waiting for the build of another process lock=%s", lock)
        told |= set(locks)
        time.sleep(LOOK_S)


def _removed(lock: Path, stale_s: float) -> bool:
    """Whether a lock is gone, by our hand if nobody can hold it any more."""
    try:
        age_s = time.time() - lock.stat().st_mtime
        if age_s < stale_s or _is_open(lock):
            return False
        log.warning("removed the lock of a build that was killed lock=%s age_s=%.0f", lock, age_s)
        lock.unlink()
    except FileNotFoundError:
        pass
    return True


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has the file open; only ours can be seen."""
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if handle.readlink() == path.resolve():
                return True
        except OSError:  # another user's, or closed meanwhile
            continue
    return False
