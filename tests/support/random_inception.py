"""Random weights of the true Inception-v3."""

import io
from typing import Any

import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """He-scaled convolutions and identity normalisation: activations neither vanish nor grow."""

    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    class Blank(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> Any: ...

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    blank = Blank("blank", ["2048"], feature_extractor_weights_path=empty)
    generator = torch.Generator().manual_seed(0)
    state = {name: value.clone() for name, value in blank.state_dict().items()}
    for value in state.values():
        if value.dim() > 1:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
    state["fc.bias"].uniform_(1, 2, generator=generator)
    return state
