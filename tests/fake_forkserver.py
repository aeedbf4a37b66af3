"""Speaks the fork server's protocol without forking: `exit CODE`, `stay` until killed, `die`."""

import json
import os
import sys


def say(**message: int) -> None:
    print(json.dumps(message), flush=True)


for line in sys.stdin:
    request = json.loads(line)
    if "kill" in request:
        say(id=request["id"], exit=-request["kill"])
        continue
    say(id=request["id"], pid=1)
    action, *rest = request["argv"]
    if action == "exit":
        say(id=request["id"], exit=int(rest[0]))
    elif action == "die":
        os._exit(3)
