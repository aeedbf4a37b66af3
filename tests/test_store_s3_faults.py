"""Bad days of networks and servers: nothing is lost, nothing doubled, and time is bounded."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaifv.errors import ArtifactError, ConfigError, RlaifvError, TransientError
from rlaifv.records import Answer
from rlaifv.store import Store, check_before_run, open_store, probe
from rlaifv.store._s3 import S3Backend
from rlaifv.store._s3_client import Checksums, Settings
from tests.faultproxy import Fault, FaultProxy, Kind, Request
from tests.s3servers import ACCESS_KEY, BUCKET, SECRET_KEY, Server, free_port, running, use
from tests.test_store_s3_contract import KEY, TREE, answers, make_tree, write

QUICK = Settings(
    attempts=4,
    backoff_seconds=0.01,
    connect_seconds=1.0,
    read_seconds=0.5,
    bytes_per_second=50_000_000,
)
ALWAYS = 10**6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running("versitygw", tmp_path_factory.mktemp("versitygw")) as server:
        yield server


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    use(server.endpoint, monkeypatch, tmp_path)
    with FaultProxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy, tmp_path: Path) -> Store:
    return Store(S3Backend(f"s3://{BUCKET}/{tmp_path.name}", QUICK))


def keys(store: Store) -> list[str]:
    return [item.key for item in store.objects("")]


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "SlowDown"), (500, "InternalError"), (409, "ConditionalRequestConflict")],
)
def test_a_busy_server_is_asked_again(
    store: Store, proxy: FaultProxy, status: int, code: str
) -> None:
    for method in ("PUT", "GET"):
        proxy.add(Fault("answer", method, times=2, status=status, code=code))
    assert write(store, KEY, answers(3))
    assert list(store.read_part(KEY, Answer)) == answers(3)
    assert keys(store) == [KEY]
    assert proxy.count("PUT") == 3


def test_a_server_that_stays_busy_is_given_up_in_bounded_time(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.add(Fault("answer", "PUT", times=ALWAYS))
    started = time.monotonic()
    with pytest.raises(TransientError, match="busy"):
        write(store, KEY, answers(1))
    assert time.monotonic() - started < 5
    assert proxy.count("PUT") == QUICK.attempts
    assert keys(store) == []


@pytest.mark.parametrize("kind", ["reset", "truncate", "flip", "trickle", "lose_answer"])
def test_a_damaged_download_is_made_again(store: Store, proxy: FaultProxy, kind: Kind) -> None:
    data = os.urandom(40_000)
    store.write_bytes("data", data)
    proxy.add(Fault(kind, "GET"))
    started = time.monotonic()
    assert store.read_bytes("data") == data
    assert time.monotonic() - started < 5
    assert proxy.count("GET") == 2


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("reset", TransientError),
        ("truncate", TransientError),
        ("trickle", TransientError),
        ("flip", ArtifactError),
    ],
)
def test_a_download_that_is_always_damaged_fails_in_bounded_time(
    store: Store, proxy: FaultProxy, kind: Kind, error: type[RlaifvError]
) -> None:
    store.write_bytes("data", os.urandom(40_000))
    proxy.add(Fault(kind, "GET", times=ALWAYS))
    started = time.monotonic()
    with pytest.raises(error, match="/data: "):
        store.read_bytes("data")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("kind", ["reset", "truncate", "flip"])
def test_a_tree_is_downloaded_in_spite_of_damage(
    store: Store, proxy: FaultProxy, kind: Kind
) -> None:
    files = {"model": os.urandom(20_000_000), "config.json": b"{}"}
    make_tree(store, TREE, files)
    proxy.add(Fault(kind, "GET", path_part="step-000004/model", times=2))
    folder = store.tree_path(TREE)
    assert {name: (folder / name).read_bytes() for name in files} == files


def test_a_tree_that_is_always_damaged_is_refused_and_not_cached(
    store: Store, proxy: FaultProxy, tmp_path: Path
) -> None:
    make_tree(store, TREE, {"model": os.urandom(10_000_000)})
    proxy.add(Fault("flip", "GET", path_part="step-000004/model", times=ALWAYS))
    with pytest.raises(ArtifactError, match="SHA-256 of model"):
        store.tree_path(TREE)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_row_group_damaged_on_the_way_is_read_again(store: Store, proxy: FaultProxy) -> None:
    rows = [row.model_copy(update={"text": os.urandom(50_000).hex()}) for row in answers(300)]
    write(store, KEY, rows)
    proxy.add(Fault("flip", "GET", when=lambda request: "bytes=4-" in request.headers["range"]))
    assert list(store.read_part(KEY, Answer)) == rows


def test_a_lost_answer_to_a_successful_put_is_success(store: Store, proxy: FaultProxy) -> None:
    proxy.add(Fault("lose_answer", "PUT"))
    assert write(store, KEY, answers(1))
    assert proxy.count("PUT") == 2
    assert keys(store) == [KEY]


def test_a_lost_answer_to_a_put_that_lost_is_a_loss(store: Store, proxy: FaultProxy) -> None:
    assert write(store, KEY, answers(1, text="first"))
    proxy.add(Fault("lose_answer", "PUT"))
    assert not write(store, KEY, answers(1, text="second"))
    assert next(store.read_part(KEY, Answer)).text == "first"


def test_a_lost_answer_to_a_completed_upload_is_success(
    store: Store, proxy: FaultProxy, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(20_000_000))
    proxy.add(Fault("lose_answer", "POST", path_part="uploadId"))
    assert store.backend.put_file_if_absent("large", source)
    assert store.read_bytes("large") == source.read_bytes()


def test_an_upload_that_fails_leaves_nothing_behind(
    store: Store, proxy: FaultProxy, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(20_000_000))
    proxy.add(Fault("answer", "PUT", path_part="partNumber=2", times=ALWAYS))
    with pytest.raises(TransientError, match="busy"):
        store.backend.put_file_if_absent("large", source)
    assert keys(store) == []
    assert isinstance(store.backend, S3Backend)
    assert list(store.backend.uploads("")) == []


def test_412_without_an_object_is_not_taken_for_another_writer(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.add(Fault("answer", "PUT", status=412, code="PreconditionFailed"))
    with pytest.raises(TransientError, match="says that it exists"):
        write(store, KEY, answers(1))


@pytest.mark.parametrize("fresh", [True, False])
def test_an_expired_token_is_read_anew(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: bool
) -> None:
    file = tmp_path / "credentials"
    old = "[default]\naws_access_key_id = AKIAOLD\naws_secret_access_key = old\n"
    file.write_text(old)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    def is_old(request: Request) -> bool:
        if fresh:  # what a sidecar does, some time or other
            file.write_text(old.replace("AKIAOLD", ACCESS_KEY).replace("= old", f"= {SECRET_KEY}"))
        return "AKIAOLD" in request.headers["authorization"]

    proxy.add(Fault("answer", times=ALWAYS, status=400, code="ExpiredToken", when=is_old))
    if fresh:
        assert write(store, KEY, answers(1))
        assert store.exists(KEY)
    else:
        with pytest.raises(TransientError, match="expired"):
            write(store, KEY, answers(1))
        with pytest.raises(TransientError, match="expired"):
            store.exists(KEY)


@pytest.mark.parametrize(
    ("status", "code", "error", "said"),
    [
        (403, "AccessDenied", ConfigError, "access denied"),
        (404, "NoSuchBucket", ConfigError, "no such bucket"),
        (301, "PermanentRedirect", ConfigError, "wrong region"),
        (400, "AuthorizationHeaderMalformed", ConfigError, "wrong region"),
        (403, "RequestTimeTooSkewed", ConfigError, "clock"),
        (403, "QuotaExceeded", TransientError, "quota"),
        (507, "InsufficientStorage", TransientError, "quota"),
        (501, "NotImplemented", ConfigError, "does not know"),
    ],
)
def test_an_error_says_what_to_do(
    store: Store, proxy: FaultProxy, status: int, code: str, error: type[RlaifvError], said: str
) -> None:
    proxy.add(Fault("answer", "PUT", times=ALWAYS, status=status, code=code))
    with pytest.raises(error, match=said):
        write(store, KEY, answers(1))
    assert proxy.count("PUT") <= 2  # boto3 follows a redirect once by itself


def test_the_reason_of_a_refused_head_is_found_out(store: Store, proxy: FaultProxy) -> None:
    proxy.add(Fault("answer", times=ALWAYS, status=403, code="RequestTimeTooSkewed"))
    with pytest.raises(ConfigError, match="clock"):
        store.exists(KEY)


def test_wrong_and_missing_credentials_are_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ConfigError, match="does not accept these credentials") as caught:
        open_store(f"s3://{BUCKET}/a").exists(KEY)
    assert "wrong" not in str(caught.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="no credentials"):
        store.exists(KEY)


def test_a_missing_bucket_is_named(proxy: FaultProxy) -> None:
    with pytest.raises(ConfigError, match=r"no such bucket.*bucket missing-bucket at http"):
        open_store("s3://missing-bucket/run").read_bytes("config.json")


def test_an_endpoint_that_is_down_is_named(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(TransientError, match=f"cannot be reached.*{endpoint}"):
        Store(S3Backend(f"s3://{BUCKET}", QUICK)).exists(KEY)


def test_an_endpoint_with_a_password_is_refused_without_repeating_it(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hush@127.0.0.1:1")
    with pytest.raises(ConfigError, match="must not hold") as caught:
        Store(S3Backend(f"s3://{BUCKET}", QUICK)).exists(KEY)
    assert "hush" not in str(caught.value)


def test_a_uri_with_credentials_is_refused_without_repeating_them() -> None:
    with pytest.raises(ConfigError, match="credentials elsewhere") as caught:
        open_store("s3://AKIA:hush@bucket/run")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "variable",
    [
        "AWS_MAX_ATTEMPTS",
        "AWS_REQUEST_CHECKSUM_CALCULATION",
        "RLAIFV_S3_ADDRESSING",
        "RLAIFV_S3_SINGLE_WRITER",
    ],
)
def test_a_bad_setting_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "perhaps")
    with pytest.raises(ConfigError, match=f"{variable}=perhaps: expected"):
        open_store("s3://bucket")


@pytest.mark.parametrize("wanted", ["when_supported", "when_required"])
def test_additional_checksums_are_headers_and_can_be_switched_off(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", wanted)
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}")
    write(store, KEY, answers(2))
    make_tree(store, TREE, {"model": os.urandom(20_000_000)})
    assert list(store.read_part(KEY, Answer)) == answers(2)
    seen = [request.headers for request in proxy.requests if request.method == "PUT"]
    sent = [name for headers in seen for name in headers if name.startswith("x-amz-checksum-")]
    assert not any("x-amz-trailer" in headers for headers in seen)
    assert set(sent) == (
        {"x-amz-checksum-sha256", "x-amz-checksum-crc32"} if wanted == "when_supported" else set()
    )


def test_a_part_that_is_damaged_on_the_way_up_is_refused_and_sent_again(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.add(Fault("flip_up", "PUT", path_part="partNumber=1"))
    data = os.urandom(20_000_000)
    make_tree(store, TREE, {"model": data})
    assert proxy.count("PUT", "partNumber=1") == 2
    assert (store.tree_path(TREE) / "model").read_bytes() == data


@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_a_body_is_signed_unless_the_server_checks_its_crc(
    proxy: FaultProxy, tmp_path: Path, checksums: Checksums
) -> None:
    settings = QUICK._replace(request_checksums=checksums)
    store = Store(S3Backend(f"s3://{BUCKET}/{tmp_path.name}", settings))
    make_tree(store, TREE, {"model": os.urandom(20_000_000), "config.json": b"{}"})
    writes = [one for one in proxy.requests if one.method in ("PUT", "POST")]
    unsigned = [one for one in writes if one.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"]
    blocks = [one for one in writes if "partNumber=" in one.query]
    assert len(blocks) == 2
    assert unsigned == (blocks if checksums == "when_supported" else [])
    assert all("x-amz-checksum-crc32" in one.headers["authorization"] for one in unsigned)


# --- a server that ignores If-None-Match -------------------------------------------------


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ministack: it does not check signatures, which cover the header that the proxy drops."""
    with running("ministack", tmp_path_factory.mktemp("ministack")) as server:
        yield server


