"""What a training step does meanwhile: reads ahead, keeps features, moves gradients."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlaifv.models.shared_prefix import SharedPrefixModel
from rlaifv.records import PreferencePair
from rlaifv.training import TrainRequest, train
from rlaifv.training.optimizer import MasterAdamW
from rlaifv.training.policy import Policy, _FeatureCache
from rlaifv.training.processes import Processes
from rlaifv.training.schedule import make_plan
from tests.training_support import (
    CONFIG,
    NUM_STEPS,
    Folders,
    assert_same_weights,
    make_pair,
    make_policy,
    make_request,
    reference_logps,
)


@pytest.fixture(scope="module")
def request_full(tmp_path_factory: pytest.TempPathFactory) -> TrainRequest:
    policy = make_policy(tmp_path_factory.mktemp("policy"))
    return make_request(policy, reference_logps(policy, [make_pair(i) for i in range(10)]))


def test_reading_ahead_and_keeping_features_change_no_bit(
    request_full: TrainRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, seen = request_full, list[int]()
    features = SharedPrefixModel.vision_features

    def counted(self: SharedPrefixModel, pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return features(self, pixels)

    monkeypatch.setattr(SharedPrefixModel, "vision_features", counted)
    monkeypatch.setattr("rlaifv.training.policy.COPYING", 1)
    train(request, Folders(tmp_path / "kept"))
    images = {pair.image.bytes for pair in request.pairs}
    assert seen == [1] * len(images), "once for all epochs"
    monkeypatch.setattr(Policy, "read_ahead", lambda *_: None)
    monkeypatch.setattr("rlaifv.training.policy.FEATURE_CACHE_BYTES", 0)
    train(request, Folders(tmp_path / "anew"))
    assert len(seen) > 2 * len(images)
    assert_same_weights(tmp_path / "kept/checkpoint-6", tmp_path / "anew/checkpoint-6")


def test_each_pass_is_encoded_once_and_a_steps_first_one_during_the_step_before(
    request_full: TrainRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, sink = Policy._encode, Folders(tmp_path)
    at: list[int] = []

    def counted(self: Policy, pairs: Sequence[PreferencePair]) -> Any:
        at.append(len(sink.metrics))
        return encode(self, pairs)

    monkeypatch.setattr(Policy, "_encode", counted)
    train(request_full, sink)
    sizes = [len(batch) for batch in make_plan(request_full.reflogps, CONFIG, seed=0).batches(0)]
    passes = [step for step, size in enumerate(sizes) for _ in range(math.ceil(size / 2))]
    firsts = [passes.index(step) for step in range(1, NUM_STEPS)]
    assert at == [step - (number in firsts) for number, step in enumerate(passes)]


def test_what_was_read_ahead_serves_no_other_pairs(request_full: TrainRequest) -> None:
    policy, pairs = Policy(request_full.policy, CONFIG, base="hub/tiny"), request_full.pairs
    expected = policy(pairs[2:4]).logps_M
    policy.read_ahead(pairs[:2])
    assert torch.equal(policy(pairs[2:4]).logps_M, expected)


def test_features_are_kept_up_to_a_size_and_few_are_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlaifv.training.policy.COPYING", 1)
    pixels = torch.arange(4.0).view(4, 1, 1)
    cache, seen = _FeatureCache(max_bytes=3 * pixels[:1].nbytes), list[float]()

    def tower(pixels_1: Tensor) -> Tensor:
        seen.append(pixels_1.item())
        return pixels_1 + 0.5

    for _ in range(2):
        for number in range(4):
            features = cache.get(bytes([number]), pixels[number : number + 1], tower)
            assert torch.equal(features, pixels[number : number + 1] + 0.5)
            assert len(cache._copying) <= 1
    assert seen == [0, 1, 2, 3, 3], "three fit"


def test_no_gradient_is_held_in_both_precisions(request_full: TrainRequest) -> None:
    spec = request_full.policy.model_copy(update={"dtype": "bfloat16"})
    policy = Policy(spec, request_full.config, base="hub/tiny")
    updates = MasterAdamW(policy, request_full.config, processes=Processes())
    weight = policy.module.get_decoder().layers[0].mlp.down_proj.weight
    (name,) = (name for name, one in policy.trainable().items() if one is weight)
    gradients = []
    for pairs in (request_full.pairs[:1], request_full.pairs[1:2]):
        (gradient,) = torch.autograd.grad(updates.score(pairs).logps_M.sum(), weight)
        updates.backward(updates.score(pairs).logps_M.sum())
        gradients.append(gradient.float())
        assert all(one.grad is None for one in policy.trainable().values())
    summed = updates._masters[name].grad
    assert summed is not None
    assert torch.equal(summed, gradients[0] + gradients[1])
