"""A training step and a sampling step: ours, the plain formulation, and the official code where it is given.

    python bench/training_step.py [--official PATH] [--compile] [--device cuda] [--case 16x16]

Variants of one thing take turns, round after round in one process; ratios are medians over rounds. Plain: the
same network in PyTorch's own operators, with every output of the head, a running sum and a gather. The
official code (shaharYadin/CDM) is imported from PATH, gets the same weights, and must agree with ours first.
A training step is loss and gradients, without the optimizer; a sampling step is one call of the denoiser.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import about
from torch import Tensor, nn

import cdm_kernels
from cdm_core.compiled import CompiledModel, CompiledObjective
from cdm_core.data import DataInfo
from cdm_core.memory import keep_freed_memory
from cdm_core.random import Draws
from cdm_plugins_cdm.configs import ObjectiveConfig, UNetConfig
from cdm_plugins_cdm.objective import CDMObjective
from cdm_plugins_cdm.unet import UNet

SMALL: dict[str, Any] = {"channels": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "norm_groups": 8}
# Network, shape of an image, images on a CPU and on a GPU.
CASES = {
    "digits": (UNetConfig(**SMALL, attn_resolutions=(4,), decoder=False), (1, 8, 8), 64, 512),
    "8x8": (UNetConfig(**SMALL, attn_resolutions=(4,)), (1, 8, 8), 64, 512),
    "16x16": (UNetConfig(**SMALL, attn_resolutions=(8,)), (1, 16, 16), 64, 512),
    "28x28": (UNetConfig(**SMALL, attn_resolutions=(14,)), (1, 28, 28), 32, 256),
    "cifar10": (UNetConfig(), (3, 32, 32), 4, 128),
}
Tasks = dict[str, Callable[[], Any]]


class Setting:
    """One case: the model, a batch, its levels and its noise."""

    def __init__(self, name: str, device: torch.device) -> None:
        config, self.shape, on_cpu, on_gpu = CASES[name]
        self.config = UNetConfig(**{**vars(config), "path": "uniform", "dropout": 0.0})
        self.batch, self.device = on_cpu if device.type == "cpu" else on_gpu, device
        torch.manual_seed(0)
        self.model = UNet(self.config, DataInfo("bench", self.shape)).to(device)
        nn.init.normal_(self.model.linear_layer.weight, std=0.02)
        self.x0 = (torch.rand(self.batch, *self.shape) * 2 - 1).to(device)
        self.draws = lambda: Draws(0, self.batch, device=device)
        self.level = self.draws().integers(len(self.model.path))
        self.level[:] = self.level.clamp(1, len(self.model.path) - 2)
        self.path = self.model.path.to(device)

    def autocast(self, half: bool) -> Any:
        """Of bfloat16, or none."""
        return torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()


def ours(setting: Setting, half: bool = False, recipe: Any = None) -> Tasks:
    """The plugin's own objective and denoiser, in float32 or under bfloat16 autocast, compiled or not."""
    objective: Any = CDMObjective(ObjectiveConfig())
    model: Any = setting.model
    if recipe:
        objective = CompiledObjective(objective, recipe, name="cdm/cdm")
        model = CompiledModel(model, hint="")
    x_t = noised(setting)

    def train() -> Tensor:
        with setting.autocast(half):
            loss = objective(setting.model, setting.x0, None, setting.draws())["loss"]
        loss.backward()
        return loss

    def denoise() -> Tensor:
        x, sigma = setting.path.to_ve(x_t, setting.level)
        with torch.no_grad(), setting.autocast(half):
            x0 = model.denoise(x, sigma.float())
        return (x - x0) / sigma.float()[:, None, None, None]

    return {"train": train, "sample": denoise}


