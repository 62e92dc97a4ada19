"""Recipes of fine-tuning a latent model on other images; times are for digits on one core."""

from dataclasses import replace

import tyro

from midway.gen.flags.cli import by_name
from midway.gen.flags.tasks import FinetuneTask
from midway.gen.networks.adapters import AdapterConfig
from midway.gen.recipes.generic import UNNAMED
from midway.gen.training.config import TrainConfig

TRAIN = TrainConfig(steps=1000, batch_size=64, lr=1e-2, decay="cosine", ema=0.99, log_every=100)


def lora() -> FinetuneTask:
    """Adapters of rank 8 on attention and MLP. About 1 min.

    midway finetune lora --model runs/digits-flow --data path/to/images --out runs/my-adapter
    """
    return FinetuneTask(tyro.MISSING, tyro.MISSING, UNNAMED, train=TRAIN)


def lora_plus() -> FinetuneTask:
    """LoRA+: the second matrix of every adapter learns 16 times as fast as the first.

    midway finetune lora-plus --model runs/digits-flow --data path/to/images --out runs/my-adapter
    """
    return replace(lora(), adapter=AdapterConfig(b_rate=16.0), train=replace(TRAIN, lr=3e-3))


def lora_ga() -> FinetuneTask:
    """LoRA-GA: adapters begin along the gradient of the first batch.

    midway finetune lora-ga --model runs/digits-flow --data path/to/images --out runs/my-adapter
    """
    return replace(lora(), adapter=AdapterConfig(start="gradient"))


def full() -> FinetuneTask:
    """All weights, in place of adapters; what comes out is a latent model by itself.

    midway finetune full --model runs/digits-flow --data path/to/images --out runs/my-model
    """
    return replace(lora(), method="full", train=replace(TRAIN, lr=3e-3))


FINETUNE_RECIPES = by_name(lora, lora_plus, lora_ga, full)
