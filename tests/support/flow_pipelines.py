"""Pipelines of diffusers that begin with a text encoder, without one: tiny random networks and given embeddings.

Their modules import names of transformers for annotations alone, so that classes of those names are enough here.
"""

import importlib
import importlib.util
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch


class _Names(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def pipeline_class(module: str, name: str) -> Any:
    """A class of diffusers.pipelines, say ("flux.pipeline_flux", "FluxPipeline"). Mixins that load files may be empty."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("transformers") is None:
            patch.setitem(sys.modules, "transformers", _Names("transformers"))
        while True:
            try:
                return getattr(importlib.import_module(f"diffusers.pipelines.{module}"), name)
            except ImportError as error:
                missing = re.search(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
                if missing is None:
                    raise
                patch.setattr(sys.modules[missing[2]], missing[1], type(missing[1], (), {}), raising=False)


def autoencoder(diffusers: Any) -> Any:
    """Images (3, 16, 16) to latents (4, 8, 8)."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    size = {
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "latent_channels": 4,
        "sample_size": 16,
        "shift_factor": 0.1,
    }
    return diffusers.AutoencoderKL(**blocks, **size).eval()


def flux(diffusers: Any, scheduler: Any, module: str = "pipeline_flux", name: str = "FluxPipeline") -> Any:
    """A pipeline of FLUX on latents of 4 channels, packed to 16."""
    torch.manual_seed(0)
    heads = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    width = {"joint_attention_dim": 6, "pooled_projection_dim": 4, "axes_dims_rope": (2, 2, 4)}
    transformer = diffusers.FluxTransformer2DModel(patch_size=1, in_channels=16, **heads, **width).eval()
    parts = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    made = pipeline_class(f"flux.{module}", name)
    pipe = made(scheduler=scheduler, vae=autoencoder(diffusers), transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_inputs(steps: int) -> dict[str, Any]:
    """Arguments of a call: two prompts of three words, 16 x 16 pixels, latents as they come."""
    generator = torch.Generator().manual_seed(1)
    words = {"prompt_embeds": torch.randn(2, 3, 6, generator=generator)}
    words["pooled_prompt_embeds"] = torch.randn(2, 4, generator=generator)
    size = {"height": 16, "width": 16, "num_inference_steps": steps, "guidance_scale": 1.0}
    return {**words, **size, "output_type": "latent", "generator": torch.Generator().manual_seed(2)}


def kandinsky(diffusers: Any, scheduler: Any) -> Any:
    """Kandinsky 2.2's image to image on latents (4, 8, 8) of images (3, 16, 16)."""
    torch.manual_seed(0)
    down = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
    up = ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
    size = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 4}
    images = {"addition_embed_type": "image", "encoder_hid_dim": 6, "encoder_hid_dim_type": "image_proj"}
    more = {"cross_attention_dim": 8, "resnet_time_scale_shift": "scale_shift", "in_channels": 4, "out_channels": 8}
    unet = diffusers.UNet2DConditionModel(**blocks, **size, **images, **more).eval()
    coder = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    movq = diffusers.VQModel(**coder, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4).eval()
    made = pipeline_class("kandinsky2_2.pipeline_kandinsky2_2_img2img", "KandinskyV22Img2ImgPipeline")
    pipe = made(unet, scheduler, movq)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kandinsky_inputs(steps: int, strength: float) -> dict[str, Any]:
    """Arguments of a call: two images of 16 x 16 pixels, latents as they come."""
    generator = torch.Generator().manual_seed(1)
    embeddings = {"image_embeds": torch.randn(2, 6, generator=generator), "negative_image_embeds": torch.zeros(2, 6)}
    size = {"height": 16, "width": 16, "num_inference_steps": steps, "strength": strength, "guidance_scale": 2.0}
    images = {"image": torch.rand(2, 3, 16, 16, generator=generator), "output_type": "latent"}
    return {**embeddings, **size, **images, "generator": torch.Generator().manual_seed(2)}
