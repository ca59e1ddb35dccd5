"""Images a second of a diffusion classifier: `classify` with its race, and the official loop, on one network.

    python bench/classify_throughput.py --run RUN [--official PATH] [--threads 2] [--seconds 120]

RUN: a trained `zeroshot/context-unet`. PATH: a checkout of Svithjod/Diffusion_Classifier, whose own
`DDPM.inference` then runs, with our weights in its own network; without it, the same loop as it is described:
100 times one level and noise an image, of which ten whole passes, one a class, for a batch of images, and
a squared error an image, each read by itself. Both networks must compute the same noise first.

The two classify the same images in turns, chunk after chunk in one process; the ratio is the median over
chunks. How many images there are follows from `--seconds`, what the official loop may take, unless `--images`
says it. "ours, flat" asks as often as the official loop does: the part of the ratio that is not the race's.
Accuracies are put beside each other with McNemar's test, as speed means nothing at another accuracy.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import about
from torch import Tensor, nn

from cdm_core.memory import keep_freed_memory
from cdm_core.metrics import wilson
from cdm_core.runs import Run, load_run
from cdm_plugins_zeroshot.context_unet import ContextUnet
from cdm_plugins_zeroshot.race import Race
from cdm_plugins_zeroshot.statistics import mcnemar
from cdm_plugins_zeroshot.zeroshot_configs import EliminationConfig, EstimatorConfig

ROUNDS = 100  # levels and noises an image, of the published table's best row
ALLOWED = 1e-4  # relative: rounding
Classify = Callable[[list[int]], list[int]]  # numbers of images -> classes
Loop = Callable[[list[int], int], list[int]]  # the same, with so many rounds
Noise = Callable[[Tensor, Tensor, Tensor], Tensor]  # u_t, level (from 1), class -> eps


class Setting:
    """The run's network and its test images."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.run: Run = load_run(options.run, device=options.device)
        self.model = self.run.model
        if not isinstance(self.model, ContextUnet) or self.run.config is None:
            raise SystemExit(f"{options.run} is no run of zeroshot/context-unet")
        self.config: Any = self.run.config.model.config
        self.x0, labels = self.run.examples("test")
        self.y = np.asarray(labels)
        self.tile, self.alpha = options.tile, options.alpha
        self.classes: int = self.model.num_classes or 0

    def official_units(self, numbers: list[int]) -> Tensor:
        """Images as the official code has them, in [0, 1]."""
        return (self.x0[numbers].to(self.device) + 1) / 2


# -- the official loop ---------------------------------------------------------------------------------------


class Textbook(nn.Module):
    """The published network on our weights: PyTorch's own operators and layout, skips concatenated."""

    def __init__(self, model: ContextUnet) -> None:
        super().__init__()
        self.net = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def forward(self, u_t: Tensor, code: Tensor, time: Tensor) -> Tensor:
        """eps; u_t in [0, 1] and noise, code (B, K) the one-hot class with its sign, time (B,) t / n_T."""
        net = self.net
        first = net.init_conv(u_t)
        half = net.down1(first)
        quarter = net.down2(half)
        scales = [embed.model(code)[..., None, None] for embed in (net.contextembed1, net.contextembed2)]
        shifts = [embed.model(time[:, None])[..., None, None] for embed in (net.timeembed1, net.timeembed2)]
        h = net.up0(net.to_vec(quarter))
        h = net.up1.model(torch.cat([scales[0] * h + shifts[0], quarter], 1))
        h = net.up2.model(torch.cat([scales[1] * h + shifts[1], half], 1))
        return net.out(torch.cat([h, first], 1))


