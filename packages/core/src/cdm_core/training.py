"""The training loop, on Hugging Face accelerate. It knows no method: the objective computes the loss.

Whatever is random is keyed by (seed, purpose, step) and drawn for the whole batch (`cdm_core.random`), so

* a run resumes bit for bit on a CPU without having saved the state of a generator,
* any number of processes and of micro-batches sees the numbers of one, up to the rounding of the sums.

Run it in one process, or in many with `accelerate launch` or `torchrun`. Of accelerate it uses the devices,
the wrapping for many processes, mixed precision and the gradient scaler; rows and the learning rate are its
own: accelerate would cut the data by shuffled loaders and step a schedule once a process.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cdm_core import lr
from cdm_core.capabilities import offered
from cdm_core.checkpoints import Checkpoint, RunFolder, disk, finite, safetensors_bytes, torch_bytes
from cdm_core.compiled import CompiledObjective, choose
from cdm_core.components import Objective, Parts, build, sampled
from cdm_core.config import diff, from_toml, is_resumable, to_dict, to_toml
from cdm_core.data import Split
from cdm_core.ema import EMA
from cdm_core.errors import UserError
from cdm_core.progress import Progress
from cdm_core.random import Draws, fold
from cdm_core.settings import RunConfig, TrainConfig

if TYPE_CHECKING:
    from cdm_core.manager import Registry

SAMPLES = 64  # images of a grid drawn while training
_NEVER = 2**62


def train(
    config: RunConfig, out: str | Path, *, registry: Registry, device: str = "auto", quiet: bool = False
) -> RunFolder:
    """Train `config` in the folder `out`, or go on where it stopped; a run that has its steps is left alone.

    device: `auto`, `cpu` or `cuda`; quiet: no progress. Errors, all `UserError`: settings out of range; a
    model that lacks what the objective needs; a folder that holds something else, or a run of other settings;
    a disk that cannot be written; a loss that is not finite.
    """
    config = from_toml(to_toml(config), registry)  # in range, and what the folder will say
    parts = build(config, registry)
    if "denoise" in offered(parts.model):  # what is drawn at the end must be known to be possible
        sampled(config.sampling, parts.model, parts.data.info, registry)
    folder = RunFolder(out)
    checkpoint = find_checkpoint(folder, config, registry)
    accelerator = start_accelerator(device, config.train.precision)
    check_batch(config.train, accelerator.num_processes)
    progress = Progress(config.train.steps, enabled=accelerator.is_main_process and not quiet)
    if checkpoint and checkpoint.step >= config.train.steps:
        progress.say(f"{folder.path} has its {checkpoint.step} steps already; ask for more with --steps")
        accelerator.end_training()
        return folder
    with accelerator.local_main_process_first():  # one process a machine downloads the data
        for split in ("train", "valid"):
            parts.data.split(split)
    trainer = Trainer(config, parts, folder, registry, accelerator, progress)
    start = trainer.load(checkpoint) if checkpoint else 0
    trainer.compile(start)  # a step that cannot be compiled leaves the folder as it was
    if accelerator.is_main_process:
        write_description(folder, config, registry, accelerator)
        folder.rewind(start)
    accelerator.wait_for_everyone()
    trainer.run(start)
    accelerator.end_training()
    return folder


# -- before the first step ---------------------------------------------------------------------------------


def check_batch(settings: TrainConfig, processes: int) -> None:
    """Raise `UserError` unless each pass of each process has at least one row."""
    passes = processes * settings.micro_batches
    if settings.batch_size < passes:
        raise UserError(
            f"train.batch_size is {settings.batch_size}, too few for {settings.micro_batches} micro-batches "
            f"in each of {processes} processes: it must be at least {passes}"
        )


def find_checkpoint(folder: RunFolder, config: RunConfig, registry: Registry) -> Checkpoint | None:
    """The checkpoint to go on from; `UserError` when the folder holds another run, or no run."""
    if not folder.check():
        return None
    there = from_toml(folder.config_path.read_text(), registry, where=str(folder.config_path))
    differing = diff(there, config, resumable=False)
    if differing:
        named = ", ".join(
            f"{key} {_setting(there, key)} not {_setting(config, key)}" for key in differing[:3]
        )
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{folder.path} is a run of other settings ({named}{more}): "
            "give those again to resume it, or another --out to start anew"
        )
    with warnings.catch_warnings():
        if not is_main_process():  # one tells of a damaged checkpoint
            warnings.simplefilter("ignore")
        checkpoint = folder.latest()
    if checkpoint and checkpoint.manifest["config"] != digest(config):
        raise UserError(
            f"{folder.config_path} was changed after {checkpoint.path.name} was written: "
            "put it back, or give another --out to start anew"
        )
    return checkpoint


def is_main_process() -> bool:
    """Whether this is the first of the processes that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def start_accelerator(device: str, precision: str) -> Accelerator:
    """accelerate on `auto`, `cpu` or `cuda`, in as many processes as the launcher started."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("torch finds no CUDA device here: use --device cpu or auto")
    cpu = device == "cpu" or not cuda
    if cpu and precision == "fp16":
        raise UserError("train.precision 'fp16' needs a GPU: use 'bf16' or 'no'")
    # accelerate keeps its state in globals, which would refuse a second run of another precision or device.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # Some objectives leave weights out of the loss (an embedding without labels): they are to stay as they
    # are, as in one process.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[unused])


def write_description(
    folder: RunFolder, config: RunConfig, registry: Registry, accelerator: Accelerator
) -> None:
    """Write config.toml, environment.json and plugins.json."""
    folder.write_text("config.toml", to_toml(config))
    folder.write_text("environment.json", json.dumps(environment(accelerator), indent=2) + "\n")
    plugins = [plugin.to_dict() for plugin in registry.plugins]
    folder.write_text("plugins.json", json.dumps(plugins, indent=2) + "\n")
    with disk(folder.checkpoints_path):
        folder.checkpoints_path.mkdir(exist_ok=True)


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What a run's numbers may depend on beside its configuration."""
    packages = ("accelerate", "numpy", "safetensors", "torch", "torchvision")
    device = accelerator.device
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def digest(config: RunConfig) -> str:
    """SHA-256 of what may not change between two runs of the same `train` command."""
    values = to_dict(config)
    values["train"] = {key: v for key, v in values["train"].items() if not is_resumable(f"train.{key}")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _setting(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = to_dict(config)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return repr(value)


# -- rows --------------------------------------------------------------------------------------------------


def bounds(total: int, parts: int, index: int) -> tuple[int, int]:
    """Rows [start, stop) of part `index` when `total` rows are cut into `parts` nearly equal ones."""
    return index * total // parts, (index + 1) * total // parts


def order(size: int, batch_size: int, seed: int, steps: Iterable[int], rows: slice) -> Iterator[list[int]]:
    """The images of `rows` of each step's batch, out of `size`.

    Every epoch is a permutation of its own; a batch may span two (or more) epochs, so none is cut short.
    """
    for step in steps:
        places = range(step * batch_size, (step + 1) * batch_size)[rows]
        yield [int(_permutation(size, seed, place // size)[place % size]) for place in places]


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    generator = torch.Generator().manual_seed(fold(seed, "order", epoch))
    return torch.randperm(size, generator=generator).numpy()


def read(split: Split, batches: Iterable[list[int]], workers: int, pin: bool) -> Iterator[Any]:
    """Batches `(pixels, labels or None)` of the given images; `UserError` where one cannot be read."""
    loader: DataLoader[Any] = DataLoader(
        split, batch_sampler=batches, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin
    )
    try:
        yield from loader
    except UserError as error:
        # A worker's error comes with its whole traceback as text; what it said is behind the last name.
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from error


def _as_it_is(batch: Any) -> Any:
    return batch


# -- the loop ----------------------------------------------------------------------------------------------


class TrainStep(nn.Module):
    """Model and objective in one forward pass.

    DistributedDataParallel must see the whole loss as its module's output: an objective may call
    `torch.autograd.grad` inside, and gradients are exchanged in the backward pass of the loss.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x0: Tensor, y: Tensor | None, draws: Draws) -> dict[str, Tensor]:
        """x0 (B, C, H, W) float32 in model units, y (B,) int64 or None. Only the loss keeps its graph."""
        scalars = self.objective(self.model, x0, y, draws)
        return {name: value if name == "loss" else value.detach() for name, value in scalars.items()}


class Meter:
    """Sums of scalars, kept on the device: reading one back at every step would stall a GPU."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0  # what the sums are over: steps, or the images of a split

    def add(self, scalars: Mapping[str, Tensor], weight: float) -> None:
        """Add scalars, each a 0-d tensor, times `weight`."""
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double() * weight

    def totals(self) -> dict[str, float]:
        """The sums over all processes; to be called by each of them."""
        mine = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        totals: dict[str, float] = {}
        for sums in gather_object([dict(zip(self.sums, mine, strict=True))]):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def means(self) -> dict[str, float]:
        """The totals over the count; to be called by every process."""
        return {name: value / self.count for name, value in self.totals().items()}


class Trainer:
    """One run's model, average, optimizer and loop; `train` makes it."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        folder: RunFolder,
        registry: Registry,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        self.config, self.settings, self.folder, self.registry = config, config.train, folder, registry
        self.accelerator, self.progress = accelerator, progress
        self.data, self.objective = parts.data, parts.objective
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.model = parts.model.to(self.device).train()
        self.ema = EMA(self.model, self.settings.ema_decay, self.settings.ema_start)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.compiled = make_compiled(config, parts.objective, self.device)
        module = TrainStep(self.model, self.compiled or self.objective)
        self.module, self.optimizer = accelerator.prepare(module, make_optimizer(self.settings, self.weights))
        self.passes = self.rows_of(self.settings.batch_size)
        self.meter = Meter()
        self.first_bad = torch.full((1,), _NEVER, device=self.device)
        self.clock = Clock()

    def run(self, start: int) -> None:
        """Train from step `start` to the last one."""
        self.writer = self._tensorboard(start) if self.main else None
        if self.main:
            self.registry.hook.on_run_start(folder=self.folder)
        self.clock.start()
        self.progress.start(start)
        # The collector would walk over torch's own million objects again and again.
        gc.collect()
        gc.freeze()
        try:
            for step, (pixels, labels) in zip(self._steps(start), self._batches(start), strict=True):
                self.step(step, pixels, labels)
                self.after(step + 1)
        finally:
            gc.unfreeze()
            self.progress.close()
            if self.writer:
                with disk(self.folder.tensorboard_path):
                    self.writer.close()
        if self.main:
            self.registry.hook.on_run_end(folder=self.folder, step=self.settings.steps)

    def compile(self, start: int) -> None:
        """Compile the step, if it is to be, on the batch of step `start`; nothing of the run changes."""
        if self.compiled is None or start >= self.settings.steps:
            return
        self.progress.say(f"compiling the training step, recipe {self.compiled.recipe}")
        began = time.perf_counter()
        pixels, labels = self.data.split("train").__getitems__(next(self._order([start])))
        for rows in self.passes:  # micro-batches of several sizes are several steps
            with self.accelerator.autocast():
                self.compiled.compile(self.model, *self.inputs(start, rows, pixels, labels))
        seconds, error = time.perf_counter() - began, self.compiled.error
        self.progress.say(f"compiled in {seconds:.1f} s; gradients within {error:.1g} of eager's")

    def _steps(self, start: int) -> range:
        return range(start, self.settings.steps)

    def _batches(self, start: int) -> Iterator[Any]:
        """This process's rows of every batch."""
        return read(
            self.data.split("train"),
            self._order(self._steps(start)),
            self.settings.num_workers,
            self.device.type == "cuda",
        )

    def _order(self, steps: Iterable[int]) -> Iterator[list[int]]:
        """The images of this process's rows of each step's batch."""
        count = len(self.data.split("train"))
        if count == 0:
            raise UserError(f"the training split of {self.config.data.name!r} is empty")
        rows = slice(self.passes[0][0], self.passes[-1][1])
        return order(count, self.settings.batch_size, self.config.seed, steps, rows)

    def rows_of(self, total: int) -> list[tuple[int, int]]:
        """Rows [start, stop) of each micro-batch of this process, of a batch of `total` rows."""
        first, last = bounds(total, self.accelerator.num_processes, self.accelerator.process_index)
        count = self.settings.micro_batches
        cuts = [bounds(last - first, count, index) for index in range(count)]
        return [(first + start, first + stop) for start, stop in cuts]

    def draws(self, total: int, rows: tuple[int, int], *keys: int | str) -> Draws:
        """The numbers of `rows` of a batch of `total` rows for a purpose."""
        return Draws(fold(self.config.seed, *keys), total, *rows, device=self.device)

    def step(self, step: int, pixels: Tensor, labels: Tensor | None) -> None:
        """One optimizer step on this process's rows; step 0 is the first."""
        torch.manual_seed(fold(self.config.seed, "dropout", step, self.accelerator.process_index))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.zero_grad()
        whole = torch.ones_like(self.first_bad, dtype=torch.bool)
        for rows in self.passes:
            whole &= self.backward(rows, self.inputs(step, rows, pixels, labels)).isfinite()
        whole &= self.clip()
        # Noted on the device and looked at later (`guard`): the first step that went wrong.
        self.first_bad = torch.where(whole, self.first_bad, self.first_bad.clamp(max=step))
        self.optimizer.step()
        self.ema.update(self.model, step)
        self.meter.count += 1
        self.clock.steps += 1

    def inputs(
        self, step: int, rows: tuple[int, int], pixels: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Draws]:
        """What the objective takes of one micro-batch, of this process's `pixels` and `labels`."""
        batch, first = self.settings.batch_size, self.passes[0][0]
        part = slice(rows[0] - first, rows[1] - first)
        y = None if labels is None else labels[part].to(self.device, non_blocking=True)
        moved = pixels[part].to(self.device, non_blocking=True)
        x0 = self.data.info.to_model(moved, self.draws(batch, rows, "pixels", step), train=True)
        return x0, y, self.draws(batch, rows, "train", step)

    def backward(self, rows: tuple[int, int], inputs: tuple[Tensor, Tensor | None, Draws]) -> Tensor:
        """Add one micro-batch's gradients; returns its loss, a 0-d tensor."""
        share = (rows[1] - rows[0]) / self.settings.batch_size
        # Processes exchange gradients once a step, in the last micro-batch's backward pass.
        last = rows == self.passes[-1]
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            scalars = self.module(*inputs)
            # The exchange is a mean over processes; the loss of the batch is a sum of shares.
            self.accelerator.backward(scalars["loss"] * (share * self.accelerator.num_processes))
        self.meter.add(scalars, share)
        return scalars["loss"].detach()

    def clip(self) -> Tensor:
        """Clip the gradient when asked to; returns whether its norm is finite, a 0-d bool tensor."""
        self.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.weights if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights, self.settings.clip_norm, norm)
        if (
            self.accelerator.scaler is not None
        ):  # in fp16 an overflow is the scaler's business: it skips the step
            return torch.ones((), dtype=torch.bool, device=self.device)
        self.meter.add({"grad_norm": norm}, 1 / self.accelerator.num_processes)
        return norm.isfinite()

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.settings.lr * lr.factor(step, self.settings.lr_schedule, self.settings.steps)

    # -- between steps -------------------------------------------------------------------------------------

    def after(self, done: int) -> None:
        """Whatever is due when `done` steps are done."""
        self.progress.advance()
        settings = self.settings
        periods = (
            settings.log_every,
            settings.validate_every,
            settings.checkpoint_every,
            settings.sample_every,
        )
        log, validate, checkpoint, sample = (self._due(done, every) for every in periods)
        # On a CPU looking costs nothing; a GPU would have to be waited for.
        if log or validate or checkpoint or sample or self.device.type == "cpu":
            self.guard()
        if log:
            self.log(done)
        with self.clock.paused():
            valid = self.validate(done) if validate else {}
            if checkpoint:
                self.save(done, valid)
            if sample:
                self.sample(done)

    def _due(self, done: int, every: int) -> bool:
        return done == self.settings.steps or (every > 0 and done % every == 0)

    def guard(self) -> None:
        """Stop at a loss or gradient that was not finite, before anything of it is written."""
        first = int(self.accelerator.gather(self.first_bad).min())
        if first == _NEVER:
            return
        good = next((c for c in self.folder.checkpoints() if c.step <= first), None)
        kept = f"the last good checkpoint is {good.path}" if good else "there is no checkpoint yet"
        raise UserError(
            f"step {first + 1}: the loss or its gradient is not finite (seed of the batch: "
            f"{fold(self.config.seed, 'train', first)}); {kept}. Try a lower train.lr or a train.clip_norm, "
            "with another --out"
        )

    def log(self, done: int) -> None:
        """Write the means since the last line."""
        means = self.meter.means()
        self.meter = Meter()
        speed = self.clock.steps_per_second() * self.settings.batch_size
        timing = {"images_per_second": speed, "seconds": self.clock.total()}
        self.write(done, "train", {**means, "lr": self.learning_rate(done - 1), **timing})

    def write(self, done: int, split: str, scalars: Mapping[str, float]) -> None:
        """Write a line of figures everywhere; only one process does."""
        if not self.main:
            return
        self.folder.log(done, scalars, split)
        assert self.writer is not None
        with disk(self.folder.tensorboard_path):
            for name, value in scalars.items():
                self.writer.add_scalar(f"{split}/{name}", value, done)
        self.progress.report(done, split, scalars)
        self.registry.hook.on_log(folder=self.folder, step=done, scalars=scalars)

    def _tensorboard(self, start: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        with disk(self.folder.tensorboard_path):
            return SummaryWriter(str(self.folder.tensorboard_path), purge_step=start + 1)

    # -- validation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, done: int) -> dict[str, float]:
        """The objective on the whole validation split under the averaged weights, the draws always the same.

        And bits/dim where the model has a density. {} where the data set has no validation images. An
        objective that differentiates inside enables grad for that itself, as `denoise` does.
        """
        split = self.data.split("valid")
        if len(split) == 0:
            return {}
        rows = list(self._blocks(len(split)))
        batches = [list(range(first + r[0], first + r[1])) for first, _, r in rows]
        meter = Meter()
        meter.count = len(split)
        loader = read(split, batches, self.settings.num_workers, self.device.type == "cuda")
        for (first, total, part), (pixels, labels) in zip(rows, loader, strict=True):
            draws = self.draws(total, part, "valid", "pixels", first)
            x0 = self.data.info.to_model(pixels.to(self.device), draws)
            y = None if labels is None else labels.to(self.device)
            with self.accelerator.autocast():
                scalars = self.objective(self.ema.module, x0, y, self.draws(total, part, "valid", first))
                meter.add({**scalars, **self._bits_per_dim(x0, y)}, len(x0))
        means = meter.means()
        self.write(done, "valid", means)
        return means

    def _blocks(self, size: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """Blocks that draws are keyed by: (first image, images, rows of them that are one pass of ours)."""
        for first in range(0, size, self.settings.batch_size):
            total = min(self.settings.batch_size, size - first)
            yield from ((first, total, rows) for rows in self.rows_of(total) if rows[0] < rows[1])

    def _bits_per_dim(self, x0: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        model: Any = self.ema.module
        if "log_density" not in offered(model):
            return {}
        # A model that also knows "no class" is scored by p(x); one that must be told the class, by p(x | y).
        conditional = getattr(model, "num_classes", None) and getattr(model, "null_label", None) is None
        nats = model.log_density(x0, y if conditional else None)
        return {"bits_per_dim": self.data.info.bits_per_dim(nats.double()).mean()}

    # -- checkpoints and samples ---------------------------------------------------------------------------

    def save(self, done: int, valid: Mapping[str, float]) -> None:
        """Write a checkpoint; only one process does, and the others wait for it."""
        logged = {"sums": self.meter.totals(), "count": self.meter.count}
        if self.main:
            scaler = self.accelerator.scaler
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else {},
                "logged": logged,
            }
            files = {
                "model.safetensors": safetensors_bytes(self.model.state_dict()),
                "ema.safetensors": safetensors_bytes(self.ema.module.state_dict()),
                "optimizer.pt": torch_bytes(state),
            }
            newest = self.folder.save(
                done, files, config=digest(self.config), seconds=self.clock.total(), valid=finite(valid)
            )
            self.folder.prune(self.settings.keep_checkpoints, newest)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Checkpoint) -> int:
        """Take up a checkpoint; returns the steps it had done."""
        try:
            self.model.load_state_dict(checkpoint.weights("model"))
            self.ema.module.load_state_dict(checkpoint.weights("ema"))
            state = checkpoint.state()
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{checkpoint.path} does not fit the model: {error}") from error
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.meter.count = state["logged"]["count"]
        if self.main:
            for name, value in state["logged"]["sums"].items():
                self.meter.sums[name] = torch.tensor(value, dtype=torch.float64, device=self.device)
        self.clock.before = checkpoint.manifest["seconds"]
        return checkpoint.step

    def sample(self, done: int) -> None:
        """Draw a grid from the averaged weights into `samples/`, where the model can denoise."""
        if self.main and "denoise" in offered(self.ema.module):
            from cdm_core.images import save_grid
            from cdm_core.runs import Run

            run = Run(
                self.ema.module,
                self.data.info,
                config=self.config,
                data=self.data,
                device=self.device,
                registry=self.registry,
                path=self.folder.path,
                step=done,
            )
            images, info = run.decoded(run.sample(SAMPLES, seed=self.config.seed))
            save_grid(self.folder.samples_path / f"step-{done:08d}.png", images, info)
        self.accelerator.wait_for_everyone()


def make_compiled(config: RunConfig, objective: Objective, device: torch.device) -> CompiledObjective | None:
    """The objective as `train.compile` wants it compiled; None where it does not."""
    if config.train.compile == "no":
        return None
    recipe = choose(config.train.compile, device)
    return CompiledObjective(objective, recipe, name=config.objective.name)


def make_optimizer(settings: TrainConfig, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam or AdamW, as `settings` say."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(weights, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)


class Clock:
    """Seconds of training over all sittings, and the speed of the training steps alone."""

    def __init__(self) -> None:
        self.before = 0.0  # seconds of earlier sittings
        self.steps = 0  # since the speed was last asked for
        self.start()

    def start(self) -> None:
        """The sitting starts now."""
        self._start = self._mark = time.perf_counter()

    def total(self) -> float:
        """Seconds of all sittings."""
        return self.before + time.perf_counter() - self._start

    def steps_per_second(self) -> float:
        """Speed since this was last asked for, pauses left out."""
        now = time.perf_counter()
        speed = self.steps / (now - self._mark)
        self._mark, self.steps = now, 0
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that is not a training step."""
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start
