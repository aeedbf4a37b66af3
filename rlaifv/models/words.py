"""Tokens of answers: what needs a tokenizer and nothing else."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlaifv.errors import ConfigError
from rlaifv.models.base import Generation


class Words:
    """Answers as tokens and back, for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, source: str) -> None:
        """`source`: for messages. Raises ConfigError without an end-of-sequence token."""
        self._tokenizer, self._source = tokenizer, source
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"{source}: the tokenizer has no end-of-sequence token")

    @property
    def pad_id(self) -> int:
        """Any id will do: padding is never seen."""
        return self.eos_id

    @property
    def eos_id(self) -> int:
        return int(self._tokenizer.eos_token_id)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, end of sequence included."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.eos_id]

    def generation(self, tokens: Sequence[int], eos_ids: Sequence[int]) -> Generation:
        """See `as_generation`."""
        return as_generation(self._tokenizer, tokens, eos_ids)

    def word_ids(self, words: Sequence[str]) -> list[int]:
        """The different ids of words that are one token each at the start of an answer.

        Raises ConfigError for a word that the tokenizer splits: its first piece would also count
        other words.
        """
        found: set[int] = set()
        for word in words:
            ids = self.answer(word)[:-1]
            if len(ids) != 1 or ids[0] == self._tokenizer.unk_token_id:
                raise ConfigError(
                    f"{self._source}: cannot be used as a labeller: its tokenizer spells "
                    f"{word!r} as {len(ids)} tokens, expected 1"
                )
            found.add(ids[0])
        return sorted(found)

    def piece(self, token: int) -> str:
        """The text of one token."""
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text


def as_generation(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], eos_ids: Sequence[int]
) -> Generation:
    """Generated tokens as text, special tokens left out."""
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return Generation(text, len(tokens), "stop" if tokens[-1] in eos_ids else "length")
