"""Answers to prompts that were run once: sampling, greedy and beam search over a shared prefix.

Shapes:  B prompts;  S slots per prompt;  N = B * S;  R answers;  T steps;  V vocabulary;
W beams;  C candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlaifv.models.attention import PrivateCache, SharedPrefix
from rlaifv.models.base import Decoding
from rlaifv.models.decoder import Decoder, Prefill
from rlaifv.models.sampling import draw_uniforms, penalised, pick

COMPACT_BELOW = 0.75
"""Finished rows are dropped when this share of the slots would be left."""
SYNC_EVERY = 16
"""Steps between looks at what is finished on an accelerator, where looking stalls the queue."""


def generate(
    decoder: Decoder,
    prefill: Prefill,
    seeds: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    eos_ids: Sequence[int],
) -> list[list[list[int]]]:
    """Per prompt and seed: the tokens generated, end of sequence included if it was reached.

    A row does not depend on the other rows but for float noise. Greedy and beam search give one
    answer per prompt, repeated.
    """
    if not any(seeds):
        return [[] for _ in seeds]
    if decoding.num_beams > 1:
        beams = _BeamSearch(decoder, prefill, decoding, eos_ids).run()
        return [[tokens] * len(row) for tokens, row in zip(beams, seeds, strict=True)]
    if decoding.temperature == 0:
        answers = _Sampling(decoder, prefill, [1] * len(seeds), eos_ids).run(
            draw_uniforms([0] * len(seeds), 1).expand(-1, decoding.max_new_tokens), decoding
        )
        return [[tokens] * len(row) for tokens, row in zip(answers, seeds, strict=True)]
    uniforms = draw_uniforms([seed for row in seeds for seed in row], decoding.max_new_tokens)
    counts = [len(row) for row in seeds]
    samples = iter(_Sampling(decoder, prefill, counts, eos_ids).run(uniforms, decoding))
    return [[next(samples) for _ in row] for row in seeds]


def _until_eos(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in eos_ids), len(tokens) - 1)
    return tokens[: end + 1]


class _Slots(NamedTuple):
    """Where the running rows are. The layout is a rectangle: prompts by slots."""

    answer_N: Tensor
    """Which answer a slot writes; R for a filler."""
    positions_N: Tensor
    """Position of the slot's first token: the length of its prompt."""
    answers: list[list[int]]
    """The same as `answer_N`, per prompt."""


