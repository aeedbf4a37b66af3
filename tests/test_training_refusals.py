import math
import re
from pathlib import Path
from typing import Any

import pytest

from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.records import Image
from rlaifv.training import TrainRequest, train
from rlaifv.training.schedule import make_plan
from rlaifv.training.scoring import Answers, score_pair
from tests.training_support import (
    CONFIG,
    Folders,
    make_pair,
    make_policy,
    make_request,
    reference_logps,
    with_config,
)


@pytest.fixture(scope="module")
def request_full(tmp_path_factory: pytest.TempPathFactory) -> TrainRequest:
    policy = make_policy(tmp_path_factory.mktemp("policy"))
    return make_request(policy, reference_logps(policy, [make_pair(i) for i in range(10)]))


def replaced(request: TrainRequest, pair_id: str, **changes: object) -> TrainRequest:
    row = request.reflogps[pair_id].model_copy(update=changes)
    return request._replace(reflogps={**request.reflogps, pair_id: row})


def test_loss_that_is_not_finite_stops_before_the_step(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    second = next(make_plan(request_full.reflogps, CONFIG, seed=0).batches(1))
    nats = request_full.reflogps[second[2]].chosen_token_nats
    request = replaced(request_full, second[2], chosen_token_nats=[math.nan] * len(nats))
    sink = Folders(tmp_path)
    with pytest.raises(ArtifactError, match=f"loss is not finite for pairs {second[2]};"):
        train(request, sink)
    assert len(sink.metrics) == 1
    assert sink.offered == []


def test_an_image_that_is_read_ahead_is_refused_in_its_turn(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    second = next(make_plan(request_full.reflogps, CONFIG, seed=0).batches(1))
    broken = Image(bytes=b"no picture")
    pairs = [
        pair.model_copy(update={"image": broken}) if pair.pair_id in second else pair
        for pair in request_full.pairs
    ]
    sink = Folders(tmp_path)
    with pytest.raises(ArtifactError, match=rf"pairs: pair ({'|'.join(second)}): .*image"):
        train(request_full._replace(pairs=pairs), sink)
    assert len(sink.metrics) == 1


def test_gradient_that_is_not_finite_stops_before_the_step(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    first = next(make_plan(request_full.reflogps, CONFIG, seed=0).batches())
    sink = Folders(tmp_path)
    with pytest.raises(ArtifactError, match=rf"gradient's norm is (inf|nan).*{min(first)}"):
        train(with_config(request_full, beta=3e38), sink)
    assert sink.metrics == []


@pytest.mark.parametrize("size", [1, 2])
def test_pairs_of_the_pass_whose_gradient_is_not_finite_are_named(
    request_full: TrainRequest, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(make_plan(request_full.reflogps, CONFIG, seed=0).batches())

    def broken(policy: Answers, *others: Any, **options: Any) -> Any:
        if others[1].pair_id == first[1]:
            policy.chosen_T.register_hook(lambda g: g * math.inf)  # type: ignore[no-untyped-call]
        return score_pair(policy, *others, **options)

    monkeypatch.setattr("rlaifv.training.trainer.score_pair", broken)
    sink = Folders(tmp_path)
    with pytest.raises(ArtifactError, match="gradient's norm is") as caught:
        train(with_config(request_full, micro_batch_size=size), sink)
    named = re.findall(r"pair-\d\d", str(caught.value))
    assert first[1] in named
    assert len(named) == size
    assert sink.metrics == []


def test_missing_reference_is_refused(request_full: TrainRequest, tmp_path: Path) -> None:
    rest = {name: row for name, row in request_full.reflogps.items() if name != "pair-07"}
    with pytest.raises(ArtifactError, match="reflogps: no row for pair pair-07"):
        train(request_full._replace(reflogps=rest), Folders(tmp_path))


def test_reference_of_another_length_is_refused(request_full: TrainRequest, tmp_path: Path) -> None:
    nats = [*request_full.reflogps["pair-07"].rejected_token_nats, -1.0]
    request = replaced(request_full, "pair-07", rejected_token_nats=nats)
    expected = rf"pair pair-07: {len(nats)} rejected tokens, but the policy has {len(nats) - 1}"
    with pytest.raises(ArtifactError, match=expected):
        train(request, Folders(tmp_path))


def test_equal_answers_and_repeated_ids_are_refused(
    request_full: TrainRequest, tmp_path: Path
) -> None:
    equal = request_full.pairs[3].model_copy(update={"rejected": request_full.pairs[3].chosen})
    with pytest.raises(ArtifactError, match="pair-03: chosen and rejected are equal"):
        train(request_full._replace(pairs=[equal]), Folders(tmp_path))
    with pytest.raises(ArtifactError, match="pair-03 occurs twice"):
        train(request_full._replace(pairs=[request_full.pairs[3]] * 2), Folders(tmp_path))


def test_pair_that_is_too_long_is_named(request_full: TrainRequest, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"pair pair-\d\d: "):
        train(with_config(request_full, max_length=20), Folders(tmp_path))


def test_float16_is_refused(request_full: TrainRequest, tmp_path: Path) -> None:
    spec = request_full.policy.model_copy(update={"dtype": "float16"})
    with pytest.raises(ConfigError, match="float16 cannot be trained"):
        train(request_full._replace(policy=spec), Folders(tmp_path))
