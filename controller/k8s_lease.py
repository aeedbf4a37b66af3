"""One controller per run in a cluster: a Lease says who drives it, and is renewed while it lasts."""

import datetime
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from controller.k8s_client import Api, ApiError
from rlaifv.errors import RlaifvError, TransientError

log = logging.getLogger(__name__)
Json = dict[str, Any]
NOBODY = ""


class LeaseSettings(NamedTuple):
    """A holder that has not renewed for `duration_s` is dead."""

    duration_s: float = 30.0
    renew_s: float = 10.0


class Lease:
    """A Lease object. Dead or alive is told by watching it with our clock, not by its times."""

    def __init__(
        self, api: Api, path: str, *, holder: str, settings: LeaseSettings | None = None
    ) -> None:
        """`path` of the object, such as `/apis/coordination.k8s.io/v1/namespaces/a/leases/b`."""
        self._api = api
        self._path = path
        self._holder = holder
        self._settings = settings or LeaseSettings()
        self._renewed = 0.0
        self._stop = threading.Event()
        self._taken_by = NOBODY

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds it for the block; raises TransientError when somebody else is alive."""
        self._acquire()
        thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self._release()

    def check(self) -> None:
        """Raises TransientError when it is not ours any more, or may not be (we were paused)."""
        silent = time.monotonic() - self._renewed
        if self._taken_by or silent > self._settings.duration_s:
            who = self._taken_by or "nobody knows"
            raise TransientError(
                f"the lease on this run was lost ({silent:.0f} s without renewal; now: {who}); "
                "this controller ends, Jobs go on"
            )

    def _acquire(self) -> None:
        first = self._read()
        if first is None:
            self._write(None)
            return
        holder = first["spec"].get("holderIdentity") or NOBODY
        deadline = time.monotonic() + self._settings.duration_s
        current = first
        if holder not in (NOBODY, self._holder):
            log.warning("the run is held by %s; is it alive?", holder)
        while holder not in (NOBODY, self._holder) and time.monotonic() < deadline:
            self._stop.wait(self._settings.renew_s / 5)
            current = self._read() or current
            same = current["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
            holder = current["spec"].get("holderIdentity") or NOBODY
            if not same and holder:
                raise TransientError(
                    f"another controller drives this run: {holder}, alive just now; wait for it, "
                    "or look on with `python -m controller status`"
                )
        self._write(current)

    def _keep(self) -> None:
        while not self._stop.wait(self._settings.renew_s):
            try:
                current = self._read()
                holder = (current or {"spec": {}})["spec"].get("holderIdentity") or NOBODY
                if holder != self._holder:
                    self._taken_by = holder or "nobody"
                    return
                self._write(current)
            except RlaifvError as error:
                log.warning("the lease is not renewed: %s", error)

    def _read(self) -> Json | None:
        try:
            return self._api.get(self._path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _write(self, before: Json | None) -> None:
        """Makes it ours, if nobody has written since `before` was read."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        stamp = now.replace("+00:00", "Z")
        started = time.monotonic()
        folder, _, name = self._path.rpartition("/")
        old = before["spec"] if before else {}
        ours = old.get("holderIdentity") == self._holder
        spec = {
            "holderIdentity": self._holder,
            "leaseDurationSeconds": int(self._settings.duration_s),
            "acquireTime": old.get("acquireTime") if ours else stamp,
            "renewTime": stamp,
            "leaseTransitions": old.get("leaseTransitions", 0) + (0 if ours or not before else 1),
        }
        body: Json = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": before["metadata"] if before else {"name": name},
            "spec": spec,
        }
        try:
            self._api.replace(self._path, body) if before else self._api.create(folder, body)
        except ApiError as error:
            if error.status != 409:
                raise
            current = self._read() or {"spec": {}}
            if current["spec"].get("holderIdentity") != self._holder:
                raise TransientError(
                    f"another controller took this run: {current['spec'].get('holderIdentity')}"
                ) from error
        self._renewed = started

    def _release(self) -> None:
        """The next controller need not wait; a failure to say so only makes it wait."""
        try:
            current = self._read()
            if current and current["spec"].get("holderIdentity") == self._holder:
                body = current | {"spec": current["spec"] | {"holderIdentity": NOBODY}}
                self._api.replace(self._path, body)
        except RlaifvError as error:
            log.info("the lease is not released: %s", error)
