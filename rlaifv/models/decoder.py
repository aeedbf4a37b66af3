"""The language model of a checkpoint as three functions: embed, run, predict.

Shapes:  B rows;  L tokens;  P prefix tokens;  N rows of a decoding step;  E width;  V vocabulary;
M positions whose next token matters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from rlaifv.errors import ArtifactError
from rlaifv.models.attention import (
    PADDING,
    PREFIX,
    PrivateCache,
    SharedPrefix,
    segment_mask,
)

HEAD_CHUNK = 1024
"""Positions whose logits exist at a time: 131 MB in float32 for a vocabulary of 32,000."""

NOT_FINITE = "the model's scores are not finite: broken weights, or dtype float16 overflows"


class Prefill(NamedTuple):
    """Prompts that have been run once."""

    shared: SharedPrefix
    lengths_B: Tensor
    logits_BV: Tensor
    """For the first token of the answer, float32."""


class Decoder:
    """Runs the language model inside `module`; embeddings in, hidden states or logits out."""

    def __init__(self, module: PreTrainedModel) -> None:
        self._module = module

    @property
    def device(self) -> torch.device:
        device: torch.device = self._module.get_input_embeddings().weight.device
        return device

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together; a sliding window is not slid."""
        config = self._module.config.get_text_config()
        context: int = config.max_position_embeddings
        return min(context, getattr(config, "sliding_window", None) or context)

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self._module.get_input_embeddings()(ids)
        return embedded

    def run(self, embeds_BLE: Tensor, positions_BL: Tensor, segments_BL: Tensor) -> Tensor:
        """Hidden states [B, L, E] of rows made of a prefix and branches; keeps gradients."""
        output = self._module.get_decoder()(
            inputs_embeds=embeds_BLE,
            position_ids=positions_BL,
            attention_mask=segment_mask(segments_BL),
            use_cache=False,
        )
        hidden_BLE: Tensor = output.last_hidden_state
        return hidden_BLE

    def logits(self, hidden_ME: Tensor) -> Tensor:
        """Scores of the next token, float32 [M, V]."""
        logits_MV: Tensor = self._module.get_output_embeddings()(hidden_ME)
        return logits_MV.float()

    def target_logps(self, hidden_ME: Tensor, targets_M: Tensor) -> Tensor:
        """Log-probability of each target, nats, float32 [M]; long inputs go in chunks.

        With gradients, a chunk's logits are computed again in the backward pass instead of kept.
        """
        if len(targets_M) <= HEAD_CHUNK:
            return self._target_logps(hidden_ME, targets_M)
        chunks = zip(
            torch.split(hidden_ME, HEAD_CHUNK), torch.split(targets_M, HEAD_CHUNK), strict=True
        )
        if not torch.is_grad_enabled():
            return torch.cat([self._target_logps(hidden, target) for hidden, target in chunks])
        logps = [
            checkpoint(self._target_logps, hidden, target, use_reentrant=False)
            for hidden, target in chunks
        ]
        return torch.cat(logps)

    def _target_logps(self, hidden_ME: Tensor, targets_M: Tensor) -> Tensor:
        logps_MV = self.logits(hidden_ME).log_softmax(-1)
        return logps_MV.gather(1, targets_M.unsqueeze(1)).squeeze(1)

    def prefill(self, embeds_BPE: Tensor, lengths: Sequence[int]) -> Prefill:
        """Runs prompts, padded on the right, once; every later token reads what this leaves.

        Raises ArtifactError when the scores are not finite.
        """
        device = embeds_BPE.device
        lengths_B = torch.tensor(lengths, device=device)
        index_P = torch.arange(embeds_BPE.shape[1], device=device)
        present_BP = index_P < lengths_B.unsqueeze(1)
        cache = DynamicCache()
        output = self._module.get_decoder()(
            inputs_embeds=embeds_BPE,
            position_ids=index_P.expand(len(lengths), -1),
            attention_mask=segment_mask(torch.where(present_BP, PREFIX, PADDING)),
            past_key_values=cache,
            use_cache=True,
        )
        rows_B = torch.arange(len(lengths), device=device)
        last_BE = output.last_hidden_state[rows_B, lengths_B - 1]
        absent_BP = ~present_BP
        bias_BP = torch.zeros(absent_BP.shape, device=device).masked_fill(absent_BP, -torch.inf)
        shared = SharedPrefix(
            tuple(layer.keys for layer in cache.layers),
            tuple(layer.values for layer in cache.layers),
            bias_BP[:, None, None],
        )
        logits_BV = self.logits(last_BE)
        if not logits_BV.isfinite().all():
            raise ArtifactError(NOT_FINITE)
        return Prefill(shared, lengths_B, logits_BV)

    def step(
        self, tokens_N: Tensor, positions_N: Tensor, shared: SharedPrefix, cache: PrivateCache
    ) -> Tensor:
        """One more token per row: scores of the one after it, float32 [N, V].

        Rows are grouped by prompt, equally many for each prompt of `shared`.
        """
        output = self._module.get_decoder()(
            inputs_embeds=self.embed(tokens_N.unsqueeze(1)),
            position_ids=positions_N.unsqueeze(1),
            attention_mask=shared.bias_B11P,  # 4-D: kept as it is; only the prefix is masked
            past_key_values=cache,
            use_cache=True,
            shared_prefix=shared,
        )
        cache.advance()
        return self.logits(output.last_hidden_state[:, 0])
