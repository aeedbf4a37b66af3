"""The language model of a checkpoint as three functions: embed, run, predict.

Shapes:  B rows;  L tokens;  P prefix tokens;  N rows of a decoding step;  E width;  V vocabulary;
M positions whose next token matters.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from rlaifv.errors import ArtifactError
from rlaifv.models import lines, steps
from rlaifv.models.attention import (
    PADDING,
    PREFIX,
    PrivateCache,
    SharedPrefix,
    segment_mask,
)
from rlaifv.models.base import NOT_FINITE
from rlaifv.models.branches import (
    PackedRows,
    TokenRow,
    pack,
    pack_line,
    row_starts,
    to_device,
)
from rlaifv.models.placement import is_spread

LINE_TOKENS = 8192
"""Most tokens of prompts that are run in one line."""
HEAD_CHUNK = 1024
"""Positions whose logits exist at a time: 131 MB in float32 for a vocabulary of 32,000."""


Embeds = Callable[[range], Tensor]
"""Embeddings of some prompts, padded on the right, [B, P, E]."""


class Prefill(NamedTuple):
    """Prompts that have been run once."""

    shared: SharedPrefix | steps.PrefixLine
    lengths_B: Tensor
    logits_BV: Tensor
    """For the first token of the answer, float32."""


class Steps(Protocol):
    """Decoding of some rows, grouped by prompt, equally many for each prompt."""

    def advance(self, tokens_N: Tensor, positions_N: Tensor) -> Tensor:
        """Adds a token per row; scores of the one after it, float32 [N, V]."""
        ...

    def select(self, rows_N: Tensor, prompts_B: Tensor | None) -> None:
        """Keeps, repeats or reorders rows, and keeps some of the prompts (None: all)."""
        ...


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

    @property
    def in_lines(self) -> bool:
        """Whether rows are run in one line by `lines`: on a GPU, where the layers are known."""
        decoder: Any = self._module.get_decoder()
        spread = is_spread(self._module)
        if self.device.type != "cuda" or spread or not lines.supports(decoder):
            return False
        width: int = decoder.layers[0].self_attn.head_dim
        return width >= 16 and width & (width - 1) == 0  # what the kernels can do

    def pack(self, rows: Sequence[TokenRow], *, pad_id: int) -> tuple[PackedRows, list[int]]:
        """Some rows as `run` takes them, on the device; flat index of each row's first token."""
        if self.in_lines:
            packed, width = pack_line(rows, pad_id=pad_id, multiple=lines.BLOCK), None
        else:
            packed = pack(rows, pad_id=pad_id)
            width = packed.ids_BL.shape[1]
        return packed.to(self.device), row_starts(rows, width=width)

    def run(self, embeds_BLE: Tensor, packed: PackedRows, sources_M: Tensor) -> Tensor:
        """Hidden states [M, E] at positions of the flattened rows; keeps gradients."""
        if self.in_lines:
            owners = lines.Owners(packed.segments_BL[0], packed.prefixes_BL[0])
            decoder = self._module.get_decoder()
            return lines.run(decoder, embeds_BLE, packed.positions_BL, owners, sources_M)
        output = self._module.get_decoder()(
            inputs_embeds=embeds_BLE,
            position_ids=packed.positions_BL,
            attention_mask=segment_mask(packed.segments_BL),
            use_cache=False,
        )
        hidden_BLE: Tensor = output.last_hidden_state.to(self.device)
        return hidden_BLE.flatten(0, 1)[sources_M]

    def logits(self, hidden_ME: Tensor) -> Tensor:
        """Scores of the next token, float32 [M, V]."""
        logits_MV: Tensor = self._module.get_output_embeddings()(hidden_ME)
        return logits_MV.float().to(self.device)

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

    def prefill(
        self, embeds: Embeds, lengths: Sequence[int], *, rectangle: bool = False
    ) -> Prefill:
        """Runs prompts of these lengths once; every later token reads what this leaves.

        `rectangle`: as a `SharedPrefix` even where a `steps.PrefixLine` can be had. Raises
        ArtifactError when the scores are not finite.
        """
        if not rectangle and self.in_lines and steps.supports(self._module.get_decoder()):
            prefill = self._prefill_line(embeds, lengths)
        else:
            prefill = self._prefill_rectangle(embeds(range(len(lengths))), lengths)
        if not prefill.logits_BV.isfinite().all():
            raise ArtifactError(NOT_FINITE)
        return prefill

    def _prefill_line(self, embeds: Embeds, lengths: Sequence[int]) -> Prefill:
        decoder: Any = self._module.get_decoder()
        device, attention = self.device, decoder.layers[0].self_attn
        shape = (decoder.config.num_key_value_heads, sum(lengths), attention.head_dim)
        like = decoder.embed_tokens.weight
        kept = [(like.new_empty(shape), like.new_empty(shape)) for _ in decoder.layers]
        rows = [TokenRow([0] * length, []) for length in lengths]
        hidden, start = [], 0
        for group in _within(lengths, LINE_TOKENS):
            some = rows[group.start : group.stop]
            packed = pack_line(some, pad_id=0, multiple=lines.BLOCK).to(device)
            embeds_BPE = embeds(group)
            line_LE = torch.cat([embeds_BPE[i, : row.length] for i, row in enumerate(some)])
            end = start + len(line_LE)
            padding = packed.ids_BL.shape[1] - len(line_LE)

            def keep(layer: int, *new: Tensor, a: int = start, z: int = end) -> None:
                for to_KPD, from_1KLD in zip(kept[layer], new, strict=True):
                    to_KPD[:, a:z] = from_1KLD[0, :, : z - a]

            ends_B = to_device(torch.tensor([row.length for row in some]).cumsum(0) - 1, device)
            owners = lines.Owners(packed.segments_BL[0], packed.prefixes_BL[0])
            line_1LE = functional.pad(line_LE, (0, 0, 0, padding))[None]
            hidden.append(
                lines.run(decoder, line_1LE, packed.positions_BL, owners, ends_B, keep=keep)
            )
            start = end
        starts_B = torch.tensor(row_starts(rows, width=None), dtype=torch.int32, device=device)
        lengths_B = torch.tensor(lengths, device=device)
        keys, values = (list(every) for every in zip(*kept, strict=True))
        shared = steps.PrefixLine(keys, values, starts_B, lengths_B.int())
        return Prefill(shared, lengths_B, self.logits(torch.cat(hidden)))

    def _prefill_rectangle(self, embeds_BPE: Tensor, lengths: Sequence[int]) -> Prefill:
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
        last_BE = output.last_hidden_state.to(device)[rows_B, lengths_B - 1]
        absent_BP = ~present_BP
        bias_BP = torch.zeros(absent_BP.shape, device=device).masked_fill(absent_BP, -torch.inf)
        shared = SharedPrefix(
            tuple(layer.keys for layer in cache.layers),
            tuple(layer.values for layer in cache.layers),
            bias_BP[:, None, None],
        )
        return Prefill(shared, lengths_B, self.logits(last_BE))

    def stepper(self, prefill: Prefill, num_rows: int) -> Steps:
        """Decoding of `num_rows` rows behind some prompts."""
        if isinstance(prefill.shared, SharedPrefix):
            return _CachedSteps(self, prefill.shared)
        head = self._module.get_output_embeddings()
        return steps.StaticSteps(self._module.get_decoder(), head, prefill.shared, num_rows)

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


class _CachedSteps:
    """`Steps` through transformers' own layers."""

    def __init__(self, decoder: Decoder, shared: SharedPrefix) -> None:
        self._decoder, self._shared, self._cache = decoder, shared, PrivateCache()

    def advance(self, tokens_N: Tensor, positions_N: Tensor) -> Tensor:
        return self._decoder.step(tokens_N, positions_N, self._shared, self._cache)

    def select(self, rows_N: Tensor, prompts_B: Tensor | None) -> None:
        self._cache.select(rows_N)
        if prompts_B is not None:
            self._shared = self._shared.select(prompts_B)


def _within(lengths: Sequence[int], most: int) -> Iterator[range]:
    """Consecutive indices whose lengths add up to at most `most`; at least one each."""
    start, total = 0, 0
    for index, length in enumerate(lengths):
        if index > start and total + length > most:
            yield range(start, index)
            start, total = index, 0
        total += length
    yield range(start, len(lengths))