def described(setting: Setting) -> tuple[Loop, Noise]:
    """The loop as it is described, and its network's noise."""
    net, config = Textbook(setting.model).eval(), setting.config
    path, sign, classes = setting.model.path.to(setting.device), config.sign, setting.classes

    def noise(u_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return net(u_t, sign * nn.functional.one_hot(y, classes).float(), t / config.n_T)

    @torch.no_grad()
    def classify(numbers: list[int], rounds: int) -> list[int]:
        u = setting.official_units(numbers)
        errors = torch.zeros(len(u), classes, device=u.device)
        for _ in range(rounds):
            t = torch.randint(1, config.n_T + 1, (len(u),)).to(u.device)
            eps = torch.randn_like(u)
            alpha, sigma = (c[t - 1].float().view(-1, 1, 1, 1) for c in (2 * path.alpha, path.sigma))
            for label in range(classes):
                guess = noise(alpha * u + sigma * eps, t, torch.full((len(u),), label, device=u.device))
                each = [float(nn.functional.mse_loss(a, b)) for a, b in zip(eps, guess, strict=True)]
                errors[:, label] += torch.tensor(each, device=u.device)
        return errors.argmin(1).tolist()

    return classify, noise


def official(checkout: Path, setting: Setting) -> tuple[Loop, Noise]:
    """The official `DDPM.inference` with our weights, and its network's noise."""
    spec = importlib.util.spec_from_file_location("official_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config, (channels, height, width) = setting.config, setting.run.info.shape
    net = module.ContextUnet(in_channels=channels, n_feat=config.n_feat, n_classes=setting.classes)
    quarter = (height // 4, width // 4)
    if quarter != (7, 7):  # the official code is written for 28x28
        net.to_vec[0] = nn.AvgPool2d(quarter)
        net.up0[0] = nn.ConvTranspose2d(2 * config.n_feat, 2 * config.n_feat, quarter, quarter)
    state = {key: tensor.contiguous() for key, tensor in setting.model.state_dict().items()}
    net.load_state_dict(state)
    betas = (config.beta_start, config.beta_end)
    ddpm = module.DDPM(net, setting.classes, betas, config.n_T, setting.device, drop_prob=0.0)
    ddpm.to(setting.device).eval()

    def noise(u_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return net(u_t, y, t / config.n_T, torch.zeros_like(y))

    @torch.no_grad()
    def classify(numbers: list[int], rounds: int) -> list[int]:
        return ddpm.inference(setting.official_units(numbers), mc_sample=rounds).tolist()

    return classify, noise


# -- ours ----------------------------------------------------------------------------------------------------


class Ours:
    """`classify` by a race, or by every pair for every class; `spent` adds up its cost."""

    def __init__(self, setting: Setting, rule: str) -> None:
        estimator = EstimatorConfig(pairs=ROUNDS, tile=setting.tile)
        elimination = EliminationConfig(rule=rule, alpha=setting.alpha)  # type: ignore[arg-type]
        self.race = Race(setting.model, estimator, elimination, setting.run.info.shape)
        self.setting, self.spent = setting, 0.0

    def __call__(self, numbers: list[int]) -> list[int]:
        """Classes of these images."""
        found = {}
        for verdict in self.race((number, self.setting.x0[number]) for number in numbers):
            found[verdict.image] = verdict.label
            self.spent += verdict.evaluations
        return [found[number] for number in numbers]


# -- measuring -----------------------------------------------------------------------------------------------


@torch.no_grad()
def check_agreement(setting: Setting, noise: Noise) -> float:
    """The largest difference of the noises of both, relative to the largest; an error if large."""
    model, x0 = setting.model, setting.x0[:8].to(setting.device)
    t = torch.linspace(1, setting.config.n_T, len(x0)).long().to(setting.device)
    y = torch.arange(len(x0), device=setting.device) % setting.classes
    x_t = model.path.noised(x0, t - 1, torch.randn_like(x0))
    alpha = model.path.to(setting.device).alpha[t - 1].float().view(-1, 1, 1, 1)
    expected = noise(x_t + alpha, t, y)
    error = float((model.eps(x_t, t - 1, y) - expected).abs().max() / expected.abs().max())
    if not error <= ALLOWED:
        raise SystemExit(f"the two networks differ by {error:.2g} of their noise")
    return error


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Of a call, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def chunks(setting: Setting, loop: Loop, options: argparse.Namespace) -> list[list[int]]:
    """Numbers of images in equal parts: as many as the official loop has time for, or as were asked for."""
    count = options.images
    if count is None:
        tried = list(range(min(options.batch, len(setting.x0))))
        loop(tried, 1)  # warms up
        once, _ = seconds(lambda: loop(tried, 1), setting.device)
        count = int(options.seconds / (once * ROUNDS / len(tried)))
    size = max(1, min(count, len(setting.x0)) // options.chunks)
    return [list(range(i * size, (i + 1) * size)) for i in range(options.chunks)]


def batched(loop: Loop, size: int) -> Classify:
    """In batches of so many images, as the official script goes through its data."""
    return lambda numbers: [
        y for i in range(0, len(numbers), size) for y in loop(numbers[i : i + size], ROUNDS)
    ]


def measure(setting: Setting, theirs: Loop, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a classifier; the first is what ratios are of."""
    parts = chunks(setting, theirs, options)
    race, flat = Ours(setting, "race"), Ours(setting, "none")
    race(parts[0][:4])  # warms up
    race.spent = 0.0
    times: dict[str, list[float]] = {"official loop": [], "ours, race": [], "ours, flat": []}
    said: dict[str, list[int]] = {name: [] for name in times}
    runs: dict[str, Classify] = {"official loop": batched(theirs, options.batch), "ours, race": race}
    for i, part in enumerate(parts):
        for name, classify in (runs if i else {**runs, "ours, flat": flat}).items():
            spent, labels = seconds(partial(classify, part), setting.device)
            times[name].append(spent)
            said[name] += labels
    passes = {"official loop": float(ROUNDS * setting.classes)}
    passes |= {"ours, race": race.spent / len(said["ours, race"]), "ours, flat": flat.spent / len(parts[0])}
    rows = []
    for name, spent in times.items():
        row: dict[str, Any] = {
            "classifier": name,
            "images": len(said[name]),
            "passes an image": round(passes[name], 2),
        }
        row["images per second"] = round(len(said[name]) / sum(spent), 4)
        base = times["official loop"]
        row["times as fast"] = round(statistics.median(b / s for b, s in zip(base, spent, strict=False)), 2)
        rows.append(row | judged(setting, said, name))
    return rows


def judged(setting: Setting, said: dict[str, list[int]], name: str) -> dict[str, Any]:
    """Accuracy with its interval, and McNemar's test against the official loop on the same images."""
    count = len(said[name])
    hits, base = (np.asarray(said[n][:count]) == setting.y[:count] for n in (name, "official loop"))
    low, high = wilson(int(hits.sum()), count)
    found = {"accuracy": float(hits.mean()), "low": round(low, 4), "high": round(high, 4)}
    if name == "official loop":
        return found
    test = mcnemar(base, hits)
    return found | {"only official right": test.only_first, "only ours right": test.only_second, "p": test.p}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="A run folder of zeroshot/context-unet.")
    parser.add_argument("--official", type=Path, help="A checkout of Svithjod/Diffusion_Classifier.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="That the official loop may take, about."
    )
    parser.add_argument("--images", type=int, help="That both classify, whatever time it takes.")
    parser.add_argument("--chunks", type=int, default=3, help="In which they take turns.")
    parser.add_argument("--batch", type=int, default=256, help="Images of the official loop at a time.")
    parser.add_argument("--tile", type=int, default=64, help="Rows of our network at a time.")
    parser.add_argument("--alpha", type=float, default=1e-3, help="Of a test of the race.")
    parser.add_argument("--out", type=Path, help="Default: bench/results/classify-DEVICE.json.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    setting = Setting(options)
    theirs, noise = official(options.official, setting) if options.official else described(setting)
    error = check_agreement(setting, noise)
    rows = measure(setting, theirs, options)
    network = {"n_feat": setting.config.n_feat, "n_T": setting.config.n_T, "data": setting.run.info.name}
    result = {
        "about": about() | {"official code": bool(options.official), "network": network, "difference": error},
        "batch": options.batch,
        "tile": options.tile,
        "alpha": options.alpha,
        "rows": rows,
    }
    out = options.out or Path(__file__).parent / f"results/classify-{setting.device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(*(f"{key}: {value}" for key, value in row.items()), sep=", ")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
