"""Classifiers from elsewhere, ready to guide: loaded without running code of theirs, frozen, smooth, fast.

    guide = Guide(load_classifier(ClassifierConfig("torchvision:resnet101", softplus=3.0)), GuideConfig())

Every one is in evaluation mode, its parameters frozen for good. torchvision, timm and transformers are
imported only where one is asked for.
"""

from __future__ import annotations

import copy
import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from cdm_core.errors import MissingPackage, UserError
from cdm_core.formats import read_tensors
from cdm_core.manager import did_you_mean
from cdm_plugins_guidance.guide_configs import ClassifierConfig, Contract
from cdm_plugins_guidance.pickles import shown
from cdm_plugins_guidance.softplus import Smoothed, smooth

__all__ = ["ImageClassifier", "checkpoint_blocks", "fold_batch_norms", "load_classifier", "own_classifier"]

Build = Callable[..., Any]
ALLOW_TARGETS = "CDM_RUN_PYTHON_TARGETS"  # environment variable, 1: Python targets in settings may be run


class ImageClassifier(nn.Module):
    """Images to logits, with what is known of both.

    contract: how the images should look; num_classes: K, or None where the network does not say;
    smoothed: what `softplus` replaced; folded: how many batch norms went into their convolutions; not_folded:
    why none did where they were to be folded if they can be, "" where there is nothing to say.
    """

    smoothed: Smoothed | None = None
    folded: int = 0
    not_folded: str = ""

    def __init__(self, network: nn.Module, contract: Contract, num_classes: int | None = None) -> None:
        super().__init__()
        self.network, self.contract, self.num_classes = network, contract, num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) as the network was trained on."""
        result = self.network(x)
        return result if isinstance(result, Tensor) else result.logits


def load_classifier(
    config: ClassifierConfig | str, device: torch.device | str = "cpu", *, targets: bool = True
) -> Any:
    """The classifier that `config`, or a bare name, asks for, on `device`: what `Guide` takes.

    An `ImageClassifier`; of a run, what offers `class_logits(x, sigma)`, by Bayes' rule where the model is a
    class-conditional density. targets: whether `module:callable` may be imported and called, which runs code
    that the settings' author chose; who did not choose them himself says no. Raises UserError where it is
    unknown or not allowed, its package is missing, its weights do not fit, or one of the settings cannot be
    had.
    """
    config = ClassifierConfig(config) if isinstance(config, str) else config
    try:
        config.check()
    except ValueError as error:
        raise UserError(f"classifier: {error}") from error
    source, colon, name = config.name.partition(":")
    if not colon or not source or not name:
        raise UserError(
            f"classifier {config.name!r}: name one as torchvision:NAME, timm:NAME, hf:NAME, run:PATH or "
            "module:callable"
        )
    if source == "run":
        return _from_run(config, name, device)
    if source not in _SOURCES and not targets:
        raise UserError(
            f"classifier {config.name!r} is a Python target, whose code would run: set the environment "
            f"variable {ALLOW_TARGETS}=1 if you trust it"
        )
    classifier = _SOURCES.get(source, _from_target)(config, name)
    classifier.eval().requires_grad_(False)
    return _prepared(classifier, config).to(device)


def own_classifier(model: Any, config: ClassifierConfig) -> Any:
    """The classifier of a model that offers `class_logits`, on its device: what `Guide` takes.

    A copy of the network `model.classifier` where there is one, made smooth and fast as the settings say;
    else the model itself, of which nothing can be changed: UserError where the settings ask for that.
    """
    network = getattr(model, "classifier", None)
    if isinstance(network, nn.Module):
        contract = getattr(network, "contract", None) or Contract()
        copied = ImageClassifier(copy.deepcopy(network), contract, getattr(network, "classes", None))
        device = next(network.parameters()).device
        return _prepared(copied.cpu().eval().requires_grad_(False), config).to(device)
    if config != ClassifierConfig(config.name):
        whose = f"classifier {config.name!r}" if config.name else "the model's own classifier"
        raise UserError(
            f"{whose} is no network apart that could be made smooth or fast: it is used as it is, with "
            "softplus = inf and the other settings of a classifier left out"
        )
    return OwnLogits(model)


class OwnLogits:
    """`class_logits(x, sigma)` of a model, and nothing else of it."""

    def __init__(self, model: Any) -> None:
        self.class_logits = model.class_logits
        self.num_classes: int | None = getattr(model, "classes", None) or getattr(model, "num_classes", None)


def _prepared(classifier: ImageClassifier, config: ClassifierConfig) -> ImageClassifier:
    """Folded, smooth, checkpointed, compiled, as the settings say."""
    smoothed = config.softplus != math.inf
    if config.fold:
        classifier.folded = fold_batch_norms(classifier.network)
    elif config.fold is None and smoothed:
        classifier.folded, classifier.not_folded = _folded(classifier.network)
    if classifier.num_classes is None and config.shape:
        with torch.no_grad():
            classifier.num_classes = classifier(_example(classifier, config)).shape[1]
    if smoothed:
        classifier.smoothed = smooth(classifier, config.softplus, _example(classifier, config))
    if smoothed if config.channels_last is None else config.channels_last:
        classifier.to(memory_format=torch.channels_last)
    if config.checkpoint:
        checkpoint_blocks(classifier.network)
    if config.compile:
        classifier.network.compile(dynamic=False)
    return classifier


def _folded(network: nn.Module) -> tuple[int, str]:
    """How many batch norms were folded, as many as can be, and if none, why: it is no error."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return 0, ""  # a network is traced only where there is something to gain
    try:
        return fold_batch_norms(network), ""
    except UserError as error:
        return 0, str(error)


