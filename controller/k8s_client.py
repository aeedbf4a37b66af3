"""Requests to the Kubernetes API: plain JSON, time bounds on each, and retries of what may pass.

The official client gives configuration, credentials and connections; its own layers above have no
default timeout, never repeat a POST, and take seconds for a thousand typed pods.
"""

import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import urllib3
from kubernetes import config as kubernetes_config
from kubernetes.client import ApiClient, Configuration

from rlaifv.errors import ConfigError, RlaifvError, TransientError

log = logging.getLogger(__name__)
Json = dict[str, Any]
PASSING = frozenset({408, 429, 500, 502, 503, 504})
PAGE = 500
"""Objects per LIST request."""
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class Patience(NamedTuple):
    """How long to try. A create may be repeated: our names are deterministic."""

    attempts: int = 8
    backoff_s: float = 0.5
    """The n-th wait is drawn from 0 to this times 2**n, at most 20 s (full jitter)."""
    connect_s: float = 3.05
    read_s: float = 30.0


class ApiError(RlaifvError):
    """An answer that is not a success."""

    def __init__(self, what: str, status: int, message: str) -> None:
        super().__init__(f"{what}: {status} {message}")
        self.status = status
        self.message = message


class Answer(NamedTuple):
    """A response, read whole."""

    status: int
    headers: Mapping[str, str]
    data: bytes


Transport = Callable[[str, str, bytes | None, Mapping[str, str]], Answer]
"""(method, path and query, body, headers) -> answer. Raises urllib3's errors."""


class Api:
    """One API server; not to be shared with a forked process."""

    def __init__(
        self,
        connect: Callable[[], Transport],
        *,
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._connect = connect
        self._transport = connect()
        self._patience = patience or Patience()
        self._sleep = sleep

    def get(self, path: str, **query: str) -> Json:
        """Raises ApiError (404 among others), TransientError when nothing answers."""
        return self._json("GET", path, query=query)

    def items(self, path: str, **query: str) -> list[Json]:
        """Every object of a collection, page after page; again from the first one when the server
        has forgotten where we were (410)."""
        for _ in range(self._patience.attempts):
            try:
                return list(self._pages(path, query))
            except ApiError as error:
                if error.status != 410:
                    raise
                log.info("listing again: %s", error)
        raise TransientError(f"GET {path}: the listing expires faster than it is read")

    def _pages(self, path: str, query: Mapping[str, str]) -> Iterator[Json]:
        start: dict[str, str] = {}
        while True:
            page = self._json("GET", path, query={**query, "limit": str(PAGE), **start})
            yield from page.get("items") or []
            token = page["metadata"].get("continue")
            if not token:
                return
            start = {"continue": token}

    def create(self, path: str, body: Json) -> Json:
        """Raises ApiError: 409 when there is one of that name, which may be our own lost try; 400
        for a field that the server does not know."""
        return self._json("POST", path, query={"fieldValidation": "Strict"}, body=body)

    def replace(self, path: str, body: Json) -> Json:
        """Raises ApiError 409 when `resourceVersion` is no longer the newest."""
        return self._json("PUT", path, body=body)

    def patch(self, path: str, body: Json) -> Json:
        """A JSON merge patch."""
        return self._json("PATCH", path, body=body, kind="application/merge-patch+json")

    def delete(self, path: str, *, uid: str | None = None) -> None:
        """Removes an object and what it owns, the object last; nothing if it is gone already."""
        body: Json = {"propagationPolicy": "Foreground"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            self._json("DELETE", path, body=body)
        except ApiError as error:
            if error.status not in (404, 409):  # 409: another object has that name by now
                raise

    def text(self, path: str, **query: str) -> str:
        """A plain text answer, such as a pod's log."""
        return self._call("GET", path, query=query).data.decode(errors="replace")

    def _json(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        kind: str = "application/json",
    ) -> Json:
        data = json.dumps(body).encode() if body is not None else None
        answer = self._call(method, path, query=query or {}, data=data, kind=kind)
        value: Json = json.loads(answer.data)
        return value

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str],
        data: bytes | None = None,
        kind: str = "application/json",
    ) -> Answer:
        target = f"{path}?{urlencode(query)}" if query else path
        what, headers, renewed = f"{method} {path}", {"Content-Type": kind}, False
        for attempt in range(1, self._patience.attempts + 1):
            wait: float | None = None
            try:
                answer = self._transport(method, target, data, headers)
                if 200 <= answer.status < 300:
                    return answer
                problem: RlaifvError = _problem(what, answer)
                if answer.status == 401 and not renewed:
                    self._transport, renewed = self._connect(), True  # a rotated token
                    continue
                if not _passes(answer):
                    raise problem
                wait = _retry_after(answer)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                problem = TransientError(f"{what}: no answer from the API server: {error}")
            if attempt == self._patience.attempts:
                break
            log.info("attempt %d of %d: %s", attempt, self._patience.attempts, problem)
            bound = min(20.0, self._patience.backoff_s * 2**attempt)
            self._sleep(max(wait or 0.0, random.uniform(0, bound)))
        raise problem if isinstance(problem, TransientError) else TransientError(str(problem))


def _message(answer: Answer) -> str:
    try:
        value = json.loads(answer.data)
    except ValueError:
        value = None
    if isinstance(value, dict) and value.get("message"):
        return str(value["message"])
    return answer.data[:500].decode(errors="replace")


def _problem(what: str, answer: Answer) -> RlaifvError:
    if answer.status == 401:
        return ConfigError(f"{what}: the API server does not accept the credentials (401)")
    if answer.status == 403 and not _passes(answer):
        return ConfigError(f"{what}: not allowed: {_message(answer)}; see the Role in k8s/")
    return ApiError(what, answer.status, _message(answer))


def _passes(answer: Answer) -> bool:
    """A namespace that is out of quota refuses with 403, until something in it ends."""
    quota = answer.status == 403 and "exceeded quota" in _message(answer)
    return quota or answer.status in PASSING


def _retry_after(answer: Answer) -> float | None:
    text = answer.headers.get("Retry-After", "")
    return min(60.0, float(text)) if text.isdecimal() else None


def connect_cluster(context: str | None = None) -> Transport:
    """A transport with the credentials of the pod, else of `KUBECONFIG` or ~/.kube/config.

    Raises ConfigError when there are none.
    """
    settings = Configuration()
    try:
        if ACCOUNT.exists() and not os.environ.get("KUBECONFIG"):
            kubernetes_config.load_incluster_config(settings)
        else:
            kubernetes_config.load_kube_config(  # the library reads the variable when imported
                os.environ.get("KUBECONFIG"), context, client_configuration=settings
            )
    except kubernetes_config.ConfigException as error:
        raise ConfigError(f"no way to a Kubernetes cluster: {error} (set KUBECONFIG)") from error
    patience = Patience()
    timeout = urllib3.Timeout(connect=patience.connect_s, read=patience.read_s)
    client = ApiClient(settings)

    def send(method: str, target: str, data: bytes | None, headers: Mapping[str, str]) -> Answer:
        keys = {one["key"]: one["value"] for one in settings.auth_settings().values()}
        response = client.rest_client.pool_manager.request(
            method,
            f"{settings.host.rstrip('/')}{target}",
            body=data,
            headers={"Accept": "application/json, */*", **headers, **keys},
            timeout=timeout,
            retries=False,
        )
        return Answer(response.status, response.headers, response.data)

    return send
