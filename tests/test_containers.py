"""The docker executor's command line, and what a gang's pod does before it trains."""

import socket
from pathlib import Path

import pytest

from controller.executors.docker import Engine, container_command
from controller.k8s_settings import ClusterSettings
from jobs._gang import await_rank_0
from rlaifv.errors import TransientError

SETTINGS = ClusterSettings.model_validate({"threads": 2, "defaults": {"env": {"A": "b"}}})


def words(uri: str, environment: dict[str, str]) -> list[str]:
    argv = ("jobs.sample", "--run", uri, "--iteration", "0", "--shard", "3/8")
    return container_command(Engine("podman", ("--quiet",)), SETTINGS, argv, environment)


def test_a_container_gets_the_stage_s_arguments_and_nothing_else_to_write(tmp_path: Path) -> None:
    command = words(tmp_path.as_uri(), {})
    assert command[-8:] == [
        "rlaifv-gpu:latest", "jobs.sample", "--run", tmp_path.as_uri(), "--iteration", "0",
        "--shard", "3/8",
    ]  # fmt: skip
    assert {"--read-only", "--rm", "--quiet", f"{tmp_path}:{tmp_path}"} <= set(command)
    assert {"OMP_NUM_THREADS=2", "A=b", "RLAIFV_IMAGE=rlaifv-gpu:latest"} <= set(command)


def test_credentials_are_passed_on_by_name_only() -> None:
    command = words(
        "s3://bucket/demo",
        {"AWS_SECRET_ACCESS_KEY": "planted", "HOME": "/root", "AWS_CA_BUNDLE": "/etc/ca"},
    )
    assert "AWS_SECRET_ACCESS_KEY" in command
    assert not [word for word in command if "planted" in word or "HOME" in word]
    assert "AWS_CA_BUNDLE" not in command
    assert "--volume" not in command


def test_a_gang_waits_until_rank_0_answers_and_not_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        await_rank_0("127.0.0.1", port, timeout_s=5, dial=True)
    with pytest.raises(TransientError, match="is not there after 0 s"):
        await_rank_0("127.0.0.1", port, timeout_s=0, dial=True)
    await_rank_0("127.0.0.1", port, timeout_s=0, dial=False)  # rank 0 itself only needs its name
