"""Baselines by kind: what model.json names, and what a script can train."""

from midway.gen.baseline import Baseline
from midway.gen.flows import CouplingFlow
from midway.gen.tarflow import TarFlow
from midway.gen.vae import VAE

BASELINES: dict[str, type[Baseline]] = {"vae": VAE, "flow": CouplingFlow, "tarflow": TarFlow}
