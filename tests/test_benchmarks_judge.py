"""The judge against a real HTTP endpoint that misbehaves: retries, cache, nothing lost."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rlaifv.benchmarks import load_benchmark
from rlaifv.benchmarks.__main__ import main
from rlaifv.benchmarks.judge import Judge
from rlaifv.benchmarks.prompts import MMHAL, OBJECTS, load_prompt
from rlaifv.benchmarks.replies import Ask, Message
from rlaifv.config import BenchmarkSpec, JudgeConfig
from rlaifv.errors import ConfigError, TransientError
from rlaifv.records import Grade, Response

Answer = Callable[[dict[str, object], int], tuple[int, str, dict[str, str]]]
"""Of a request and how often its text was seen before: status, body, headers."""


def completion(text: str, model: str = "judge-1") -> str:
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}}]
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    return json.dumps({"id": "x", "model": model, "choices": choices, "usage": usage})


class Stub:
    """An endpoint on 127.0.0.1 whose answers a test decides."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.seen: Counter[str] = Counter()
        self.requests: list[dict[str, object]] = []
        self.keys: set[str] = set()
        self.done = threading.Event()
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status, text, headers = stub.handle(json.loads(body), self.headers)
                data = text.encode()
                try:
                    self.send_response(status)
                    for name, value in {"content-type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client did not wait

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def handle(
        self, request: dict[str, object], headers: object
    ) -> tuple[int, str, dict[str, str]]:
        with self._lock:
            key = json.dumps(request["messages"])
            before = self.seen[key]
            self.seen[key] += 1
            self.requests.append(request)
            self.keys.add(headers["authorization"])  # type: ignore[index]
        return self.answer(request, before)

    def close(self) -> None:
        self.done.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def start() -> Iterator[Callable[[Answer], Stub]]:
    stubs: list[Stub] = []

    def make(answer: Answer) -> Stub:
        stubs.append(Stub(answer))
        return stubs[-1]

    yield make
    for stub in stubs:
        stub.close()


def good(request: dict[str, object], before: int) -> tuple[int, str, dict[str, str]]:
    return 200, completion("Rating: 4"), {}


def config(stub: Stub, **changes: object) -> JudgeConfig:
    values = {"url": stub.url, "model": "judge-1", "backoff_seconds": 0.001, "concurrency": 4}
    return JudgeConfig.model_validate(values | changes)


def asks(count: int, repeats: int = 1) -> list[Ask]:
    return [
        Ask(f"item {n}", n, (Message("user", f"text {n}"),), 16, repeat)
        for n in range(count)
        for repeat in range(repeats)
    ]


def anything(_: str) -> bool:
    return True


def misbehave(stub: Stub) -> Answer:
    """Every item fails once or twice, each in its own way, and is then answered."""

    def answer(request: dict[str, object], before: int) -> tuple[int, str, dict[str, str]]:
        number = sum(json.dumps(request["messages"]).encode()) % 7
        if before == 0:
            if number == 5:
                stub.done.wait(1)  # slower than the client waits
            failures: list[tuple[int, str, dict[str, str]]] = [
                (429, '{"error": {"message": "slow down"}}', {"retry-after": "0"}),
                (500, "oops", {"content-type": "text/plain"}),
                (200, "<html>garbage</html>", {"content-type": "text/html"}),
                (200, '{"choices": []}', {}),
                (200, "not json at all", {}),
                (200, completion("too late"), {}),
                (200, completion("Rating: 4", model="another-model"), {}),
            ]
            return failures[number]
        return good(request, before)

    return answer


def test_every_item_survives_a_judge_that_misbehaves(
    start: Callable[[Answer], Stub], tmp_path: Path
) -> None:
    stub = start(good)
    stub.answer = misbehave(stub)
    judge = Judge(config(stub, timeout_seconds=0.4), default_model="x", cache=tmp_path)
    replies = judge.ask(asks(28), anything)
    assert [reply.text for reply in replies] == ["Rating: 4"] * 28
    tally = judge.tally()
    assert tally.asked == 28
    assert set(tally.models) == {"another-model", "judge-1"}
    assert tally.failures == 28 - tally.models["another-model"]


def test_a_second_run_is_served_from_the_cache(
    start: Callable[[Answer], Stub], tmp_path: Path
) -> None:
    stub = start(good)
    first = Judge(config(stub), default_model="x", cache=tmp_path)
    replies = first.ask(asks(5, repeats=2), anything)
    assert len(stub.requests) == 10
    again = Judge(config(stub), default_model="x", cache=tmp_path)
    assert again.ask(asks(5, repeats=2), anything) == replies
    assert again.tally().cached == 10
    assert len(stub.requests) == 10
    other = Judge(config(stub, temperature=0.5), default_model="x", cache=tmp_path)
    other.ask(asks(1), anything)
    assert len(stub.requests) == 11


def test_repeats_have_their_own_seeds_and_cache_entries(
    start: Callable[[Answer], Stub], tmp_path: Path
) -> None:
    stub = start(lambda request, before: (200, completion(f"seed {request['seed']}"), {}))
    judge = Judge(config(stub, seed=5), default_model="x", cache=tmp_path)
    for _ in range(2):
        replies = judge.ask(asks(1, repeats=3), anything)
        assert [reply.text for reply in replies] == ["seed 5", "seed 6", "seed 7"]
    assert len(stub.requests) == 3


def test_lost_items_are_an_error_and_a_second_call_asks_only_for_them(
    start: Callable[[Answer], Stub], tmp_path: Path
) -> None:
    def answer(request: dict[str, object], before: int) -> tuple[int, str, dict[str, str]]:
        return (503, "{}", {}) if "text 3" in str(request) else good(request, before)

    stub = start(answer)
    judge = Judge(config(stub, attempts=3), default_model="x", cache=tmp_path)
    with pytest.raises(TransientError, match=r"1 of 6 items .* item 3, repeat 0: status 503"):
        judge.ask(asks(6), anything)
    assert len(stub.requests) == 5 + 3
    stub.answer = good
    assert len(judge.ask(asks(6), anything)) == 6
    assert len(stub.requests) == 5 + 3 + 1


def test_an_unusable_reply_is_asked_for_again_with_another_seed_and_never_cached(
    start: Callable[[Answer], Stub], tmp_path: Path
) -> None:
    def answer(request: dict[str, object], before: int) -> tuple[int, str, dict[str, str]]:
        return 200, completion("[[A]]" if before == 2 else "no verdict"), {}

    stub = start(answer)
    judge = Judge(config(stub), default_model="x", cache=tmp_path)
    (reply,) = judge.ask(asks(1), lambda text: "[[" in text)
    assert reply.text == "[[A]]"
    assert len({str(request["seed"]) for request in stub.requests}) == 3
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_ends_everything_at_once(
    start: Callable[[Answer], Stub], tmp_path: Path, status: int
) -> None:
    stub = start(lambda request, before: (status, "{}", {}))
    judge = Judge(config(stub), default_model="x", cache=tmp_path)
    with pytest.raises(ConfigError, match=f"status {status}"):
        judge.ask(asks(50), anything)
    assert len(stub.requests) <= 8


def test_a_request_that_is_faulty_itself_is_not_repeated(
    start: Callable[[Answer], Stub], tmp_path: Path
) -> None:
    stub = start(lambda request, before: (400, '{"error": {"message": "too long"}}', {}))
    judge = Judge(config(stub), default_model="x", cache=tmp_path)
    with pytest.raises(TransientError, match="status 400"):
        judge.ask(asks(1), anything)
    assert len(stub.requests) == 1


def test_an_endpoint_that_answers_nobody_is_soon_left_alone(
    start: Callable[[Answer], Stub], tmp_path: Path
) -> None:
    stub = start(lambda request, before: (500, "{}", {}))
    judge = Judge(config(stub, attempts=2), default_model="x", cache=tmp_path)
    with pytest.raises(TransientError, match="200 of 200"):
        judge.ask(asks(200), anything)
    assert len(stub.requests) < 40


def test_waiting_grows_has_jitter_and_obeys_the_endpoint(
    start: Callable[[Answer], Stub], tmp_path: Path
) -> None:
    waits: list[float] = []
    stub = start(lambda request, before: (500, "{}", {}))
    judge = Judge(
        config(stub, backoff_seconds=1, attempts=4),
        default_model="x",
        cache=tmp_path,
        pause=waits.append,
    )
    with pytest.raises(TransientError):
        judge.ask(asks(1), anything)
    for wait, longest in zip(waits, (1, 2, 4), strict=True):
        assert longest / 2 <= wait <= longest
    stub.answer = lambda request, before: (429, "{}", {"retry-after": "7"})
    waits.clear()
    with pytest.raises(TransientError):
        judge.ask(asks(1), anything)
    assert waits == [7, 7, 7]


def test_the_key_comes_from_the_environment_and_stays_there(
    start: Callable[[Answer], Stub],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    stub = start(good)
    judge = Judge(config(stub), default_model="x", cache=tmp_path)
    with caplog.at_level("DEBUG", logger="rlaifv"):
        judge.ask(asks(2), anything)
    assert stub.keys == {"Bearer sk-very-secret"}
    written = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(written) == 2
    assert "secret" not in "".join(written) + judge.identity + caplog.text


def test_cost_is_estimated_before_and_counted_after(
    start: Callable[[Answer], Stub], tmp_path: Path
) -> None:
    stub = start(good)
    prices = {"input_price": 10, "output_price": 30}
    judge = Judge(config(stub, **prices), default_model="x", cache=tmp_path)
    estimate = judge.estimate(asks(4))
    assert (estimate.requests, estimate.max_output_tokens) == (4, 64)
    assert estimate.max_cost == pytest.approx((6 * 10 + 64 * 30) / 1e6)
    judge.ask(asks(4), anything)
    assert judge.tally().cost == pytest.approx((40 * 10 + 8 * 30) / 1e6)
    assert judge.estimate(asks(4)).requests == 0


def mmhal_files(tmp_path: Path) -> Path:
    kinds = ("attribute", "adversarial", "comparison", "counting")
    kinds += ("relation", "environment", "holistic", "other")  # type: ignore[assignment]
    rows = [
        {
            "question_type": kinds[n % 8],
            "image_content": ["dog", "box"],
            "question": f"Q{n}?",
            "gt_answer": "A dog.",
            "image": "cGljdHVyZQ==",
        }
        for n in range(16)
    ]
    path = tmp_path / "mmhal.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def responses(steps: Sequence[int]) -> list[Response]:
    return [
        Response(
            benchmark="mmhal",
            question_id=str(n),
            step=step,
            text=f"Answer {n} of {step}",
            num_tokens=4,
            finish_reason="stop",
        )
        for step in steps
        for n in range(16)
    ]


def test_two_checkpoints_are_graded_by_a_judge_that_misbehaves(
    start: Callable[[Answer], Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLAIFV_CACHE", str(tmp_path / "cache"))
    stub = start(good)
    stub.answer = misbehave(stub)
    spec = BenchmarkSpec(
        name="mmhal",
        kind="mmhal",
        path=str(mmhal_files(tmp_path)),
        judge=config(stub, repeats=2, timeout_seconds=0.4),
    )
    rows = responses([0, 10])
    grades = list(load_benchmark(spec).grade(rows))
    assert len(grades) == 2 * len(rows)
    assert [grade.repeat for grade in grades[:4]] == [0, 1, 0, 1]
    assert {grade.step for grade in grades} == {0, 10}
    assert all("judge-1 at http://127.0.0.1" in grade.judge for grade in grades)
    assert all("prompt own/1" in grade.judge for grade in grades)
    of_first = [grade for grade in grades if grade.step == 0]
    metrics = load_benchmark(spec).metrics(of_first)
    assert metrics["score"] == 4
    assert metrics["score_spread"] is None  # all replies equal: the spread was not measured
    before = len(stub.requests)
    again: list[Grade] = list(load_benchmark(spec).grade(rows))
    assert again == grades
    assert len(stub.requests) == before


def test_the_command_line_asks_a_judge_and_reports_it(
    start: Callable[[Answer], Stub], tmp_path: Path
) -> None:
    stub = start(lambda request, before: (200, completion("Rating: 2", "renamed"), {}))
    questions = mmhal_files(tmp_path)
    answers = tmp_path / "a.jsonl"
    answers.write_text("\n".join('{"text": "A cat."}' for _ in range(16)))
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Original wording\n{}\n{}\n{}\n{}")
    out = tmp_path / "o.json"
    code = main(
        [
            *("score", "mmhal", "--answers", str(answers), "--ground-truth", str(questions)),
            *("--judge", stub.url, "--judge-prompt", str(prompt), "--cache", str(tmp_path / "c")),
            *("--out", str(out)),
        ]
    )
    assert code == 0
    result = json.loads(out.read_text())
    assert result["overall"]["hallucination_rate"] == 1
    assert result["judge"]["models"] == {"renamed": 16}
    assert "gpt-4-1106-preview at" in result["judge"]["identity"]
    assert "prompt file:" in result["judge"]["identity"]
    assert "Original wording\ndog, box\nQ0?\nA dog.\nA cat." in str(
        stub.requests[0]["messages"]
    ) or ("Original wording\\ndog, box" in json.dumps(stub.requests[0]["messages"]))


def test_prompt_files_need_every_field(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("{question} only")
    with pytest.raises(ConfigError, match=r"\{question\}, \{answer\} is needed"):
        load_prompt(OBJECTS, tmp_path / "p.txt")


def test_values_are_not_expanded_again() -> None:
    text = MMHAL.fill("{question}", "Q", "{}", "A")
    assert "### Picture contents\n{question}" in text
    assert "### Person's answer\n{}" in text
