"""The state of a training as the files of a checkpoint.

model.safetensors        parameters and buffers (codebooks, counters)
ema.safetensors          their averages; posthoc-<width>.safetensors the power-function ones
optimizer.safetensors    `<parameter>/<state>`: exp_avg, exp_avg_sq, step, momentum_buffer
progress.safetensors     skipped steps, the best validation, and the sums of the open log interval, one row per process
state.json               step, seconds, configuration, processes, parameters that have had no gradient yet

At the end of an optimizer step a quantizer has no pending statistics, and the random numbers of a step are a function of its
number, so this is all. Sharded tensors (FSDP) are gathered, so that any number of processes can resume.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from midway.gen.core.checkpoints import Checkpoint
from midway.gen.core.errors import DataError, one_line, raising
from midway.gen.core.files import DAMAGE
from midway.gen.training.early_stopping import Validation
from midway.gen.training.ema import EMA, placed
from midway.gen.training.nonfinite import NonFiniteGuard
from midway.gen.training.optim import STATES, parameter_groups
from midway.gen.training.power_ema import PowerAverage, width_name
from midway.gen.training.progress import Averages
from midway.tokenizers.weights import check_tensors

Files = dict[str, dict[str, Tensor]]
MISFIT = (
    "use the code and the configuration that wrote it, resume from an older checkpoint, or train again with --overwrite"
)


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step of a training depends on."""

    model: nn.Module
    optimizers: list[Optimizer]
    ema: EMA | None
    posthoc: list[PowerAverage]
    averages: Averages
    guard: NonFiniteGuard
    validation: Validation
    accelerator: Accelerator

    def averaged(self) -> Files:
        """The file of the averaged weights, or of the newest if there is no average, and its tensors on the CPU.

        Every process must call it when the model is sharded.
        """
        name, tensors = (
            ("model.safetensors", self.model.state_dict()) if self.ema is None else ("ema.safetensors", self.ema.shadow)
        )
        return {name: {key: whole(value) for key, value in tensors.items()}}

    def capture(self) -> Files:
        """File name -> whole tensors on the CPU. Every process must call it."""
        files = {"model.safetensors": self.model.state_dict()}
        files |= {name: average.shadow for name, average in self._averages().items()}
        files["optimizer.safetensors"] = self._optimizer_tensors()
        files["progress.safetensors"] = self._progress()
        return {name: {key: whole(value) for key, value in tensors.items()} for name, tensors in files.items()}

    def restore(self, checkpoint: Checkpoint, stateless: Collection[str] | None = ()) -> None:
        """Restore what `capture` returned. DataError for files that do not hold exactly the tensors that this training has.

        stateless: names of parameters without a state of their optimizer, as `stateless` listed them; None if no list was kept.
        """
        stateless = self._not_begun(checkpoint) if stateless is None else stateless
        own = self.model.state_dict()
        self.model.load_state_dict(like(own, fitting(checkpoint, "model.safetensors", own)))
        for name, average in self._averages().items():
            average.load(fitting(checkpoint, name, average.shadow))
        optimizer = fitting(checkpoint, "optimizer.safetensors", self._expected_states(stateless))
        with raising(DataError, f"{checkpoint.path / 'optimizer.safetensors'} does not fit this training", MISFIT):
            check_states(optimizer, checkpoint.step)
        self._load_optimizers(optimizer)
        what = f"{checkpoint.path / 'progress.safetensors'} does not fit this training"
        with raising(DataError, what, MISFIT, *DAMAGE, why=one_line):
            self._load_progress(checkpoint.tensors("progress.safetensors"), checkpoint.step)

    @property
    def stateless(self) -> list[str]:
        """Names of parameters of which the optimizer has no state: those that have had no gradient yet."""
        return [name for name, optimizer, parameter in self._named_states() if not optimizer.state.get(parameter)]

    def _averages(self) -> dict[str, EMA]:
        """The averages by the names of their files."""
        averages = {} if self.ema is None else {"ema.safetensors": self.ema}
        return {**averages, **{posthoc_file(average): average for average in self.posthoc}}

    def _named_states(self) -> list[tuple[str, Optimizer, nn.Parameter]]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        pairs = [(o, p) for o in self.optimizers for group in o.param_groups for p in group["params"]]
        return [(names[parameter], optimizer, parameter) for optimizer, parameter in pairs]

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name, optimizer, parameter in self._named_states()
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def _expected_states(self, stateless: Collection[str]) -> dict[str, Tensor]:
        """Names, shapes and types, without numbers, of what `_optimizer_tensors` gives."""
        expected: dict[str, Tensor] = {}
        for name, optimizer, parameter in self._named_states():
            like_it, number = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), torch.zeros(())
            keys = () if name in stateless else STATES[type(optimizer)]
            expected |= {f"{name}/{key}": number if key == "step" else like_it for key in keys}
        return expected

    def _not_begun(self, checkpoint: Checkpoint) -> list[str]:
        """Parameters of a discriminator, if a checkpoint has no state of any of them; all parameters before the first step."""
        found = {key.rpartition("/")[0] for key in checkpoint.tensors("optimizer.safetensors")}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = [{names[p] for p in group} for group in parameter_groups(self.model)]
        return [name for group in groups[1 if checkpoint.step else 0 :] if not group & found for name in group]

    def _load_optimizers(self, tensors: dict[str, Tensor]) -> None:
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, state = key.rpartition("/")
            by_name.setdefault(name, {})[state] = value
        states: dict[Optimizer, dict[int, dict[str, Tensor]]] = {optimizer: {} for optimizer in self.optimizers}
        counts = dict.fromkeys(self.optimizers, 0)
        for name, optimizer, parameter in self._named_states():
            if name in by_name:  # torch numbers the parameters of an optimizer in this order
                found = by_name[name]
                states[optimizer][counts[optimizer]] = {k: placed(parameter, v) for k, v in found.items()}
            counts[optimizer] += 1
        for optimizer, state in states.items():
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _progress(self) -> dict[str, Tensor]:
        guard = {f"guard/{name}": value for name, value in self.guard.state().items()}
        validation = {f"validation/{name}": value for name, value in self.validation.state().items()}
        return guard | validation | {f"interval/{k}": v for k, v in self.averages.state(self.accelerator).items()}

    def _load_progress(self, tensors: dict[str, Tensor], step: int) -> None:
        parts: dict[str, dict[str, Tensor]] = {"guard": {}, "validation": {}, "interval": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        self.guard.load(parts["guard"], step)
        self.validation.load(parts["validation"], step)
        self.averages.load(parts["interval"], self.accelerator)


def posthoc_file(average: PowerAverage) -> str:
    """The file of one power-function average."""
    return f"posthoc-{width_name(average.std)}.safetensors"


def fitting(checkpoint: Checkpoint, name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of a checkpoint; DataError unless their names, shapes and types are those expected."""
    found = checkpoint.tensors(name)
    with raising(DataError, f"{checkpoint.path / name} does not fit this training", MISFIT):
        check_tensors(found, expected)
    return found


def check_states(tensors: Mapping[str, Tensor], step: int) -> None:
    """ValueError for states that no optimizer has after `step` steps: other counts of steps, and mean squares below 0."""
    for name, value in tensors.items():
        least, most = {"step": (0, step), "exp_avg_sq": (0, math.inf)}.get(
            name.rpartition("/")[2], (-math.inf, math.inf)
        )
        if value.numel() and not least <= float(value.min()) <= float(value.max()) <= most:
            raise ValueError(f"{name} is {float(value.min()):g} to {float(value.max()):g} after {step} steps")


def write_files(folder: Path, files: Files, state: dict[str, Any] | None = None) -> None:
    """Fill a checkpoint directory; `state` is state.json."""
    for name, tensors in files.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    if state is not None:
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def size_of(files: Files) -> int:
    """Bytes of all tensors."""
    return sum(value.nbytes for tensors in files.values() for value in tensors.values())


def not_finite(files: Files) -> list[str]:
    """Names of the tensors that hold NaN or infinity, counters aside."""
    return [
        f"{file.removesuffix('.safetensors')}: {key}"
        for file, tensors in files.items()
        if file != "progress.safetensors"
        for key, value in tensors.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of a flat configuration, 12 digits."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def whole(value: Tensor) -> Tensor:
    """A tensor on the CPU; the shards of a distributed one are gathered, so that every process must call it."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().cpu()


def like(model: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors cut into shards as those of the same names in `model`."""
    return {name: placed(model[name], value) if name in model else value for name, value in values.items()}
