"""Models in the format of diffusers: a folder, or a Hub id, with config.json and safetensors; ours and theirs, read strictly.

diffusers alone also loads pickles, fills missing tensors with random numbers, and ignores unknown options, each with a warning.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from midway.tokenizers.arguments import check_arguments
from midway.tokenizers.hub import Shared, card_in
from midway.tokenizers.weights import (
    CONFIG,
    HUB,
    building,
    check_published,
    load_weights,
    local_folder,
    of_run,
    read_folder,
    read_object,
)


class Pretrained(Shared, ModelMixin, ConfigMixin):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Base of our models in the format of diffusers."""

    def write(self, folder: Path, **options: Any) -> None:
        ModelMixin.save_pretrained(self, folder, **options)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **hub: Any,
    ) -> Self:
        """What `save_pretrained` wrote into a folder, a run left, or the Hub has (`hub`: revision, token, ...), in eval mode.

        torch_dtype: of the networks, whose file is in it or in float32. OSError, SafetensorError or ValueError: files that are
        missing, damaged or pickled, options that this class does not have or that are of other types, and tensors that are
        missing, surplus, of another shape or type, not finite, or meaningless.
        """
        if unknown := hub.keys() - {*HUB}:
            raise ValueError(
                f"{cls.__name__} is loaded without {', '.join(sorted(unknown))}: give any of {', '.join(HUB)}"
            )
        folder = of_run(local_folder(os.fspath(pretrained_model_name_or_path), subfolder, **hub), "tokenizer")
        options, tensors = _options(cls, read_object(folder / CONFIG)), read_folder(folder)
        with building(folder / CONFIG, tensors):
            model = cls(**options)
            load_weights(model, tensors, {torch_dtype})
            model.check_loaded()
        for name, part in model.named_children():
            if name not in (cls._keep_in_fp32_modules or ()):
                nn.Module.to(part, dtype=torch_dtype)
        model.card = card_in(folder)
        return model.eval()

    def check_loaded(self) -> None:
        """ValueError for numbers of the right types that mean nothing."""


def _options(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `cls` in its config.json; ValueError for those of another class."""
    if config.get("_class_name") != cls.__name__:
        raise ValueError(f"{CONFIG} is of class {config.get('_class_name')!r}, not {cls.__name__}")
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    check_arguments(cls, options, cls.__name__)
    return options


def read_diffusers(kind: Any, folder: Path) -> nn.Module:
    """A model of this class of diffusers in float32, on the CPU; OSError, SafetensorError or ValueError as `from_pretrained`.

    Published weights may be in half precision, which float32 holds. diffusers renames those of old files.
    """
    tensors = read_folder(folder)
    check_published(tensors)
    options = {"torch_dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    with building(folder / CONFIG, tensors):
        model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        wrong = {what.replace("_", " "): sorted(map(str, names))[:3] for what, names in report.items() if names}
        if wrong:
            raise ValueError(f"the {kind.__name__} has {wrong}")
    return model
