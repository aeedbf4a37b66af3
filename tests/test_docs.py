"""Every command, link and picture of README and docs is real."""

import re
from pathlib import Path

import pytest

from controller.__main__ import main
from tests.commands_support import finished_run, keeping_config
from tests.docs_commands import PAGES, ROOT, Command, check, commands, stray, words_of

ALL = [command for page in PAGES for command in commands(page)]
LOOKING = {
    "compare",
    "status",
    "report",
    "show",
    "ls",
    "lineage",
    "verify",
    "export",
    "gc",
    "fork",
    "doctor",
}
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("command", ALL, ids=str)
def test_a_command_is_one_that_our_parsers_take(command: Command) -> None:
    if (
        "COMMAND" in command.text or "..." in command.text
    ):  # a pattern of commands, within a sentence
        assert command.text.startswith("python -m")
        return
    check(command.text)


@pytest.mark.parametrize("command", [c for c in ALL if c.runs], ids=str)
def test_a_command_that_is_not_marked_needs_nothing_that_is_not_here(command: Command) -> None:
    """Whatever is clearly a GPU's, a cluster's or a bucket's must say `# needs ...`."""
    assert words_of(command.text)[0] in ("python", "make", ".")
    line = " ".join(words_of(command.text))
    assert not re.search(r"s3://|--executor|llava|openbmb|torchrun|https?://|\b[A-Z]{3,}\b", line)


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m controller rum",
        "python -m controller run --recipee demo",
        "python -m controller run --recipe no_such",
        "python -m controller run --set sample.num_answer=3",
        "python -m jobs.sample --run file:///x",
        "python -m rlaifv.chatt",
        "make domo",
        "torchrun --nproc-per-node 8 -m -- jobs.train --run URI",
        "curl example.org",
    ],
)
def test_a_wrong_command_would_be_found(wrong: str) -> None:
    with pytest.raises(Exception, match=r"\w"):
        check(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_sh_blocks_only(page: Path) -> None:
    assert stray(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists(), target
            assert not anchor, "name the section in words: anchors go stale unseen"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"\bdocs/[\w-]+\.\w+", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_no_page_is_left_half_merged(page: Path) -> None:
    assert not re.search(r"^(<<<<<<<|=======|>>>>>>>)", page.read_text(), re.MULTILINE)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" in index} == pages


def test_readme_states_the_licences_and_both_citations() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for needed in ("Apache-2.0", "CC BY-NC 4.0", "LLaMA", "Vicuna", "yu2024rlaifv", "yu2024rlhfv"):
        assert needed in text


def looks_on(command: Command) -> bool:
    """Whether it only reads a run that is there, by names that are there."""
    words = words_of(command.text) if not command.marked else []
    ours = words[:3] == ["python", "-m", "controller"] and words[3:4] != []
    return ours and words[3] in LOOKING and not re.search(r"s3://|\b[A-Z]{2,}\b", command.text)


def test_commands_that_read_a_run_work_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those within sentences and tables, on a run of stand-in stages."""
    config = keeping_config(iterations=4)
    finished_run(tmp_path / "runs", config.model_copy(update={"name": "demo"}))
    monkeypatch.chdir(tmp_path)
    looking = {command.text: command for command in ALL if looks_on(command)}
    assert {words_of(text)[3] for text in looking} == LOOKING
    words = {text: words_of(text)[3:] for text in looking}
    order = [*sorted(LOOKING - {"fork", "compare"}), "fork", "compare"]  # then there are two runs
    finished_run(tmp_path / "elsewhere", config.model_copy(update={"name": "other"}))
    for text in sorted(looking, key=lambda text: order.index(words[text][0])):
        if not {"mine", "rows"} & set(words[text]):  # of the reader's own data: `make docs-run`
            if words[text][0] == "compare" and not (tmp_path / "runs/other").exists():
                (tmp_path / "elsewhere/other").rename(tmp_path / "runs/other")
            code = main(words[text])
            assert code == 0, f"{looking[text]}: {text}: {capsys.readouterr().err}"
