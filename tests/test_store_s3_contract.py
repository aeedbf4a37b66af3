"""What every back end of the store owes its callers: the same tests on a folder and on S3."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlaifv.errors import ArtifactError
from rlaifv.pipeline import Shard, part_key
from rlaifv.records import Answer, Verdict
from rlaifv.store import FileInfo, Manifest, Provenance, Store, open_store
from tests.s3servers import BUCKET, Server, running, use

KEY = part_key(0, "answers", Shard(0, 4))
TREE = "iteration-0/checkpoints/step-000004"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Started when a test first asks for one of them."""
    started: dict[str, Server] = {}
    stack = []
    try:

        class Lazy(dict[str, Server]):
            def __missing__(self, kind: str) -> Server:
                context = running(kind, tmp_path_factory.mktemp(kind))
                server = context.__enter__()
                stack.append(context)
                self[kind] = server
                return server

        started = Lazy()
        yield started
    finally:
        for context in reversed(stack):
            context.__exit__(None, None, None)


@pytest.fixture(params=["folder", "versitygw", "ministack"])
def store(
    request: pytest.FixtureRequest,
    servers: dict[str, Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "run"))
    use(servers[request.param].endpoint, monkeypatch, tmp_path)
    return open_store(f"s3://{BUCKET}/{tmp_path.name}/run")


def answers(count: int, *, text: str = "A dog sleeps on a red sofa.") -> list[Answer]:
    return [
        Answer(
            instruction_id=f"i{n}",
            answer_id=f"i{n}/0",
            text=text,
            seed=n,
            num_tokens=9,
            finish_reason="stop",
        )
        for n in range(count)
    ]


def origin(shard: str = "0/4") -> Provenance:
    return Provenance(
        stage="sample",
        run="demo",
        iteration=0,
        shard=shard,
        code_version="0",
        config_sha256="0",
        inputs={},
        seed=0,
    )


def write(store: Store, key: str, rows: list[Answer], shard: str = "0/4") -> bool:
    return store.write_part(key, rows, record=Answer, origin=lambda: origin(shard))


def make_tree(store: Store, key: str, files: dict[str, bytes]) -> None:
    with store.new_tree(key) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def test_a_part_comes_back_as_written(store: Store) -> None:
    rows = answers(600)
    assert not store.exists(KEY)
    assert write(store, KEY, rows)
    assert list(store.read_part(KEY, Answer)) == rows
    assert store.provenance(KEY).rows == 600
    info = store.part_info(KEY)
    assert (info.rows, info.bytes) == (600, store.backend.size(KEY))


def test_the_first_writer_of_a_part_wins(store: Store) -> None:
    assert write(store, KEY, answers(1, text="first"))
    assert not write(store, KEY, answers(1, text="second"))
    assert next(store.read_part(KEY, Answer)).text == "first"


def test_one_of_many_simultaneous_writers_wins(store: Store) -> None:
    gate = threading.Barrier(32)

    def attempt(number: int) -> bool:
        gate.wait()
        return write(store, KEY, answers(3, text=f"writer {number}"))

    with ThreadPoolExecutor(32) as pool:
        won = list(pool.map(attempt, range(32)))
    assert won.count(True) == 1
    assert next(store.read_part(KEY, Answer)).text == f"writer {won.index(True)}"


def test_simultaneous_writers_of_equal_bytes_have_one_winner_too(store: Store) -> None:
    manifest = Manifest(stage="sample", parts=[])
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda _: store.write_json_once("manifest.json", manifest), range(8)))
    assert won.count(True) == 1


def test_rows_that_raise_leave_nothing_behind(store: Store) -> None:
    def rows() -> Iterator[Answer]:
        yield from answers(2)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        store.write_part(KEY, rows(), record=Answer, origin=origin)
    assert list(store.objects("")) == []


def test_a_missing_part_and_wrong_columns_are_named(store: Store) -> None:
    with pytest.raises(ArtifactError, match=r"00000-of-00004.*no such artifact"):
        list(store.read_part(KEY, Answer))
    write(store, KEY, answers(1))
    with pytest.raises(ArtifactError, match="column 'claim_id' is missing"):
        list(store.read_part(KEY, Verdict))


