"""What is particular to LLaVA-1.5 and its like: a CLIP tower, a projector, a fixed image size.

Shapes:  B rows;  L tokens of a row;  I images;  F features of an image;  E width;  V vocabulary.
"""

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration


class Llava:
    """The image side of `LlavaForConditionalGeneration`: a `shared_prefix.VisionSide`."""

    def __init__(self, module: LlavaForConditionalGeneration) -> None:
        self.module = module

    def features(self, pixels: Tensor) -> Tensor:
        """The chosen layers of the tower, before the projector, [I, F, E]."""
        config, tower = self.module.config, self.module.model.vision_tower
        trains = any(parameter.requires_grad for parameter in tower.parameters())
        layers = config.vision_feature_layer
        layers = layers if isinstance(layers, (list, tuple)) else [layers]
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            output = tower(pixels.to(tower.device, tower.dtype), output_hidden_states=True)
            chosen = [output.hidden_states[layer] for layer in layers]
            if config.vision_feature_select_strategy == "default":
                chosen = [layer_IFE[:, 1:] for layer_IFE in chosen]  # the class token
            return torch.cat(chosen, -1)

    def merge(self, ids_BL: Tensor, features_IFE: Tensor, image_of_row_B: Tensor) -> Tensor:
        """Embeddings [B, L, E] with projected features in place of the image's placeholders."""
        embeds_BLE: Tensor = self.module.get_input_embeddings()(ids_BL)
        projected_IFE = self.module.model.multi_modal_projector(features_IFE)
        mask_BL1 = (ids_BL == self.module.config.image_token_id).unsqueeze(-1)
        rows_BFE = projected_IFE[image_of_row_B].to(embeds_BLE.dtype)
        return embeds_BLE.masked_scatter(mask_BL1, rows_BFE)

    def full_logits(self, ids_L: Tensor, pixels_1: Tensor) -> Tensor:
        """One plain row through transformers' own forward, [L, V]."""
        logits_1LV: Tensor = self.module(
            input_ids=ids_L.unsqueeze(0), pixel_values=pixels_1, use_cache=False
        ).logits
        return logits_1LV[0]