def _example(classifier: ImageClassifier, config: ClassifierConfig) -> Tensor:
    """One image to try the classifier on."""
    contract = classifier.contract
    shape = config.shape or (contract.channels, contract.size, contract.size)
    if not all(shape):
        raise UserError(f"classifier {config.name!r} does not say its images' size: set shape to (C, H, W)")
    dtype = next((p.dtype for p in classifier.parameters()), torch.float32)
    return torch.zeros(1, *shape, dtype=dtype)


# -- where they come from ------------------------------------------------------------------------------------


def _from_torchvision(config: ClassifierConfig, name: str) -> ImageClassifier:
    models = _package("torchvision.models", "torchvision")
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classifier {name!r}{did_you_mean(name, known)}")
    published = models.get_model_weights(name)
    file = _file(config.weights)
    wanted = "DEFAULT" if file else config.weights or "DEFAULT"
    if wanted not in published.__members__:
        listed = ", ".join(published.__members__)
        raise UserError(f"torchvision:{name} has no weights {wanted!r}: give a file, or one of {listed}")
    weights = published[wanted]
    state = _state(file) if file else _download(weights)
    network, classes = _fitted(partial(models.get_model, name, weights=None), state, config.name)
    if hasattr(network, "transform_input"):
        network.transform_input = True  # Inception's weights want their input normalised in another way
    preset = weights.transforms()
    contract = Contract(tuple(preset.mean), tuple(preset.std), preset.crop_size[0], len(preset.mean))
    return ImageClassifier(network, contract, classes)


def _download(weights: Any) -> Mapping[str, Tensor]:
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download {weights.url}: {error}; get it and give its path as weights"
        ) from error


def _from_timm(config: ClassifierConfig, name: str) -> ImageClassifier:
    """timm's network; its own weights are read from safetensors and from nothing else."""
    timm = _package("timm", "timm")
    file = _file(config.weights)
    if config.weights and not file:
        raise UserError(f"timm:{name}: weights {config.weights!r} is no file; timm's own go with the name")
    try:
        if file:
            network, classes = _fitted(partial(timm.create_model, name), _state(file), config.name)
        else:
            with torch.device("meta"):
                published = timm.create_model(name).pretrained_cfg
            # A file goes before the places that timm knows, and is read as its ending says.
            given = {"source": "", "file": _safetensors(published, name), "custom_load": False}
            network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given)
            classes = network.num_classes
    except UserError:
        raise
    except (AssertionError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"timm cannot make {name!r}: {shown(str(error), 300)}") from error
    about = network.pretrained_cfg
    channels, _, size = about["input_size"]
    return ImageClassifier(
        network, Contract(tuple(about["mean"]), tuple(about["std"]), size, channels), classes
    )


def _safetensors(published: Mapping[str, Any], name: str) -> str:
    """The file of safetensors with timm's weights, downloaded; UserError where there is none."""
    hub = _package("huggingface_hub", "huggingface_hub")
    place, file = published.get("hf_hub_id"), published.get("hf_hub_filename") or "model.safetensors"
    if not place or not file.endswith(".safetensors"):
        raise UserError(
            f"timm:{name} has no weights in safetensors: get them, and give their path as weights"
        )
    repository, _, revision = place.partition("@")
    try:
        return str(hub.hf_hub_download(repository, file, revision=revision or None))
    except Exception as error:  # its own and its HTTP library's, of no common kind
        raise UserError(
            f"cannot get {file} of {place}, the weights of timm:{name}: {shown(str(error), 300)}; get it and "
            "give its path as weights"
        ) from error


def _from_transformers(config: ClassifierConfig, name: str) -> ImageClassifier:
    transformers = _package("transformers", "transformers")
    if config.weights:
        raise UserError(f"hf:{name} brings its own weights: leave weights out")
    given = {"trust_remote_code": False}
    try:
        network = transformers.AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, **given
        )
        processor = transformers.AutoImageProcessor.from_pretrained(name, **given)
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot load {name!r}: {str(error).splitlines()[0]}") from error
    cropped = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    size = _side(cropped or processor.size)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if getattr(processor, "do_normalize", False):
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    contract = Contract(mean, std, size, getattr(network.config, "num_channels", 0))
    return ImageClassifier(network, contract, network.config.num_labels)


def _side(sizes: Any) -> int:
    """Of transformers' sizes, a dictionary or, in some of its versions, an object with the same names."""
    given = sizes if isinstance(sizes, Mapping) else vars(sizes)
    return given.get("height") or given.get("shortest_edge") or 0


