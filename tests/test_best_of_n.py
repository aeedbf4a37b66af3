"""The best of N answers: the reward by hand, and the command on tiny models."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlaifv.best_of_n import Asked, Candidate, Models, Settings, best_of_n, main, reward
from rlaifv.config import SampleConfig
from rlaifv.errors import ArtifactError
from rlaifv.models import load_model
from rlaifv.models.base import Branches
from tests.models_kit import spec
from tests.tiny import make_tiny_llava, random_image


def nats(*values: float) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    return np.array(values, dtype=np.float32)


def test_the_reward_is_the_mean_log_ratio_times_beta() -> None:
    assert reward(nats(-1, -2, -3), nats(-2, -2, -5), beta=0.1) == pytest.approx(0.1 * 3 / 3)
    assert reward(nats(-4), nats(-1), beta=0.5) == pytest.approx(-1.5)


def test_a_long_answer_is_not_punished_for_its_length() -> None:
    short, long = nats(-1.5), nats(*[-1.25] * 8)
    rewards = [reward(one, nats(*[-1.0] * len(one)), beta=1) for one in (short, long)]
    assert rewards == pytest.approx([-0.5, -0.25])  # the sums are -0.5 and -2


@pytest.mark.parametrize("tokens", [(), (-1.0, -1.0)])
def test_answers_of_different_lengths_cannot_be_compared(tokens: tuple[float, ...]) -> None:
    with pytest.raises(ArtifactError, match="same tokenizer"):
        reward(nats(*tokens), nats(*tokens[1:]), beta=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_tiny_llava(folder / "new", seed=1), make_tiny_llava(folder / "old", seed=2)


def test_the_winner_has_the_highest_reward_and_fewer_samples_are_the_first_ones(
    models: tuple[Path, Path],
) -> None:
    policy, reference = (load_model(spec(path)) for path in models)
    asked = [Asked(f"q{n}", "What is it?", random_image(n)) for n in range(2)]
    sample = SampleConfig(temperature=1.0, max_new_tokens=8)
    both = Models(policy, policy, reference)
    many = list(best_of_n(both, asked, Settings(4, sample)))
    for best in many:
        (ours,) = policy.sequence_logps([_row(best.asked, best.candidates)])
        (theirs,) = reference.sequence_logps([_row(best.asked, best.candidates)])
        by_hand = [0.1 * float((p - q).sum()) / len(p) for p, q in zip(ours, theirs, strict=True)]
        assert [one.reward for one in best.candidates] == pytest.approx(by_hand, abs=1e-6)
        assert best.winner == int(np.argmax(by_hand))
        assert [one.num_tokens for one in best.candidates] == [len(one) for one in ours]
    few = list(best_of_n(both, asked, Settings(2, sample)))
    texts = [[one.text for one in best.candidates] for best in many]
    assert [[one.text for one in best.candidates] for best in few] == [row[:2] for row in texts]
    assert len({text for row in texts for text in row}) > 2


def _row(asked: Asked, candidates: tuple[Candidate, ...]) -> Branches:
    return Branches(asked.image, asked.question, tuple(one.text for one in candidates))


def test_the_command_writes_one_line_per_question(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(random_image(5))
    rows = [{"question_id": f"q{n}", "question": "What?", "image": "a.png"} for n in range(2)]
    questions, out = tmp_path / "questions.jsonl", tmp_path / "best.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    argv = ["--policy", str(models[0]), "--reference", str(models[1]), "--out", str(out)]
    argv += ["--questions", str(questions), "--num-samples", "3", "--max-new-tokens", "4"]
    assert main([*argv, "--dtype", "float32"]) == 0
    best = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question_id"] for row in best] == ["q0", "q1"]
    for row in best:
        assert row["reward"] == max(one["reward"] for one in row["candidates"])
        assert row["text"] == row["candidates"][row["winner"]]["text"]
    questions.write_text("\n".join(json.dumps(rows[0]) for _ in range(2)))
    assert main(argv) == 65


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--num-samples", "0"], 78, "argument --num-samples: 0"),
        (["--temperature", "0"], 78, "temperature"),
        (["--beta", "-1"], 78, "beta"),
        (["--batch-size", "0"], 78, "argument --batch-size: 0"),
        (["--policy", "nowhere"], 78, "nowhere"),
        (["--questions", "nowhere.jsonl"], 65, "nowhere.jsonl: no such file"),
    ],
)
def test_what_cannot_be_is_named_with_its_exit_code(
    flags: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(random_image(5))
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "What?", "image": "a.png"}')
    argv = ["--policy", "p", "--reference", "r", "--questions", str(questions)]
    argv += ["--out", str(tmp_path / "out.jsonl"), *flags]
    try:
        ended: object = main(argv)
    except SystemExit as error:  # what the flags themselves refuse
        ended = error.code
    assert ended == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
