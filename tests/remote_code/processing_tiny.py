# mypy: ignore-errors
"""The processor: one overview, and for a wide picture one slice more."""

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

MARK = "(<image>./</image>)"
SIDE, QUERIES = 28, 4


class TinyProcessor(ProcessorMixin):
    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, **_):
        super().__init__(tokenizer)

    def __call__(self, text, images=None, max_length=None, return_tensors=None):
        (picture,) = images
        assert text.count(MARK) == 1
        pictures = [picture, picture.rotate(90)] if picture.width > picture.height else [picture]
        arrays = [np.array(each.resize((SIDE, SIDE)), dtype=np.float32) for each in pictures]
        pixels = [torch.from_numpy(each).permute(2, 0, 1) / 127.5 - 1 for each in arrays]
        inside = "<image>" + "<unk>" * QUERIES + "</image>"
        ids = self.tokenizer.encode(text.replace(MARK, inside * len(pixels)))[:max_length]
        starts, ends = (
            [i for i, token in enumerate(ids) if token == self.tokenizer.convert_tokens_to_ids(tag)]
            for tag in ("<image>", "</image>")
        )
        bound = [[start + 1, end] for start, end in zip(starts, ends, strict=True)]
        data = {
            "input_ids": torch.tensor([ids], dtype=torch.int32),
            "pixel_values": [pixels],
            "image_sizes": [[each.size for each in pictures]],
            "image_bound": [torch.tensor(bound)],
            "tgt_sizes": [torch.tensor([[SIDE // 14, SIDE // 14]] * len(pixels))],
        }
        return BatchFeature(data=data)
