"""Our weights as those of the library `diffusers`, and back: DiT, and the ADM and EDM-ADM U-Nets.

Names are matched block by block. The traps are the packings of queries, keys and values in one layer, with
H heads of d channels: (3, H, d) in DiT and in ADM's new order, (H, 3, d) in ADM's legacy order, (H, d, 3) in
EDM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cdm_core.errors import UserError
from cdm_plugins_guidance.dit_configs import DiTConfig

Packing = Literal["3Hd", "H3d", "Hd3"]
State = dict[str, Tensor]

# The place of 3 among (heads, d) when a packed layer's rows are unfolded.
_AXIS: dict[Packing, int] = {"3Hd": 0, "H3d": 1, "Hd3": 2}


def unpacked(qkv: Tensor, heads: int, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (C, ...) each, of a packed layer's weight or bias (3C, ...)."""
    shape = [heads, qkv.shape[0] // (3 * heads)]
    shape.insert(_AXIS[packing], 3)
    q, k, v = qkv.unflatten(0, shape).unbind(_AXIS[packing])
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def packed(parts: Sequence[Tensor], heads: int, packing: Packing) -> Tensor:
    """The inverse of `unpacked`."""
    apart = [part.unflatten(0, (heads, -1)) for part in parts]
    return torch.stack(apart, _AXIS[packing]).flatten(0, 2)


def _split_qkv(state: State, source: str, target: str, heads: int, packing: Packing, out: State) -> None:
    """The packed layer `source` of `state` as three layers beside `target` in `out`, dense matrices all."""
    for kind in ("weight", "bias"):
        parts = unpacked(state[f"{source}.{kind}"], heads, packing)
        for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
            out[f"{target}.{name}.{kind}"] = part.flatten(1) if kind == "weight" else part


def _join_qkv(state: State, target: str, heads: int, packing: Packing) -> tuple[Tensor, Tensor]:
    weight, bias = (
        packed([state[f"{target}.{name}.{kind}"] for name in ("to_q", "to_k", "to_v")], heads, packing)
        for kind in ("weight", "bias")
    )
    return weight, bias


# -- DiT -----------------------------------------------------------------------------------------------------

_DIT_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_DIT_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_DIT_EMBEDDINGS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}


def _dit_names(depth: int) -> Iterator[tuple[str, str]]:
    """Names of layers, ours and the library's, all but the embeddings and the packed attention."""
    yield from _DIT_TOP.items()
    for i in range(depth):
        for ours, theirs in _DIT_BLOCK.items():
            yield f"blocks.{i}.{ours}", f"transformer_blocks.{i}.{theirs}"


def dit_to_diffusers(state: Mapping[str, Tensor], config: DiTConfig) -> tuple[dict[str, Any], State]:
    """Settings and weights of the `DiTTransformer2DModel` that holds the weights of our `DiT`.

    The class computes something else with them unless it is put right (`TransformerConfig.official`). Raises
    UserError on a net that the class cannot be: without classes, not square, or of another mlp_ratio.
    """
    depth, width, heads = config.shape
    channels, tokens = state["x_embedder.proj.weight"].shape[1], state["pos_embed"].shape[1]
    side = round(tokens**0.5)
    if "y_embedder.embedding_table.weight" not in state or not config.null_class:
        raise UserError("DiTTransformer2DModel needs classes, and one for no class")
    if side**2 != tokens or config.mlp_ratio != 4:
        raise UserError("DiTTransformer2DModel is square and has mlp_ratio 4")
    settings = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": channels * (2 if config.learn_sigma else 1),
        "num_layers": depth,
        "sample_size": side * config.patch_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": len(state["y_embedder.embedding_table.weight"]) - 1,
    }
    out: State = {}
    for ours, theirs in _dit_names(depth):
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        _split_qkv(dict(state), f"blocks.{i}.attn.qkv", f"{block}.attn1", heads, "3Hd", out)
        for ours, theirs in _DIT_EMBEDDINGS.items():
            out[f"{block}.norm1.emb.{theirs}"] = state[ours]
    return settings, out