def test_a_listing_is_sorted_and_complete(store: Store) -> None:
    for index in (3, 0, 2, 1):
        write(store, part_key(0, "answers", Shard(index, 4)), answers(1))
    store.write_bytes("iteration-0/answers2/x", b"1")
    found = list(store.objects("iteration-0/answers"))
    assert [item.key for item in found] == [part_key(0, "answers", Shard(i, 4)) for i in range(4)]
    assert all(item.size_bytes > 0 and item.modified > 1e9 for item in found)


def test_a_cut_part_is_refused(store: Store) -> None:
    write(store, KEY, answers(300))
    data = store.read_bytes(KEY)
    store.write_bytes(KEY, data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="not a complete Parquet file"):
        list(store.read_part(KEY, Answer))


def test_a_damaged_page_is_refused(store: Store) -> None:
    write(store, KEY, answers(300))
    data = bytearray(store.read_bytes(KEY))
    data[200] ^= 1
    store.write_bytes(KEY, bytes(data))
    with pytest.raises(ArtifactError, match="row group 0"):
        list(store.read_part(KEY, Answer))


def test_a_tree_comes_back_as_written(store: Store) -> None:
    files = {"config.json": b"{}", "sub/model.safetensors": os.urandom(9_000_000), "empty": b""}
    assert not store.tree_exists(TREE)
    make_tree(store, TREE, files)
    folder = store.tree_path(TREE)
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert [info.path for info in store.tree_files(TREE)] == sorted(files)


def test_the_first_tree_wins_and_is_not_mixed_with_the_second(store: Store) -> None:
    make_tree(store, TREE, {"a": b"first", "b": b"first"})
    make_tree(store, TREE, {"a": b"second", "c": b"second"})
    folder = store.tree_path(TREE)
    assert sorted(path.name for path in folder.iterdir() if path.name != "_COMPLETE") == ["a", "b"]
    assert (folder / "a").read_bytes() == b"first"


def test_simultaneous_trees_do_not_mix(store: Store) -> None:
    names = [f"file-{n}" for n in range(6)]

    def attempt(number: int) -> None:
        make_tree(store, TREE, {name: f"writer {number}".encode() * 100 for name in names})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attempt, range(4)))
    folder = store.tree_path(TREE)
    assert len({(folder / name).read_bytes() for name in names}) == 1
    digests = {info.path: info.sha256 for info in store.tree_files(TREE)}
    assert digests == {info.path: info.sha256 for info in digests_of(folder, names)}


def digests_of(folder: Path, names: list[str]) -> list[FileInfo]:
    from rlaifv.store import file_digest

    return [
        FileInfo(path=name, bytes=(folder / name).stat().st_size, sha256=file_digest(folder / name))
        for name in names
    ]


def test_a_tree_that_was_not_finished_is_absent(store: Store) -> None:
    with pytest.raises(FileNotFoundError), store.new_tree(TREE) as folder:
        (folder / "a" / "b").write_bytes(b"1")
    assert not store.tree_exists(TREE)
    with pytest.raises(ArtifactError, match="no complete tree"):
        store.tree_path(TREE)


def test_delete_removes_a_part_and_a_tree_and_nothing_else(store: Store) -> None:
    write(store, KEY, answers(1))
    make_tree(store, TREE, {"a": b"1", "sub/b": b"2"})
    make_tree(store, f"{TREE}0", {"a": b"1"})
    store.delete(TREE)
    store.delete(TREE)
    assert not store.tree_exists(TREE)
    assert store.tree_exists(f"{TREE}0")
    store.delete(KEY)
    assert not store.exists(KEY)


def test_a_large_part_is_read_by_row_groups(store: Store) -> None:
    rows = [
        row.model_copy(update={"text": os.urandom(20_000).hex()}) for row in answers(700)
    ]  # 256 rows of a group: some 5 MB compressed
    write(store, KEY, rows)
    with store.backend.open(KEY) as stream:
        assert pq.ParquetFile(stream).num_row_groups == 3
    assert list(store.read_part(KEY, Answer)) == rows
