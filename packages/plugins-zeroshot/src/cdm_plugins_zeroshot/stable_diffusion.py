"""Stable Diffusion as a zero-shot classifier: its prompts are the labels (Li et al. 2023, arXiv 2303.16203).

A class is asked about by its prompts, "a photo of a tabby cat": the U-Net (Rombach et al. 2022) predicts the
noise on an autoencoder's latents by cross-attention to an encoded prompt. Prompts are encoded once, when a
pipeline of the library `diffusers` is converted, and kept with the weights: to classify needs no text
encoder. Of K classes, labels 0 .. K - 1 are the first prompts of the classes, K is the empty prompt, and
FIRST + p, far from any class, the prompt p, counted through; `wordings` are those of every class, which a
race pools.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.data import DataInfo
from cdm_core.denoisers import DiscreteDenoiser, Predicts
from cdm_core.errors import MissingPackage, UserError
from cdm_core.formats import Foreign, filled, overridden, read_tensors
from cdm_core.settings import Selection
from cdm_plugins_zeroshot.stable_diffusion_configs import StableDiffusionConfig

UNET = "UNet2DConditionModel"
EXTRA = "pip install 'cdm-plugins-zeroshot[stable-diffusion]'"
PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "v_prediction": "v"}
WEIGHTS = tuple(
    f"diffusion_pytorch_model{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
)
FIRST = 2**20  # label of the first prompt: more classes than anybody has
AT_ONCE = 64  # prompts that are encoded in one batch


def library(name: str, what: str) -> Any:
    """The module `diffusers` or `transformers`; UserError, saying what needs it, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(f"{what} needs the library {name} ({error}): {EXTRA}") from error


# -- the model -----------------------------------------------------------------------------------------------


def make_path(config: StableDiffusionConfig) -> schedules.Path:
    """The levels that the U-Net was trained on, T of them, from clean to noisy, on the CPU."""
    low, high = config.beta_start, config.beta_end
    with torch.device("cpu"):
        ramp = torch.linspace(0, 1, config.noise_steps, dtype=torch.float64)
        if config.schedule == "linear":
            beta = low + (high - low) * ramp
        else:
            beta = (low**0.5 + (high**0.5 - low**0.5) * ramp).square()
        log_signal = torch.log1p(-beta).cumsum(0)
        alpha, sigma = (log_signal / 2).exp(), (-torch.expm1(log_signal)).sqrt()
        if config.zero_snr:  # Lin et al. 2024, algorithm 1: the first alpha stays, the last becomes 0
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            sigma = (1 - alpha.square()).sqrt()
        return schedules.Path(alpha, sigma)


class Autoencoder:
    """The AutoencoderKL in a folder of diffusers; no module: its weights are no part of the denoiser's."""

    def __init__(self, folder: Path, scale: float) -> None:
        if not folder.is_dir():
            raise UserError(f"model.autoencoder: there is no folder {folder}")
        diffusers = library("diffusers", "model.autoencoder")
        try:
            self.net = diffusers.AutoencoderKL.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"model.autoencoder: {folder} cannot be read: {_short(error)}") from error
        self.net.eval().requires_grad_(False)
        self.scale = scale

    def __deepcopy__(self, memo: dict[int, Any]) -> Autoencoder:
        return self  # frozen: copies of a model share it

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of latents (B, C, h, w); differentiable."""
        return self.net.to(latents.device).decode(latents / self.scale).sample

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w), the mean of the encoder's distribution, of images (B, 3, H, W) in [-1, 1]."""
        return self.net.to(images.device).encode(images).latent_dist.mean * self.scale