def dit_from_diffusers(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> State | None:
    """The state dict of our `DiT`, all but `pos_embed`, from a `DiTTransformer2DModel` with DiT's weights.

    None where every block has a time and class embedding of its own, as the class is when trained itself: the
    official DiT has one for all. UserError where weights are missing.
    """
    depth, heads = settings["num_layers"], settings["num_attention_heads"]
    first, state = "transformer_blocks.0.norm1.emb", dict(weights)
    out: State = {}
    try:
        for i in range(depth):
            embedding = f"transformer_blocks.{i}.norm1.emb"
            names = _DIT_EMBEDDINGS.values()
            if not all(torch.equal(state[f"{embedding}.{name}"], state[f"{first}.{name}"]) for name in names):
                return None
            qkv = _join_qkv(state, f"transformer_blocks.{i}.attn1", heads, "3Hd")
            out[f"blocks.{i}.attn.qkv.weight"], out[f"blocks.{i}.attn.qkv.bias"] = qkv
        out |= {ours: state[f"{first}.{theirs}"] for ours, theirs in _DIT_EMBEDDINGS.items()}
        for ours, theirs in _dit_names(depth):
            out |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    except KeyError as error:
        raise UserError(f"the weights lack {error.args[0]} of a DiTTransformer2DModel") from error
    return out


# -- U-Nets --------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of a U-Net, its name here and in the library; kind: what it is made of."""

    ours: str
    theirs: str
    kind: Literal["block", "attention", "conv"]


class Names(NamedTuple):
    """Names of layers, ours and the library's: of the ends, of a block, and of attention, packed in `qkv`."""

    ends: dict[str, str]
    block: dict[str, str]
    attention: dict[str, str]
    packing: Packing


class Plan(NamedTuple):
    """What a U-Net is: residual blocks a level, which levels have attention, what changes the resolution."""

    layers: int
    attention: tuple[bool, ...]
    blocks: bool

    @property
    def levels(self) -> int:
        """How many resolutions."""
        return len(self.attention)


def _to_library(state: State, parts: Iterable[Part], names: Names, heads: Callable[[int], int]) -> State:
    """Our weights under the library's names; heads: of an attention by its width."""
    out: State = {}

    def copy(ours: str, theirs: str) -> None:
        out.update({f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")})

    for ours, theirs in names.ends.items():
        copy(ours, theirs)
    for ours, theirs, kind in parts:
        if kind == "conv":
            copy(ours, theirs)
        elif kind == "block":
            for name, other in names.block.items():
                if f"{ours}.{name}.weight" in state:
                    copy(f"{ours}.{name}", f"{theirs}.{other}")
        else:
            for name, other in names.attention.items():
                copy(f"{ours}.{name}", f"{theirs}.{other}")
            out[f"{theirs}.to_out.0.weight"] = out[f"{theirs}.to_out.0.weight"].flatten(1)
            count = heads(len(out[f"{theirs}.to_out.0.bias"]))
            _split_qkv(state, f"{ours}.qkv", theirs, count, names.packing, out)
    return out


def _unet_settings(plan: Plan, out: State, image_size: int) -> dict[str, Any]:
    """Settings of the `UNet2DModel` with weights `out`, all but those of its heads and norms.

    UserError where its time embedding is not as wide as its first level, of which the class makes one.
    """
    widths = [len(out[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(plan.levels)]
    if out["time_embedding.linear_1.weight"].shape[1] != widths[0]:
        raise UserError(
            f"UNet2DModel needs as many time features as its first level has channels, {widths[0]}"
        )
    plain = "Resnet%ssampleBlock2D" if plan.blocks else "%sBlock2D"
    attended = ["Attn%sBlock2D" if there else plain for there in plan.attention]
    kind = "resnet" if plan.blocks else "conv"
    doubled = len(out["down_blocks.0.resnets.0.time_emb_proj.bias"]) == 2 * widths[0]
    settings: dict[str, Any] = {
        "sample_size": image_size,
        "in_channels": out["conv_in.weight"].shape[1],
        "out_channels": len(out["conv_out.weight"]),
        "block_out_channels": widths,
        "down_block_types": [name % "Down" for name in attended],
        "up_block_types": [name % "Up" for name in reversed(attended)],
        "layers_per_block": plan.layers,
        "downsample_type": kind,
        "upsample_type": kind,
        "resnet_time_scale_shift": "scale_shift" if doubled else "default",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if "class_embedding.weight" in out:
        settings["num_class_embeds"] = len(out["class_embedding.weight"])
    return settings


_ADM_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_ADM_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ADM_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}


def _adm_names(legacy: bool) -> Names:
    return Names(_ADM_ENDS, _ADM_BLOCK, _ADM_ATTENTION, "H3d" if legacy else "3Hd")


def _adm_parts(plan: Plan) -> Iterator[Part]:
    """Every part of a guided-diffusion U-Net between its first convolution and its last norm."""
    per_level = plan.layers + 1
    resample: tuple[str, str, Literal["block", "conv"]] = ("", "", "block")
    if not plan.blocks:
        resample = (".op", ".conv", "conv")
    for i, attention in enumerate(plan.attention):
        for j in range(plan.layers):
            k = 1 + i * per_level + j
            yield Part(f"input_blocks.{k}.0", f"down_blocks.{i}.resnets.{j}", "block")
            if attention:
                yield Part(f"input_blocks.{k}.1", f"down_blocks.{i}.attentions.{j}", "attention")
        if i < plan.levels - 1:
            ours, theirs, kind = resample
            last = (i + 1) * per_level
            yield Part(f"input_blocks.{last}.0{ours}", f"down_blocks.{i}.downsamplers.0{theirs}", kind)
    yield Part("middle_block.0", "mid_block.resnets.0", "block")
    yield Part("middle_block.1", "mid_block.attentions.0", "attention")
    yield Part("middle_block.2", "mid_block.resnets.1", "block")
    for k in range(plan.levels * per_level):
        i, j = divmod(k, per_level)
        attention = plan.attention[plan.levels - 1 - i]
        yield Part(f"output_blocks.{k}.0", f"up_blocks.{i}.resnets.{j}", "block")
        if attention:
            yield Part(f"output_blocks.{k}.1", f"up_blocks.{i}.attentions.{j}", "attention")
        if i < plan.levels - 1 and j == plan.layers:
            place, (_, theirs, kind) = 1 + attention, resample
            ours = theirs  # a convolution on the way up is called `conv` here too
            yield Part(f"output_blocks.{k}.{place}{ours}", f"up_blocks.{i}.upsamplers.0{theirs}", kind)


def adm_to_diffusers(
    weights: Mapping[str, Tensor],
    *,
    image_size: int,
    layers: int,
    num_heads: int,
    head_channels: int | None = None,
    legacy: bool = True,
) -> tuple[dict[str, Any], State]:
    """Settings and weights of the `UNet2DModel` that is a guided-diffusion U-Net with state dict `weights`.

    layers: residual blocks a level; head_channels: width of a head, None: `num_heads` of them everywhere;
    legacy: attention packed (H, 3, d), not (3, H, d). The class knows a width a head only: where attention
    has several widths and a number of heads, its heads must be set (`UNet2DConfig.num_heads`), and
    `attention_head_dim` holds for the narrowest. UserError on a net that the class cannot be.
    """
    state = dict(weights)
    inputs = {name.split(".")[1] for name in state if name.startswith("input_blocks.")}
    firsts = range(1, len(inputs), layers + 1)
    plan = Plan(
        layers,
        tuple(f"input_blocks.{k}.1.qkv.weight" in state for k in firsts),
        f"input_blocks.{layers + 1}.0.in_layers.0.weight" in state,
    )
    heads = (lambda width: width // head_channels) if head_channels else (lambda width: num_heads)
    out = _to_library(state, _adm_parts(plan), _adm_names(legacy), heads)
    if "label_emb.weight" in state:
        out["class_embedding.weight"] = state["label_emb.weight"]
    attended = [len(tensor) for name, tensor in out.items() if name.endswith("to_q.bias")]
    norms = {"attn_norm_num_groups": 32, "attention_head_dim": head_channels or min(attended) // num_heads}
    return _unet_settings(plan, out, image_size) | norms, out


def adm_from_diffusers(
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    legacy: bool = True,
) -> State:
    """The state dict of the guided-diffusion U-Net that a `UNet2DModel` is: `adm_to_diffusers` back.

    num_heads: of every attention, None: as `settings` have it. UserError on a network that is no such U-Net.
    """
    theirs_not_ours = {
        key: settings[key]
        for key, wanted in {
            "freq_shift": 0,
            "flip_sin_to_cos": True,
            "time_embedding_type": "positional",
        }.items()
        if settings.get(key, wanted) != wanted
    }
    if theirs_not_ours:
        raise UserError(f"a guided-diffusion U-Net has other time features: {theirs_not_ours}")
    down = settings["down_block_types"]
    plan = Plan(
        settings["layers_per_block"],
        tuple(name.startswith("Attn") for name in down),
        settings["downsample_type"] == "resnet",
    )
    state, names = dict(weights), _adm_names(legacy)
    out: State = {}
    try:
        for ours, theirs in names.ends.items():
            out |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
        for ours, theirs, kind in _adm_parts(plan):
            layers = {"conv": {"": ""}, "block": names.block, "attention": names.attention}[kind]
            for name, other in layers.items():
                source, target = f"{theirs}.{other}".strip("."), f"{ours}.{name}".strip(".")
                if other == "conv_shortcut" and f"{source}.weight" not in state:
                    continue
                out |= {f"{target}.{one}": state[f"{source}.{one}"] for one in ("weight", "bias")}
            if kind == "attention":
                width = len(out[f"{ours}.proj_out.bias"])
                count = num_heads or width // settings["attention_head_dim"]
                qkv = _join_qkv(state, theirs, count, names.packing)
                out |= {f"{ours}.qkv.weight": qkv[0][..., None], f"{ours}.qkv.bias": qkv[1]}
                out[f"{ours}.proj_out.weight"] = out[f"{ours}.proj_out.weight"][..., None]
    except KeyError as error:
        raise UserError(f"the weights lack {error.args[0]} of a guided-diffusion U-Net") from error
    if "class_embedding.weight" in state:
        out["label_emb.weight"] = state["class_embedding.weight"]
    return out


_EDM_BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
_EDM_ATTENTION = {"norm2": "group_norm", "proj": "to_out.0"}
EDM_HEAD = 64  # channels of a head


def _edm_parts(plan: Plan, size: int) -> Iterator[Part]:
    """Every part of a `DhariwalUNet` between its first convolution and its last norm."""

    def block(ours: str, theirs: str, i: int, j: int, attention: bool) -> Iterator[Part]:
        yield Part(ours, f"{theirs}.{i}.resnets.{j}", "block")
        if attention:
            yield Part(ours, f"{theirs}.{i}.attentions.{j}", "attention")

    names = [f"{size >> i}x{size >> i}" for i in range(plan.levels)]
    for i, attention in enumerate(plan.attention):
        if i:
            yield Part(f"enc.{names[i]}_down", f"down_blocks.{i - 1}.downsamplers.0", "block")
        for j in range(plan.layers):
            yield from block(f"enc.{names[i]}_block{j}", "down_blocks", i, j, attention)
    yield Part(f"dec.{names[-1]}_in0", "mid_block.resnets.0", "block")
    yield Part(f"dec.{names[-1]}_in0", "mid_block.attentions.0", "attention")
    yield Part(f"dec.{names[-1]}_in1", "mid_block.resnets.1", "block")
    for i, (name, attention) in enumerate(zip(names[::-1], plan.attention[::-1], strict=True)):
        if i:
            yield Part(f"dec.{name}_up", f"up_blocks.{i - 1}.upsamplers.0", "block")
        for j in range(plan.layers + 1):
            yield from block(f"dec.{name}_block{j}", "up_blocks", i, j, attention)


def edm_to_diffusers(weights: Mapping[str, Tensor], *, image_size: int) -> tuple[dict[str, Any], State]:
    """Settings and weights of the `UNet2DModel` that is EDM's ADM network (`DhariwalUNet`).

    weights: under the official names, with or without `model.`. The class takes numbers for classes, not
    vectors: it knows no "no class". UserError on norms of fewer groups than 32, which are not the class's.
    """
    state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    top = f"{image_size}x{image_size}"
    levels = sum(name.endswith("_block0.conv0.weight") for name in state if name.startswith("enc."))
    heights = [image_size >> i for i in range(levels)]
    layers = sum(name.startswith(f"enc.{top}_block") and name.endswith("conv0.weight") for name in state)
    plan = Plan(layers, tuple(f"enc.{h}x{h}_block0.qkv.weight" in state for h in heights), True)
    if (
        "map_layer0.weight" not in state
        or f"enc.{top}_conv.weight" not in state
        or "out_conv.weight" not in state
    ):
        raise UserError(f"these are not the weights of a DhariwalUNet for images of {image_size} pixels")
    ends = {
        "map_layer0": "time_embedding.linear_1",
        "map_layer1": "time_embedding.linear_2",
        f"enc.{top}_conv": "conv_in",
        "out_norm": "conv_norm_out",
        "out_conv": "conv_out",
    }
    names = Names(ends, _EDM_BLOCK, _EDM_ATTENTION, "Hd3")
    out = _to_library(state, _edm_parts(plan, image_size), names, lambda width: width // EDM_HEAD)
    if "map_label.weight" in state:
        out["class_embedding.weight"] = state["map_label.weight"].mT
    narrowest = min(len(tensor) for name, tensor in out.items() if "norm" in name and tensor.ndim == 1)
    if narrowest < 128:
        raise UserError(
            f"UNet2DModel has 32 groups in every norm, EDM {narrowest // 4} in that of {narrowest}"
        )
    heads = {"attention_head_dim": EDM_HEAD, "attn_norm_num_groups": 32}
    return _unet_settings(plan, out, image_size) | heads, out
