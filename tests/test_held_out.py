"""Checkpoints are compared on what `prepare` held out, through the ordinary stages."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from controller.k8s_settings import ClusterSettings, StageSettings
from controller.verify import verify
from rlaifv.benchmarks.labelled import (
    Answered,
    CheckedClaim,
    ClaimsGrade,
    Labelled,
    claims_metrics,
)
from rlaifv.config import ChooseConfig, Criterion, HeldOutConfig, RunConfig
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.pipeline import (
    HELD_OUT,
    Shard,
    choice_key,
    held_out_key,
    holds_out,
    labels_grades,
    part_key,
    stage_of,
)
from rlaifv.recipes import Wishes, build_config
from rlaifv.records import Choice, Grade, Image, Instruction, Response
from rlaifv.sources import held_out_rows, iteration_rows
from rlaifv.store import Store
from tests.jobs_support import (
    DATA,
    LOOP,
    all_rows,
    make_config,
    make_run,
    make_source,
    run_job,
    run_stages,
)
from tests.nltk_folder import make_nltk_folder

COCO = DATA / "coco_mini" / "ccby_29"
SYNONYMS = DATA / "chair_synonyms" / "synonyms.txt"
ONE = Shard(0, 1)
NUM_IMAGES = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_tiny_llava  # torch: only for whole runs

    return make_tiny_llava(tmp_path_factory.mktemp("models") / "model")


def held_out_config(
    source: Path, model: Path, held_out: HeldOutConfig, num_shards: int
) -> RunConfig:
    config = make_config(source, model=model, num_shards=num_shards)
    return config.model_copy(
        update={
            "choose": ChooseConfig(held_out=held_out),
            "respond": config.respond.model_copy(update={"max_new_tokens": 16}),
        }
    )


def stored(run: Store, iteration: int = 0) -> list[Instruction]:
    return list(run.read_part(held_out_key(iteration), Instruction))


def digests(rows: list[Instruction]) -> set[str]:
    return {hashlib.sha256(row.image.bytes).hexdigest() for row in rows}


@pytest.mark.slow
def test_the_labeller_chooses_on_instructions_that_nothing_was_trained_on(
    model: Path, tmp_path: Path
) -> None:
    source = make_source(tmp_path / "source", num_rows=22)
    with source.open("a") as file:  # a picture that is held out, in another row
        file.writelines(
            f"{json.dumps({'question': 'Again?', 'image': f'{n}.png'})}\n" for n in range(22)
        )
    config = held_out_config(source, model, HeldOutConfig(num_instructions=5), 2)
    assert stage_of(config, "grade").runs_on == "gpu"
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, LOOP)
    rows = stored(run)
    assert len(rows) == 5
    instructions = all_rows(run, config, "prepare", Instruction)
    assert not digests(rows) & digests(instructions)
    notes = run.provenance(part_key(0, "instructions", Shard(0, 2))).notes
    assert notes["held out"] == "5"
    grades = all_rows(run, config, "grade", Grade)
    assert {row.question_id for row in grades} == {row.instruction_id for row in rows}
    assert {row.benchmark for row in grades} == {HELD_OUT}
    assert all(row.judge.startswith(f"labeller {model}") for row in grades)
    assert all("; claims rules" in row.judge for row in grades)
    choice = run.read_json(choice_key(0), Choice)
    assert "the labeller's own verdicts on 5 held-out instructions" in choice.reason
    assert "no COCO annotations are given (choose.held_out.coco)" in choice.reason
    by_hand = claims_metrics(
        [ClaimsGrade.model_validate_json(row.value) for row in grades if row.step == 0]
    )
    assert choice.baseline == {f"{HELD_OUT}/{name}": value for name, value in by_hand.items()}
    assert f"rejected_claims on {HELD_OUT}" in choice.reason
    assert not verify(run).problems
    run_stages(run, config, ("prepare",), iteration=1)
    assert stored(run, 1) == rows
    assert not digests(rows) & {
        hashlib.sha256(row.image.bytes).hexdigest()
        for n in range(2)
        for row in run.read_part(part_key(1, "instructions", Shard(n, 2)), Instruction)
    }


def coco_source(folder: Path) -> Path:
    """All COCO images: one half by the names of 2014, the other as copies with other names."""
    folder.mkdir()
    rows = []
    for number, path in enumerate(sorted((COCO / "images").iterdir())):
        name = f"COCO_val2014_{path.name}" if number % 2 else f"copy-{number}.jpg"
        data = path.read_bytes()
        (folder / name).write_bytes(data + b"\0" if number % 2 else data)
        rows.append(json.dumps({"question": "What is there?", "image": name}))
    (folder / "source.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "source.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(not COCO.exists(), reason="no COCO samples here")
def test_chair_chooses_on_coco_images_that_are_in_no_instruction(
    model: Path, tmp_path: Path
) -> None:
    excluded = tmp_path / "excluded.txt"
    gone = 790
    excluded.write_text(f"{gone}\n")
    held_out = HeldOutConfig(
        coco=str(COCO),
        images=str(COCO / "images"),
        vocabulary=str(SYNONYMS),
        nltk_data=str(make_nltk_folder(tmp_path / "nltk")),
        exclude=(str(excluded),),
        num_images=NUM_IMAGES,
    )
    config = held_out_config(coco_source(tmp_path / "source"), model, held_out, 1)
    config = config.model_copy(
        update={"prepare": config.prepare.model_copy(update={"instructions_per_iteration": 40})}
    )
    assert stage_of(config, "grade").runs_on == "cpu"
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, LOOP)
    rows = stored(run)
    ids = {int(row.instruction_id) for row in rows}
    assert len(ids) == NUM_IMAGES
    assert gone not in ids
    origin = run.provenance(part_key(0, "instructions", ONE))
    assert origin.rows == 29 - NUM_IMAGES
    assert origin.notes["left out, for they show a held-out picture"] == str(NUM_IMAGES)
    grades = all_rows(run, config, "grade", Grade)
    assert {int(row.question_id) for row in grades} == ids
    assert {row.judge.partition(";")[0] for row in grades} == {"object_halbench chair"}
    choice = run.read_json(choice_key(0), Choice)
    assert (
        f"compared by CHAIR on {NUM_IMAGES} COCO images that are in no instruction" in choice.reason
    )
    assert f"{HELD_OUT}/mean_words" in choice.baseline
    assert not verify(run).problems


@pytest.mark.skipif(not COCO.exists(), reason="no COCO samples here")
def test_too_few_coco_images_stop_prepare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = HeldOutConfig(
        coco=str(COCO), images=str(COCO / "images"), vocabulary="synonyms.txt", num_images=30
    )
    config = held_out_config(coco_source(tmp_path / "source"), tmp_path, held_out, 1)
    run = make_run(tmp_path / "run", config)
    assert run_job(run, "prepare") == 65
    assert "expected at least 30 images" in capsys.readouterr().err


def test_an_instruction_with_a_held_out_picture_is_left_out_and_counted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", num_rows=22)
    again = [json.dumps({"question": "Again?", "image": f"{n}.png"}) for n in range(22)]
    source.write_text(source.read_text() + "\n".join(again) + "\n")
    config = held_out_config(source, tmp_path, HeldOutConfig(num_instructions=5), 1)
    config = config.model_copy(
        update={"prepare": config.prepare.model_copy(update={"instructions_per_iteration": 39})}
    )
    run = make_run(tmp_path / "run", config)
    run_stages(run, config, ("prepare",))
    twice = 2 * len({row.image_id for row in stored(run)}) - 5  # in the other rows
    assert twice > 0
    origin = run.provenance(part_key(0, "instructions", ONE))
    assert origin.notes["left out, for they show a held-out picture"] == str(twice)
    assert (origin.rows, origin.quarantined) == (39 - twice, 0)
    assert verify(run).parts == 2


class Doubter:
    """A labeller that rejects the second claim of every answer."""

    identity = "doubter"

    def check(self, answers: Sequence[Answered]) -> list[list[CheckedClaim]]:
        return [
            [
                CheckedClaim(text=text, p_yes=0.9 if n else 0.6, p_no=0.1 if n == 0 else 0.95)
                for n, text in enumerate(answer.answer.split(". "))
            ]
            for answer in answers
        ]


def test_held_out_answers_are_graded_by_their_own_pictures() -> None:
    rows = [
        Instruction(
            instruction_id=f"{n}",
            image_id=f"{n}",
            question=f"Q{n}?",
            image=Image(bytes=bytes([n])),
            origin_dataset="",
            origin_split="{}",
            idx=n,
        )
        for n in range(3)
    ]
    texts = {"2": "A. B. C.", "0": "A."}
    responses = [
        Response(
            benchmark=HELD_OUT,
            question_id=key,
            step=4,
            text=text,
            num_tokens=1,
            finish_reason="stop",
        )
        for key, text in texts.items()
    ]
    graded = list(Labelled(lambda: iter(rows), Doubter()).grade(responses))
    assert [(row.question_id, row.step, row.judge) for row in graded] == [
        ("2", 4, "doubter"),
        ("0", 4, "doubter"),
    ]
    assert Labelled(lambda: iter(rows)).metrics(graded)["rejected_claims"] == 2 / 4
    stranger = responses[0].model_copy(update={"question_id": "9"})
    with pytest.raises(ArtifactError, match="'9' is no held-out instruction"):
        list(Labelled(lambda: iter(rows), Doubter()).grade([stranger]))
    with pytest.raises(ConfigError, match="stage `grade` only"):
        list(Labelled(lambda: iter(rows)).grade(responses))


@pytest.mark.parametrize("when", ["stop", "reuse"])
def test_the_held_out_rows_are_in_no_iteration(when: str) -> None:
    prepare = build_config(Wishes()).prepare.model_copy(
        update={"instructions_per_iteration": 30, "when_exhausted": when}
    )
    aside = held_out_rows(100, 10, seed=3)
    taken = [
        row
        for iteration in range(3)
        for row in iteration_rows(100, prepare, seed=3, iteration=iteration, held_out=10).rows
    ]
    assert sorted({*taken, *aside}) == list(range(100))
    assert not {*taken} & {*aside}
    without = [iteration_rows(100, prepare, seed=3, iteration=n).rows for n in range(3)]
    assert sorted(taken) == sorted(row for rows in without for row in rows)  # the same slices
    assert len(held_out_rows(22, 200, seed=0)) == 4  # at most a fifth
    assert held_out_rows(3, 200, seed=0) == []


def test_real_recipes_hold_out_and_the_paper_s_and_the_demo_do_not() -> None:
    for name in ("llava15_7b", "llava15_7b_lora", "llava15_7b_minicpmv", "omnilmm_12b"):
        held_out = holds_out(build_config(Wishes(recipe=name)))
        assert held_out is not None
        assert (held_out.num_images, held_out.num_instructions) == (500, 200)
    assert holds_out(build_config(Wishes(recipe="paper"))) is None
    assert holds_out(build_config(Wishes())) is None


def test_what_a_user_names_takes_the_place_of_what_is_held_out() -> None:
    def changed(*sets: str) -> RunConfig:
        return build_config(Wishes(recipe="llava15_7b", sets=sets))

    own = "[{name: own, path: x, vocabulary: y, use: select}]"
    assert holds_out(changed(f"respond.benchmarks={own}")) is None
    coco = changed(*(f"choose.held_out.{name}=x" for name in ("coco", "images", "vocabulary")))
    assert not labels_grades(coco)
    with pytest.raises(ConfigError, match=r"choose.held_out: .* images is missing"):
        changed("choose.held_out.coco=x", "choose.held_out.vocabulary=x")
    config = changed("choose.held_out=null", "choose.criteria=[{metric: recall, better: higher}]")
    assert holds_out(config) is None
    assert config.choose.criteria == (Criterion(metric="recall", better="higher"),)


def test_a_grade_that_asks_the_labeller_gets_the_pods_of_verify() -> None:
    config = build_config(Wishes(recipe="llava15_7b"))
    settings = ClusterSettings(
        stages={"verify": StageSettings(gpus=2), "grade": StageSettings(gpus=0)}
    )
    grade = settings.for_run(config).of("grade")
    assert (grade.gpus, grade.image) == (2, settings.images.gpu)
    assert settings.for_run(build_config(Wishes())) == settings


def test_rejected_claims_are_counted_over_all_answers() -> None:
    def graded(*verdicts: tuple[float, float], words: int = 4) -> ClaimsGrade:
        claims = [{"text": "x", "p_yes": yes, "p_no": no} for yes, no in verdicts]
        return ClaimsGrade.model_validate({"claims": claims, "num_words": words})

    grades = [graded((0.9, 0.1), (0.2, 0.2)), graded((0.6, 0.3), words=8), graded(words=0)]
    assert claims_metrics(grades) == {
        "rejected_claims": 1 / 3,  # a tie is a rejection
        "rejected_answers": 1 / 2,
        "mean_claims": 1.0,
        "mean_words": 4.0,
    }
    assert claims_metrics([graded()])["rejected_claims"] is None
    assert claims_metrics([])["mean_words"] is None
