"""A model behind an OpenAI-compatible server (vLLM, SGLang, `rlaifv.serve`, a vendor).

For sampling, claims and labelling; log-probabilities of given answers, which training needs, are
not part of that protocol. The image comes first in every prompt and requests keep their order, so
that a server's prefix cache serves all questions about an image. Sampled text depends on the
server; scores of different engines do not belong into one comparison.
"""

import base64
import io
import logging
import math
import os
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from rlaifv.config import EndpointConfig, ModelSpec
from rlaifv.errors import ArtifactError, ConfigError, TransientError
from rlaifv.images import BadImageError, decode
from rlaifv.models.base import (
    NO,
    YES,
    Branches,
    Decoding,
    Floats,
    Generation,
    ImageQuestions,
    Prompt,
    VisionLanguageModel,
    YesNo,
)

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
GREEDY = Decoding(1)
_LONGEST_WAIT = 60.0
_REFUSED = (400, 413, 422)
_NO_ACCESS = (401, 403, 404)
_WORTH_ANOTHER_TRY = (408, 409, 425, 429)


_T = TypeVar("_T")


class _Failure(NamedTuple):
    """A request that may be repeated."""

    reason: str
    retry_after: float | None = None


class _Request(NamedTuple):
    row: int
    content: Any
    decoding: Decoding
    seed: int
    top_logprobs: int = 0


def endpoint_identity(spec: ModelSpec) -> str:
    """`model at server`, without credentials."""
    if spec.endpoint is None:
        raise ConfigError(f"model {spec.path}: has no endpoint")
    url = urlsplit(spec.endpoint.url)
    return f"{spec.path} at {url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


