"""A language model that grades answers: any OpenAI-compatible endpoint, or a file of its replies.

Every reply is cached under its full request and the number of the repeat, so that a run that was
cut short asks only for what is missing. An item without a usable reply is an error, never a gap.
The key is read from OPENAI_API_KEY and appears in no artifact, cache entry or log line.
"""

import hashlib
import json
import logging
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from pydantic import ValidationError

from rlaifv.benchmarks.replies import Accept, Ask, Reply, Tally
from rlaifv.config import JudgeConfig
from rlaifv.errors import ConfigError, TransientError

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
_LONGEST_WAIT = 60.0
CHARACTERS_PER_TOKEN = 4
"""For estimates only."""


class Estimate(NamedTuple):
    """What a list of questions will cost at most, at four characters per token."""

    requests: int
    input_tokens: int
    max_output_tokens: int
    max_cost: float | None


def no_judge(benchmark: str) -> ConfigError:
    """For a benchmark that no rule can grade."""
    return ConfigError(
        f"benchmark {benchmark}: a judge is needed: --judge URL (in a configuration: `judge` with "
        "a `url`), any OpenAI-compatible endpoint"
    )


class Judge:
    """An endpoint with bounded retries, concurrency and a cache."""

    def __init__(
        self,
        config: JudgeConfig,
        *,
        default_model: str,
        max_tokens: int | None = None,
        cache: Path | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`default_model`, `max_tokens`: of the published scores, where `config` names none."""
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ConfigError("openai is not installed: pip install 'rlaifv[eval]'") from error
        self._config = config
        self._model = config.model or default_model
        self._max_tokens = config.max_tokens or max_tokens
        self._cache = cache or cache_folder()
        self._pause = pause
        self._client = openai.OpenAI(
            base_url=config.url,
            api_key=os.environ.get(KEY_VARIABLE) or "none",
            max_retries=0,
            timeout=config.timeout_seconds,
        )
        self._counts: Counter[str] = Counter()
        self._models: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def identity(self) -> str:
        """Model, endpoint without credentials, and every setting that a reply may depend on."""
        config = self._config
        settings = {
            "temperature": f"{config.temperature:g}",
            "top_p": f"{config.top_p:g}",
            "seed": config.seed,
            **({"max_tokens": self._max_tokens} if self._max_tokens else {}),
            "attempts": config.attempts,
        }
        named = " ".join(f"{name}={value}" for name, value in settings.items())
        return f"{self._model} at {_without_credentials(config.url)} {named}"

    @property
    def repeats(self) -> int | None:
        return self._config.repeats

    def tally(self) -> Tally:
        counts = self._counts
        return Tally(
            counts["asked"],
            counts["cached"],
            counts["failures"],
            counts["input"],
            counts["output"],
            self._cost(counts["input"], counts["output"]),
            dict(sorted(self._models.items())),
        )

    def estimate(self, asks: Sequence[Ask]) -> Estimate:
        """Of the questions that are not in the cache."""
        fresh = [ask for ask in asks if not self._entry(ask).exists()]
        characters = sum(len(message.content) for ask in fresh for message in ask.messages)
        inputs, outputs = characters // CHARACTERS_PER_TOKEN, sum(map(self._limit, fresh))
        return Estimate(len(fresh), inputs, outputs, self._cost(inputs, outputs))

    def ask(self, asks: Sequence[Ask], accept: Accept) -> list[Reply]:
        """One reply per question, in order; a cached one is not asked for.

        Raises ConfigError at once when the endpoint refuses the key or does not know the model;
        TransientError when items are left without a usable reply after `attempts` requests each:
        all others are cached by then, and a second call asks only for the missing ones.
        """
        estimate = self.estimate(asks)
        cost = (
            "no prices given" if estimate.max_cost is None else f"at most {estimate.max_cost:.4g}"
        )
        log.info(
            "judge %s: %d questions, %d not cached, about %d input tokens, at most %d output; %s",
            *(self._model, len(asks), estimate.requests),
            *(estimate.input_tokens, estimate.max_output_tokens, cost),
        )
        self._stop.clear()
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            outcomes = list(pool.map(lambda ask: self._one(ask, accept), asks))
        for outcome in outcomes:
            if isinstance(outcome, ConfigError):
                raise outcome
        lost = [
            (ask, outcome)
            for ask, outcome in zip(asks, outcomes, strict=True)
            if not isinstance(outcome, Reply)
        ]
        if lost:
            ask, reason = lost[0]
            raise TransientError(
                f"judge {self.identity}: {len(lost)} of {len(asks)} items have no usable reply, "
                f"the first is {ask.item}, repeat {ask.repeat}: {reason}; the others are cached, "
                "another call asks only for the missing ones"
            )
        replies = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
        self._models.update(reply.model for reply in replies)
        others = sorted({reply.model for reply in replies} - {self._model})
        if others:
            log.warning("judge: asked for model %s, answered by %s", self._model, others)
        return replies

    def _one(self, ask: Ask, accept: Accept) -> "Reply | ConfigError | str":
        """The reply, the error that ends everything, or why there is none."""
        entry = self._entry(ask)
        known = _read_entry(entry)
        if known is not None and accept(known.text):
            self._count(cached=1)
            return known
        reason, refused = "not asked: the judge gave no answer to any item", 0
        for attempt in range(self._config.attempts):
            if self._stop.is_set():
                return reason
            outcome = self._request(ask, refused)
            if isinstance(outcome, ConfigError):
                self._stop.set()
                return outcome
            if isinstance(outcome, Reply):
                self._count(asked=1, input=outcome.input_tokens, output=outcome.output_tokens)
                if accept(outcome.text):
                    _write_entry(entry, outcome)
                    return outcome
                reason = f"the reply cannot be used: {outcome.text!r:.200}"
                refused += 1
                continue
            reason = outcome.reason
            self._count(failures=1)
            if outcome.for_good:
                break
            if attempt + 1 < self._config.attempts:
                self._pause(self._wait(ask, attempt, outcome.retry_after))
        self._give_up_if_nothing_works()
        return reason

    def _request(self, ask: Ask, refused: int) -> "Reply | _Failure | ConfigError":
        """`refused`: replies to this item that could not be used; each changes the seed."""
        import openai

        config = self._config
        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": m.role, "content": m.content} for m in ask.messages],  # type: ignore[misc]
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=self._limit(ask),
                seed=config.seed + ask.repeat + 1_000_003 * refused,
            )
        except (
            openai.AuthenticationError,
            openai.PermissionDeniedError,
            openai.NotFoundError,
        ) as e:
            return ConfigError(
                f"judge {self.identity}: refused with status {e.status_code}; check url, model and "
                f"the key in {KEY_VARIABLE}"
            )
        except openai.APIStatusError as error:
            after = error.response.headers.get("retry-after", "")
            return _Failure(
                f"status {error.status_code}: {error.message:.200}",
                float(after) if after.isdigit() else None,
                for_good=error.status_code in (400, 413, 422),
            )
        except (openai.APIError, ValueError) as error:
            return _Failure(f"{type(error).__name__}: {error!s:.200}")
        return _parse_completion(completion)

    def _wait(self, ask: Ask, attempt: int, retry_after: float | None) -> float:
        """Seconds before the next request: what the endpoint asks for, else exponential."""
        if retry_after is not None:
            return min(retry_after, _LONGEST_WAIT)
        longest: float = min(self._config.backoff_seconds * 2**attempt, _LONGEST_WAIT)
        return longest * random.Random(f"{ask.item}/{ask.repeat}/{attempt}").uniform(0.5, 1.0)

    def _give_up_if_nothing_works(self) -> None:
        """An endpoint that answers nobody is not asked for the remaining thousands."""
        self._count(lost=1)
        with self._lock:
            if not self._counts["asked"] and self._counts["lost"] >= self._config.concurrency:
                self._stop.set()

    def _entry(self, ask: Ask) -> Path:
        config = self._config
        request = {
            "url": _without_credentials(config.url),
            "model": self._model,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": config.seed,
            "max_tokens": self._limit(ask),
            "messages": ask.messages,
            "repeat": ask.repeat,
        }
        name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self._cache / name[:2] / f"{name}.json"

    def _limit(self, ask: Ask) -> int:
        return self._config.max_tokens or ask.max_tokens

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self._counts.update(numbers)

    def _cost(self, inputs: int, outputs: int) -> float | None:
        config = self._config
        if config.input_price is None or config.output_price is None:
            return None
        return (inputs * config.input_price + outputs * config.output_price) / 1e6


class _Failure(NamedTuple):
    """A request that got no reply."""

    reason: str
    retry_after: float | None = None
    for_good: bool = False
    """The endpoint finds fault with the request itself."""


def _parse_completion(completion: Any) -> Reply | _Failure:
    """A reply from whatever the client made of the body; endpoints do send other things."""
    try:
        body = completion.model_dump(warnings=False)
        usage = body.get("usage") or {}
        return Reply(
            text=body["choices"][0]["message"]["content"],
            model=body["model"],
            input_tokens=usage.get("prompt_tokens") or 0,
            output_tokens=usage.get("completion_tokens") or 0,
        )
    except (AttributeError, KeyError, IndexError, TypeError, ValidationError):
        return _Failure(f"not a chat completion: {completion!r:.200}")


def cache_folder() -> Path:
    """Where replies are kept: `judge` below RLAIFV_CACHE, else below `~/.cache/rlaifv`."""
    named = os.environ.get("RLAIFV_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "rlaifv") / "judge"


def _read_entry(path: Path) -> Reply | None:
    try:
        return Reply.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        log.warning("judge cache: %s is not an entry; asking again", path)
        return None


def _write_entry(path: Path, reply: Reply) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(reply.model_dump_json().encode())
    Path(file.name).replace(path)


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))
