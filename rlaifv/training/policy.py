"""The policy in training: which parts train, how pairs are scored, what a checkpoint holds."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlaifv.config import ModelSpec, TrainConfig
from rlaifv.errors import ArtifactError
from rlaifv.models import load_trainable
from rlaifv.models.base import Branches
from rlaifv.models.branches import BranchBatch, FullRows, to_device, to_host
from rlaifv.models.checkpoint import find_checkpoint
from rlaifv.models.shared_prefix import SharedPrefixModel
from rlaifv.records import PreferencePair
from rlaifv.training.parts import (
    freeze_all_but_language_and_projector,
    recompute_activations,
    save_full,
    tower_place,
    vision_tower,
)

FEATURE_CACHE_BYTES = 8 * 2**30
"""LLaVA-1.5 in bfloat16: 1.18 MB per image, so the images of an iteration fit."""
COPYING = 64
"""Images whose features may be on their way to the host, in pinned memory."""


class TokenScores(NamedTuple):
    """All answers' tokens in a line: of each pair the chosen answer's, then the rejected one's.

    Always the same number of tensors with gradients: ZeRO-3 runs a hook for each, and all processes
    must run equally many.
    """

    logps_M: Tensor
    """Nats, float32."""
    tokens_M: Tensor
    counts: tuple[tuple[int, ...], ...]
    """Per pair and answer."""

    def split(self, values_M: Tensor) -> list[list[Tensor]]:
        """Per pair and answer."""
        parts = iter(torch.split(values_M, [count for pair in self.counts for count in pair]))
        return [[next(parts) for _ in pair] for pair in self.counts]


class Policy(nn.Module):
    """A model with language model and projector (or adapters) trainable, the vision tower frozen."""

    def __init__(self, spec: ModelSpec, config: TrainConfig, *, base: str) -> None:
        super().__init__()
        self._engine = load_trainable(spec, spread=False)
        self._source, self._max_length = find_checkpoint(spec).folder, config.max_length
        self.module = self._engine.module
        self._features = _FeatureCache(max_bytes=FEATURE_CACHE_BYTES)
        self._ahead: tuple[list[str], BranchBatch | FullRows] | None = None
        self._adapted = None
        if config.lora is None:
            freeze_all_but_language_and_projector(self.module)
        else:
            from rlaifv.training import adapters  # PEFT takes seconds to import

            self._adapted = adapters.attach(self.module, config.lora, base=base)
        if config.gradient_checkpointing:
            recompute_activations(self.module)
        self.module.train()
        vision_tower(self.module).eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that training changes, by their name in the module."""
        named = self.module.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def forward(self, pairs: Sequence[PreferencePair]) -> TokenScores:
        """Token log-probabilities of both answers of each pair.

        Raises ArtifactError naming the pair that is too long or whose image is broken.
        """
        ahead, self._ahead = self._ahead, None
        known = ahead is not None and ahead[0] == [pair.pair_id for pair in pairs]
        batch = ahead[1] if ahead is not None and known else self._encode(pairs)
        logps = self._score(batch, pairs)
        line_M = torch.cat(list(itertools.chain.from_iterable(logps)))
        return TokenScores(line_M, batch.targets_M, batch.counts)

    def read_ahead(self, pairs: Sequence[PreferencePair]) -> None:
        """Tokens and pixels for the next call of `forward`, while the device is busy."""
        try:
            self._ahead = ([pair.pair_id for pair in pairs], self._encode(pairs))
        except ArtifactError:
            self._ahead = None  # `forward` says so in its turn

    def _score(
        self, batch: BranchBatch | FullRows, pairs: Sequence[PreferencePair]
    ) -> list[list[Tensor]]:
        engine = self._engine
        if not (isinstance(engine, SharedPrefixModel) and isinstance(batch, BranchBatch)):
            return engine.branch_logps(batch)
        images = dict.fromkeys(pair.image.bytes for pair in pairs)  # in the order of the pixels
        features = [
            self._features.get(image, pixels_1, engine.vision_features)
            for image, pixels_1 in zip(images, torch.split(batch.pixels, 1), strict=True)
        ]
        return engine.branch_logps(batch, features=torch.cat(features))

    def _encode(self, pairs: Sequence[PreferencePair]) -> BranchBatch | FullRows:
        try:
            return self._engine.encode_branches(
                [_row(pair) for pair in pairs], max_length=self._max_length
            )
        except ArtifactError:  # names a row of this batch
            for pair in pairs:
                try:
                    self._engine.encode_branches([_row(pair)], max_length=self._max_length)
                except ArtifactError as error:
                    raise ArtifactError(f"pairs: pair {pair.pair_id}: {error}") from error
            raise

    def hide_tower(self) -> dict[str, Tensor]:
        """Hides the vision tower from whoever walks over the modules; its weights by name.

        A tower that is spread over processes would have to run on all of them at the same time;
        features kept from earlier epochs make that impossible.
        """
        parent, name = tower_place(self.module)
        tower = vision_tower(self.module)
        named = self.module.named_parameters()
        inside = {id(parameter) for parameter in tower.parameters()}
        weights = {path: tensor.detach() for path, tensor in named if id(tensor) in inside}
        delattr(parent, name)
        parent.__dict__[name] = tower  # found as before, but no longer registered
        return weights

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """The checkpoint: a full tree in the policy's precision, or an adapter.

        `weights` replaces the module's own, by name in the module; for an adapter those that are
        trained are enough.
        """
        if self._adapted is None:
            save_full(self.module, folder, like=self._source, weights=weights)
        else:
            from rlaifv.training import adapters

            adapters.save_adapter(self._adapted, folder, weights=weights)


class _FeatureCache:
    """What the frozen vision tower says of each image, kept on the host until `max_bytes`.

    Images go through the tower one by one, so that features do not depend on which other images a
    batch has: a resumed run computes the same bits.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._features: dict[bytes, Tensor] = {}
        self._copying: dict[bytes, Callable[[], Tensor]] = {}

    def get(self, image: bytes, pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Features [1, F, E] of one image, on the device of its `pixels`."""
        if image in self._copying:
            self._settle(image)
        kept = self._features.get(image)
        if kept is not None:
            return to_device(kept, pixels.device)
        features = compute(pixels).detach()
        if (size := features.nbytes) <= self._free_bytes:
            self._free_bytes -= size
            self._copying[image] = to_host(features)
            if len(self._copying) > COPYING:
                self._settle(next(iter(self._copying)))
        return features

    def _settle(self, image: bytes) -> None:
        """Out of pinned memory, of which there is little."""
        self._features[image] = self._copying.pop(image)().clone()


def _row(pair: PreferencePair) -> Branches:
    return Branches(pair.image.bytes, pair.question, (pair.chosen, pair.rejected))
