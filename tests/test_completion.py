"""TAB: what the program proposes, and what a real interactive bash makes of it."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from controller.__main__ import main
from controller.completion import SCRIPTS, candidates
from controller.flags import parser
from rlaifv.pipeline import STAGES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sta", ["status"]),
        ("status --js", ["--json"]),
        ("import ", ["benchmark", "model"]),
        ("import model --na", ["--name"]),
        ("run --executor d", ["docker"]),
        ("run --executor local --exe", ["--executor"]),
        ("run --root x --isolated --work", ["--workers"]),
        ("logs --stage ", sorted(STAGES)),
        ("fork a b --from tr", ["train"]),
        ("show verd", ["verdicts"]),
        ("run --recipe llava15_7b_l", ["llava15_7b_lora"]),
        ("run --config ", []),
        ("export pairs --to ", []),
        ("no-such-command ", []),
    ],
)
def test_what_may_come_next(line: str, expected: list[str]) -> None:
    found = candidates(parser(), line.split(" "))
    assert found == expected if line != "no-such-command " else "run" in found


def test_runs_below_the_root_are_proposed(tmp_path: Path) -> None:
    for name in ("demo", "demo-beta", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "demo-no-run").mkdir()
    words = ["status", "--root", str(tmp_path), "dem"]
    assert candidates(parser(), words) == ["demo", "demo-beta"]


def test_a_shell_may_ask_about_any_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish", "--words", "status", "--"]) == 0
    assert "--json" in capsys.readouterr().out.split()


def test_tab_in_an_interactive_bash(tmp_path: Path) -> None:
    """Types three commands, each with a TAB in it, and reads what bash then runs."""
    (tmp_path / "a-file.yaml").write_text("")
    typed = [
        ("source ./tab.sh; PS1=ready:\n", "ready:"),
        ("python -m controller fork demo new --from trai\t", "--from train "),
        (" --no\n", "ready:"),
        ("python -m controller completion ba\t", "completion bash "),
        ("\n", "complete -o bashdefault -o default -F _rlaifv_controller python python3"),
        ("python -m controller run --config a-f\t", "--config a-file.yaml "),
    ]
    _type(["bash", "--norc", "--noprofile", "-i"], typed, tmp_path)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
def test_tab_in_an_interactive_zsh(tmp_path: Path) -> None:
    typed = [
        ("autoload -U compinit && compinit -u -D; source ./tab.sh; PS1=ready:\n", "ready:"),
        ("python -m controller stat\t", "status "),
        ("\x15python -m controller run --recipe omni\t", "--recipe omnilmm_12b"),
    ]
    _type(["zsh", "-f", "-i"], typed, tmp_path)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish on this machine")
@pytest.mark.parametrize(
    ("line", "proposed"),
    [("stat", "status"), ("run --rec", "--recipe"), ("run --recipe omni", "omnilmm_12b")],
)
def test_what_fish_proposes(line: str, proposed: str, tmp_path: Path) -> None:
    environment = _environment(tmp_path, "fish")
    asks = f"source tab.sh; complete -C 'python -m controller {line}'"
    command = ["fish", "--no-config", "-c", asks]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == ([proposed], "")


def _environment(folder: Path, shell: str) -> dict[str, str]:
    """Of a shell in `folder`, with this interpreter as `python` and the script as tab.sh."""
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to(sys.executable)
    (folder / "tab.sh").write_text(SCRIPTS[shell])
    return {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{':'.join(sys.path)}",
        "HOME": str(folder),
        "TERM": "dumb",
        "PS1": "> ",
    }


def _type(shell: list[str], typed: list[tuple[str, str]], folder: Path) -> None:
    """Types each entry into an interactive shell and waits for what must then be on the screen."""
    environment = _environment(folder, shell[0])
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe(shell[0], shell, environment)  # noqa: S606
    try:
        for keys, awaited in typed:
            os.write(terminal, keys.encode())
            _read_until(terminal, awaited)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _read_until(terminal: int, awaited: str, *, timeout_s: float = 60) -> None:
    said, deadline = "", time.monotonic() + timeout_s
    while awaited not in said:
        left = deadline - time.monotonic()
        ready = select.select([terminal], [], [], max(0.0, left))[0]
        assert ready, f"{awaited!r} does not come: {said}"
        said += os.read(terminal, 65536).decode(errors="replace")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_can_read_their_scripts(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    script = tmp_path / "script"
    script.write_text(SCRIPTS[shell])
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
