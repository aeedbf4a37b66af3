"""MiniCPM-Llama3-V 2.5: a model whose code comes with its weights, run on purpose only.

`ModelSpec.trust_remote_code` and a pinned revision are asked for by the configuration. What is
called is the public part of that code: the processor's tokenizer and chat template, the processor
itself, `get_vllm_embedding` (which sees an image once) and the module's `forward`. Source: the
public copies of `modeling_minicpmv.py` and of its processor; the release's labeller
(`minicpm-llama3-v-25/`) scores the same token. Imports run with transformers 4.40, for which that
code was written, and with 5.

Shapes:  L tokens;  N slices of the image;  Q queries;  E width;  V vocabulary.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from rlaifv.config import ModelSpec
from rlaifv.errors import ArtifactError, ConfigError
from rlaifv.images import BadImageError, decode
from rlaifv.models.base import Decoding
from rlaifv.models.files import check_files, check_loaded, find_folder, read_config
from rlaifv.models.one_by_one import Inputs, OneByOne, Run
from rlaifv.models.words import Words

log = logging.getLogger(__name__)

PLACEHOLDER = "(<image>./</image>)"
"""What that processor replaces by an image and its slices."""
TURN_END = "<|eot_id|>"
"""Llama 3's end of a turn, which ends an answer beside the tokenizer's own end."""


def load_remote(spec: ModelSpec) -> "RemoteModel":
    """The model, on the GPU if there is one.

    Raises ConfigError when its code cannot be run with the libraries here or is of another kind,
    ArtifactError for missing or broken files and weights.
    """
    folder = find_folder(spec)
    if (found := read_config(folder).get("model_type")) != "minicpmv":
        raise ConfigError(
            f"model {spec.path}: family is 'minicpmv', but config.json says model_type {found!r}"
        )
    check_files(folder)
    module, info = _load(AutoModel, folder, output_loading_info=True, **_dtype(spec.dtype))
    check_loaded(folder, info)
    if not hasattr(module, "get_vllm_embedding"):
        raise ConfigError(
            f"{folder}: {type(module).__name__} is not of MiniCPM-Llama3-V 2.5's kind"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log.info("model loaded path=%s type=minicpmv dtype=%s", folder, spec.dtype)
    processor = _load(AutoProcessor, folder)
    return RemoteModel(module.to(device).eval(), processor, spec.batch_size, source=str(folder))


def _dtype(name: str) -> dict[str, Any]:
    key = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"
    return {key: getattr(torch, name)}


def _load(auto_class: Any, folder: Path, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(
            str(folder), trust_remote_code=True, local_files_only=True, **options
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{folder}: its code does not run with transformers {transformers.__version__}: "
            f"{error}; use an image of its own (images/labeller.Dockerfile) or an endpoint"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{folder}: cannot be loaded: {error}") from error


class RemoteModel(OneByOne):
    """A `VisionLanguageModel` over that interface: labels and answers."""

    def __init__(self, module: Any, processor: Any, batch_size: int, *, source: str) -> None:
        self._processor = processor
        tokenizer = processor.tokenizer
        words = Words(tokenizer, source=source)
        turn_end = tokenizer.convert_tokens_to_ids(TURN_END)
        ids = {words.eos_id, turn_end} - {None, tokenizer.unk_token_id}
        super().__init__(module, words, batch_size=batch_size, eos_ids=sorted(ids))
        self._seen: tuple[bytes, Tensor] | None = None

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        limit: int = self.module.config.max_position_embeddings
        return limit

    def _inputs(self, image: bytes, question: str, row: int) -> Inputs:
        """`input_ids`, `image_bound` [N, 2] (where slices go), `features` [N, Q, E]."""
        if PLACEHOLDER in question:
            raise ArtifactError(f"row {row}: the question contains {PLACEHOLDER!r}")
        try:
            picture = decode(image)
        except BadImageError as error:
            raise ArtifactError(f"row {row}: image: {error}") from error
        text = self._processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{PLACEHOLDER}\n{question}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        given = self._processor(text, [picture], return_tensors="pt")  # no max_length: it cuts
        ids_1L = given["input_ids"].to(self.module.device)
        bound_N2 = given["image_bound"][0].to(self.module.device)
        self._check_length(row, ids_1L.shape[1])
        if self._seen is None or self._seen[0] != image:
            self._seen = (image, self._features(given, ids_1L))
        return {"input_ids": ids_1L, "image_bound": bound_N2, "features": self._seen[1]}

    def _features(self, given: Any, ids_1L: Tensor) -> Tensor:
        device = self.module.device
        pixels = [[slice_.to(device) for slice_ in image] for image in given["pixel_values"]]
        sizes = [torch.as_tensor(size, device=device) for size in given["tgt_sizes"]]
        bound = [each.to(device) for each in given["image_bound"]]
        data = {"input_ids": ids_1L, "image_bound": bound, "pixel_values": pixels}
        _, (features,) = self.module.get_vllm_embedding({**data, "tgt_sizes": sizes})
        return torch.stack(list(features))

    def _data(self, inputs: Inputs, before: int) -> dict[str, Any]:
        ids_1L = inputs["input_ids"]
        end = before + ids_1L.shape[1]
        positions_1L = torch.arange(before, end, device=ids_1L.device).unsqueeze(0)
        data: dict[str, Any] = {"input_ids": ids_1L, "position_ids": positions_1L}
        for name, key in (("image_bound", "image_bound"), ("features", "vision_hidden_states")):
            data[key] = [inputs.get(name, [])]  # tokens after the prompt come without
        return data

    def _forward(self, inputs: Inputs, cache: Any) -> Run:
        before = 0 if cache is None else _cached(cache)
        output = self.module(self._data(inputs, before), past_key_values=cache, use_cache=True)
        return Run(output.logits[0].float(), output.past_key_values)

    def _image_end(self, inputs: Inputs) -> int:
        return int(inputs["image_bound"].max())

    def _can_be_copied(self, cache: Any) -> bool:
        return True  # Llama's

    def _beams(self, inputs: Inputs, decoding: Decoding) -> list[int]:
        data = self._data(inputs, 0)
        data["vision_hidden_states"] = [inputs["features"].to(self.module.dtype)]
        embeds_1LE, _ = self.module.get_vllm_embedding(data)
        ids = self.module.llm.generate(
            inputs_embeds=embeds_1LE,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            repetition_penalty=decoding.repetition_penalty,
            do_sample=False,
            eos_token_id=self._eos_ids,
            pad_token_id=self._words.pad_id,
        )
        tokens: list[int] = ids[0].tolist()
        while len(tokens) > 1 and tokens[-1] == tokens[-2] == self._words.pad_id:
            tokens.pop()  # padding behind the end
        return tokens


def _cached(cache: Any) -> int:
    """How many tokens a cache holds; transformers 4.40 hands out tuples [1, heads, tokens, width]."""
    return int(cache[0][0].shape[-2] if isinstance(cache, tuple) else cache.get_seq_length())
