"""Speaks the fork server's protocol without forking: `exit CODE`, `stay` until killed, `die`.

With RLAIFV_FAKE=dead it ends at once; with deadly or crashing its children do.
"""

import json
import os
import sys


def say(**message: int) -> None:
    print(json.dumps(message), flush=True)


mode = os.environ.get("RLAIFV_FAKE")
if mode == "dead":
    sys.exit("no module named torch")
for line in sys.stdin:
    request = json.loads(line)
    if mode in ("deadly", "crashing"):
        say(id=request["id"], pid=1)
        say(id=request["id"], exit=-9 if mode == "deadly" else -11)
        continue
    if "kill" in request:
        say(id=request["id"], exit=-request["kill"])
        continue
    say(id=request["id"], pid=1)
    action, *rest = request["argv"]
    if action == "exit":
        say(id=request["id"], exit=int(rest[0]))
    elif action == "die":
        os._exit(3)
