"""The flags of midway evaluate, and the checks that need nothing but them."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from midway.gen.core.checkpoints import split_step
from midway.gen.core.config import PER_CALL
from midway.gen.core.errors import DiskError, UsageError, raising
from midway.gen.core.files import check_path, clear_temporaries, replaced_name
from midway.gen.core.ranges import COUNT, SEED, STEPS, WIDTH, check_flag_ranges
from midway.gen.core.runs import kind_of
from midway.gen.data.places import DataPathFlag
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.class_draw import LabelRule
from midway.gen.evaluation.metrics import check_names
from midway.gen.features.protocols import ProtocolName
from midway.gen.flags.cli import Flat, names
from midway.gen.flags.sampling_flags import PriorFlags, SamplingFlags, TileFlags
from midway.gen.metrics.frechet import Root
from midway.gen.sweep.jobs import EXACT_NFE, GuidanceSearch

DEFAULT_SPACES = ("effnet-lite0", "pixels")
UNNAMED = DataConfig(data="")
"""The reference data while none are named."""


@dataclass(frozen=True, kw_only=True)
class EvaluateTask(DataPathFlag, TileFlags, PriorFlags, SamplingFlags):
    """Fréchet distance and RMSE of every solver at every budget, of priors over codes, baselines, and external images.

    Writes results.csv, results.jsonl, report.md, report.html and two plots; cells/ stores the measurements, also of an
    interrupted sweep.
    """

    model: Path | None = None
    """Run directory of the latent model that solvers are measured on, or of a prior over codes; its training images are the
    reference."""
    diffusers: Path | None = None
    """In place of --model: folder of a saved diffusers pipeline with a unet and a scheduler, and a vqvae or vae if latent."""
    images: tuple[Path, ...] = ()
    """External samples, each a row: folders or zips of image files, or NPZ with arr_0 uint8 (N, H, W, C)."""
    images_resize: int | None = None
    """Bring --images to this size: shorter side, then a centre crop. It changes their distance."""
    images_channels: Literal[1, 3] | None = None
    """1 converts --images to grey, 3 to RGB."""
    data: Annotated[DataConfig, Flat] = field(default_factory=lambda: UNNAMED)
    """Without --model: the reference, and its split, as in the training of --features."""
    features: str = ",".join(DEFAULT_SPACES)
    """Comma-separated feature spaces; the first ranks, the others are columns beside it: effnet-lite0, pixels, inception,
    inception-pytorch, dinov2-vitb14, dinov2-vitl14, clip-vitb32, clip-vitl14, or the run directory of a network trained on
    these images."""
    feature_weights: Annotated[Path | None, tyro.conf.arg(aliases=["--inception-weights"])] = None
    """File with the weights of the first feature space (default: installed, in the cache, or downloaded)."""
    out: Path | None = None
    """Directory to write (default: report/ in the run of the model, or of its --adapter; needed without --model)."""
    repeats: tuple[Path, ...] = ()
    """Run directories of trainings of the same configuration with other seeds: figures become means over trainings, and error
    bars their deviation. Learned solvers must have been learned for each."""
    few_step: tuple[Path, ...] = ()
    """Run directories of latent models for few steps, trained on the same images, each a line of its own beside the solvers of
    --model: jump models are sampled by jump, flow models by euler, on grid uniform; guided only if trained with guidance."""
    few_step_nfe: str = "1,2,4,8"
    """Comma-separated budgets of --few-step."""
    priors: tuple[Path, ...] = ()
    """Run directories of priors over codes of the same images, each a line for each of its rules, beside the solvers of --model;
    each decodes by its own tokenizer. Guided by --guidance."""
    prior_rules: str | None = None
    """Comma-separated rules of masked --priors: random, halton, certain, maskgit (default: halton). Causal ones have one."""
    prior_nfe: str | None = None
    """Comma-separated budgets of masked --priors (default: 1,2,4,8,... up to their tokens, at most 64). Causal ones have one,
    an evaluation a token."""
    prior_decay: Literal["cosine", "arccos", "linear"] | None = None
    """How the share of missing tokens of masked --priors falls (default: cosine)."""
    baselines: tuple[Path, ...] = ()
    """Run directories of baselines of the same images, each a row at its own number of evaluations."""
    solvers: str | None = None
    """Comma-separated; learned ones (table, amed, amed-plugin-...) must have been trained for every budget (default:
    euler,ddim,heun,dpm2,dpmpp2m; of a jump model jump; of a masked prior all rules). all: every solver there is, and what was
    learned for every budget."""
    nfe: str | None = None
    """Comma-separated budgets of network evaluations (default: 4,6,8,10,20; of a jump model 1,2,4,8; of a prior as --prior-nfe).
    Beside --few-step, by default also its budgets, where a solver can reach them."""
    grids: str | None = None
    """Comma-separated; the grid of each solver and budget is chosen among them on seeds that are not scored (default:
    uniform,logsnr,karras; of a jump model uniform). gits is fitted to the model. Of a masked prior one of cosine,
    arccos, linear."""
    choice_seeds: int = 128
    """Seeds on which grids are chosen, by RMSE to the exact solution, and guidance; they follow those that are measured."""
    guidance_scales: str | None = None
    """Comma-separated scales, 1 for none: choose the guidance of every solver among them, at every cost, with the grid, by the
    distance to the data on --choice-seeds. With --guide by that model, too. There is no exact solution then."""
    guidance_intervals: str | None = None
    """With --guidance-scales: comma-separated intervals LOW:HIGH of noise levels sigma / alpha to guide, as 0:inf,0.3:5."""
    skip_unreachable: bool = False
    """Leave out budgets that a solver cannot reach (heun at 5) or was not learned for, instead of raising an error."""
    reference: Path | None = None
    """Mean and covariance that others publish, in place of the training images (the floor is still of held-out images): npz
    of pytorch-fid, EDM or ADM, tensors, or a state of torchmetrics."""
    save_reference: Path | None = None
    """Write mean and covariance of the reference as an .npz that others read."""
    protocol: ProtocolName | None = None
    """Measure as a published evaluator does: features, resize, number of images and draw of classes; needs --reference."""
    labels: LabelRule | None = None
    """How seeds draw classes: proportional to the training images (default), balanced, or random."""
    n: Annotated[int | None, tyro.conf.arg(aliases=["--samples"])] = None
    """Images per block (default: as many as are held out, so that the floor is measured at the same count; without --model, as
    many as --images hold). Launchers take --n for a flag of their own; there write --samples."""
    blocks: int | None = None
    """Disjoint blocks of seeds, or of consecutive --images, whose spread is the error bar (default: 4; 1 of --images alone)."""
    seed: int = 0
    """First seed."""
    exact_nfe: int = EXACT_NFE
    """Evaluations of the exact solution (dpmpp3m on logsnr; of a jump model jump on uniform), which solvers are compared with;
    0 leaves it out, and with it all that is compared with it, and the choice of a grid."""
    metrics: str | None = None
    """Comma-separated, beside the Fréchet distance: kid, sliced, precision (and recall), density (and coverage), is, infinity;
    empty for none (default: kid,sliced; of a --reference without images none)."""
    root: Root = "eigen"
    """newton-schulz computes the distance by matrix products alone, on the GPU if there is one; an error where it does not
    converge."""
    overlap: bool = False
    """Decode images and compute features while the next are sampled. On a GPU more images a second; times overlap, too."""
    export_npz: Path | None = None
    """Folder for the images of each best cell (of all, with one solver) as NPZ, for ADM's evaluator; they are sampled again."""
    save_images: Path | None = None
    """The same as zips of PNG, in EDM's layout."""
    fresh: bool = field(default=False, metadata=PER_CALL)
    """Forget what was measured into --out before."""
    title: str = "Fréchet distance per step budget"
    """Title of the report."""

    def __post_init__(self) -> None:
        SamplingFlags.__post_init__(self)
        self.check_prior_flags()
        check_flag_ranges(
            self, n=COUNT, blocks=COUNT, seed=SEED, exact_nfe=(0, STEPS[1]), choice_seeds=COUNT, images_resize=WIDTH
        )
        check_flag_ranges(self, tile=WIDTH)