@pytest.fixture
def careless(
    trusting: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FaultProxy]:
    use(trusting.endpoint, monkeypatch, tmp_path)
    with FaultProxy(trusting.endpoint, drop_headers=("if-none-match",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def test_a_store_that_ignores_put_if_absent_is_refused(
    careless: FaultProxy, tmp_path: Path
) -> None:
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}")
    with pytest.raises(ConfigError, match="put-if-absent: ignored"):
        check_before_run(store)
    outcomes = {finding.check: finding.outcome for finding in probe(store)}
    assert {outcomes[check] for check in ("put-if-absent", "race", "multipart")} == {"fail"}
    assert outcomes["read"] == outcomes["list"] == outcomes["delete"] == "ok"
    assert keys(store) == []


def test_single_writer_mode_says_so_and_keeps_the_first(
    careless: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RLAIFV_S3_SINGLE_WRITER", "1")
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}")
    assert "nothing else may write to this run" in check_before_run(store)
    assert write(store, KEY, answers(1, text="first"))
    assert not write(store, KEY, answers(1, text="second"))
    assert next(store.read_part(KEY, Answer)).text == "first"


def test_a_sound_store_passes_the_doctor(store: Store, proxy: FaultProxy) -> None:
    findings = probe(store)
    assert {finding.outcome for finding in findings if finding.check != "space"} == {"ok"}
    assert check_before_run(store) == ""
    assert keys(store) == []


def test_a_role_that_may_not_delete_is_found_out(store: Store, proxy: FaultProxy) -> None:
    proxy.add(Fault("answer", "DELETE", times=ALWAYS, status=403, code="AccessDenied"))
    failed = [finding for finding in probe(store) if finding.outcome == "fail"]
    assert "delete" in [finding.check for finding in failed]
    assert all("access denied" in finding.text for finding in failed)
