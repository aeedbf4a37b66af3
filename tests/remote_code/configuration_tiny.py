# mypy: ignore-errors
"""The stand-in's configuration."""

from transformers import LlamaConfig


class TinyConfig(LlamaConfig):
    model_type = "minicpmv"

    def __init__(self, patch=14, query_num=4, **values):
        self.patch = patch
        self.query_num = query_num
        super().__init__(**values)