def _from_run(config: ClassifierConfig, path: str, device: torch.device | str) -> Any:
    from cdm_core.runs import load_run

    run = load_run(path, device=str(device))
    classifier = own_classifier(run.classifier, config)
    if not classifier.num_classes:
        classifier.num_classes = run.info.num_classes
    return classifier


def _from_target(config: ClassifierConfig, name: str) -> ImageClassifier:
    """What a Python target returns; the weights, where there are any, loaded into it."""
    module = config.name.partition(":")[0]
    try:
        network = getattr(importlib.import_module(module), name)()
    except Exception as error:  # the target's own code raises anything
        raise UserError(f"classifier {config.name!r} cannot be made: {shown(str(error), 300)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"classifier {config.name!r} returned {type(network).__name__}, not an nn.Module")
    if config.weights:
        _load(network, _state(Path(config.weights)), config.name)
    contract = getattr(network, "contract", None) or Contract()
    return ImageClassifier(network, contract, getattr(network, "num_classes", None))


_SOURCES = {"torchvision": _from_torchvision, "timm": _from_timm, "hf": _from_transformers}


def _package(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: of another build than torch
        raise MissingPackage(f"this classifier needs {package}: `pip install {package}` ({error})") from error


# -- weights -------------------------------------------------------------------------------------------------


def _file(weights: str) -> Path | None:
    """The weights as a file, or None for a name; UserError where what looks like a file is none."""
    path = Path(weights)
    if weights and path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"weights {weights}: there is no such file")
    return None


def _state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, bare or in a training checkpoint."""
    state = read_tensors(path)
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} holds no state dict: names and their tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _fitted(build: Build, state: Mapping[str, Tensor], name: str) -> tuple[Any, int]:
    """The network with the weights, and how many classes they are for: what differs is the last layer."""
    with torch.device("meta"):
        expected = build().state_dict()
    state = {key if key in expected else _modern(key): tensor for key, tensor in state.items()}
    other = (t for key, t in state.items() if key in expected and t.shape != expected[key].shape)
    rows = {len(t) if t.ndim else 0 for t in other}
    if len(rows) > 1 or 0 in rows:
        raise UserError(f"the weights do not fit {name}: they are of another network")
    network = build(num_classes=rows.pop()) if rows else build()
    _load(network, state, name)
    return network, _classes(network)


def _classes(network: nn.Module) -> int:
    """Rows of the last layer."""
    *_, last = (p for p in network.parameters() if p.ndim > 1)
    return len(last)


def _modern(key: str) -> str:
    """A name in old DenseNet files (`norm.1`) as it is today (`norm1`)."""
    return re.sub(r"\.(norm|relu|conv)\.([12])\.", r".\1\2.", key)


def _load(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        problem = shown(" ".join(str(error).split()), 300)
        raise UserError(f"the weights do not fit {name}: {problem}") from error


# -- speed and memory ----------------------------------------------------------------------------------------


def fold_batch_norms(network: nn.Module) -> int:
    """Fold every batch norm that follows a convolution into it, in place; returns how many.

    Exact in evaluation mode but for rounding. `network` must be traceable by `torch.fx`; UserError where it
    is not, is in training mode, or has no such batch norm.
    """
    if any(module.training for module in network.modules()):
        raise UserError("batch norms fold in evaluation mode only: call eval() first")
    new: dict[nn.Module, nn.Module] = {}
    for convolution, norm in _followed_by_norm(network):
        new[convolution], new[norm] = fuse_conv_bn_eval(convolution, norm), nn.Identity().eval()
    if not new:
        raise UserError(f"no batch norm follows a convolution in {type(network).__name__}: leave fold out")
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, new[module].requires_grad_(False))
    return len(new) // 2


def _followed_by_norm(network: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Convolutions whose one result goes into one batch norm and nowhere else, both called once."""
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception as error:  # tracing runs the network's own code, which raises anything
        raise UserError(f"{type(network).__name__} cannot be traced ({error}): leave fold out") from error
    called: dict[Any, Any] = {
        node: network.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"
    }
    times = Counter(called.values())
    for node, norm in called.items():
        (source,) = node.args or (None,)
        convolution = called.get(source)
        known = isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
        if source is None or not known or not isinstance(convolution, nn.Conv2d):
            continue
        if times[convolution] == times[norm] == len(source.users) == 1:
            yield convolution, norm


def checkpoint_blocks(network: nn.Module) -> int:
    """Let every block recompute its activations in the backward pass; returns how many blocks.

    A block is a module with modules of its own, in an `nn.Sequential` or `nn.ModuleList`. UserError where
    there is none.
    """
    blocks = list(_blocks(network))
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if not blocks:
        raise UserError(f"{type(network).__name__} has no blocks in sequence: leave checkpoint out")
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost ones."""
    sequence = isinstance(module, nn.Sequential | nn.ModuleList)
    for child in module.children():
        composite = any(True for _ in child.children())
        if sequence and composite and not isinstance(child, nn.Sequential | nn.ModuleList):
            yield child
        else:
            yield from _blocks(child)
