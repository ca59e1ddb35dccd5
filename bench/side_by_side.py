"""Ours against the textbook formulation, and against the official code where a checkout of it is given.

    python bench/side_by_side.py [--official PATH] [--out bench/results/cdm.json]

Variants of one thing take turns, round after round in one process, and the fastest round of each counts.
Textbook: the same trunk, then the last convolution, the mean, the linear layer, the running sum and a gather.
The official network (shaharYadin/CDM) is imported from PATH, gets the same weights, and must agree first.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core.data import DataInfo
from cdm_core.random import Draws
from cdm_plugins_cdm.configs import ObjectiveConfig, UNetConfig
from cdm_plugins_cdm.objective import CDMObjective
from cdm_plugins_cdm.unet import UNet

DIGITS = UNetConfig(channels=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(4,), path="uniform")
CASES = {
    "digits 8x8, base width 32, batch 64": (DIGITS, (1, 8, 8), 64),
    "digits 8x8, encoder alone, batch 64": (
        UNetConfig(**{**vars(DIGITS), "decoder": False, "norm_groups": 8}),
        (1, 8, 8),
        64,
    ),
    "CIFAR-10 32x32, official size, batch 4": (UNetConfig(path="uniform"), (3, 32, 32), 4),
}


def textbook_outputs(model: UNet, x: Tensor) -> Tensor:
    """F (B, K): every output of the head, in the order of the paper."""
    h = model.conv_out(model.norm_out(model._trunk(model.conv_in(x), None)))
    return model.linear_layer(h.mean((2, 3))).cumsum(1)


def steps(
    net: Callable[[Tensor], Tensor], path: Any, x0: Tensor, level: Tensor
) -> dict[str, Callable[[], Any]]:
    """Denoising and training with a network that gives all logits: cumulative sum, gather, autograd."""
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    sigma = path.sigma[level].float()[:, None, None, None]

    def noise(create_graph: bool) -> tuple[Tensor, Tensor]:
        x = path.noised(x0, level, eps).requires_grad_()
        logits = net(x)
        y = (logits[:, -1] - logits.gather(1, level[:, None])[:, 0]).sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=create_graph)
        return logits, sigma * (gradient + x)

    def train() -> None:
        logits, estimate = noise(create_graph=True)
        loss = 0.001 * F.cross_entropy(logits, level) + F.mse_loss(estimate, eps)
        loss.backward()

    return {"denoise": lambda: noise(create_graph=False)[1].detach(), "train": train}


def ours(model: UNet, x0: Tensor, level: Tensor) -> dict[str, Callable[[], Any]]:
    """The plugin's own denoiser and objective."""
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x_t = model.path.noised(x0, level, eps)
    objective = CDMObjective(ObjectiveConfig())

    def denoise() -> Tensor:
        x, sigma = model.path.to_ve(x_t, level)
        with torch.no_grad():
            x0_hat = model.denoise(x, sigma.float())
        return (x - x0_hat) / sigma.float()[:, None, None, None]

    return {
        "denoise": denoise,
        "train": lambda: objective(model, x0, None, Draws(0, len(x0)))["loss"].backward(),
    }


def official(checkout: Path, config: UNetConfig, shape: tuple[int, int, int], model: UNet) -> nn.Module:
    """The official network of the same shape with our weights."""
    spec = importlib.util.spec_from_file_location("official_diffusion", checkout / "models/diffusion.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.DDPM_Unet(
        channels=config.channels,
        ch_mult=config.ch_mult,
        num_res_blocks=config.num_res_blocks,
        attn_resolutions=config.attn_resolutions,
        dropout=config.dropout,
        in_channels=shape[0],
        out_channels=len(model.path),
        image_size=shape[1],
        resamp_with_conv=config.resamp_with_conv,
        num_classes=None,
    )
    net.load_state_dict(model.state_dict())
    return net.eval()


def fastest(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of `rounds` rounds, the variants taking turns."""
    times: dict[str, float] = dict.fromkeys(variants, float("inf"))
    for round_ in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if round_:  # the first warms up
                times[name] = min(times[name], time.perf_counter() - start)
    return times


def measure(name: str, checkout: Path | None, rounds: int) -> list[dict[str, Any]]:
    """Rows of one case: seconds by variant and their ratios to ours, for denoising and training."""
    config, shape, batch = CASES[name]
    torch.manual_seed(0)
    model = UNet(config, DataInfo("bench", shape)).eval()
    nn.init.normal_(model.linear_layer.weight, std=0.02)
    x0, level = torch.rand(batch, *shape) * 2 - 1, torch.randint(1, len(model.path) - 1, (batch,))
    variants = {"ours": ours(model, x0, level)}
    variants["textbook"] = steps(lambda x: textbook_outputs(model, x), model.path, x0, level)
    if checkout and config.decoder:
        net = official(checkout, config, shape, model)
        variants["official"] = steps(lambda x: net(x).cumsum(1), model.path, x0, level)
    rows = []
    for task in ("denoise", "train"):
        runs = {variant: tasks[task] for variant, tasks in variants.items()}
        if task == "denoise":
            for run in runs.values():
                torch.testing.assert_close(run(), runs["ours"](), rtol=1e-3, atol=1e-4)
        seconds = fastest(runs, rounds)
        ratios = {f"{variant} / ours": value / seconds["ours"] for variant, value in seconds.items()}
        rows.append({"case": name, "task": task, "seconds": seconds, "ratio": ratios})
        print(name, task, {key: round(value, 3) for key, value in ratios.items()}, flush=True)
    return rows


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, help="A checkout of shaharYadin/CDM.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/cdm.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for name in CASES for row in measure(name, options.official, options.rounds)]
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "cpu": next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                     if line.startswith("model name")), "unknown") if sys.platform == "linux" else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": options.rounds,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