class StableDiffusion(DiscreteDenoiser):
    """The U-Net `net`, under the library's own names, and the encoded prompts (P + 1, tokens, width).

    The last of them is the empty prompt. UserError where it is not for data like `info`.
    """

    prompts: Tensor
    row_of: Tensor

    def __init__(self, config: StableDiffusionConfig, info: DataInfo) -> None:
        super().__init__()
        settings = _checked(config, info)
        self.net = _network(settings)
        counts = [len(prompts) for prompts in config.prompts]
        total, classes = sum(counts), len(counts)
        firsts = [sum(counts[:number]) for number in range(classes)]
        # Until encoded ones are loaded, no two alike.
        self.register_buffer(
            "prompts", torch.randn(total + 1, config.tokens, settings["cross_attention_dim"])
        )
        self.register_buffer("row_of", torch.tensor([*firsts, total]), persistent=False)
        every = [
            tuple(range(FIRST + first, FIRST + first + count))
            for first, count in zip(firsts, counts, strict=True)
        ]
        # A class of a single prompt is asked by its own label.
        self.wordings = tuple((number,) if len(one) == 1 else one for number, one in enumerate(every))
        predicts = PREDICTS[config.prediction]
        self.set_process(make_path(config), predicts=predicts, num_classes=classes, null_label=classes)
        folder = config.autoencoder
        self.autoencoder = Autoencoder(Path(folder), config.latent_scale) if folder else None

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's output; x_t (B, C, H, W), t (B,) int64 steps, y (B,) int64 labels.

        `IndexError` on a label that is neither a class nor a prompt (on a GPU, torch's own assertion).
        """
        label = cast(Tensor, self.spelt_out(y, x_t))
        by_prompt = label >= FIRST
        of_class = self.row_of.index_select(0, label.masked_fill(by_prompt, 0))
        context = self.prompts.index_select(0, torch.where(by_prompt, label - FIRST, of_class))
        return self.net(x_t, t, encoder_hidden_states=context, return_dict=False)[0]

    # -- latents ---------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do: see `cdm_core.capabilities.offered`."""
        return frozenset({"denoise"} if self.autoencoder is None else {"denoise", "to_images", "to_latents"})

    @property
    def to_images(self) -> Any:
        """`Autoencoder.decode`; a model without one has no such attribute."""
        return self._coder().decode

    @property
    def to_latents(self) -> Any:
        """`Autoencoder.encode`; a model without one has no such attribute."""
        return self._coder().encode

    def _coder(self) -> Autoencoder:
        if self.autoencoder is None:
            raise AttributeError("no autoencoder")
        return self.autoencoder


def _checked(config: StableDiffusionConfig, info: DataInfo) -> dict[str, Any]:
    if not config.architecture or not config.prompts:
        raise UserError(
            "model.architecture and model.prompts are empty: `cdm-run convert FOLDER --set "
            "model.prompts=FILE.csv` fills them from a pipeline of diffusers"
        )
    settings = config.settings
    size = settings.get("sample_size")
    shape = (settings.get("in_channels"), *(size if isinstance(size, list) else (size, size)))
    if shape != info.shape:
        wanted, given = ("x".join(map(str, one)) for one in (shape, info.shape))
        raise UserError(f"the network is for {wanted}, and {info.name!r} is {given}")
    if info.num_classes != len(config.prompts):
        raise UserError(
            f"there are prompts of {len(config.prompts)} classes, {info.name!r} has {info.num_classes}"
        )
    for key in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim"):
        if settings.get(key) is not None:
            raise UserError(
                f"model.architecture: {key} must be null: prompts are all that the network is told"
            )
    if not isinstance(settings.get("cross_attention_dim"), int):
        raise UserError("model.architecture: cross_attention_dim must be the width of an encoded prompt")
    return settings


def _network(settings: Mapping[str, Any]) -> nn.Module:
    cls = getattr(library("diffusers", "model.architecture"), UNET)
    known = {key: value for key, value in settings.items() if key in inspect.signature(cls).parameters}
    strange = [key for key in settings.keys() - known.keys() if settings[key] not in (None, False)]
    if strange:
        raise UserError(
            f"model.architecture: the installed diffusers does not know {', '.join(sorted(strange))}"
        )
    try:
        net: nn.Module = cls(**known)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"model.architecture: {UNET} cannot be built from it: {_short(error)}") from error
    return net


