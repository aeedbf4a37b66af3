"""A bucket as other people's tools see it, and what must not be seen in it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from rlaifv.pipeline import Shard, part_key
from rlaifv.store import Store, open_store
from tests.s3servers import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    Server,
    aws_program,
    duckdb_python,
    free_port,
    plain_client,
    running,
    use,
)
from tests.test_store_s3_contract import KEY, TREE, answers, make_tree, write

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running("versitygw", tmp_path_factory.mktemp("versitygw")) as server:
        yield server


@pytest.fixture
def store(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    use(server.endpoint, monkeypatch, tmp_path)
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


def arrow_filesystem(server: Server) -> pyarrow.fs.S3FileSystem:
    return pyarrow.fs.S3FileSystem(
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
        endpoint_override=server.endpoint.removeprefix("http://"),
        scheme="http",
        region="us-east-1",
    )


def test_a_person_can_browse_the_bucket(store: Store, server: Server) -> None:
    write(store, KEY, answers(3))
    make_tree(store, TREE, {"config.json": b"{}"})
    client, run = plain_client(server.endpoint), str(store).rsplit("/", 1)[1]
    page = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{run}/iteration-0/", Delimiter="/")
    folders = [item["Prefix"] for item in page["CommonPrefixes"]]
    assert folders == [f"{run}/iteration-0/answers/", f"{run}/iteration-0/checkpoints/"]
    page = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{run}/{TREE}/", Delimiter="/")
    names = [item["Key"].rsplit("/", 1)[1] for item in page["Contents"]]
    assert names == ["_COMPLETE", "config.json"]


@pytest.mark.slow
def test_the_aws_command_line_browses_and_copies(
    store: Store, server: Server, tmp_path: Path
) -> None:
    write(store, KEY, answers(3))
    make_tree(store, TREE, {"config.json": b"{}"})

    def aws(*words: str) -> str:
        done = subprocess.run(
            [aws_program(), "s3", *words], capture_output=True, text=True, env=os.environ
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert aws("ls", f"{store}/iteration-0/").split() == ["PRE", "answers/", "PRE", "checkpoints/"]
    assert aws("ls", f"{store}/{KEY}").split()[2:] == [str(store.backend.size(KEY)), Path(KEY).name]
    aws("sync", f"{store}/{TREE}", str(tmp_path / "checkpoint"))
    assert (tmp_path / "checkpoint/config.json").read_bytes() == b"{}"


ASK = """
import os, sys
from pathlib import Path
import duckdb, duckdb_ext
(extension,) = Path(duckdb_ext.__path__[0]).rglob("httpfs.duckdb_extension")
connection = duckdb.connect()
connection.load_extension(str(extension))
connection.execute(
    f"create secret (type s3, key_id '{os.environ['AWS_ACCESS_KEY_ID']}', "
    f"secret '{os.environ['AWS_SECRET_ACCESS_KEY']}', region 'us-east-1', url_style 'path', "
    f"endpoint '{os.environ['AWS_ENDPOINT_URL'].removeprefix('http://')}', use_ssl false)"
)
print(connection.sql(sys.argv[1]).fetchall())
"""


@pytest.mark.slow
def test_duckdb_reads_all_parts_of_an_artifact(store: Store, server: Server) -> None:
    for shard in range(2):
        write(store, part_key(0, "answers", Shard(shard, 2)), answers(3))
    query = f"select count(*), sum(num_tokens) from '{store}/iteration-0/answers/*.parquet'"  # noqa: S608
    done = subprocess.run([duckdb_python(), "-c", ASK, query], capture_output=True, text=True)
    assert done.stdout == "[(6, 54)]\n", done.stderr


def test_arrow_and_pandas_read_a_part_directly(store: Store, server: Server) -> None:
    write(store, KEY, answers(3))
    path = f"{str(store).removeprefix('s3://')}/{KEY}"
    table = pq.read_table(path, filesystem=arrow_filesystem(server))
    assert table.to_pandas()["text"].tolist() == [row.text for row in answers(3)]


def _as_s3(arrow: object, server: Server) -> object:
    """An fsspec file system, as `datasets` wants it, over Arrow's S3 client."""
    wrapper = arrow.ArrowFSWrapper  # type: ignore[attr-defined]

    class ArrowS3(wrapper):  # type: ignore[misc, valid-type]
        protocol = "s3fs"

        def __init__(self, **options: object) -> None:
            super().__init__(fs=arrow_filesystem(server), **options)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("s3fs://").rstrip("/")

    return ArrowS3()


@pytest.mark.slow
def test_datasets_reads_a_part_directly(
    store: Store, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    fsspec = pytest.importorskip("fsspec")
    arrow = pytest.importorskip("fsspec.implementations.arrow")
    write(store, KEY, answers(3))
    fsspec.register_implementation("s3fs", type(_as_s3(arrow, server)), clobber=True)
    path = f"s3fs://{str(store).removeprefix('s3://')}/{KEY}"
    found = datasets.load_dataset(
        "parquet", data_files=path, split="train", streaming=True, cache_dir=str(tmp_path)
    )
    assert [row["text"] for row in found] == [row.text for row in answers(3)]


# --- secrets ------------------------------------------------------------------------------

FAIL_AND_SUCCEED = """
import logging, sys
from rlaifv.errors import RlaifvError
from rlaifv.store import open_store, probe
logging.basicConfig(level=logging.DEBUG)
good, down = sys.argv[1:]
store = open_store(good)
store.write_bytes("x", b"1")
store.read_bytes("x")
print(probe(store))
for uri in ("s3://missing-bucket/x",):
    try:
        open_store(uri).read_bytes("x")
    except RlaifvError as error:
        logging.error("%s", error)
import os
os.environ["AWS_ENDPOINT_URL"] = down
os.environ["AWS_MAX_ATTEMPTS"] = "2"
try:
    open_store(good).read_bytes("x")
except RlaifvError as error:
    logging.exception("%s", error)
"""


@pytest.mark.slow
def test_no_secret_is_logged_or_stored_even_at_debug_level(
    store: Store, server: Server, tmp_path: Path
) -> None:
    down = f"http://someone:hushhush@127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", FAIL_AND_SUCCEED, str(store), down],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "no such bucket" in done.stderr
    assert "must not hold" in done.stderr
    said = done.stdout + done.stderr
    stored = b"".join(store.read_bytes(item.key) for item in store.objects(""))
    for secret in (SECRET_KEY, ACCESS_KEY, "hushhush", "Signature="):
        assert secret not in said
        assert secret.encode() not in stored
