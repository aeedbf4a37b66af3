"""Chat models without images.

Shapes:  B prompts;  P tokens of a prompt.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.models.base import Decoding, Generation
from rlaifv.models.batches import batches
from rlaifv.models.checkpoint import end_tokens
from rlaifv.models.decoder import Decoder
from rlaifv.models.generation import generate
from rlaifv.models.words import as_generation


def _rows_of(embeds_BPE: Tensor, rows: range) -> Tensor:
    return embeds_BPE[rows.start : rows.stop]


class ChatModel:
    """A `TextModel` on `AutoModelForCausalLM`: the checkpoint's chat template, one user turn."""

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        source: str,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(f"{source}: the tokenizer has no chat template")
        self._tokenizer = tokenizer
        self._decoder = Decoder(module)
        self.batch_size = batch_size
        self._eos_ids = end_tokens(module, tokenizer)

    @torch.inference_mode()
    def reply(
        self, prompts: Sequence[str], *, seeds: Sequence[int], decoding: Decoding
    ) -> list[Generation]:
        """One reply per prompt, in order; raises ArtifactError for one beyond the context."""
        replies: dict[int, Generation] = {}
        for rows in batches([len(prompt) for prompt in prompts], size=self.batch_size):
            ids = [self._encode(prompts[row], row, decoding) for row in rows]
            ids_BP = pad_sequence([torch.tensor(tokens) for tokens in ids], batch_first=True)
            embeds = self._decoder.embed(ids_BP.to(self._decoder.device))
            prefill = self._decoder.prefill(
                functools.partial(_rows_of, embeds),
                [len(tokens) for tokens in ids],
                rectangle=decoding.num_beams > 1,
            )
            row_seeds = [[seeds[row]] for row in rows]
            answers = generate(
                self._decoder, prefill, row_seeds, decoding=decoding, eos_ids=self._eos_ids
            )
            for row, (tokens,) in zip(rows, answers, strict=True):
                replies[row] = as_generation(self._tokenizer, tokens, self._eos_ids)
        return [replies[row] for row in range(len(prompts))]

    def count_prompt(self, prompt: str) -> int:
        """Tokens of a prompt."""
        return len(self._encode(prompt, 0, Decoding(0)))

    def _encode(self, prompt: str, row: int, decoding: Decoding) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) + decoding.max_new_tokens > self._decoder.context:
            raise ArtifactError(
                f"row {row}: prompt ({len(ids)} tokens) and reply ({decoding.max_new_tokens}) "
                f"do not fit the context of {self._decoder.context}"
            )
        return ids