def check_flags(task: EvaluateTask) -> None:
    """UsageError for a reference that is named twice, or not at all, and for nothing to measure."""
    check_names(name for name in (task.metrics or "").split(",") if name.strip())
    named = replace(task.data, on_bad_image=UNNAMED.on_bad_image, download=UNNAMED.download)
    if task.tile is not None and not (task.model or task.few_step or task.priors):
        raise UsageError(f"--tile {task.tile}", "only tokenizers of ours are tiled", "drop it, or pass --model")
    if task.data_path is not None and not task.model:
        raise UsageError(f"--data-path {task.data_path}", "it is the new place of a run's images", "use --data")
    if task.model and task.diffusers:
        raise UsageError("--model and --diffusers", "a report is of one model", "pass one of them")
    if task.model and named != UNNAMED:
        raise UsageError(
            "--model and flags of the reference data",
            "the reference is what the model was trained on",
            "drop --data, --held-out, --split-seed, --channels and --resize (of samples: --images-resize, --images-channels)",
        )
    _check_prior_flags(task)
    _check_search(task)
    if task.guides and not _samples(task):
        raise UsageError(
            "guidance without --model",
            "no model is sampled: baselines and images are as they are",
            "drop --guidance, --guidance-interval and --guide, or pass --model",
        )
    if task.labels and not (_samples(task) or task.baselines):
        raise UsageError(
            "--labels without --model", "classes of images are as they are", "drop --labels, or pass --model"
        )
    if task.graph and task.overlap:
        raise UsageError("--graph and --overlap", "nothing else may run while a graph is captured", "pass one of them")
    if task.repeats and not task.model:
        raise UsageError("--repeats without --model", "they repeat its training", "pass --model")
    if not (_samples(task) or task.images or task.baselines):
        raise UsageError(
            "nothing to measure", "no model and no images are named", "pass --model, --diffusers or --images"
        )
    if not task.model and not task.data.data:
        raise UsageError(
            "--data is not given",
            "samples are compared with the images that they imitate",
            "pass --data, --held-out, ... as they were given to the training of --features",
        )