class _Sampling:
    """One batch of prompts, `counts[b]` answers for prompt b, one token per step for each."""

    def __init__(
        self, decoder: Decoder, prefill: Prefill, counts: Sequence[int], eos_ids: Sequence[int]
    ) -> None:
        self._eos_ids = eos_ids
        self._num_answers = sum(counts)
        device = prefill.lengths_B.device
        self._eos = torch.tensor(list(eos_ids), device=device)
        starts = [sum(counts[:b]) for b in range(len(counts))]
        rows = [list(range(start, start + n)) for start, n in zip(starts, counts, strict=True)]
        width = max(counts)
        self._steps = decoder.stepper(prefill, width * len(counts))
        self._slots = self._layout(rows, prefill.lengths_B.repeat_interleave(width), width)
        self._logits_NV = prefill.logits_BV.repeat_interleave(width, 0)

    def _layout(self, rows: list[list[int]], positions_N: Tensor, width: int) -> _Slots:
        filler = self._num_answers
        answers = [[*row, *([filler] * (width - len(row)))] for row in rows]
        flat = torch.tensor(answers, device=positions_N.device).flatten()
        return _Slots(flat, positions_N, answers)

    def run(self, uniforms_RT: Tensor, decoding: Decoding) -> list[list[int]]:
        """The tokens of every answer."""
        steps, device = decoding.max_new_tokens, self._logits_NV.device
        uniforms_RT = torch.cat([uniforms_RT, uniforms_RT.new_zeros(1, steps)]).to(device)
        tokens_RT = torch.zeros(self._num_answers + 1, steps, dtype=torch.long, device=device)
        done_R = torch.zeros(self._num_answers + 1, dtype=torch.bool, device=device)
        done_R[-1] = True
        penalty, vocabulary = decoding.repetition_penalty, self._logits_NV.shape[1]
        said_RV = done_R.new_zeros(len(done_R), vocabulary) if penalty != 1 else None
        sync_every = 1 if device.type == "cpu" else SYNC_EVERY
        for step in range(steps):
            slots = self._slots
            logits_NV = self._logits_NV
            if said_RV is not None:
                logits_NV = penalised(logits_NV, said_RV[slots.answer_N], penalty)
            next_N = pick(logits_NV, uniforms_RT[slots.answer_N, step], decoding)
            if said_RV is not None:
                said_RV[slots.answer_N, next_N] = True
            tokens_RT[slots.answer_N, step] = next_N
            done_R[slots.answer_N] |= torch.isin(next_N, self._eos)
            if step + 1 == steps:
                break
            kept_N = None
            if (step + 1) % sync_every == 0:
                done = done_R.tolist()
                if all(done):
                    break
                kept_N = self._compact(done)
            if kept_N is not None:
                next_N = next_N[kept_N]
            self._logits_NV = self._steps.advance(next_N, self._slots.positions_N + step)
        return [_until_eos(row, self._eos_ids) for row in tokens_RT[:-1].tolist()]

    def _compact(self, done: list[bool]) -> Tensor | None:
        """Drops finished rows if enough are; the slots that stay."""
        slots = self._slots
        width = len(slots.answers[0])
        kept = [
            [b * width + s for s, answer in enumerate(row) if not done[answer]]
            for b, row in enumerate(slots.answers)
        ]
        prompts = [b for b, row in enumerate(kept) if row]
        new_width = max(len(row) for row in kept)
        if len(prompts) * new_width > COMPACT_BELOW * len(slots.answer_N):
            return None
        rows = [[slots.answers[s // width][s % width] for s in kept[b]] for b in prompts]
        filled = [[*kept[b], *([kept[b][0]] * (new_width - len(kept[b])))] for b in prompts]
        kept_N = torch.tensor(filled, device=slots.answer_N.device).flatten()
        self._slots = self._layout(rows, slots.positions_N[kept_N], new_width)
        some = len(prompts) < len(slots.answers)
        self._steps.select(kept_N, torch.tensor(prompts, device=kept_N.device) if some else None)
        return kept_N


NEVER = -1e9
"""A score that no sequence reaches, still finite so that sums stay ordered."""


class _BeamSearch:
    """transformers' beam search with its defaults: length penalty 1, no early stopping.

    A finished sequence scores its log-probability divided by its length, end token included. The
    search of a prompt ends when its best running beam, divided by its present length, cannot beat
    the worst of W finished ones.
    """

    def __init__(
        self, decoder: Decoder, prefill: Prefill, decoding: Decoding, eos_ids: Sequence[int]
    ) -> None:
        if not isinstance(prefill.shared, SharedPrefix):
            raise TypeError("beam search needs a rectangular prefill")
        self._shared: SharedPrefix = prefill.shared
        self._decoder, self._prefill, self._eos_ids = decoder, prefill, eos_ids
        self._width, self._steps = decoding.num_beams, decoding.max_new_tokens
        self._penalty = decoding.repetition_penalty
        # Enough candidates that W of them go on even if every beam's best is an end token.
        self._num_candidates = max(2, 1 + len(eos_ids)) * decoding.num_beams
        device, prompts = prefill.logits_BV.device, len(prefill.lengths_B)
        shape = (prompts, self._width)
        self._eos = torch.tensor(list(eos_ids), device=device)
        self._tokens_BWT = torch.zeros(*shape, self._steps, dtype=torch.long, device=device)
        self._scores_BW = torch.full(shape, NEVER, device=device)
        self._scores_BW[:, 0] = 0.0  # the beams start equal: only one may speak
        self._finished_BWT = self._tokens_BWT.clone()
        self._finished_scores_BW = torch.full(shape, NEVER, device=device)
        self._is_finished_BW = torch.zeros(shape, dtype=torch.bool, device=device)
        self._open_B1 = torch.ones(prompts, 1, dtype=torch.bool, device=device)

    def run(self) -> list[list[int]]:
        """The best sequence of each prompt."""
        prefill, width, cache = self._prefill, self._width, PrivateCache()
        logits_NV = prefill.logits_BV.repeat_interleave(width, 0)
        positions_N = prefill.lengths_B.repeat_interleave(width)
        offset_B1 = torch.arange(len(prefill.lengths_B), device=positions_N.device)[:, None] * width
        for step in range(self._steps):
            beam_BW = self._advance(logits_NV, step)
            if step + 1 == self._steps or not self._open_B1.any():
                break
            if step:
                cache.select((beam_BW + offset_B1).flatten())
            next_N = self._tokens_BWT[:, :, step].flatten()
            logits_NV = self._decoder.step(next_N, positions_N + step, self._shared, cache)
        return [_until_eos(row, self._eos_ids) for row in self._finished_BWT[:, 0].tolist()]

    def _advance(self, logits_NV: Tensor, step: int) -> Tensor:
        """Extends every beam by a token; which old beam each new one continues, [B, W]."""
        prompts, vocabulary = len(self._scores_BW), logits_NV.shape[1]
        logps_BWV = logits_NV.log_softmax(-1).view(prompts, self._width, vocabulary)
        if self._penalty != 1:
            said_BWV = torch.zeros_like(logps_BWV, dtype=torch.bool)
            said_BWV.scatter_(2, self._tokens_BWT[:, :, :step], True)
            logps_BWV = penalised(logps_BWV, said_BWV, self._penalty)
        totals_BX = (logps_BWV + self._scores_BW.unsqueeze(-1)).flatten(1)
        scores_BC, index_BC = totals_BX.topk(self._num_candidates)
        beam_BC, token_BC = index_BC // vocabulary, index_BC % vocabulary
        tokens_BCT = _gather(self._tokens_BWT, beam_BC)
        tokens_BCT[:, :, step] = token_BC
        ends_BC = torch.isin(token_BC, self._eos)
        if step + 1 == self._steps:
            ends_BC = torch.ones_like(ends_BC)
        self._finish(tokens_BCT, scores_BC / (step + 1), ends_BC)
        running_BC = scores_BC + ends_BC * NEVER
        chosen_BW = running_BC.topk(self._width).indices
        self._tokens_BWT = _gather(tokens_BCT, chosen_BW)
        self._scores_BW = running_BC.gather(1, chosen_BW)
        worst_B1 = self._finished_scores_BW.min(1, keepdim=True).values
        worst_BW = torch.where(self._is_finished_BW, worst_B1, NEVER)
        hope_BW = self._scores_BW[:, :1] / (step + 1) > worst_BW
        self._open_B1 = self._open_B1 & hope_BW.any(1, keepdim=True)
        return beam_BC.gather(1, chosen_BW)

    def _finish(self, tokens_BCT: Tensor, scores_BC: Tensor, ends_BC: Tensor) -> None:
        """Only the W best candidates may finish; the rest are there to keep W beams running."""
        ends_BC = ends_BC.clone()
        ends_BC[:, self._width :] = False
        scores_BC = scores_BC + ~self._open_B1 * NEVER + ~ends_BC * NEVER
        scores = torch.cat([self._finished_scores_BW, scores_BC], 1)
        best_BW = scores.topk(self._width).indices
        self._finished_scores_BW = scores.gather(1, best_BW)
        self._finished_BWT = _gather(torch.cat([self._finished_BWT, tokens_BCT], 1), best_BW)
        self._is_finished_BW = torch.cat([self._is_finished_BW, ends_BC], 1).gather(1, best_BW)


def _gather(tokens_BXT: Tensor, index_BY: Tensor) -> Tensor:
    index_BYT = index_BY.unsqueeze(-1).expand(-1, -1, tokens_BXT.shape[-1])
    return tokens_BXT.gather(1, index_BYT)
