"""Classifiers from files, packages, runs and targets; folded, smooth, checkpointed, they stay themselves."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cdm_core import schedules
from cdm_core.data import DataInfo
from cdm_core.denoisers import DiscreteDenoiser
from cdm_core.errors import UserError
from cdm_core.formats import Foreign, save_converted
from cdm_core.manager import load_registry
from cdm_core.settings import Selection
from cdm_plugins_guidance.classifiers import (
    ImageClassifier,
    checkpoint_blocks,
    fold_batch_norms,
    load_classifier,
    own_classifier,
)
from cdm_plugins_guidance.guide import Guide
from cdm_plugins_guidance.guide_configs import ClassifierConfig, Contract, GuideConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.act(x + self.norm(self.conv(x)))


class Net(nn.Module):
    """Convolutions with one norm, with two readers, without a norm, and called twice."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.alias = self.norm
        self.blocks = nn.Sequential(Block(), Block())
        self.split, self.split_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.twice_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.alias(self.stem(x)))
        s = self.split(h)
        h = s + self.split_norm(s)
        h = self.twice_norm(self.twice(h)) + self.twice(h)
        return self.fc(h.mean((2, 3)))


def lived(net: nn.Module) -> nn.Module:
    """With statistics and affine parameters as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_(0, 0.3, generator=generator)
    return net.eval()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return lived(Net())


@pytest.fixture
def target(monkeypatch) -> Callable[[Callable[[], object]], str]:
    """Makes a Python target of a function."""

    def make(build: Callable[[], object]) -> str:
        module = types.ModuleType("nets_for_tests")
        module.build = build
        monkeypatch.setitem(sys.modules, "nets_for_tests", module)
        return "nets_for_tests:build"

    return make


X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
Y = torch.tensor([0, 3])


# -- Python targets, and what is done to every network -------------------------------------------------------


def test_a_target_with_weights_comes_frozen_and_in_evaluation_mode(net, target, tmp_path) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pth")
    classifier = load_classifier(ClassifierConfig(target(Net), str(tmp_path / "w.pth")))
    assert not any(module.training for module in classifier.modules())
    assert not any(p.requires_grad for p in classifier.parameters())
    assert torch.equal(classifier(X), net(X))


def test_everything_at_once_is_the_network_with_softplus(net, target) -> None:
    config = ClassifierConfig(target(lambda: deepcopy(net)), softplus=3.0, shape=(3, 8, 8))
    expected = Guide(load_classifier(config)).gradient(X, Y)
    fast = load_classifier(dataclasses.replace(config, fold=True, channels_last=True, checkpoint=True))
    assert (fast.num_classes, fast.folded, fast.smoothed.modules, fast.smoothed.calls) == (5, 3, 2, 2)
    for part, whole in zip(Guide(fast).gradient(X, Y), expected, strict=True):
        torch.testing.assert_close(part, whole, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_compiled_it_has_the_same_gradient(net, target) -> None:
    expected = Guide(load_classifier(target(lambda: net))).gradient(X, Y)
    compiled = Guide(load_classifier(ClassifierConfig(target(lambda: net), compile=True)))
    for part, whole in zip(compiled.gradient(X, Y), expected, strict=True):
        torch.testing.assert_close(part, whole, rtol=2e-5, atol=2e-6)


def test_what_the_network_says_of_itself_is_kept(target) -> None:
    class Says(Net):
        num_classes, contract = 5, Contract((0.5,) * 3, (0.25,) * 3, 8, 3)

    classifier = load_classifier(ClassifierConfig(target(lambda: lived(Says())), softplus=3.0))
    guide = Guide(classifier, GuideConfig(input="normalised"))
    assert guide.num_classes == 5
    assert classifier.smoothed.calls == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "name one as torchvision:NAME"),
        ("no_such_module:build", "cannot be made: No module named 'no_such_module'"),
        ("math:no_such_name", "cannot be made: module 'math' has no attribute"),
        ("time:time", "returned float, not an nn.Module"),
        ("torch.nn:Linear", "cannot be made: .*missing .* required positional argument"),
        (".x:y", "cannot be made: the 'package' argument is required"),
        ("time:sleep\x1b[2J\n", r"module 'time' has no attribute 'sleep\\"),
        ("run:/no/such/run", "does not exist"),
    ],
)
def test_names_that_name_nothing(name, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_classifier(name)
    assert str(error.value).isprintable()


def test_a_target_that_the_caller_did_not_choose_is_not_run(target) -> None:
    def ran() -> None:
        raise AssertionError("the target was run")

    name = target(ran)
    with pytest.raises(
        UserError, match=r"Python target.*: set the environment variable CDM_RUN_PYTHON_TARGETS=1"
    ):
        load_classifier(name, targets=False)
    with pytest.raises(UserError, match="cannot be made: the target was run"):
        load_classifier(name)
    with pytest.raises(UserError, match="does not exist"):
        load_classifier("run:/no/such/run", targets=False)


def test_why_norms_were_not_folded_can_be_read(net, target) -> None:
    class Branches(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    def loaded(build: Callable[[], nn.Module], **settings: object) -> tuple[int, str]:
        config = ClassifierConfig(target(build), softplus=3.0, shape=(3, 8, 8), **settings)
        classifier = load_classifier(config)
        return classifier.folded, classifier.not_folded

    folded, reason = loaded(lambda: lived(Branches()))
    assert folded == 0
    assert "Branches cannot be traced" in reason
    assert loaded(lambda: net) == (3, "")
    assert loaded(lambda: lived(Branches()), fold=False) == (0, "")


def test_settings_that_cannot_be_had(target) -> None:
    with pytest.raises(UserError, match="softplus must be above 0"):
        load_classifier(ClassifierConfig(target(Net), softplus=0.0))
    with pytest.raises(UserError, match="does not say its images' size"):
        load_classifier(ClassifierConfig(target(Net), softplus=3.0))
    linear = target(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    with pytest.raises(UserError, match="no batch norm follows a convolution"):
        load_classifier(ClassifierConfig(linear, fold=True))
    with pytest.raises(UserError, match="no blocks in sequence"):
        load_classifier(ClassifierConfig(linear, checkpoint=True))


def test_weights_that_do_not_fit_or_would_run_code(net, target, tmp_path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    torch.save({"model": net}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({**net.state_dict(), "x\x1b[2J\n": torch.zeros(1)}, tmp_path / "escapes.pth")
    for name, message in (
        ("other.pth", "do not fit"),
        ("escapes.pth", r"do not fit .*x\\x1b\[2J"),
        ("code.pth", "nothing in it was run"),
        ("list.pth", "holds no state dict"),
        ("none.pth", "cannot read"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_classifier(ClassifierConfig(target(Net), str(tmp_path / name)))
        assert str(error.value).isprintable()


# -- folding and checkpointing -------------------------------------------------------------------------------


def test_folding_takes_norms_that_alone_read_a_convolution(net) -> None:
    expected = net(X)
    kept = net.split_norm, net.twice_norm
    assert fold_batch_norms(net) == 3  # stem and two blocks, not where the convolution has other readers
    assert (net.split_norm, net.twice_norm) == kept
    assert isinstance(net.alias, nn.Identity)
    assert net.alias is net.norm
    assert not any(p.requires_grad for p in net.stem.parameters())
    torch.testing.assert_close(net(X), expected, rtol=1e-5, atol=1e-6)


def test_folding_refuses_what_it_cannot_see_through(net) -> None:
    class Branches(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(UserError, match="Branches cannot be traced"):
        fold_batch_norms(Branches().eval())
    with pytest.raises(UserError, match="evaluation mode"):
        fold_batch_norms(net.train())


def test_checkpointed_blocks_run_again_and_keep_less(net) -> None:
    guide = Guide(net)

    def gradient() -> tuple[Tensor, int]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            graded = guide.gradient(X, Y)
        return graded.gradient, len(kept)

    guide.logits(X)  # and the number of classes is known

    plain, before = gradient()
    runs = net.blocks[0].runs
    assert checkpoint_blocks(net) == 2
    again, after = gradient()
    assert torch.equal(again, plain)
    assert net.blocks[0].runs - runs == 2
    assert after < before


def test_checkpoint_blocks_are_the_outermost() -> None:
    inner = nn.Sequential(Block(), Block())
    assert checkpoint_blocks(nn.Sequential(nn.Sequential(Block(), inner), nn.ReLU())) == 3


# -- torchvision ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    return pytest.importorskip(
        "torchvision.models", reason="torchvision is not installed", exc_type=Exception
    )


def test_torchvision_from_a_file_of_any_class_count(models, tmp_path) -> None:
    torch.manual_seed(0)
    net = lived(models.resnet18(num_classes=7))
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": t for k, t in net.state_dict().items()}}, tmp_path / "b.pth")
    x = torch.rand(1, 3, 32, 32)
    for name in ("a.safetensors", "b.pth"):
        classifier = load_classifier(ClassifierConfig("torchvision:resnet18", str(tmp_path / name)))
        assert classifier.num_classes == 7
        assert classifier.contract == Contract((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 3)
        assert torch.equal(classifier(x), net(x))


def test_torchvision_reads_densenet_files_of_old(models, tmp_path) -> None:
    state = models.densenet121(num_classes=3).state_dict()
    old = {k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): t for k, t in state.items()}
    assert set(old) != set(state)
    torch.save(old, tmp_path / "old.pth")
    config = ClassifierConfig("torchvision:densenet121", str(tmp_path / "old.pth"))
    loaded = load_classifier(config).network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_torchvision_downloads_by_name_without_unpickling(models, monkeypatch) -> None:
    asked: list[tuple[str, dict[str, object]]] = []
    net = models.resnet18()

    def download(url: str, **given: object) -> dict[str, Tensor]:
        asked.append((url, given))
        return net.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    classifier = load_classifier("torchvision:resnet18")
    assert classifier.num_classes == 1000
    load_classifier(ClassifierConfig("torchvision:resnet18", "IMAGENET1K_V1"))
    assert all(given["weights_only"] and given["check_hash"] for _, given in asked)
    assert all(url == models.ResNet18_Weights.IMAGENET1K_V1.url for url, _ in asked)

    def offline(url: str, **given: object) -> dict[str, Tensor]:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"cannot download .*no route to host; get it"):
        load_classifier("torchvision:resnet18")


def test_torchvision_names(models, tmp_path) -> None:
    with pytest.raises(UserError, match="no classifier 'resnet5': did you mean resnet50"):
        load_classifier("torchvision:resnet5")
    with pytest.raises(UserError, match="has no weights 'V9': give a file, or one of IMAGENET1K_V1"):
        load_classifier(ClassifierConfig("torchvision:resnet18", "V9"))
    with pytest.raises(UserError, match="there is no such file"):
        load_classifier(ClassifierConfig("torchvision:resnet18", str(tmp_path / "none.pth")))
    torch.save(models.resnet34().state_dict(), tmp_path / "other.pth")
    state = models.resnet18().state_dict()
    for name, tensor in ("point.pth", torch.tensor(1.0)), ("empty.pth", torch.zeros(0, 512)):
        torch.save({**state, "fc.weight": tensor, "fc.bias": tensor}, tmp_path / name)
    for name in ("other.pth", "point.pth", "empty.pth"):
        with pytest.raises(UserError, match="do not fit torchvision:resnet18"):
            load_classifier(ClassifierConfig("torchvision:resnet18", str(tmp_path / name)))


# -- packages that need not be there: their interface, as far as it is used ----------------------------------


@pytest.mark.parametrize(("name", "package"), [("timm:a", "timm"), ("hf:a", "transformers")])
def test_a_missing_package_is_named(monkeypatch, name, package) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"this classifier needs {package}: `pip install {package}`"):
        load_classifier(name)


def test_timm(monkeypatch, tmp_path) -> None:
    made: list[dict[str, object]] = []
    asked: list[tuple[object, ...]] = []
    places = {"net": "timm/net.a1@v2", "old": None, "gone": "timm/gone", "pickle": "timm/pickle"}

    def create_model(
        name: str,
        pretrained: bool = False,
        num_classes: int = 5,
        pretrained_cfg_overlay: dict[str, object] | None = None,
    ) -> nn.Module:
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)")
        made.append({"pretrained": pretrained, "num_classes": num_classes})
        if pretrained:
            asked.append(tuple((pretrained_cfg_overlay or {}).items()))
        net = Net(num_classes)
        net.num_classes = num_classes
        net.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 8, 8)}
        net.pretrained_cfg |= {"hf_hub_id": places[name]}
        net.pretrained_cfg |= {"hf_hub_filename": "pytorch_model.bin"} if name == "pickle" else {}
        return net

    def hf_hub_download(repository: str, file: str, revision: str | None = None) -> str:
        if repository == "timm/gone":
            raise KeyError("no such entry\n")
        asked.append((repository, file, revision))
        return "/cache/model.safetensors"

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    classifier = load_classifier("timm:net")
    assert made[-1] == {"pretrained": True, "num_classes": 5}
    assert asked[0] == ("timm/net.a1", "model.safetensors", "v2")
    assert dict(asked[1]) == {"source": "", "file": "/cache/model.safetensors", "custom_load": False}
    for name in ("old", "pickle"):
        with pytest.raises(UserError, match=f"timm:{name} has no weights in safetensors"):
            load_classifier(f"timm:{name}")
    with pytest.raises(UserError, match=r"cannot get model\.safetensors of timm/gone") as error:
        load_classifier("timm:gone")
    assert str(error.value).isprintable()
    assert len(asked) == 2
    assert classifier.contract == Contract((0.5,) * 3, (0.5,) * 3, 8, 3)
    torch.save(Net(9).state_dict(), tmp_path / "nine.pth")
    assert load_classifier(ClassifierConfig("timm:net", str(tmp_path / "nine.pth"))).num_classes == 9
    assert made[-1] == {"pretrained": False, "num_classes": 9}
    with pytest.raises(UserError, match="timm cannot make 'unknown': Unknown model"):
        load_classifier("timm:unknown")
    with pytest.raises(UserError, match="'V1' is no file"):
        load_classifier(ClassifierConfig("timm:net", "V1"))


@pytest.mark.parametrize(
    ("processor", "contract"),
    [
        (
            {"do_normalize": True, "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "size": {"height": 8}},
            Contract((0.1,) * 3, (0.2,) * 3, 8, 3),
        ),
        (
            {
                "do_normalize": True,
                "image_mean": [0.1] * 3,
                "image_std": [0.2] * 3,
                "size": SimpleNamespace(height=None, shortest_edge=9),
                "do_center_crop": True,
                "crop_size": {"height": 8, "width": 8},
            },
            Contract((0.1,) * 3, (0.2,) * 3, 8, 3),
        ),
        ({"size": {"shortest_edge": 9}}, Contract((0.0,) * 3, (1.0,) * 3, 9, 3)),
    ],
)
def test_transformers(monkeypatch, processor, contract) -> None:
    asked: list[dict[str, object]] = []

    class Hugging(Net):
        config = SimpleNamespace(num_labels=5, num_channels=3)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(x))

    def of(make: Callable[[], object]) -> SimpleNamespace:
        def from_pretrained(name: str, **given: object) -> object:
            asked.append(given)
            if name == "unknown":
                raise OSError("unknown is not a local folder\nand more")
            return make()

        return SimpleNamespace(from_pretrained=from_pretrained)

    module = SimpleNamespace(
        AutoModelForImageClassification=of(Hugging),
        AutoImageProcessor=of(lambda: SimpleNamespace(**processor)),
    )
    monkeypatch.setitem(sys.modules, "transformers", module)
    classifier = load_classifier("hf:net")
    assert (classifier.contract, classifier.num_classes) == (contract, 5)
    assert classifier(X).shape == (2, 5)
    assert asked[0] == {"use_safetensors": True, "trust_remote_code": False}
    with pytest.raises(UserError, match=r"cannot load 'unknown': unknown is not a local folder$"):
        load_classifier("hf:unknown")
    with pytest.raises(UserError, match="brings its own weights"):
        load_classifier(ClassifierConfig("hf:net", "w.pth"))


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def density(tmp_path_factory) -> Path:
    """A converted file of a class-conditional density."""
    registry = load_registry()
    name = next((n for n, r in registry.components("model").items() if "log_density" in r.provides), None)
    if name is None:
        pytest.skip("no model with a density is installed")
    _, record = registry.find("model", name)
    settings = record.config.small()
    if not hasattr(settings, "conditional"):
        pytest.skip(f"{name} is not conditional")
    settings = dataclasses.replace(settings, conditional=True)
    info = DataInfo("tiny", (4, 1, 1), num_classes=3, levels=None)
    torch.manual_seed(0)
    model = record.load()(settings, info)
    path = tmp_path_factory.mktemp("run") / "density.safetensors"
    save_converted(Foreign(model.state_dict(), Selection(name, settings), info), path)
    return path


def test_a_density_guides_by_bayes_rule(density) -> None:
    guide = Guide(load_classifier(f"run:{density}"))
    assert guide.noise_aware
    assert guide.num_classes == 3
    torch.manual_seed(0)
    x, sigma, y = torch.randn(2, 4, 1, 1), torch.tensor([0.5, 2.0]), torch.tensor([0, 2])
    direction, step = torch.randn(x.shape), 1e-2
    graded = guide.gradient(x, y, sigma)
    ahead, behind = (guide.gradient(x + s * direction, y, sigma).value for s in (step, -step))
    slope = (graded.gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=2e-2, atol=2e-3)
    assert guide.skipped == 0


def test_the_models_own_count_of_classes_is_a_number() -> None:
    """Also of a model on core's base for discrete levels, with methods of its own."""

    class Both(DiscreteDenoiser):
        def class_logits(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :4]

    model = Both()
    model.set_process(schedules.linear(10), num_classes=4, null_label=4)
    assert own_classifier(model, ClassifierConfig()).num_classes == 4


def test_a_run_is_used_as_it_is(density) -> None:
    with pytest.raises(UserError, match="it is used as it is"):
        load_classifier(ClassifierConfig(f"run:{density}", softplus=3.0))


def test_an_image_classifier_is_a_module_like_any_other() -> None:
    torch.manual_seed(0)
    classifier = ImageClassifier(lived(Net()), Contract(), 5).eval()
    assert Guide(classifier).gradient(X, Y).logits.shape == (2, 5)
