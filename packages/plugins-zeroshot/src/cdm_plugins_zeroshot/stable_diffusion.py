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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.diffusers_folder import build, find, library
from cdm_core.diffusers_models import Discrete, checked_settings, data_settings, model_settings
from cdm_core.errors import UserError
from cdm_core.formats import Foreign, filled, overridden
from cdm_core.settings import Selection
from cdm_plugins_zeroshot.stable_diffusion_configs import StableDiffusionConfig

UNET = "UNet2DConditionModel"
FIRST = 2**20  # label of the first prompt: more classes than anybody has
AT_ONCE = 64  # prompts that are encoded in one batch


# -- the model -----------------------------------------------------------------------------------------------


class StableDiffusion(Discrete):
    """The U-Net `net`, under the library's own names, and the encoded prompts (P + 1, tokens, width).

    The last of them is the empty prompt. UserError where it is not for data like `info`.
    """

    prompts: Tensor
    row_of: Tensor

    def __init__(self, config: StableDiffusionConfig, info: DataInfo) -> None:
        settings, classes = _checked(config, info), len(config.prompts)
        super().__init__(build(UNET, settings, "model.architecture"), config, classes, classes)
        counts = [len(prompts) for prompts in config.prompts]
        total = sum(counts)
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

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's output; x_t (B, C, H, W), t (B,) int64 steps, y (B,) int64 labels.

        `IndexError` on a label that is neither a class nor a prompt (on a GPU, torch's own assertion).
        """
        label = cast(Tensor, self.spelt_out(y, x_t))
        by_prompt = label >= FIRST
        of_class = self.row_of.index_select(0, label.masked_fill(by_prompt, 0))
        context = self.prompts.index_select(0, torch.where(by_prompt, label - FIRST, of_class))
        return self.net(x_t, t, encoder_hidden_states=context, return_dict=False)[0]


def _checked(config: StableDiffusionConfig, info: DataInfo) -> dict[str, Any]:
    settings = checked_settings(config, info)
    if not config.prompts:
        raise UserError(
            "model.prompts is empty: `cdm-run convert FOLDER --set model.prompts=FILE.csv` fills it"
        )
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
    folder = find(path, (UNET,))
    if folder is None:
        return None
    values = overridden({"model": model_settings(folder), "data": data_settings(folder)}, overrides)
    prompts = _prompts(values["model"])
    words = [prompt for one in prompts.values() for prompt in one]
    encoded = encode_prompts(folder.path.parent, [*words, ""])
    values["model"] |= {"prompts": [list(one) for one in prompts.values()], "tokens": encoded.shape[1]}
    values["data"] |= {"num_classes": len(prompts), "class_names": list(prompts)}
    config = filled(StableDiffusionConfig, values["model"], "model", "--set")
    info = filled(DataInfo, values["data"], "data", "--set")
    state = {f"net.{name}": tensor for name, tensor in folder.weights().items()}
    scheduler = folder.scheduler.get("_class_name")
    note = f"{len(words)} prompts of {len(prompts)} classes; its scheduler is {scheduler}."
    return Foreign(state | {"prompts": encoded}, Selection("zeroshot/stable-diffusion", config), info, note)


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


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
