"""The store on S3 servers: races, killed writers, killed servers, long listings, the cache."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from controller.gc import Collection
from controller.status import RunStatus
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.pipeline import CONFIG, Shard, part_key
from rlaifv.places import local_path
from rlaifv.records import Answer
from rlaifv.store import Store, debris, local_copy, open_store, remove_debris
from rlaifv.store._cache import Cache
from rlaifv.store._s3 import S3Backend
from tests.commands_support import command
from tests.fake_world import tiny_config
from tests.faultproxy import Fault, FaultProxy
from tests.s3servers import BUCKET, Server, plain_client, running, use
from tests.test_store_s3_contract import KEY, TREE, answers, make_tree, write

ROOT = Path(__file__).parents[1]
ROUNDS = int(os.environ.get("PROOF_ROUNDS", "25"))
"""200 in `make proof-s3`."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running("versitygw", tmp_path_factory.mktemp("versitygw")) as server:
        yield server


@pytest.fixture
def store(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    use(server.endpoint, monkeypatch, tmp_path)
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["versitygw", "ministack"])
def test_one_of_32_writers_wins_in_every_round(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with running(kind, tmp_path / "server") as server, ThreadPoolExecutor(32) as pool:
        use(server.endpoint, monkeypatch, tmp_path)
        store = open_store(f"s3://{BUCKET}/race")
        gate = threading.Barrier(32)
        source = tmp_path / "parts"
        source.mkdir()
        for number in range(32):
            (source / str(number)).write_bytes(f"writer {number}".encode() * 1000)
        for lap in range(ROUNDS):

            def attempt(number: int, key: str = f"part-{lap}") -> bool:
                gate.wait()
                return store.backend.put_file_if_absent(key, source / str(number))

            won = list(pool.map(attempt, range(32)))
            assert won.count(True) == 1, f"round {lap}"
            data = (source / str(won.index(True))).read_bytes()
            assert store.read_bytes(f"part-{lap}") == data
    print(f"{kind}: one winner among 32 writers in each of {ROUNDS} rounds")


UPLOAD = """
import os, sys
from rlaifv.store import open_store
with open_store(sys.argv[1]).new_tree(sys.argv[2]) as folder:
    for name in ("config.json", "model.safetensors"):
        os.symlink(os.path.join(sys.argv[3], name), folder / name)
"""


@pytest.mark.slow
def test_a_killed_upload_is_invisible_and_resumed_and_its_debris_can_be_removed(
    store: Store,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {"config.json": b"{}", "model.safetensors": os.urandom(90_000_000)}
    (tmp_path / "files").mkdir()
    for name, data in files.items():
        (tmp_path / "files" / name).write_bytes(data)
    with FaultProxy(server.endpoint) as proxy:
        proxy.add(Fault("answer", "PUT", path_part="partNumber=6", times=10**6))
        child = subprocess.Popen(
            [sys.executable, "-c", UPLOAD, str(store), TREE, str(tmp_path / "files")],
            cwd=ROOT,
            env=os.environ | {"AWS_ENDPOINT_URL": proxy.endpoint},
        )
        _wait(lambda: proxy.count("PUT", "partNumber") >= 6 and proxy.count("PUT", "config.json"))
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not store.tree_exists(TREE)
    with pytest.raises(ArtifactError, match="no complete tree"):
        store.tree_path(TREE)
    store.write_json_once(CONFIG, tiny_config())
    found = waste(store, capsys, "--older-than", "0")
    assert [(item.kind, item.key) for item in found.items] == [
        ("upload", f"{TREE}/model.safetensors"),
        ("tree", TREE),
    ]
    (left,) = (item for item in debris(store, "", older_than_seconds=0) if item.kind == "tree")
    found = waste(store, capsys, "--older-than", "24")
    assert found.items == []  # a writer may still be at work on it
    with FaultProxy(server.endpoint) as proxy:  # the retry
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        make_tree(open_store(str(store)), TREE, files)
        assert proxy.count("PUT", "config.json") == 0  # it was there already
    folder = store.tree_path(TREE)
    assert {name: (folder / name).read_bytes() for name in files} == files
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    remove_debris(store, left)  # listed as unfinished; complete by now
    assert store.tree_exists(TREE)
    found = waste(store, capsys, "--older-than", "0", "--delete")
    assert [item.kind for item in found.items] == ["upload"]
    assert waste(store, capsys, "--older-than", "0").items == []
    page = plain_client(server.endpoint).list_multipart_uploads(
        Bucket=BUCKET, Prefix=f"{tmp_path.name}/"
    )
    assert "Uploads" not in page
    assert store.tree_exists(TREE)


def waste(store: Store, capsys: pytest.CaptureFixture[str], *flags: str) -> Collection:
    """What the command `gc` says."""
    root, _, name = str(store).rpartition("/")
    assert command("gc", name, "--json", *flags, root=root) == 0
    return Collection.model_validate_json(capsys.readouterr().out)


def _wait(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # the only way to see another process's progress


def test_debris_of_other_bytes_does_not_end_up_in_the_tree(store: Store) -> None:
    store.write_bytes(f"{TREE}/model", b"of a writer that was killed")
    make_tree(store, TREE, {"model": b"of the one that finished", "config.json": b"{}"})
    assert (store.tree_path(TREE) / "model").read_bytes() == b"of the one that finished"
    names = {item.key.removeprefix(f"{TREE}/") for item in store.objects(TREE)}
    (moved,) = names - {"_COMPLETE", "config.json"}
    assert moved.endswith("/model")


def test_an_unfinished_tree_can_be_removed(store: Store) -> None:
    store.write_bytes(f"{TREE}/model", b"12345")
    (found,) = debris(store, "iteration-0", older_than_seconds=0)
    assert (found.key, found.num_bytes) == (TREE, 5)
    remove_debris(store, found)
    assert list(store.objects("")) == []


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with running("versitygw", tmp_path / "server") as server:
        use(server.endpoint, monkeypatch, tmp_path)
        store = open_store(f"s3://{BUCKET}/run")
        keys = [part_key(0, "answers", Shard(i, 40)) for i in range(40)]
        gate = threading.Event()

        def attempt(key: str) -> bool:
            if key == keys[20]:
                gate.set()
            return write(store, key, answers(5, text=key))

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(attempt, key) for key in keys]
            gate.wait()
            server.kill()
            server.start()
            assert all(future.result() for future in futures)
        assert [item.key for item in store.objects("")] == keys
        for key in keys:
            assert list(store.read_part(key, Answer)) == answers(5, text=key)


@pytest.mark.slow
def test_status_of_ten_thousand_parts_takes_eleven_listings_and_two_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(iterations=1)
    shards = config.shards.model_copy(update={"instructions": 10_000})
    config = config.model_copy(update={"shards": shards})
    with running("versitygw", tmp_path / "server") as server, FaultProxy(server.endpoint) as proxy:
        use(proxy.endpoint, monkeypatch, tmp_path)
        assert open_store(f"s3://{BUCKET}/run").write_json_once(CONFIG, config)
        folder = tmp_path / "server/data" / BUCKET / "run/iteration-0/instructions"
        folder.mkdir(parents=True)
        for index in range(10_000):
            (folder / f"{index:05d}-of-10000.parquet").touch()
        took = []
        for _ in range(3):
            proxy.requests.clear()
            started, busy = time.monotonic(), time.process_time()
            assert command("status", "run", "--json", root=f"s3://{BUCKET}") == 4
            took.append((time.monotonic() - started, time.process_time() - busy))
            listings = proxy.count("GET", "list-type=2")
            stages = {one.stage: one for one in RunStatus.model_validate_json(out(capsys)).stages}
            assert (stages["prepare"].done, stages["prepare"].shards) == (10_000, 10_000)
            assert listings <= 11
            assert len(proxy.requests) <= listings + 3  # the configuration
        seconds, busy = min(took)
        others = os.getloadavg()[0] / len(os.sched_getaffinity(0))
        print(
            f"status of 10,000 parts: {seconds:.2f} s, {busy:.2f} s busy, {listings} LIST calls; "
            f"{others:.1f} programs per core"
        )
        assert busy < 2.0
        assert seconds < 2.0 * max(1.0, others)


def out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_provenance_of_a_large_part_is_read_without_the_part(
    store: Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row.model_copy(update={"text": os.urandom(60_000).hex()}) for row in answers(400)]
    write(store, KEY, rows)
    size = store.backend.size(KEY)
    assert size is not None
    assert size > 20_000_000
    with FaultProxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert open_store(str(store)).provenance(KEY).rows == 400
        assert [request.headers["range"] for request in proxy.requests] == ["bytes=-65536"]


# --- a name that is a URI -----------------------------------------------------------------


def test_a_model_or_a_file_may_be_named_by_its_uri(
    store: Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(store, "models/tiny", {"config.json": b"{}"})
    store.write_bytes("benchmarks/questions.jsonl", b"{}\n")
    assert (local_path(f"{store}/models/tiny") / "config.json").read_bytes() == b"{}"
    file = local_path(f"{store}/benchmarks/questions.jsonl")
    assert (file.name, file.read_bytes()) == ("questions.jsonl", b"{}\n")
    with pytest.raises(ArtifactError, match=r"no such object, and no complete tree"):
        local_copy(f"{store}/models")
    store.write_bytes("benchmarks/questions.jsonl", b"[]\n")
    assert local_path(f"{store}/benchmarks/questions.jsonl").read_bytes() == b"[]\n"


def test_a_tree_is_downloaded_once(
    store: Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(store, TREE, {"model": b"1"})
    with FaultProxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        again = open_store(str(store))
        assert again.tree_path(TREE) == again.tree_path(TREE)
        assert proxy.count("GET", "step-000004/model") == 1


# --- the cache ----------------------------------------------------------------------------


def fill(folder: Path) -> None:
    (folder / "data").write_bytes(bytes(400))


HOLD = """
import sys
from pathlib import Path
from rlaifv.store._cache import Cache
folder = Cache(Path(sys.argv[1]), 1000).entry("held", 400, fill=lambda f: (f / "data").write_bytes(bytes(400)))
print(folder, flush=True)
sys.stdin.read()
"""


def test_the_cache_evicts_the_least_recently_used_but_none_in_use(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == str(tmp_path / "held")
        for name in ("old", "new"):  # as another process left them
            shutil.copytree(tmp_path / "held", tmp_path / name)
            (tmp_path / f"{name}.lock").touch()
        shutil.rmtree(tmp_path / "new")
        cache = Cache(tmp_path, 1000)
        cache.entry("mine", 400, fill=fill)
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["held", "mine"]
        with pytest.raises(ConfigError, match="do not fit"):
            cache.entry("more", 400, fill=fill)
        other.communicate("")


def test_a_failed_download_leaves_no_entry(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise ArtifactError("damaged")

    cache = Cache(tmp_path, 1000)
    with pytest.raises(ArtifactError, match="damaged"):
        cache.entry("digest", 400, fill=fail)
    assert (cache.entry("digest", 400, fill=fill) / "data").stat().st_size == 400


def test_a_forked_process_has_connections_of_its_own(store: Store) -> None:
    assert isinstance(store.backend, S3Backend)
    bucket = store.backend.bucket
    before = bucket.client()
    assert bucket.client() is before
    read, wrote = os.pipe()
    child = os.fork()
    if child == 0:  # only what a fork server's child does first
        os.write(wrote, b"same" if bucket.client() is before else b"new")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"new"
