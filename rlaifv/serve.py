"""`python -m rlaifv.serve --model PATH`: our engine behind OpenAI's chat completions protocol.

For trying a checkpoint with any client, and for labelling over HTTP. One user turn with at most
one image; greedy, sampling; `logprobs` for the first token of an answer (`max_tokens` 1). One
request at a time goes through the model: for throughput use the engine itself, or vLLM.
"""

from rlaifv import flags

if __name__ == "__main__":
    flags.look_first("serve")

import argparse
import base64
import binascii
import json
import logging
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from rlaifv.cli import checked, ending
from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError, RlaifvError
from rlaifv.models import load_local, load_text_model
from rlaifv.models.base import (
    Decoding,
    Generation,
    Prompt,
    ServedModel,
    ServedTextModel,
    TokenLogp,
)

log = logging.getLogger(__name__)

MAX_BODY = 64 * 2**20


class Question(NamedTuple):
    """A request, checked."""

    image: bytes | None
    text: str
    decoding: Decoding
    seed: int
    top_logprobs: int | None
    label_ids: tuple[int, ...] = ()
    """Tokens whose probabilities are wanted instead of the likeliest (vLLM's `logprob_token_ids`)."""


class Answer(NamedTuple):
    """What the engine makes of a question."""

    generation: Generation
    first_tokens: list[TokenLogp]
    """The likeliest, if they were asked for."""
    prompt_tokens: int


class Engine:
    """A loaded model that answers one question at a time."""

    def __init__(self, spec: ModelSpec) -> None:
        """`family` text: a chat model without images. Errors as for `load_model`."""
        self.name = spec.path
        self._model = load_text_model(spec) if spec.family == "text" else load_local(spec)
        self._lock = threading.Lock()

    def answer(self, question: Question) -> Answer:
        """The answer, the likeliest first tokens, and how long the prompt was."""
        with self._lock:
            if question.image is None or not isinstance(self._model, ServedModel):
                return self._reply(question)
            asked = (question.image, question.text)
            prompt = Prompt(*asked, (question.seed,))
            ((generation,),) = self._model.answer([prompt], decoding=question.decoding)
            count, tokens = question.top_logprobs, list[TokenLogp]()
            if count is not None:
                tokens = _first_tokens(self._model, question, count)
            return Answer(generation, tokens, self._model.count_prompt(*asked))

    def _reply(self, question: Question) -> Answer:
        if question.image is not None or not isinstance(self._model, ServedTextModel):
            kind = "without an image" if question.image is None else "with an image"
            raise ArtifactError(f"this model takes no question {kind}")
        if question.top_logprobs is not None:
            raise ArtifactError("logprobs: only for questions about an image")
        seeds, decoding = [question.seed], question.decoding
        (generation,) = self._model.reply([question.text], seeds=seeds, decoding=decoding)
        return Answer(generation, [], self._model.count_prompt(question.text))


def _first_tokens(model: ServedModel, question: Question, count: int) -> list[TokenLogp]:
    image, ids = question.image or b"", question.label_ids
    try:
        return model.first_tokens(image, question.text, count=max(1, count), ids=ids)
    except IndexError as error:
        raise ArtifactError(f"logprob_token_ids: not all in the vocabulary: {error}") from error


def parse_question(body: bytes) -> Question:
    """Raises ArtifactError for what is not understood; nothing is ignored that changes answers."""
    try:
        values = json.loads(body)
        (message,) = values["messages"]
        if message["role"] != "user" or values.get("stream") or values.get("n", 1) != 1:
            raise ArtifactError("expected one user message, no stream, n 1")
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        texts = [part["text"] for part in content if part["type"] == "text"]
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        max_tokens = values.get("max_completion_tokens", values.get("max_tokens", 512))
        decoding = Decoding(
            int(max_tokens),
            float(values.get("temperature", 1.0)),
            float(values.get("top_p", 1.0)),
            int(values.get("top_k", 0)),
            repetition_penalty=float(values.get("repetition_penalty", 1.0)),
        )
        seed = int(values.get("seed") or 0)
        ids = tuple(map(int, values.get("logprob_token_ids") or ()))
        top = int(values.get("top_logprobs") or 0) if values.get("logprobs") else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"not a chat completion request: {error!r}") from error
    if len(urls) > 1:
        raise ArtifactError(f"{len(urls)} images, expected at most 1")
    if decoding.max_new_tokens < 1 or decoding.temperature < 0 or not 0 < decoding.top_p <= 1:
        raise ArtifactError("max_tokens, temperature or top_p is out of range")
    if decoding.repetition_penalty <= 0:
        raise ArtifactError("repetition_penalty: expected more than 0")
    if ids and (top is None or min(ids) < 0):
        raise ArtifactError("logprob_token_ids: expected ids of tokens, and logprobs")
    if top is not None and decoding.max_new_tokens != 1:
        raise ArtifactError("logprobs: only with max_tokens 1")
    return Question(_image(urls), "".join(texts), decoding, seed, top, ids)


def _image(urls: list[str]) -> bytes | None:
    if not urls:
        return None
    head, mark, data = urls[0].partition(";base64,")
    if not mark or not head.startswith("data:"):
        raise ArtifactError("image_url: expected a data: URL in base64; nothing is downloaded")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ArtifactError(f"image_url: {error}") from error


def completion(engine: Engine, question: Question) -> dict[str, Any]:
    """The protocol's answer."""
    generation, tokens, before = engine.answer(question)
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": generation.text},
        "finish_reason": generation.finish_reason,
        "logprobs": None,
    }
    if tokens:
        listed = [{"token": t.text, "logprob": t.logp, "bytes": None} for t in tokens]
        choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    after = generation.num_tokens
    usage = {"prompt_tokens": before, "completion_tokens": after, "total_tokens": before + after}
    return {
        "id": "chatcmpl-rlaifv",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": engine.name,
        "choices": [choice],
        "usage": usage,
    }


class Handler(BaseHTTPRequestHandler):
    """`POST /v1/chat/completions` and `GET /v1/models`."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self.respond(404, _error(f"no such path: {self.path}"))
        models = [{"id": self.server.engine.name, "object": "model"}]
        return self.respond(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            self.close_connection = True
            return self.respond(413, _error(f"Content-Length: expected at most {MAX_BODY}"))
        body = self.rfile.read(int(length))
        if self.path != "/v1/chat/completions":
            return self.respond(404, _error(f"no such path: {self.path}"))
        try:
            return self.respond(200, completion(self.server.engine, parse_question(body)))
        except RlaifvError as error:
            return self.respond(400, _error(str(error)))

    def respond(self, status: int, values: dict[str, Any]) -> None:
        """Sends JSON."""
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


class Server(ThreadingHTTPServer):
    """Listens as soon as it is made; port 0 takes a free one."""

    daemon_threads = True

    def __init__(
        self, engine: Engine, *, host: str, port: int, handler: type[Handler] = Handler
    ) -> None:
        self.engine = engine
        super().__init__((host, port), handler)


def main(arguments: list[str] | None = None) -> int:
    """The command line; serves until it is interrupted."""
    given = flags.serve().parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    return ending(lambda: _serve(given))


def _serve(given: argparse.Namespace) -> int:
    values = {key: getattr(given, key) for key in flags.MODEL}
    spec = checked(lambda: ModelSpec(path=given.model, **values), what="a flag of the model")
    engine = Engine(spec)
    with Server(engine, host=given.host, port=given.port) as server:
        log.info("serving model=%s address=%s:%d", given.model, *server.server_address[:2])
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