def plain(setting: Setting, outputs: Callable[[Tensor], Tensor]) -> Tasks:
    """Both steps as the official code writes them, around a network that gives o (B, K)."""
    x_t = noised(setting)

    def noise(x: Tensor, level: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        logits = outputs(x).cumsum(1)
        y = torch.sum(logits[:, -1] - torch.diag(logits[:, level]))
        (gradient,) = torch.autograd.grad(y, x, create_graph=create_graph)
        return logits, setting.path.sigma[level].float()[:, None, None, None] * (gradient + x)

    def train() -> Tensor:
        draws = setting.draws()
        level, eps = draws.integers(len(setting.path)), draws.normal(*setting.shape)
        logits, estimate = noise(setting.path.noised(setting.x0, level, eps), level, create_graph=True)
        loss = 0.001 * F.cross_entropy(logits, level) + F.mse_loss(estimate, eps)
        loss.backward()
        return loss

    return {"train": train, "sample": lambda: noise(x_t, setting.level, create_graph=False)[1].detach()}


def noised(setting: Setting) -> Tensor:
    """A batch at its levels."""
    return setting.path.noised(setting.x0, setting.level, setting.draws().normal(*setting.shape))


def textbook(model: UNet) -> Callable[[Tensor], Tensor]:
    """The network with its last convolution, in PyTorch's operators and layout, on weights of its own."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def outputs(x: Tensor) -> Tensor:
        h = model.conv_out(model.norm_out(model._trunk(model.conv_in(x), None)))
        return model.linear_layer(h.mean((2, 3)))

    return outputs


def official(checkout: Path, setting: Setting) -> nn.Module:
    """The official network of the same shape with our weights."""
    spec = importlib.util.spec_from_file_location("official_diffusion", checkout / "models/diffusion.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = setting.config
    # The official code fixes 32 groups, which at base width 32 leaves groups of a single channel.
    module.Normalize = lambda width: nn.GroupNorm(config.norm_groups, width, eps=1e-6)
    net = module.DDPM_Unet(
        channels=config.channels,
        ch_mult=config.ch_mult,
        num_res_blocks=config.num_res_blocks,
        attn_resolutions=config.attn_resolutions,
        dropout=config.dropout,
        in_channels=setting.shape[0],
        out_channels=len(setting.path),
        image_size=setting.shape[1],
        resamp_with_conv=config.resamp_with_conv,
        num_classes=None,
    )
    net.load_state_dict(setting.model.state_dict())
    return net.to(setting.device)


def variants(setting: Setting, options: argparse.Namespace) -> dict[str, Tasks]:
    """By task, what takes turns; the first is what ratios are of."""
    found = {"plain float32": in_reference(plain(setting, textbook(setting.model)))}
    if options.official and setting.config.decoder:
        found["official float32"] = plain(setting, official(options.official, setting))
    for half, precision in ((False, "float32"), (True, "bfloat16")):
        found[f"ours {precision}"] = ours(setting, half)
        for recipe in options.recipes:
            found[f"ours {precision} {recipe}"] = {"train": ours(setting, half, recipe)["train"]}
        if options.recipes:
            found[f"ours {precision} compiled"] = {"sample": ours(setting, half, "whole")["sample"]}
    tasks = ("train", "sample")
    return {task: {name: runs[task] for name, runs in found.items() if task in runs} for task in tasks}


def in_reference(tasks: Tasks) -> Tasks:
    """With PyTorch's own operators."""

    def wrapped(task: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with cdm_kernels.use("reference"):
                return task()

        return run

    return {name: wrapped(task) for name, task in tasks.items()}


def measure(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every round, the variants taking turns; a first round, untimed, warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # as the training loop does
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], Any], device: torch.device) -> float | None:
    """GiB that a call takes beside what was there before it, on a GPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    _wait(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**30, 3)


def checked(runs: Tasks, device: torch.device) -> tuple[Tasks, list[dict[str, Any]]]:
    """The variants that run and compute what the first one does; a row for each of the others."""
    expected = next(iter(runs.values()))().detach()
    good, rows = {}, []
    for variant, run in runs.items():
        # TensorFloat-32, which torch allows convolutions on a GPU, has 10 bits.
        allowed = 0.1 if "bfloat16" in variant else 1e-3 if device.type == "cpu" else 1e-2
        try:
            error = float((run().detach() - expected).norm() / expected.norm())
            if not error <= allowed:
                raise ValueError(f"differs by {error:.2g} of its size")
            good[variant] = run
        except Exception as problem:  # one that fails stops no other
            rows.append({"variant": variant, "failed": " ".join(str(problem).split())[:300]})
            print(*rows[-1].values(), flush=True)
    return good, rows


def rows_of(name: str, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of one case, task by task."""
    device = torch.device(options.device)
    setting = Setting(name, device)
    for task, runs in variants(setting, options).items():
        runs, rows = checked(runs, device)
        times = measure(runs, options.rounds, device)
        for variant, seconds in times.items():
            row = {"variant": variant}
            row["milliseconds"] = round(1e3 * statistics.median(seconds), 3)
            row["images_per_second"] = round(setting.batch / statistics.median(seconds), 1)
            for base in ("plain float32", "official float32"):
                if base in times:
                    ratio = statistics.median(b / s for b, s in zip(times[base], seconds, strict=True))
                    row[f"times as fast as {base}"] = round(ratio, 2)
            if "cuda-graph" not in variant:  # whose memory is its own, and not counted
                row["peak_gib"] = peak_memory(runs[variant], device)
            rows.append(row)
            print(name, task, *row.values(), flush=True)
        yield [{"case": name, "batch": setting.batch, "task": task, **row} for row in rows]


def main() -> None:
    """Measure every case asked for and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, help="A checkout of shaharYadin/CDM.")
    parser.add_argument("--compile", action="store_true", help="The compiled recipes too (minutes).")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", action="append", choices=CASES, help="May be repeated; all by default.")
    parser.add_argument("--out", type=Path, help="Default: bench/results/step-DEVICE.json.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    on_gpu = torch.device(options.device).type == "cuda"
    options.recipes = (["cuda-graph", "whole"] if on_gpu else ["whole", "trace"]) if options.compile else []
    out = options.out or Path(__file__).parent / f"results/step-{torch.device(options.device).type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in options.case or CASES:
        for more in rows_of(name, options):
            rows += more  # written as they come: a call with a time limit keeps what it had
            result = {"about": about() | {"rounds": options.rounds}, "rows": rows}
            out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
