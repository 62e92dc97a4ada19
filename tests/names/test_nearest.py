"""Other spellings of names, and suggestions: the right one first, at most eight."""

import pytest

from midway.gen.baselines.registry import BASELINES
from midway.gen.core.errors import nearest
from midway.gen.data.sources import SOURCES
from midway.gen.diffusion.load import LEARNED
from midway.gen.evaluation.metrics import METRICS
from midway.gen.features.open import NAMED as FEATURES
from midway.gen.names.aliases import NEAR, SAME
from midway.gen.names.nearest import SHOWN, canonical, normal
from midway.samplers.grids import NAMED
from midway.samplers.schedule import SCHEDULES
from midway.samplers.solvers import SOLVERS
from midway.tokenizers.quantizers import QUANTIZERS

FLAGS = "lr steps max-steps batch-size data out resize guidance nfe precision ema accumulation resume n solver solvers"
CHOICES = {
    "solver": [*SOLVERS, "adaptive", *LEARNED],
    "grid": [*NAMED, "gits"],
    "features": FEATURES,
    "metric": METRICS,
    "quantizer": QUANTIZERS,
    "schedule": SCHEDULES,
    "target": ["x0", "eps", "velocity", "v", "score"],
    "data": SOURCES,
    "decay": ["constant", "cosine", "inverse_sqrt"],
    "precision": ["no", "bf16", "auto"],
    "pixel loss": ["l1", "l2", "charbonnier"],
    "adversary": ["none", "hinge", "non_saturating", "wasserstein"],
    "optimizer": ["adamw", "muon"],
    "network": ["conv", "vit"],
    "resume": ["no", "auto"],
    "baseline": BASELINES,
    "flag": [f"--{name}" for name in FLAGS.split()],
}

ACCEPTED = """
solver: DPM++ 2M = dpm++2m = dpmpp-2m = DPM-Solver++(2M) = dpm-solver++ = DPMSolverMultistep -> dpmpp2m
solver: dpm++ 3m -> dpmpp3m | dpm++ 2m sde -> dpmpp2m_sde
solver: flow-euler = euler-flow = FlowMatchEulerDiscreteScheduler -> euler | heun2 -> heun | DDIM -> ddim | edm-heun -> edm_heun
solver: DPM-Solver-2 -> dpm2 | UniPC3 -> unipc3 | AMED -> amed | ddpm -> ddpm | adams-bashforth-2 -> ab2
grid: ays-sd -> ays_sd | log-SNR -> logsnr
features: CLIP-ViT-B/32 -> clip-vitb32 | efficientnet-lite0 -> effnet-lite0
metric: Inception Score -> is | recall -> precision | coverage -> density
quantizer: lookup-free -> lfq | two-level -> two_level | VQ-gradient -> vq_gradient | binary-spherical -> bsq
schedule: rectified flow = rf = flow -> linear | VP-SDE -> vp
target: flow -> velocity | epsilon -> eps | v-prediction -> v
data: cifar-10 = CIFAR10 -> cifar10 | fashion-mnist -> fashion_mnist
decay: inverse-sqrt -> inverse_sqrt | const -> constant
precision: bfloat16 -> bf16 | fp32 -> no
pixel loss: mse -> l2 | mae -> l1
adversary: non-saturating -> non_saturating
"""
SUGGESTED = """
solver: unipc -> unipc3 | deis -> deis3 | edm -> edm_heun | hune -> heun | dimm -> ddim | eulr -> euler
solver: plms -> ipndm4 | euler_a -> ddpm | tabel -> table | amde -> amed | dpmpp2 -> dpmpp2m | sa-solver -> sa_solver3
grid: edm -> karras | karas -> karras | sd3 -> shift | ays -> ays_sd | exponential -> logsnr | unifrom -> uniform
features: inception-v3 -> inception | dino -> dinov2-vitl14 | clip -> clip-vitl14 | pixel -> pixels | effnet -> effnet-lite0
metric: mmd -> kid | fid-infinity -> infinity | slice -> sliced
quantizer: vqvae = vq-vae -> vq | rvq -> residual | bsq-vit -> bsq | fsk -> fsq | vq-vae-2 -> two_level
schedule: ve -> edm | cos -> cosine | lin -> linear
data: cifar -> cifar10 | fashion -> fashion_mnist | digit -> digits
decay: cosin -> cosine | inverse -> inverse_sqrt
precision: fp16 -> bf16
optimizer: adam -> adamw
flag: learning-rate -> --lr | output-dir -> --out | cfg-scale -> --guidance | num_inference_steps -> --nfe
network: transformer -> vit
resume: yes -> auto
"""


def _cases(table: str) -> list[tuple[str, str, str]]:
    """(kind, written, meant) of lines `kind: a = b -> c | ...`."""
    found = []
    for line in table.strip().splitlines():
        kind, rest = line.split(": ", 1)
        for case in rest.split(" | "):
            written, meant = case.split(" -> ")
            found += [(kind, name, meant) for name in written.split(" = ")]
    return found


@pytest.mark.parametrize(("kind", "written", "meant"), _cases(ACCEPTED), ids=str)
def test_another_spelling_of_the_same_algorithm_is_accepted(kind: str, written: str, meant: str) -> None:
    assert canonical(written, CHOICES[kind]) == meant


@pytest.mark.parametrize(("kind", "written", "meant"), _cases(SUGGESTED), ids=str)
def test_a_relative_or_a_slip_is_suggested_first_and_not_accepted(kind: str, written: str, meant: str) -> None:
    assert canonical(written, CHOICES[kind]) is None
    hint = nearest(written, CHOICES[kind])
    assert hint.startswith(f"did you mean '{meant}'? choose one of: {meant}"), hint
    assert len(hint.split(": ", 1)[1].split(" and ")[0].split(", ")) <= SHOWN


def test_every_name_of_the_table_exists_and_no_spelling_is_two_of_one_kind() -> None:
    """Nor is a spelling accepted where another choice has that very name."""
    known = {name for names in CHOICES.values() for name in names}
    assert {*SAME} <= known
    assert {name for names in NEAR.values() for name in names.split()} <= known
    for spelling in [word for words in SAME.values() for word in words.split()] + [*NEAR]:
        assert spelling == normal(spelling)
    for names in CHOICES.values():
        meant = [word for name in names for word in {normal(name), *SAME.get(name, "").split()}]
        assert len(meant) == len({*meant}), sorted(meant)


def test_nothing_near_is_not_called_near() -> None:
    assert canonical("A B", ["a_b", "a-b"]) is None and canonical("a-b", ["a_b", "a-b"]) == "a-b"
    assert canonical("xyz", ["euler", "ddim"]) is None and canonical("", ["euler"]) is None
    assert nearest("xyz", ["euler", "ddim"]) == "choose one of: ddim, euler"
    assert nearest("qq", map(str, range(100, 110))).endswith("and 2 more")
