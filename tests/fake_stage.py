"""A stand-in for a stage process: `python -m tests.fake_stage MARK ACTION ... --shard I/N`.

Every action but the last is for an attempt that came before; `MARK` counts the attempts.
"""

import os
import signal
import sys
import time
from pathlib import Path


def main(mark: Path, *actions: str) -> int:
    attempts = mark.read_text() if mark.exists() else ""
    mark.write_text(f"{attempts}x")
    action = actions[min(len(attempts), len(actions) - 1)]
    threads, gpu = (os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"))
    print(f"attempt {len(attempts)} threads {threads} gpu {gpu}", flush=True)
    if action == "sleep":
        mark.with_suffix(".pid").write_text(str(os.getpid()))
        time.sleep(600)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "fail":
        print("2026-01-01T00:00:00.000Z ERROR [x] ArtifactError: row 7 is bad", flush=True)
        return 65
    return 75 if action == "later" else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2 : sys.argv.index("--shard")]))