PRIOR = "prior"
"""The kind of its run."""
PRIOR_FLAGS = ("prior_rules", "prior_nfe", "prior_decay")
OF_SOLVERS = (
    "guidance_scales",
    "guidance_intervals",
    "guidance_interval",
    "guide",
    "analytic_first",
    "eta",
    "graph",
    "repeats",
)
"""Flags without effect where --model is a prior."""


def _check_prior_flags(task: EvaluateTask) -> None:
    """UsageError for flags of priors where there are none, and for those of solvers where --model is one."""
    main = task.model is not None and kind_of(task.model) == PRIOR
    if not (task.priors or main):
        task.without_priors("none is measured: --priors names none")
    given = [name for name in PRIOR_FLAGS if getattr(task, name) is not None]
    if given and not task.priors:
        flag = f"--{given[0].replace('_', '-')}"
        raise UsageError(
            f"{flag} without --priors",
            "it is for them; of a prior as --model: --solvers, --nfe, --grids",
            f"drop {flag}",
        )
    changed = [f.name for f in fields(task) if f.name in OF_SOLVERS and getattr(task, f.name) != f.default]
    if main and changed:
        flag = f"--{changed[0].replace('_', '-')}"
        raise UsageError(
            f"{flag} on {task.model}", "it is for models that are solved, and this is a prior", f"drop {flag}"
        )


def _check_search(task: EvaluateTask) -> None:
    """UsageError for flags that do not go with a choice of guidance."""
    if task.guidance_scales is None:
        if task.guidance_intervals is not None:
            why = "they are guided at scales to choose among"
            raise UsageError("--guidance-intervals without --guidance-scales", why, "give --guidance-scales 1,1.5,2,3")
        return
    if not task.model:
        raise UsageError("--guidance-scales without --model", "no latent model of ours is sampled", "pass --model")
    for flag, given in (
        ("--guidance", task.guidance != 1),
        ("--guidance-interval", task.guidance_interval is not None),
        ("--repeats", bool(task.repeats)),
    ):
        if given:
            why = (
                "its guidance is that of a choice" if flag != "--repeats" else "each training would have its own choice"
            )
            raise UsageError(f"--guidance-scales and {flag}", why, f"drop {flag}")


def search_of(task: EvaluateTask, options: dict[str, Any]) -> GuidanceSearch | None:
    """What --guidance-scales and --guidance-intervals name, with the model of --guide, taken out of `options`. UsageError."""
    if task.guidance_scales is None:
        return None
    words = task.guidance_intervals or "0:inf"
    what = f"--guidance-scales {task.guidance_scales} --guidance-intervals {words}"
    with raising(UsageError, what, "write them as --guidance-scales 1,1.5,2 --guidance-intervals 0:inf,0.3:5"):
        scales = tuple(dict.fromkeys(float(word) for word in names(task.guidance_scales)))
        intervals = tuple(dict.fromkeys(_interval(word) for word in names(words)))
        weak, options["weak"] = options["weak"], None
        return GuidanceSearch(scales, intervals, weak)


def _interval(word: str) -> tuple[float, float]:
    low, _, high = word.partition(":")
    return float(low), float(high)


def _samples(task: EvaluateTask) -> bool:
    """Whether any model is sampled by a solver, or any prior."""
    return bool(task.model or task.diffusers or task.few_step or task.priors)


def blocks(task: EvaluateTask) -> int:
    """Four by default; external images alone are measured as one set."""
    if task.blocks is not None:
        return task.blocks
    return 4 if _samples(task) or task.baselines else 1


def folder(task: EvaluateTask) -> Path:
    """Where the report goes."""
    if task.out is None and task.model is not None:
        run, step = split_step(task.adapter or task.model)
        return check_path(run / ("report" if step is None else f"report-step-{step}"))
    if task.out is None:
        raise UsageError("--out is not given", "there is no run that the report belongs to", "pass --out FOLDER")
    return check_path(task.out)


def make_folders(folders: dict[str, Path | None]) -> None:
    """Folders of exported images, so that one that cannot be made shows before anything is sampled. DiskError naming the flag.

    Archives that killed exports left half-written are removed.
    """
    for flag, path in folders.items():
        if path is not None:
            with raising(DiskError, f"{flag} {path} cannot be made", "choose another folder", OSError):
                path.mkdir(parents=True, exist_ok=True)
            for name in filter(None, map(replaced_name, [*path.glob(".*")])):
                if name.endswith((".npz", ".zip")):
                    clear_temporaries(path, name)
