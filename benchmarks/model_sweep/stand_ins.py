"""A tower for images in the place of timm's, which is another package: no layers of it are patched."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.timm_wrapper import modeling_timm_wrapper


class ImageTower(modeling_timm_wrapper.TimmWrapperPreTrainedModel):
    """One convolution."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.timm_model = nn.Conv2d(3, config.hidden_size, 4, 4)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Rows of pixels become states of places."""
        return BaseModelOutput(last_hidden_state=self.timm_model(pixel_values))


def stand_in_for_timm() -> None:
    """Where timm is not installed, models that hold a tower of it can be made."""
    if importlib.util.find_spec("timm") is None:
        modeling_timm_wrapper.TimmWrapperModel = ImageTower
        transformers.models.timm_wrapper.TimmWrapperModel = ImageTower


def stood_in(model: nn.Module) -> bool:
    """Whether something in the model stands in for timm's."""
    return any(isinstance(part, ImageTower) for part in model.modules())
