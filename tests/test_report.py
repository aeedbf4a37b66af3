"""The report: hostile text stays text, the figures are the run's, and nothing is loaded."""

import base64
import functools
import hashlib
import io
import itertools
import json
import random
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image as Pictures

from controller.loop import Loop, Watcher
from controller.plan import Planner
from controller.report.build import REPORT, write_report
from controller.report.chart import Series, curve
from controller.report.gather import gather
from controller.report.markup import text
from controller.report.page import policy, render_page
from controller.report.picture import LONGEST, img
from controller.report.questions import find_questions
from controller.report.script import SCRIPT
from controller.summary import Entry, caveat, report_metric, summarise, table
from rlaifv.benchmarks import load_benchmark
from rlaifv.choosing import choose_checkpoint
from rlaifv.config import BenchmarkSpec, EndpointConfig, RunConfig
from rlaifv.pipeline import CONFIG, Shard, part_key
from rlaifv.recipes import Wishes, build_config
from rlaifv.records import Answer, Choice
from rlaifv.store import Store, open_store
from tests.commands_support import finished_run
from tests.fake_world import HOSTILE, NUM_INSTRUCTIONS, FakeExecutor, picture, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished run whose every text tries to break out."""
    config, run = tiny_config(), open_store(str(tmp_path_factory.mktemp("report")))
    executor = FakeExecutor(run, config, rng=random.Random(1))
    planner = Planner(config, str(run), executor.unit)
    loop = Loop(
        run, planner=planner, executor=executor, watcher=Watcher(), chooser=choose_checkpoint
    )
    assert loop.drive().exit_code == 0
    return run


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_hostile_text_stays_text(run: Store) -> None:
    page = Page(render_page(gather(run, tiny_config())))
    assert page.tags.count("script") == 1  # ours, the only one that the policy allows
    assert SCRIPT in page.words
    assert base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode() in policy()
    assert page.open == []
    assert any(HOSTILE in words for words in page.words)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert len(page.links) > 0


def test_reasons_notes_and_provenance_are_text_too(run: Store) -> None:
    """Whatever a file says: the choice, the notes of a stage, its image and inputs."""
    story = gather(run, tiny_config())
    hostile = f"</script><script>alert(1)</script>{HOSTILE}"
    first = story.iterations[0]
    origin = first.stages[0].origin.model_copy(
        update={"image": hostile, "code_version": hostile, "inputs": {hostile: hostile}}
    )
    candidate = first.choice.candidates[0].model_copy(update={"remark": hostile})
    choice = first.choice.model_copy(update={"reason": hostile, "candidates": [candidate]})
    worse = first._replace(
        choice=choice,
        stages=(first.stages[0]._replace(origin=origin, digest=hostile),),
        pairing={"answers": hostile},
    )
    config = story.config.model_copy(update={"recipe": hostile})
    page = Page(render_page(story._replace(config=config, iterations=(worse,))))
    assert page.tags.count("script") == 1
    assert page.open == []
    assert sum(words.count("<script>alert(1)") for words in page.words) >= 6


def test_what_servers_cost_is_added_up(tmp_path: Path) -> None:
    endpoint = EndpointConfig(url="http://nowhere/v1", input_price=1.0)
    config = tiny_config(iterations=1)
    policy = config.policy.model_copy(update={"endpoint": endpoint})
    place = finished_run(tmp_path, config.model_copy(update={"policy": policy}))
    for number in range(2):
        key = part_key(0, "answers", Shard(number, 2))
        rows = list(place.store.read_part(key, Answer))
        origin = place.store.provenance(key).model_copy(update={"notes": {"cost": "1.25"}})
        place.store.delete(key)
        place.store.write_part(key, rows, record=Answer, origin=functools.partial(deepcopy, origin))
    story = gather(place.store, place.store.read_json(CONFIG, RunConfig))
    costs = {line.stage: line.cost for line in story.iterations[0].stages}
    assert costs["sample"] == 2.5
    assert costs["verify"] is None
    assert "Paid to endpoints, at the configured prices: 2.50" in render_page(story)


def test_text_that_html_forbids_is_shown_all_the_same() -> None:
    assert text("a\0b") == "a\ufffdb"
    assert text('<b title="x">') == "&lt;b title=&quot;x&quot;&gt;"
    assert text("y" * 5000).endswith("[... 1000 more characters]")


def test_the_page_shows_the_figures_and_the_pairs(run: Store) -> None:
    story = gather(run, tiny_config())
    assert [one.number for one in story.iterations] == [0, 1]
    assert len(story.examples) == 2 * NUM_INSTRUCTIONS  # one per picture
    example = story.examples[0]
    assert {one.role for one in example.answers} == {"chosen", "rejected", ""}
    assert [one.num_rejected for one in example.answers] == [0, 1, 1]
    assert {(one.before.step, one.after.step) for one in story.comparisons} == {(0, 4)}
    words = " ".join(Page(render_page(story)).words)
    assert "75 % fewer answers that name something not in the picture" in words
    assert "right: cat; not in the picture: dog" in " ".join(words.split())


def test_a_run_without_a_choice_has_a_page_too(tmp_path: Path) -> None:
    empty = open_store(str(tmp_path))
    write_report(empty, tiny_config())
    assert "Nothing has been chosen yet" in empty.read_bytes(REPORT).decode()


def test_the_same_run_gives_the_same_page(run: Store) -> None:
    pages = {render_page(gather(run, tiny_config())) for _ in range(2)}
    assert len(pages) == 1


def photograph(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    noise = Pictures.frombytes(
        "RGB", (width, height), random.Random(0).randbytes(width * height * 3)
    )
    noise.save(stream, "PNG")
    return stream.getvalue()


def test_a_photograph_is_made_small_and_a_drawing_stays_sharp() -> None:
    assert f'width="{LONGEST}" height="{LONGEST // 2}"' in img(photograph(800, 400))
    assert len(img(photograph(1000, 1000))) < 150_000
    assert 'class="drawn"' in img(picture(1))


def test_a_picture_that_cannot_be_decoded_is_said_to_be_so() -> None:
    assert "cannot be decoded" in img(b"not a picture")
    assert img(None) == ""


def choice(value: float | None, **changes: object) -> Choice:
    figures = {"test/response_hallucination": value, "select/response_hallucination": 0.9}
    base = {
        "step": 7,
        "tree": "x",
        "metrics": figures,
        "baseline": {"test/response_hallucination": 0.8},
        "candidates": [],
        "num_pairs": 3,
        "reason": "best",
    }
    return Choice.model_validate(base | changes)


def test_a_summary_takes_only_report_benchmarks() -> None:
    first, second, untrained = summarise(tiny_config(), {1: choice(0.2), 0: choice(0.4, step=0)})
    assert (first.iteration, first.response_hallucination, first.checkpoint) == (0, 0.4, 0)
    assert (second.iteration, second.response_hallucination, second.pairs) == (1, 0.2, 3)
    assert (untrained.iteration, untrained.response_hallucination) == (None, 0.8)
    assert untrained.recall is None


def test_a_summary_of_nothing_is_empty() -> None:
    assert summarise(tiny_config(), {}) == []


def test_several_report_benchmarks_are_averaged_and_undefined_ones_left_out() -> None:
    config = tiny_config()
    more = BenchmarkSpec(name="more", path="x", use="report")
    benchmarks = (*config.respond.benchmarks, more)
    respond = config.respond.model_copy(update={"benchmarks": benchmarks})
    config = config.model_copy(update={"respond": respond})
    assert report_metric(config, {"test/recall": 0.2, "more/recall": 0.4}, "recall") == (
        pytest.approx(0.3)
    )
    assert report_metric(config, {"test/recall": 0.2, "more/recall": None}, "recall") == 0.2
    assert report_metric(config, {"selection/recall": 0.2}, "recall") is None


def only_selecting(config: RunConfig) -> RunConfig:
    """The same without a benchmark that only reports."""
    respond = config.respond
    left = tuple(one for one in respond.benchmarks if one.use == "select")
    return config.model_copy(update={"respond": respond.model_copy(update={"benchmarks": left})})


def test_without_a_report_benchmark_the_figures_are_of_what_selects_and_say_so() -> None:
    config = only_selecting(tiny_config())
    metrics = {"selection/response_hallucination": 0.25, "test/response_hallucination": 0.5}
    first, _ = summarise(config, {0: choice(None, metrics=metrics)})
    assert first.response_hallucination == 0.25
    assert caveat(config) == "Measured on selection, where checkpoints are chosen."
    assert table([first], caveat(config)).endswith(caveat(config))
    assert caveat(tiny_config()) == ""


def test_where_only_the_labeller_measures_its_rejected_claims_are_the_figures() -> None:
    config = build_config(Wishes(recipe="llava15_7b"))
    metrics = {"held_out/rejected_answers": 0.5, "held_out/rejected_claims": 0.125}
    first, _ = summarise(config, {0: choice(None, metrics=metrics)})
    assert (first.response_hallucination, first.mention_hallucination) == (0.5, 0.125)
    assert "on held_out (labeller's verdicts)" in caveat(config)


def test_the_table_begins_with_the_untrained_policy() -> None:
    lines = table(summarise(tiny_config(), {0: choice(None)})).splitlines()
    assert lines[2].split()[0] == "untrained"
    assert "80.0 %" in lines[2]
    assert "step 7" in lines[3]


def test_labels_of_close_lines_do_not_touch() -> None:
    svg = curve([Series(name, name, [0.5, 0.5]) for name in ("a", "b", "c")], ["0", "1"])
    heights = sorted(
        float(piece.split('y="')[1].split('"')[0]) for piece in svg.split('<text class="label"')[1:]
    )
    assert len(heights) == 3
    assert all(second - first >= 17 for first, second in itertools.pairwise(heights))


def test_questions_are_found_by_id_and_a_missing_file_is_no_error(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("cat\n")
    file = tmp_path / "questions.jsonl"
    (tmp_path / "1.png").write_bytes(picture(1))
    rows = [
        {"question_id": f"q{n}", "image": "1.png", "question": f"What? {n}", "objects": ["cat"]}
        for n in range(3)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = BenchmarkSpec(name="mine", path=str(file), vocabulary=str(words))
    found = find_questions(lambda: load_benchmark(spec), ["q2", "q0"])
    assert {key: one.question for key, one in found.items()} == {"q0": "What? 0", "q2": "What? 2"}
    assert found["q0"].image == picture(1)
    gone = spec.model_copy(update={"path": str(tmp_path / "gone.jsonl")})
    assert find_questions(lambda: load_benchmark(gone), ["q0"]) == {}


def test_an_entry_has_exactly_the_documented_fields() -> None:
    assert list(Entry.model_fields) == [
        *("iteration", "checkpoint", "response_hallucination", "mention_hallucination"),
        *("recall", "mean_words", "pairs"),
    ]
