"""The report in a real browser: a small run, and one of four iterations of 4,000 prompts."""

import io
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pictures

from controller.loop import Loop, Watcher
from controller.plan import Planner
from controller.report.build import REPORT, write_report
from rlaifv.choosing import choose_checkpoint
from rlaifv.config import RunConfig
from rlaifv.pipeline import ARTIFACTS, CONFIG, Shard, num_shards, part_key
from rlaifv.records import arrow_schema
from rlaifv.store import open_store
from tests.browser import Tab, browser
from tests.fake_world import HOSTILE, FakeExecutor, tiny_config

PROMPTS, ANSWERS, CLAIMS = 4000, 10, 6
BREAKOUT = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\u2029" + HOSTILE
SENTENCE = "On the left stands a wooden table with a blue vase, and behind it a window is open. "
MOST_BYTES = 15_000_000
MOST_MEMORY_MB = 450
"""Of the process that builds the page: 350 to 410; one that has only started takes 90."""
BUILD = """
import sys
from pathlib import Path
from controller.__main__ import main
assert main(["report", sys.argv[1]]) == 0
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def fake_run(folder: Path, config: RunConfig) -> None:
    """A finished run of stand-ins whose every text tries to break out."""
    run = open_store(str(folder))
    executor = FakeExecutor(run, config, rng=random.Random(1))
    planner = Planner(config, str(run), executor.unit)
    loop = Loop(
        run, planner=planner, executor=executor, watcher=Watcher(), chooser=choose_checkpoint
    )
    assert loop.drive().exit_code == 0


def photographs(count: int) -> list[bytes]:
    """JPEGs of 640 x 480 pixels and some 30 kB."""
    made = []
    for number in range(count):
        noise = random.Random(number).randbytes(80 * 60 * 3)
        picture = Pictures.frombytes("RGB", (80, 60), noise).resize((640, 480))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=85)
        made.append(stream.getvalue())
    return made


def replace_part(
    folder: Path, config: RunConfig, artifact: str, rows: Mapping[str, Sequence[object]]
) -> None:
    """All rows into the first part of every iteration; the other parts become empty."""
    schema = arrow_schema(ARTIFACTS[artifact])
    stage = {"answers": "sample", "claims": "claim", "verdicts": "verify", "pairs": "pair"}[
        artifact
    ]
    count = num_shards(config, stage)
    for index in range(count):
        first = folder / part_key(0, artifact, Shard(index, count))
        metadata = pq.ParquetFile(first).schema_arrow.metadata
        footer = pq.ParquetFile(first).metadata.metadata
        values = rows if index == 0 else {name: [] for name in rows}
        table = pa.table(values, schema=schema)
        with pq.ParquetWriter(first, schema.with_metadata(metadata), compression="zstd") as writer:
            writer.write_table(table, row_group_size=256)
            writer.add_key_value_metadata({b"rlaifv": footer[b"rlaifv"]})
        for iteration in range(1, config.iterations):
            shutil.copyfile(first, folder / part_key(iteration, artifact, Shard(index, count)))


def enlarge(folder: Path, config: RunConfig) -> None:
    """4,000 prompts, ten answers each, six claims each, a photograph per pair."""
    names = [f"i{n:05d}" for n in range(PROMPTS)]
    answers = [(name, f"{name}/{k}") for name in names for k in range(ANSWERS)]
    claims = [(name, answer, f"{answer}/{c}") for name, answer in answers for c in range(CLAIMS)]
    rng = random.Random(0)
    text = f"{5 * SENTENCE}{BREAKOUT}"
    claim: dict[str, Sequence[object]] = {
        "instruction_id": [one[0] for one in claims],
        "answer_id": [one[1] for one in claims],
        "claim_id": [one[2] for one in claims],
    }
    p_yes = [round(rng.random(), 4) for _ in claims]
    replace_part(
        folder,
        config,
        "answers",
        {
            "instruction_id": [one[0] for one in answers],
            "answer_id": [one[1] for one in answers],
            "text": [f"{answer} {text}" for _, answer in answers],
            "seed": [1] * len(answers),
            "num_tokens": [90] * len(answers),
            "finish_reason": ["stop"] * len(answers),
        },
    )
    asked: dict[str, Sequence[object]] = {
        "text": [SENTENCE] * len(claims),
        "question": ["Is it so?"] * len(claims),
    }
    replace_part(folder, config, "claims", claim | asked)
    p_no = [round(1 - p, 4) for p in p_yes]
    replace_part(folder, config, "verdicts", claim | {"p_yes": p_yes, "p_no": p_no})
    pictures = photographs(24)
    replace_part(
        folder,
        config,
        "pairs",
        {
            "ds_name": ["large"] * PROMPTS,
            "image": [{"bytes": pictures[n % 24], "path": f"{n}.jpg"} for n in range(PROMPTS)],
            "question": [f"What do you see? {BREAKOUT}"] * PROMPTS,
            "chosen": [f"{name}/0 {text}" for name in names],
            "rejected": [f"{name}/1 {text}" for name in names],
            "origin_dataset": ["made"] * PROMPTS,
            "origin_split": ["{}"] * PROMPTS,
            "idx": list(range(PROMPTS)),
            "image_path": [f"{n}.jpg" for n in range(PROMPTS)],
            "pair_id": [f"{name}/0>{name}/1" for name in names],
            "instruction_id": names,
            "image_id": names,
            "chosen_id": [f"{name}/0" for name in names],
            "rejected_id": [f"{name}/1" for name in names],
            "chosen_score": [-1] * PROMPTS,
            "rejected_score": [-2 - n % 4 for n in range(PROMPTS)],
        },
    )


def check(tab: Tab, page: Path, *, least: int) -> None:
    """No complaint, nothing fetched, nothing run that is not ours; filters and keyboard work."""
    tab.open(page)
    assert tab.requests == [page.as_uri()]
    took = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
    milliseconds = tab.value(took)
    for _ in range(2):  # what else runs on the machine does not count
        tab.open(page)
        milliseconds = min(milliseconds, tab.value(took))
    assert milliseconds < 2000
    print(f"\n{page.stat().st_size / 1e6:.2f} MB, interactive after {milliseconds:.0f} ms")
    shown = "document.querySelectorAll('#shown > article').length"
    output = "document.querySelector('#filters output').value"
    assert tab.value(shown) == 12
    examples = int(tab.value(output).removeprefix("12 of ").removesuffix(" shown"))
    assert examples >= least
    assert tab.value("document.scripts.length") == 1
    assert tab.value("document.querySelectorAll('[onerror]').length") == 0
    assert "<script>alert(" in tab.value("document.querySelector('#shown').textContent")
    loaded = (
        "[...document.querySelectorAll('#shown img')]"
        ".map((one) => { one.loading = 'eager'; return one.decode(); })"
    )
    tab.call("Runtime.evaluate", expression=f"Promise.all({loaded})", awaitPromise=True)
    assert tab.value(
        "[...document.querySelectorAll('#shown img')].every((one) => one.naturalWidth > 0)"
    )
    tab.value("document.querySelector('#filters').elements.iteration.focus()")
    tab.press("1", "1")  # by keyboard: the entry that begins with 1
    count = int(tab.value(output).split()[2])
    assert abs(count - examples / 4) < 1
    assert tab.value(shown) == min(12, count)
    of_one = (
        "[...document.querySelectorAll('#shown > article')].map((one) => one.dataset.iteration)"
    )
    assert set(tab.value(of_one)) == {"1"}
    started = time.monotonic()
    tab.value(
        "(() => { const form = document.querySelector('#filters').elements;"
        "form.iteration.value = ''; form.order.value = 'rejected'; form.words.value = 'ALERT';"
        "form.order.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    print(f"filtered in {time.monotonic() - started:.2f} s")
    ranks = "[...document.querySelectorAll('#shown > article')].map((one) => +one.dataset.rejected)"
    found = tab.value(ranks)
    assert found == sorted(found, reverse=True)
    tab.value(
        "(document.querySelector('#filters').elements.words.value = 'no such words', "
        "document.querySelector('#filters').dispatchEvent(new Event('input')))"
    )
    assert tab.value("document.querySelector('#none').hidden") is False
    assert tab.errors == []


def check_narrow(tab: Tab, page: Path) -> None:
    """On a telephone nothing is wider than the screen, in both colour schemes."""
    for theme in ("light", "dark"):
        tab.theme(theme)
        tab.size(360, 800)
        tab.open(page)
        assert tab.value("document.documentElement.scrollWidth") == 360
        ground = tab.value("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(21, 23, 26)") is (theme == "dark")


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    with browser(tmp_path / "profile") as tab:
        yield tab


@pytest.mark.slow
def test_a_small_run_works_in_a_browser(tmp_path: Path, tab: Tab) -> None:
    config = tiny_config(iterations=4)
    fake_run(tmp_path / "run", config)
    write_report(open_store(str(tmp_path / "run")), config)
    check(tab, tmp_path / "run" / REPORT, least=32)
    check_narrow(tab, tmp_path / "run" / REPORT)


@pytest.mark.slow
def test_a_large_run_has_a_page_below_15_mb_that_answers_at_once(tmp_path: Path, tab: Tab) -> None:
    config = tiny_config(iterations=4)
    fake_run(tmp_path / "run", config)
    enlarge(tmp_path / "run", config)
    open_store(str(tmp_path / "run")).write_json_once(CONFIG, config)
    started = time.monotonic()
    command = [sys.executable, "-c", BUILD, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    most = int(done.stdout.split()[-1]) / 1000
    print(f"\nbuilt in {time.monotonic() - started:.1f} s, memory at most {most:.0f} MB")
    assert most < MOST_MEMORY_MB
    page = tmp_path / "run" / REPORT
    assert page.stat().st_size < MOST_BYTES
    check(tab, page, least=200)