class EndpointModel(VisionLanguageModel):
    """A `TextModel` as well. Requests that nobody waits for any more are not made.

    Raises ConfigError when the server refuses the key, does not know the model or cannot give
    probabilities; ArtifactError with the row that it refuses; TransientError when requests keep
    failing.
    """

    def __init__(self, spec: ModelSpec, *, pause: Callable[[float], None] = time.sleep) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ConfigError("openai is not installed: pip install 'rlaifv[eval]'") from error
        self.identity = endpoint_identity(spec)
        self.batch_size = spec.batch_size
        self._endpoint: EndpointConfig = spec.endpoint  # type: ignore[assignment]  # checked above
        self._model, self._pause = spec.path, pause
        self._client = openai.OpenAI(
            base_url=self._endpoint.url,
            api_key=os.environ.get(KEY_VARIABLE) or "none",
            max_retries=0,
            timeout=self._endpoint.timeout_seconds,
        )
        self._threads = ThreadPoolExecutor(self._endpoint.concurrency)
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        """Requests, failures, input_tokens, output_tokens, served_by/<model>."""

    @property
    def usage(self) -> dict[str, str]:
        """For the provenance: who answered, how often it was asked, tokens, cost."""
        end, counts = self._endpoint, self.counts
        served = sorted(name for name in counts if name.startswith("served_by/"))
        cost = counts["input_tokens"] * end.input_price + counts["output_tokens"] * end.output_price
        names = ("requests", "failures", "input_tokens", "output_tokens")
        return {
            **{name.replace("_", " "): str(counts[name]) for name in names},
            "served by": ", ".join(name.removeprefix("served_by/") for name in served),
            "cost": f"{cost / 1e6:.6f}",
        }

    def queue_answer(
        self, prompts: Sequence[Prompt], *, decoding: Decoding
    ) -> Callable[[], list[list[Generation]]]:
        """One list per prompt, one generation per seed; a request each."""
        contents = [_content(_url(p.image, row), p.question) for row, p in enumerate(prompts)]
        requests = [
            _Request(row, contents[row], decoding, seed)
            for row, prompt in enumerate(prompts)
            for seed in prompt.seeds
        ]
        asked = self._ask_all(requests, _generation)

        def wait() -> list[list[Generation]]:
            generations = iter(asked())
            return [[next(generations) for _ in prompt.seeds] for prompt in prompts]

        return wait

    def reply(
        self, prompts: Sequence[str], *, seeds: Sequence[int], decoding: Decoding
    ) -> list[Generation]:
        """One reply per prompt, in order."""
        rows = enumerate(zip(prompts, seeds, strict=True))
        requests = [_Request(row, prompt, decoding, seed) for row, (prompt, seed) in rows]
        return self._ask_all(requests, _generation)()

    def queue_yes_no(self, rows: Sequence[ImageQuestions]) -> Callable[[], list[list[YesNo]]]:
        """From the probabilities of the likeliest `top_logprobs` tokens.

        A word that is not among them counts 0; where neither side has one the verdict is 0 and 0,
        a rejection, and a warning tells how often that was.
        """
        top = self._endpoint.top_logprobs
        urls = [_url(row.image, number) for number, row in enumerate(rows)]
        requests = [
            _Request(number, _content(urls[number], question), GREEDY, 0, top)
            for number, row in enumerate(rows)
            for question in row.questions
        ]
        asked = self._ask_all(requests, self._verdict)

        def wait() -> list[list[YesNo]]:
            verdicts = asked()
            self._check_verdicts(verdicts)
            each = iter(verdicts)
            return [[next(each) for _ in row.questions] for row in rows]

        return wait

    def _check_verdicts(self, verdicts: Sequence[YesNo]) -> None:
        if missing := sum(verdict == (0.0, 0.0) for verdict in verdicts):
            log.warning(
                "%s: %d of %d questions have neither yes nor no among %d tokens",
                *(self.identity, missing, len(verdicts), self._endpoint.top_logprobs),
            )
        served = self.usage["served by"]
        if ", " in served:
            raise ConfigError(
                f"{self.identity}: several models answered ({served}); their scores are not "
                "comparable: name one of them"
            )

    def queue_sequence_logps(self, rows: Sequence[Branches]) -> Callable[[], list[list[Floats]]]:
        """Not part of the protocol: raises ConfigError."""
        raise ConfigError(f"{self.identity}: an endpoint cannot score given answers ({len(rows)})")

    def close(self) -> None:
        """Ends threads and connections."""
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    # --- inside ----------------------------------------------------------------------------------

    def _ask_all(
        self, requests: Sequence[_Request], read: Callable[["ChatCompletion"], _T]
    ) -> Callable[[], list[_T]]:
        """What `read` makes of each answer, in order; the first error ends it, the rest unasked."""
        futures = [self._threads.submit(self._ask, request) for request in requests]

        def wait() -> list[_T]:
            try:
                return [read(future.result()) for future in futures]
            finally:
                _cancel(futures)

        weakref.finalize(wait, _cancel, futures)
        return wait

    def _verdict(self, completion: "ChatCompletion") -> YesNo:
        logprobs = completion.choices[0].logprobs
        if logprobs is None or not logprobs.content or not logprobs.content[0].top_logprobs:
            raise ConfigError(
                f"{self.identity}: returned no top_logprobs; it cannot be used as a labeller"
            )
        p_yes = p_no = 0.0
        for token in logprobs.content[0].top_logprobs:
            word = token.token.removeprefix("\u2581")  # raw pieces of a Llama tokenizer
            p_yes += math.exp(token.logprob) * (word in YES)
            p_no += math.exp(token.logprob) * (word in NO)
        return YesNo(p_yes, p_no)

    def _ask(self, request: _Request) -> "ChatCompletion":
        reason, attempts = "", self._endpoint.attempts
        for attempt in range(attempts):
            outcome = self._once(request)
            if not isinstance(outcome, _Failure):
                return outcome
            reason = outcome.reason
            self._count(failures=1)
            if attempt + 1 < attempts:
                self._pause(self._wait(request, attempt, outcome.retry_after))
        raise TransientError(
            f"{self.identity}: row {request.row}: no answer in {attempts} requests, "
            f"the last: {reason}"
        )

    def _once(self, request: _Request) -> "ChatCompletion | _Failure":
        import openai

        self._count(requests=1)
        try:
            create: Any = self._client.chat.completions.create  # overloads want literal arguments
            completion = create(**self._arguments(request))
        except openai.APIStatusError as error:
            status, text = error.status_code, f"status {error.status_code}: {error.message:.300}"
            if status in _NO_ACCESS:
                raise ConfigError(
                    f"{self.identity}: {text}; check url, model and the key in {KEY_VARIABLE}"
                ) from error
            if status in _REFUSED and request.top_logprobs and "logprob" in error.message:
                raise ConfigError(
                    f"{self.identity}: cannot return probabilities: {text}"
                ) from error
            if status < 500 and status not in _WORTH_ANOTHER_TRY:
                raise ArtifactError(f"{self.identity}: row {request.row}: {text}") from error
            after = error.response.headers.get("retry-after", "")
            return _Failure(text, float(after) if after.isdigit() else None)
        except (openai.APIError, ValueError) as error:  # timeouts, broken connections, no JSON
            return _Failure(f"{type(error).__name__}: {error!s:.300}")
        return self._checked(completion)

    def _arguments(self, request: _Request) -> dict[str, Any]:
        decoding = request.decoding
        if decoding.num_beams > 1:
            raise ConfigError(
                f"{self.identity}: an endpoint has no beam search; set num_beams to 1"
            )
        arguments: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": request.content}],
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "seed": request.seed % 2**31,  # what every server takes
        }
        extra: dict[str, Any] = {}  # not OpenAI's own; all others'
        if decoding.top_k and decoding.temperature:
            extra["top_k"] = decoding.top_k
        if decoding.repetition_penalty != 1:
            extra["repetition_penalty"] = decoding.repetition_penalty
        if request.top_logprobs:
            arguments |= {"logprobs": True, "top_logprobs": request.top_logprobs}
            if ids := self._endpoint.label_token_ids:
                extra["logprob_token_ids"] = list(ids)
        if extra:
            arguments["extra_body"] = extra
        return arguments

    def _checked(self, completion: Any) -> "ChatCompletion | _Failure":
        """Counts what was used; a failure when the answer is not one."""
        choices = getattr(completion, "choices", None)
        if not choices or choices[0].message is None or choices[0].message.content is None:
            return _Failure(f"malformed answer: {str(completion)[:200]!r}")
        if usage := completion.usage:
            self._count(input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)
        self._count(**{f"served_by/{completion.model}": 1})
        checked: ChatCompletion = completion
        return checked

    def _wait(self, request: _Request, attempt: int, retry_after: float | None) -> float:
        """Seconds before the next request: what the server asks for, else exponential."""
        if retry_after is not None:
            return min(retry_after, _LONGEST_WAIT)
        longest: float = min(self._endpoint.backoff_seconds * 2**attempt, _LONGEST_WAIT)
        return longest * random.Random(f"{request.row}/{attempt}").uniform(0.5, 1.0)

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self.counts.update(numbers)


def _generation(completion: "ChatCompletion") -> Generation:
    choice, usage = completion.choices[0], completion.usage
    text = choice.message.content or ""
    tokens = usage.completion_tokens if usage else len(text.split())
    return Generation(text, tokens, "length" if choice.finish_reason == "length" else "stop")


def _cancel(futures: Sequence["Future[ChatCompletion]"]) -> None:
    for future in futures:
        future.cancel()


def _url(image: bytes, row: int) -> str:
    try:
        picture = decode(image)
    except BadImageError as error:
        raise ArtifactError(f"row {row}: image: {error}") from error
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")  # upright RGB, whatever the server's decoder would make of the file
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _content(url: str, question: str) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
