"""The store on a local folder: absent or complete, first writer wins, nothing half-written."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.records import Claim, Verdict
from rlaifv.store import Provenance, Store, open_store
from tests.jobs_support import ROOT, environment

KEY = "iteration-0/claims/00000-of-00001.parquet"


def claim(number: int, text: str = "There is a dog.") -> Claim:
    return Claim(
        instruction_id="i",
        answer_id="i/0",
        claim_id=f"i/0/{number}",
        text=text,
        question="Is there a dog?",
    )


def origin() -> Provenance:
    return Provenance(
        stage="claim",
        run="r",
        iteration=0,
        shard="0/1",
        code_version="0",
        config_sha256="",
        inputs={},
        seed=0,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "run"))


def write(store: Store, *rows: Claim) -> bool:
    return store.write_part(KEY, rows, record=Claim, origin=origin)


def files(store: Store) -> list[str]:
    root = Path(store.backend.uri.removeprefix("file://"))
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_a_part_gives_back_its_rows_and_its_provenance(store: Store) -> None:
    rows = [claim(number) for number in range(600)]  # three row groups
    assert write(store, *rows)
    assert list(store.read_part(KEY, Claim)) == rows
    assert (store.provenance(KEY).rows, store.provenance(KEY).stage) == (600, "claim")


def test_the_first_writer_wins_and_the_second_leaves_nothing(store: Store) -> None:
    assert write(store, claim(0, "first"))
    assert not write(store, claim(0, "second"))
    assert [row.text for row in store.read_part(KEY, Claim)] == ["first"]
    assert files(store) == [KEY]


def test_a_writer_that_fails_leaves_nothing(store: Store) -> None:
    def rows() -> Iterator[Claim]:
        yield from (claim(number) for number in range(300))
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        store.write_part(KEY, rows(), record=Claim, origin=origin)
    assert files(store) == []
    assert not list(Path(store.backend.uri.removeprefix("file://")).rglob(".tmp-*"))


KILLED = """
import sys
from rlaifv.records import Claim
from rlaifv.store import open_store
from tests.test_store_local import KEY, claim, origin

def rows():
    yield from (claim(number) for number in range(300))
    print("ready", flush=True)
    sys.stdin.read()

store = open_store(sys.argv[1])
if sys.argv[2] == "part":
    store.write_part(KEY, rows(), record=Claim, origin=origin)
else:
    with store.new_tree("tree") as folder:
        (folder / "weights").write_bytes(bytes(1000))
        list(rows())
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["part", "tree"])
def test_a_killed_writer_leaves_nothing_visible_and_a_sweep_removes_the_rest(
    store: Store, what: str
) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(store), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    assert writer.stdout is not None
    assert writer.stdin is not None
    assert writer.stdout.readline() == b"ready\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdin.close()
    writer.stdout.close()
    assert not store.exists(KEY)
    assert not store.tree_exists("tree")
    assert list(store.objects("")) == []
    assert files(store) != []  # what it had written is there, under a temporary name
    store.backend.sweep("")
    assert files(store) == []
    assert write(store, claim(0))


def test_a_flipped_bit_is_found(store: Store) -> None:
    write(store, *(claim(number, f"text {number}") for number in range(50)))
    good = store.read_bytes(KEY)
    footer = pq.read_metadata(Path(store.backend.uri.removeprefix("file://")) / KEY)
    column = footer.row_group(0).column(3)
    place = column.dictionary_page_offset + column.total_compressed_size // 2
    store.write_bytes(KEY, good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    with pytest.raises(ArtifactError, match="row group 0"):
        list(store.read_part(KEY, Claim))


@pytest.mark.parametrize("length", [0, 3, 100])
def test_a_cut_part_is_no_part(store: Store, length: int) -> None:
    write(store, claim(0))
    store.write_bytes(KEY, store.read_bytes(KEY)[:length])
    with pytest.raises(ArtifactError, match=f"{KEY}: not a complete Parquet file"):
        list(store.read_part(KEY, Claim))


def test_a_part_of_another_record_is_refused_by_column(store: Store) -> None:
    write(store, claim(0))
    with pytest.raises(ArtifactError, match="column 'p_yes' is missing"):
        list(store.read_part(KEY, Verdict))


def test_a_parquet_file_without_provenance_is_not_ours(store: Store) -> None:
    write(store, claim(0))
    path = Path(store.backend.uri.removeprefix("file://")) / KEY
    table = pq.read_table(path)
    pq.write_table(table, path)
    with pytest.raises(ArtifactError, match="no provenance"):
        store.provenance(KEY)


def test_a_tree_appears_when_it_is_complete_and_the_first_one_stays(store: Store) -> None:
    with store.new_tree("tree") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/weights").write_bytes(b"first")
        assert not store.tree_exists("tree")
    with store.new_tree("tree") as folder:
        (folder / "other").write_bytes(b"second")
    assert (store.tree_path("tree") / "inner/weights").read_bytes() == b"first"
    assert [info.path for info in store.tree_files("tree")] == ["inner/weights"]


def test_a_tree_with_a_file_of_another_size_is_refused(store: Store) -> None:
    with store.new_tree("tree") as folder:
        (folder / "weights").write_bytes(b"12345")
    (store.tree_path("tree") / "weights").write_bytes(b"123")
    with pytest.raises(ArtifactError, match="weights: missing or not 5 bytes"):
        store.tree_path("tree")


def test_a_deleted_tree_is_gone_and_deleting_nothing_is_fine(store: Store) -> None:
    with store.new_tree("tree") as folder:
        (folder / "weights").write_bytes(b"12345")
    store.delete("tree")
    store.delete("tree")
    assert list(store.objects("")) == []


def test_json_is_written_once_and_read_with_its_field_named(store: Store) -> None:
    assert store.write_json_once("x.json", claim(0))
    assert not store.write_json_once("x.json", claim(1))
    assert store.read_json("x.json", Claim) == claim(0)
    with pytest.raises(ArtifactError, match=r"x\.json: field p_yes"):
        store.read_json("x.json", Verdict)


@pytest.mark.parametrize("uri", ["ftp://host/x", "file://host/x"])
def test_an_unknown_uri_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigError, match=uri):
        open_store(uri)


def test_names_with_spaces_and_umlauts_survive_the_uri(tmp_path: Path) -> None:
    folder = tmp_path / "my r\u00fcn %20"
    assert write(open_store(str(folder)), claim(0))
    again = open_store(open_store(str(folder)).backend.uri)
    assert [row.claim_id for row in again.read_part(KEY, Claim)] == ["i/0/0"]


def test_a_tree_made_from_another_does_not_list_its_marker(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with store.new_tree("first") as folder:
        (folder / "weights").write_text("1")
    with store.new_tree("second") as folder:
        for path in store.tree_path("first").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    assert [info.path for info in store.tree_files("second")] == ["weights"]
    assert store.tree_path("second").is_dir()
