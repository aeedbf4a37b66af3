"""The commands on a bucket: one run made there, read, forked, exported and cleaned."""

import random
from pathlib import Path

import pytest

from controller.__main__ import main
from controller.compare import Comparison
from controller.doctor import Diagnosis
from controller.fork import FORK, Fork
from controller.gc import Collection
from controller.places import run_place
from controller.run import settle_config
from rlaifv.config import RunConfig
from rlaifv.pipeline import CONFIG, Shard, choice_key, part_key
from rlaifv.records import Choice
from tests.commands_support import command, finished_run, go_on, keeping_config
from tests.fake_world import tiny_config
from tests.faultproxy import FaultProxy
from tests.s3servers import BUCKET, plain_client, running, use
from tests.test_report import Page


@pytest.mark.slow
def test_the_commands_work_on_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root, config = f"s3://{BUCKET}/runs-{random.randrange(1 << 30)}", keeping_config()
    with running("versitygw", tmp_path / "server") as server:
        use(server.endpoint, monkeypatch, tmp_path)
        place = run_place(root, config.name)
        settle_config(place.store, config, grow=True)
        assert go_on(place, config) == 0
        capsys.readouterr()
        assert command("doctor", "--json", root=root) == 0
        assert Diagnosis.model_validate_json(capsys.readouterr().out).healthy
        assert command("ls", root=root) == 0
        assert capsys.readouterr().out == "tiny\n"
        assert command("verify", "tiny", root=root) == 0
        assert command("show", "pair", "i0-3/3", "tiny", root=root) == 0
        to = str(tmp_path / "model")
        assert command("export", "checkpoint", "tiny", "--to", to, root=root) == 0
        assert (tmp_path / "model/weights").read_text() == "1 4"
        words = ["fork", "tiny", "new", "--from", "train@1", "--set", "train.beta=0.5"]
        assert command(*words, root=root) == 0
        assert "show config" in capsys.readouterr().out
        new = run_place(root, "new")
        kept = new.store.read_json(FORK, Fork).copied
        key = part_key(1, "pairs", Shard(0, 1))
        assert new.store.read_bytes(key) == place.store.read_bytes(key)
        assert kept[key] == place.store.provenance(key).rows_sha256
        name = f"{root.rpartition('/')[2]}/new/{key}"
        head = plain_client(server.endpoint).head_object(Bucket=BUCKET, Key=name)
        assert head["Metadata"]["sha256"] == new.store.part_info(key).sha256
        assert go_on(new, new.store.read_json(CONFIG, RunConfig)) == 0
        assert command("verify", "new", root=root) == 0
        assert command("status", "new", root=root) == 0
        assert f"export checkpoint {root}/new --to model" in capsys.readouterr().out
        assert command("report", "new", root=root) == 0
        local = str(finished_run(tmp_path / "local").folder)
        assert main(["compare", f"{root}/new", local, "--json"]) == 0
        text = capsys.readouterr().out
        compared = Comparison.model_validate_json(text[text.index("{") :])
        assert "train.beta" in {one.key for one in compared.config}
        assert compared.answered_by_both == 8
        assert command("gc", "tiny", "--delete", "--json", root=root) == 0
        found = Collection.model_validate_json(capsys.readouterr().out)
        assert {item.key for item in found.items} == {
            "iteration-0/checkpoints/step-000002",
            "iteration-1/checkpoints/step-000002",
        }
        assert command("verify", "tiny", root=root) == 0


@pytest.mark.slow
def test_a_finished_run_on_a_bucket_keeps_the_chosen_trees_and_a_private_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root, config = f"s3://{BUCKET}/runs", tiny_config()
    assert not config.train.keep_unselected
    with running("versitygw", tmp_path / "server") as server, FaultProxy(server.endpoint) as proxy:
        use(proxy.endpoint, monkeypatch, tmp_path)
        place = run_place(root, config.name)
        settle_config(place.store, config, grow=True)
        assert go_on(place, config) == 0
        choices = [place.store.read_json(choice_key(n), Choice) for n in range(config.iterations)]
        keys = {item.key for item in place.store.objects("")}
        trees = {key.removesuffix("/_COMPLETE") for key in keys if key.endswith("/_COMPLETE")}
        assert trees == {choice.tree for choice in choices}
        assert not [key for key in keys if "/train_state/" in key]
        capsys.readouterr()
        assert command("report", "tiny", root=root) == 0
        assert f"{root}/tiny/report/index.html" in capsys.readouterr().out
        page = Page(place.store.read_bytes("report/index.html").decode())
        assert page.links
        assert all(link.startswith(("data:image/", "#")) for link in page.links)
        assert not {"link", "iframe"} & set(page.tags)
        granted = ("x-amz-acl", "x-amz-grant-read", "x-amz-grant-full-control")
        assert not [one for one in proxy.requests if set(granted) & set(one.headers)]
        assert command("status", "tiny", root=root) == 0
        assert command("lineage", "checkpoints", "tiny", root=root) == 0
        assert command("show", "pairs", "tiny", "--limit", "1", root=root) == 0
        (tmp_path / "model").mkdir()
        (tmp_path / "model/config.json").write_text("{}")
        (tmp_path / "model/model.safetensors").write_bytes(b"weights")
        assert command("import", "model", str(tmp_path / "model"), root=root) == 0
        capsys.readouterr()
        assert command("ls", root=root) == 0
        assert capsys.readouterr().out.split() == ["tiny", "models/model"]
