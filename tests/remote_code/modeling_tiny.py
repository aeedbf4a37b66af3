# mypy: ignore-errors
"""A stand-in for remote code: the interface of MiniCPM-Llama3-V 2.5, and next to nothing in it."""

import torch
from transformers import LlamaForCausalLM, LlamaPreTrainedModel

from .configuration_tiny import TinyConfig


class TinyRemote(LlamaPreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.llm = LlamaForCausalLM(config)
        self.vpm = torch.nn.Linear(3 * config.patch**2, config.hidden_size)
        self.calls = 0
        self.post_init()

    def get_vllm_embedding(self, data):
        if "vision_hidden_states" in data:
            seen = data["vision_hidden_states"]
        else:
            seen = [self._see(pixels) for pixels in data["pixel_values"]]
        embeds = self.llm.model.embed_tokens(data["input_ids"]).clone()
        for row, features in enumerate(seen):
            if len(features):
                bound = data["image_bound"][row].tolist()
                for (start, end), part in zip(bound, features, strict=True):
                    embeds[row, start:end] = part.to(embeds.dtype)
        return embeds, seen

    def _see(self, slices):
        self.calls += 1
        size = self.config.patch
        patches = [
            each.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(2)
            for each in slices
        ]
        return torch.stack([self.vpm(each.flatten(0, 1).to(self.dtype)) for each in patches])

    def forward(self, data, **options):
        embeds, _ = self.get_vllm_embedding(data)
        positions = data["position_ids"]
        return self.llm(input_ids=None, position_ids=positions, inputs_embeds=embeds, **options)
