"""What is particular to LLaVA-1.5 and its like: a CLIP tower, a projector, a fixed image size.

Shapes:  B rows;  L tokens of a row;  I images;  F features of an image;  E width;  V vocabulary.
"""

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from rlaifv.errors import ArtifactError
from rlaifv.models.lines import compiled
from rlaifv.models.placement import is_spread
from rlaifv.models.prompting import Prompter


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
            plain = _is_clip(tower) and not is_spread(self.module)
            if pixels.is_cuda and len(layers) == 1 and plain:
                chosen = [layer_outputs(tower, pixels.to(tower.dtype), layers[0])]
                return _without_class(config, chosen)
            output = tower(pixels.to(tower.dtype), output_hidden_states=True)
            chosen = [output.hidden_states[layer] for layer in layers]
            return _without_class(config, chosen)

    def merge(self, ids_BL: Tensor, features_IFE: Tensor, image_of_row_B: Tensor) -> Tensor:
        """Embeddings [B, L, E] with projected features in place of the image's placeholders."""
        embeds_BLE: Tensor = self.module.get_input_embeddings()(ids_BL)
        projected_IFE = self.module.model.multi_modal_projector(features_IFE)
        mask_BL1 = (ids_BL == self.module.config.image_token_id).unsqueeze(-1)
        rows_BFE = projected_IFE.to(embeds_BLE)[image_of_row_B]
        return embeds_BLE.masked_scatter(mask_BL1, rows_BFE)

    def full_logits(self, ids_L: Tensor, pixels_1: Tensor) -> Tensor:
        """One plain row through transformers' own forward, [L, V]."""
        logits_1LV: Tensor = self.module(
            input_ids=ids_L.unsqueeze(0), pixel_values=pixels_1, use_cache=False
        ).logits
        return logits_1LV[0]


def check_processor(prompter: Prompter, config: LlavaConfig, *, source: str) -> None:
    """Raises ArtifactError unless an image gets as many tokens as the tower makes features of it.

    Where there are fewer, features would go to the wrong places without a word. Towers other than
    CLIP's are not checked.
    """
    vision = config.vision_config
    if not isinstance(vision, CLIPVisionConfig):
        return
    picture = io.BytesIO()
    Image.new("RGB", (32, 24)).save(picture, "PNG")
    pixels = prompter.pixels([picture.getvalue()], [0])
    side, dropped = vision.image_size, config.vision_feature_select_strategy == "default"
    features = (side // vision.patch_size) ** 2 + int(not dropped)
    found, wanted = (*pixels.shape[-2:], prompter.num_image_tokens(pixels)), (side, side, features)
    if found != wanted:
        raise ArtifactError(
            "{}: the processor makes {}x{} pixels and {} tokens of an image, "
            "the vision tower takes {}x{} and {}".format(source, *found, *wanted)
        )


def _is_clip(tower: Any) -> bool:
    first = next(iter(tower.parameters()))
    return type(tower) is CLIPVisionModel and not hasattr(first, "ds_id")  # ZeRO-3


def _without_class(config: LlavaConfig, layers: list[Tensor]) -> Tensor:
    """Layers side by side; without the class token where the model drops it."""
    if config.vision_feature_select_strategy == "default":
        layers = [layer_IFE[:, 1:] for layer_IFE in layers]
    return torch.cat(layers, -1)


def layer_outputs(tower: Any, pixels: Tensor, index: int) -> Tensor:
    """The tower's `hidden_states[index]`, [I, F, E]; layers above it are not run."""
    inner = getattr(tower, "vision_model", tower)  # the name until transformers 5.2x
    x_IFE: Tensor = inner.pre_layrnorm(inner.embeddings(pixels))
    layers = inner.encoder.layers
    for layer in layers[: range(len(layers) + 1)[index]]:
        x_IFE = compiled(_tower_layer)(layer, x_IFE)
    return x_IFE


def _tower_layer(layer: Any, x_IFE: Tensor) -> Tensor:
    output = layer(x_IFE, None)
    out_IFE: Tensor = output[0] if isinstance(output, tuple) else output
    return out_IFE