# -- prompts -------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> dict[str, tuple[str, ...]]:
    """Prompts by class, in the order of the classes, of a CSV file with the columns `class` and `prompt`.

    `classname` will do for `class`, and a column `classidx` numbers the classes, as in the published files;
    without it they come in the order in which they are named. UserError on anything else.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = [{str(k).strip(): v for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    key = next((name for name in ("class", "classname") if table and name in table[0]), None)
    if key is None or "prompt" not in table[0]:
        raise UserError(f"{path} must be a CSV file with a first line `class,prompt` and at least one prompt")
    found: dict[str, list[str]] = {}
    numbers: dict[str, set[str]] = {}
    for line, row in enumerate(table, 2):
        name, prompt = (row[column] and row[column].strip() for column in (key, "prompt"))
        if not name or not prompt:
            raise UserError(f"{path}, line {line}: a class and a prompt are wanted")
        found.setdefault(name, []).append(prompt)
        numbers.setdefault(name, set()).add(row.get("classidx") or "")
    if "classidx" not in table[0]:
        return {name: tuple(prompts) for name, prompts in found.items()}
    by_number = {number: name for name, said in numbers.items() for number in said}
    wanted = [str(number) for number in range(len(found))]
    if len(by_number) != sum(map(len, numbers.values())) or sorted(by_number) != sorted(wanted):
        raise UserError(f"{path}: classidx must number the {len(found)} classes from 0, each with one number")
    return {by_number[number]: tuple(found[by_number[number]]) for number in wanted}


@torch.no_grad()
def encode_prompts(pipeline: Path, prompts: Sequence[str]) -> Tensor:
    """The text encoder's last states of prompts, (P, tokens, width) float32, padded to its full length.

    UserError where a prompt is too long to be read whole, or the pipeline's text encoder cannot be read.
    """
    transformers = library("transformers", "to encode prompts")
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(
            str(pipeline / "tokenizer"), local_files_only=True
        )
        encoder = transformers.CLIPTextModel.from_pretrained(
            str(pipeline / "text_encoder"), local_files_only=True
        )
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{pipeline}: its tokenizer or text encoder cannot be read: {_short(error)}"
        ) from error
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    states = []
    for start in range(0, len(prompts), AT_ONCE):
        part = list(prompts[start : start + AT_ONCE])
        tokens = tokenizer(part, padding="max_length", max_length=length)["input_ids"]
        for prompt, one in zip(part, tokens, strict=True):
            if len(one) > length:
                raise UserError(
                    f"the text encoder reads {length} tokens, and this prompt has {len(one)}: {prompt!r}"
                )
        states.append(encoder.eval()(torch.tensor(tokens))[0].float())
    return torch.cat(states)


# -- pipelines -----------------------------------------------------------------------------------------------


def read_pipeline(path: Path, overrides: Sequence[str] = ()) -> Foreign | None:
    """Stable Diffusion in a folder of diffusers; None where there is none, or another kind of model.

    overrides: `model.prompts=FILE.csv` at least. UserError on damaged files, on a scheduler that is not of
    its family, and without prompts.
    """
    root = path.parent if path.name == "model_index.json" else path
    config_path = root / "unet" / "config.json"
    if not config_path.is_file() or _read_json(config_path).get("_class_name") != UNET:
        return None
    settings = {key: value for key, value in _read_json(config_path).items() if not key.startswith("_")}
    scheduler = _read_json(root / "scheduler" / "scheduler_config.json")
    values = overridden({"model": _model(root, settings, scheduler), "data": _data(settings)}, overrides)
    prompts = _prompts(values["model"])
    words = [prompt for one in prompts.values() for prompt in one]
    encoded = encode_prompts(root, [*words, ""])
    values["model"] |= {"prompts": [list(one) for one in prompts.values()], "tokens": encoded.shape[1]}
    values["data"] = {"num_classes": len(prompts), "class_names": list(prompts)} | values["data"]
    config = filled(StableDiffusionConfig, values["model"], "model", "--set")
    info = filled(DataInfo, values["data"], "data", "--set")
    state = {f"net.{name}": tensor for name, tensor in _weights(root / "unet").items()}
    note = f"{len(words)} prompts of {len(prompts)} classes; its scheduler is {scheduler.get('_class_name')}."
    return Foreign(state | {"prompts": encoded}, Selection("zeroshot/stable-diffusion", config), info, note)


def _model(root: Path, settings: dict[str, Any], scheduler: dict[str, Any]) -> dict[str, Any]:
    if "beta_schedule" not in scheduler or scheduler.get("trained_betas") is not None:
        name = scheduler.get("_class_name")
        raise UserError(
            f"{root}: its scheduler {name} has no beta_schedule by name: it is not Stable Diffusion's"
        )
    values: dict[str, Any] = {
        "architecture": json.dumps(settings, sort_keys=True),
        "prediction": scheduler.get("prediction_type", "epsilon"),
        "schedule": scheduler["beta_schedule"],
        "noise_steps": scheduler.get("num_train_timesteps", 1000),
        "zero_snr": bool(scheduler.get("rescale_betas_zero_snr")),
    }
    values |= {key: scheduler[key] for key in ("beta_start", "beta_end") if key in scheduler}
    coder = root / "vae" / "config.json"
    if coder.is_file():
        scale = _read_json(coder).get("scaling_factor", StableDiffusionConfig.latent_scale)
        values |= {"autoencoder": str(coder.parent.resolve()), "latent_scale": scale}
    return values


def _data(settings: Mapping[str, Any]) -> dict[str, Any]:
    size = settings.get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    shape = [settings.get("in_channels"), *sides]
    return {"name": "converted", "shape": shape, "levels": "none", "dequantise": False}


def _prompts(model: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    given = model.get("prompts")
    if isinstance(given, str):
        return read_prompts(Path(given))
    if given is None:
        raise UserError(
            "Stable Diffusion is asked about classes by prompts: --set model.prompts=FILE.csv, a table with "
            "a first line `class,prompt`"
        )
    raise UserError(f"model.prompts must be the name of a CSV file, not {given!r}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} holds no table of settings")
    return table


def _weights(folder: Path) -> dict[str, Tensor]:
    """The weights in `folder`, float32."""
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has no weights: expected one of {', '.join(WEIGHTS)} in it")
    content = read_tensors(found[0])
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{found[0]} holds other things than weights by name")
    return {str(name): tensor.float() for name, tensor in content.items()}


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
