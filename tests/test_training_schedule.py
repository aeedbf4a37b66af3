import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from rlaifv.config import TrainConfig
from rlaifv.training.schedule import Plan, Rank, learning_rate, make_plan, micro_batches


def plan(*, num_pairs: int = 20, epochs: int = 2, seed: int = 0) -> Plan:
    ids = [f"pair-{index}" for index in range(num_pairs)]
    return make_plan(ids, TrainConfig(epochs=epochs, global_batch_size=8), seed=seed)


def test_every_epoch_sees_every_pair_once_and_drops_none() -> None:
    batches = list(plan().batches())
    assert [len(batch) for batch in batches] == [8, 8, 4, 8, 8, 4]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(pair_id for batch in epoch for pair_id in batch) == list(plan().pair_ids)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first = list(plan().batches())
    assert first[0] != first[3]
    assert first != list(plan(seed=1).batches())


def test_order_does_not_depend_on_how_pairs_arrive() -> None:
    ids = [f"pair-{index}" for index in range(20)]
    config = TrainConfig(epochs=2)
    forwards, backwards = make_plan(ids, config, seed=0), make_plan(ids[::-1], config, seed=0)
    assert list(forwards.batches()) == list(backwards.batches())


@pytest.mark.parametrize("start", [0, 2, 3, 5, 6])
def test_batches_from_a_step_are_the_tail_of_all_batches(start: int) -> None:
    assert list(plan().batches(start)) == list(plan().batches())[start:]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_processes_share_a_batch_in_equally_many_passes(num_processes: int, size: int) -> None:
    batch = plan().pair_ids[:7]
    shares = [
        micro_batches(batch, Rank(index, num_processes), size=size)
        for index in range(num_processes)
    ]
    counted = [i for share in shares for micro in share for i in micro.pair_ids[: micro.counted]]
    assert sorted(counted) == sorted(batch)
    assert len({len(share) for share in shares}) == 1
    assert max(len(micro.pair_ids) for share in shares for micro in share) <= size


def test_passes_hold_the_same_pairs_for_any_number_of_processes() -> None:
    batch = plan().pair_ids[:7]
    (alone,) = (micro_batches(batch, Rank(0, 1), size=2),)
    shares = [micro_batches(batch, Rank(index, 3), size=2) for index in range(3)]
    assert {micro for share in shares for micro in share if micro.counted} == set(alone)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.5, 1.0])
def test_learning_rate_is_that_of_transformers(warmup_ratio: float) -> None:
    config = TrainConfig(learning_rate=2e-5, warmup_ratio=warmup_ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    warmup = torch.tensor(37 * warmup_ratio).ceil().int().item()
    theirs = get_cosine_schedule_with_warmup(optimizer, int(warmup), 37)
    for step in range(37):
        assert learning_rate(step, 37, config) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
