"""What a user may get wrong at `python -m controller`: a code, one line that names it, no traceback."""

import shlex
from pathlib import Path

import pytest

from controller.__main__ import main
from tests.commands_support import finished_run, keeping_config

CASES = [
    ("status nothing", 78, "runs/nothing: no run here"),
    ("status --root /nonexistent", 78, "start one with `python -m controller run`"),
    ("status --root afile", 78, "afile: Not a directory"),
    ("status tiny --root s3:/x", 78, "s3:/x/tiny: a URI has `://`"),
    ("status tiny --root ftp://x/y", 78, "unknown scheme 'ftp'"),
    ("ls --root /nonexistent", 78, "no such folder"),
    ("show pears tiny", 78, "expected one of config, table"),
    ("show pairs tiny --iteration 9", 65, "iteration-9/pairs"),
    ("show pairs tiny --where nokey=3", 78, "has no field 'nokey'"),
    ("show pair nothing tiny", 65, "no pair 'nothing'"),
    ("show choice tiny --iteration 7", 65, "iteration-7/choice.json: no such artifact"),
    ("lineage pears tiny", 78, "expected one of instructions"),
    ("verify nothing", 78, "no run here"),
    ("report nothing", 78, "no run here"),
    ("export pairs tiny --to afile", 78, "--to"),
    ("export checkpoint tiny --to out --iteration 7", 65, "iteration 7"),
    ("gc nothing", 78, "no run here"),
    ("fork tiny new --from nope", 78, "--from nope: expected one of"),
    ("fork tiny new --from train@9", 78, "iterations 0 to 1"),
    ("fork tiny tiny --from train", 78, "there is a run of that name"),
    ("import model /nonexistent", 78, "no such folder"),
    ("import benchmark ../x afile", 78, "name '../x'"),
    ("run --recipe demoo", 78, "did you mean 'demo'?"),
    ("run --config nofile.yaml", 78, "--config nofile.yaml"),
    ("run --config bad.yaml", 78, "bad.yaml: not YAML"),
    ("run --config wrong.yaml", 78, "sample"),
    ("run --config binary.yaml", 78, "binary.yaml"),
    ("run --config folder", 78, "folder"),
    ("run --set sample", 78, "expected section.key=value"),
    ("run --set sample.num_answer=3", 78, "sample.num_answers"),
    ("run --set sample.num_answers=1", 78, "sample.num_answers: Input should be"),
    ("run --set sample.num_answers=[1", 78, "not YAML"),
    ("run --iterations 0", 78, "iterations"),
    ("run --name a/b", 78, "name"),
    ("run --root afile/below", 78, "afile"),
    ("run --executor kubernetes", 78, "s3://bucket/prefix"),
    ("run --executor docker --cluster nofile.yaml", 78, "--cluster nofile.yaml"),
    ("render --root s3://b/x --cluster wrong.yaml", 78, "--cluster wrong.yaml"),
    ("train --pairs afile --recipe demo --set reflogp=3", 78, "shards.reflogp"),
    ("evaluate --model nothing --benchmarks mmhal", 78, "--model nothing: no such folder"),
    ("logs tiny --stage nope", 78, "--stage nope: expected one of"),
    ("logs tiny --stage sample --iteration 7", 78, "--iteration 7: the run has 2"),
    ("logs tiny --stage sample --shard 99", 78, "--shard 99"),
    ("doctor --root afile", 78, "afile"),
    ("doctor --recipe nope", 78, "no such recipe"),
    ("compare tiny nothing", 78, "no run here"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here: Path = tmp_path_factory.mktemp("mistakes")
    finished_run(here / "runs", keeping_config())
    (here / "afile").write_text("x")
    (here / "folder").mkdir()
    (here / "bad.yaml").write_text("a: [1\n")
    (here / "wrong.yaml").write_text("sample: 3\n")
    (here / "binary.yaml").write_bytes(b"\xff\xfe")
    return here


@pytest.mark.parametrize(("line", "code", "said"), CASES, ids=[case[0] for case in CASES])
def test_a_mistake_is_named(
    line: str,
    code: int,
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert main(shlex.split(line)) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert said in text
    assert "Traceback" not in text
