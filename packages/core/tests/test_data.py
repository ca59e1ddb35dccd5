"""Data sets: the map from integers to model inputs, the splits, the readers and their errors."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torchvision import datasets

from cdm_core.data import DataInfo, TensorSplit, carve, folder, mixture, vision
from cdm_core.data import digits as digits_data
from cdm_core.data.configs import (
    CelebAConfig,
    Cifar10Config,
    Cifar100Config,
    DigitsConfig,
    FashionMnistConfig,
    GaussianMixtureConfig,
    ImageFolderConfig,
    MnistConfig,
    SvhnConfig,
)
from cdm_core.errors import UserError
from cdm_core.random import Draws

ALL_LEVELS = [2, 3, 16, 17, 100, 200, 255, 256]


class Fixed:
    """Draws that return given uniform numbers, in order."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, *shape):
        return self.values.pop(0)


def every_level(levels):
    return torch.arange(levels, dtype=torch.uint8).view(levels, 1, 1, 1)


# ---- DataInfo


@pytest.mark.parametrize("levels", ALL_LEVELS)
@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-24])
def test_dequantised_levels_come_back_even_at_the_ends_of_the_noise(levels, noise):
    info = DataInfo("x", (1, 1, 1), levels=levels)
    pixels = every_level(levels)
    x0 = info.to_model(pixels, Fixed(torch.full((levels, 1, 1, 1), noise)))
    assert x0.dtype == torch.float32
    assert x0.min() >= -1
    assert x0.max() < 1
    assert torch.equal(info.to_pixels(x0), pixels)


@pytest.mark.parametrize("levels", ALL_LEVELS)
def test_dequantised_levels_come_back_for_random_noise(levels):
    info = DataInfo("x", (1, 32, 32), levels=levels)
    pixels = torch.randint(levels, (64, 1, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(info.to_pixels(info.to_model(pixels, Draws(0, 64))), pixels)


@pytest.mark.parametrize("levels", ALL_LEVELS)
def test_levels_come_back_without_dequantisation(levels):
    info = DataInfo("x", (1, 1, 1), levels=levels, dequantise=False)
    x0 = info.to_model(every_level(levels), None)
    assert x0[0] == -1
    assert x0[-1] == 1
    assert torch.equal(info.to_pixels(x0), every_level(levels))
    # a sampler's small errors do not move a level either way
    half = 0.9 / (levels - 1)
    assert torch.equal(info.to_pixels(x0 + half), every_level(levels))
    assert torch.equal(info.to_pixels(x0 - half), every_level(levels))


def test_dequantisation_noise_is_uniform():
    info = DataInfo("x", (1, 64, 64), levels=17)
    pixels = torch.full((256, 1, 64, 64), 5, dtype=torch.uint8)
    noise = (info.to_model(pixels, Draws(0, 256)).double() + 1) * 17 / 2 - 5
    assert noise.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert noise.var().item() == pytest.approx(1 / 12, abs=1e-3)
    counts = torch.histc(noise.float(), bins=16, min=0, max=1) / noise.numel()
    torch.testing.assert_close(counts, torch.full((16,), 1 / 16), rtol=0, atol=1.5e-3)


def test_out_of_range_values_are_clamped():
    for dequantise in (True, False):
        info = DataInfo("x", (1, 1, 2), dequantise=dequantise)
        assert info.to_pixels(torch.tensor([[[[-1.7, 3.0]]]])).flatten().tolist() == [0, 255]
        assert info.to_uint8(torch.tensor([[[[-1.7, 3.0]]]])).flatten().tolist() == [0, 255]


@pytest.mark.parametrize("dequantise", [True, False])
def test_pictures_have_the_grey_of_the_data_without_bias(dequantise):
    info = DataInfo("x", (1, 64, 64), dequantise=dequantise)
    pixels = torch.randint(256, (64, 1, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(info.to_uint8(info.to_model(pixels, Draws(1, 64))), pixels)
    # A model's samples are off the lattice: x uniform over the range has mean grey level 127.5.
    x0 = torch.rand(64, 1, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    assert info.to_uint8(x0).double().mean().item() == pytest.approx(127.5, abs=0.3)


def test_few_levels_span_black_to_white():
    info = DataInfo("x", (1, 1, 1), levels=17)
    shown = info.to_uint8(info.to_model(every_level(17), Draws(0, 17))).flatten()
    assert shown.tolist() == [round(v * 255 / 16) for v in range(17)]


@pytest.mark.parametrize("levels", ALL_LEVELS)
def test_uniform_density_has_log2_levels_bits_a_dimension(levels):
    info = DataInfo("x", (3, 4, 5), levels=levels)
    nats = torch.tensor([-info.dim * math.log(2)], dtype=torch.float64)  # over [-1, 1)^60
    assert info.bits_per_dim(nats).item() == pytest.approx(math.log2(levels), abs=1e-12)


def test_bits_per_dim_without_dequantisation_uses_the_width_of_its_levels():
    info = DataInfo("x", (3, 32, 32), dequantise=False)
    # the density that gives each of 256 cells of width 2 / 255 the probability 1 / 256
    nats = torch.tensor([info.dim * math.log(255 / 2 / 256)], dtype=torch.float64)
    assert info.bits_per_dim(nats).item() == pytest.approx(8, abs=1e-12)


def test_bits_per_dim_of_a_known_distribution_is_its_entropy():
    """A histogram density's bits/dim on its own dequantised data is the entropy of the integers."""
    info = DataInfo("x", (1, 1, 1), levels=4)
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    pixels = torch.multinomial(p, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    x0 = info.to_model(pixels.byte().view(-1, 1, 1, 1), Draws(0, 4000))
    cell = ((x0.flatten() + 1) / 2 * 4).long()
    bits = info.bits_per_dim((p[cell] / (2 / 4)).log())
    torch.testing.assert_close(bits, -p.log2()[pixels], rtol=0, atol=1e-12)


def test_continuous_data_are_used_as_they_are():
    info = DataInfo("x", (2, 1, 1), levels=None)
    x = torch.tensor([[[[1.7]], [[-3.0]]]])
    assert torch.equal(info.to_model(x, None), x)
    assert torch.equal(info.to_pixels(x), x)
    assert info.bits_per_dim(torch.tensor([-math.log(4.0)])).item() == pytest.approx(1.0)
    assert info.to_uint8(torch.tensor([[[[0.0]], [[-3.0]]]])).flatten().tolist() == [128, 0]


def test_flip_is_for_training_only_and_drawn_first():
    info = DataInfo("x", (1, 1, 2), flip=True)
    pixels = torch.tensor([[[[10, 200]]], [[[10, 200]]]], dtype=torch.uint8)
    noise = torch.zeros(2, 1, 1, 2)
    flipped = info.to_model(pixels, Fixed(torch.tensor([0.2, 0.8]), noise), train=True)
    assert info.to_pixels(flipped).flatten().tolist() == [200, 10, 10, 200]
    assert info.to_pixels(info.to_model(pixels, Fixed(noise))).flatten().tolist() == [10, 200, 10, 200]
    still = DataInfo("x", (1, 1, 2), flip=False)
    kept = still.to_model(pixels, Fixed(noise), train=True)
    assert still.to_pixels(kept).flatten().tolist() == [10, 200, 10, 200]


def test_to_model_does_not_depend_on_how_rows_are_spread():
    info = DataInfo("x", (3, 4, 4), flip=True)
    pixels = torch.randint(256, (10, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    whole = info.to_model(pixels, Draws(7, 10), train=True)
    part = info.to_model(pixels[4:7], Draws(7, 10, 4, 7), train=True)
    assert torch.equal(part, whole[4:7])


def test_to_model_refuses_what_it_cannot_use():
    info = DataInfo("photos", (3, 4, 4))
    good = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="photos: to_model needs draws"):
        info.to_model(good, None)
    with pytest.raises(ValueError, match=r"expected \(B, 3, 4, 4\)"):
        info.to_model(good[:, :1], Draws(0, 2))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        info.to_model(good.float(), Draws(0, 2))
    with pytest.raises(ValueError, match="levels"):
        DataInfo("x", (1, 1, 1), levels=65536)


def test_info_survives_json():
    info = DataInfo("x", (3, 4, 4), 2, ("cat", "dog"), levels=17, dequantise=False, flip=True)
    assert DataInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


# ---- splits


def test_carve_partitions_and_follows_the_seed():
    train, valid = carve(100, 0.05, seed=0)
    assert sorted(torch.cat([train, valid]).tolist()) == list(range(100))
    assert len(valid) == 5
    assert torch.equal(valid, carve(100, 0.05, seed=0)[1])
    assert not torch.equal(valid, carve(100, 0.05, seed=1)[1])
    assert [len(part) for part in carve(3, 0.01, seed=0)] == [2, 1]
    with pytest.raises(UserError, match="at least 2"):
        carve(1, 0.5, seed=0)


def test_split_feeds_a_dataloader_in_whole_batches():
    pixels = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1)
    split = TensorSplit(pixels, torch.arange(12) % 3, torch.tensor([1, 3, 5, 7, 9]))
    batches = BatchSampler(SequentialSampler(split), 2, drop_last=False)
    seen = list(DataLoader(split, batch_sampler=batches, collate_fn=lambda batch: batch))
    assert torch.cat([x for x, _ in seen]).flatten().tolist() == [1, 3, 5, 7, 9]
    assert torch.cat([y for _, y in seen]).tolist() == split.labels.tolist() == [1, 0, 2, 1, 0]


def whole(split):
    return split.__getitems__(range(len(split)))


def fingerprints(split):
    return [row.numpy().tobytes() for row in whole(split)[0].flatten(1)]


SPLITS = ("train", "valid", "test")


def test_digits_are_scikit_learns_in_disjoint_stratified_splits():
    from sklearn.datasets import load_digits

    data = digits_data.load(DigitsConfig())
    assert (data.info.shape, data.info.levels, data.info.num_classes) == ((1, 8, 8), 17, 10)
    parts = {name: data.split(name) for name in SPLITS}
    assert {name: len(part) for name, part in parts.items()} == {"train": 1365, "valid": 72, "test": 360}
    everything = sorted(print_ for part in parts.values() for print_ in fingerprints(part))
    assert everything == sorted(row.tobytes() for row in load_digits().images.astype(np.uint8))
    counts = torch.bincount(parts["test"].labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    nearest = nearest_class(whole(parts["train"]), whole(parts["test"])[0])
    assert (nearest == parts["test"].labels).float().mean() > 0.97  # the labels belong to the images


def nearest_class(train, pixels):
    distance = torch.cdist(pixels.flatten(1).double(), train[0].flatten(1).double())
    return train[1][distance.argmin(1)]


def test_digits_test_split_moves_with_its_own_seed_alone():
    first = digits_data.load(DigitsConfig())
    second = digits_data.load(DigitsConfig(valid=0.2, split_seed=5))
    assert fingerprints(first.split("test")) == fingerprints(second.split("test"))
    assert fingerprints(first.split("valid")) != fingerprints(second.split("valid"))
    again = digits_data.load(DigitsConfig())
    assert fingerprints(first.split("train")) == fingerprints(again.split("train"))
    other = {name: fingerprints(digits_data.load(DigitsConfig(test_seed=1)).split(name)) for name in SPLITS}
    assert other["test"] != fingerprints(first.split("test"))
    everything = [print_ for name in SPLITS for print_ in fingerprints(first.split(name))]
    assert sorted(print_ for part in other.values() for print_ in part) == sorted(everything)


def test_unknown_split_names_the_choices():
    with pytest.raises(UserError, match="no split 'val'; it has train, valid, test"):
        digits_data.load(DigitsConfig()).split("val")


# ---- Gaussian mixture


def test_ring_has_its_density_and_range():
    data = mixture.load(GaussianMixtureConfig())
    assert (data.info.shape, data.info.levels, data.info.num_classes) == ((2, 1, 1), None, 8)
    x, y = whole(data.split("train"))
    assert x.dtype == torch.float32
    assert x.abs().max() < 1.8
    assert (x.abs() < 1.5).float().mean() > 0.999
    # the entropy of the ring is log 8 + log(2 pi e std^2), less the little that its components overlap
    expected = math.log(8) + math.log(2 * math.pi * math.e * 0.15**2)
    assert -data.mixture.log_density(x).mean().item() == pytest.approx(expected, abs=0.03)
    assert (data.mixture.class_logits(x, 0.0).argmax(1) == y).float().mean() > 0.98


def test_mixture_splits_are_fixed_and_differ():
    config = GaussianMixtureConfig(train_points=100, valid_points=100, test_points=100)
    splits = {name: fingerprints(mixture.load(config).split(name)) for name in ("train", "valid", "test")}
    assert splits["train"] == fingerprints(mixture.load(config).split("train"))
    assert len({print_ for part in splits.values() for print_ in part}) == 300
    other = GaussianMixtureConfig(train_points=100, seed=1)
    assert not set(splits["train"]) & set(fingerprints(mixture.load(other).split("train")))


def test_random_and_explicit_layouts():
    config = GaussianMixtureConfig(dim=5, components=3, layout="random", std=0.2, radius=2.0, seed=4)
    known = mixture.build(config)
    torch.testing.assert_close(known.means.norm(dim=1), torch.full((3,), 2.0, dtype=torch.float64))
    assert known.eigenvalues.max() <= 0.2**2 + 1e-12
    assert known.eigenvalues.min() >= 0.05**2 - 1e-12
    assert not torch.allclose(known.covariances[0], known.covariances[0].diagonal().diag())
    explicit = GaussianMixtureConfig(
        dim=1, components=2, layout="explicit", means=((-1.0,), (0.5,)), weights=(1.0, 3.0), std=0.1
    )
    explicit.check()
    built = mixture.build(explicit)
    assert built.means.flatten().tolist() == [-1.0, 0.5]
    assert built.weights.tolist() == [0.25, 0.75]
    torch.testing.assert_close(built.covariances, torch.full((2, 1, 1), 0.01, dtype=torch.float64))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GaussianMixtureConfig(dim=3), "'ring' has dim 2"),
        (GaussianMixtureConfig(components=0), "components must be at least 1"),
        (GaussianMixtureConfig(std=0.0), "std must be > 0"),
        (GaussianMixtureConfig(layout="explicit", means=((0.0, 0.0),)), "8 points"),
        (GaussianMixtureConfig(weights=(1.0,)), "belong to layout 'explicit'"),
        (GaussianMixtureConfig(layout="explicit", components=1, means=((0.0, 0.0),), weights=(0.0,)), "> 0"),
        (DigitsConfig(valid=0.0), "between 0 and 1"),
        (DigitsConfig(valid=1.0), "between 0 and 1"),
        (MnistConfig(pad=-1), "pad"),
        (CelebAConfig(size=129), "128"),
        (ImageFolderConfig(channels=2), "channels must be 1"),
        (ImageFolderConfig(size=0), "size"),
        (ImageFolderConfig(test=1.5), "test is a share"),
    ],
)
def test_settings_out_of_range_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.check()


# ---- torchvision's sets, on small generated files


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def random_images(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_mnist(root, name="MNIST", side=28):
    raw = root / name / "raw"
    for prefix, count, seed in (("train", 40, 0), ("t10k", 10, 1)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", random_images(count, side, side, seed=seed))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)


@pytest.mark.parametrize(
    ("load", "config", "name"),
    [(vision.mnist, MnistConfig, "MNIST"), (vision.fashion_mnist, FashionMnistConfig, "FashionMNIST")],
)
def test_mnist_files_are_read_by_path(tmp_path, load, config, name):
    write_mnist(tmp_path, name)
    data = load(config(root=str(tmp_path), valid=0.1))
    prints = {part: fingerprints(data.split(part)) for part in ("train", "valid", "test")}
    train = random_images(40, 28, 28)
    assert sorted(prints["train"] + prints["valid"]) == sorted(image.tobytes() for image in train)
    assert len(prints["valid"]) == 4
    assert prints["test"] == [image.tobytes() for image in random_images(10, 28, 28, seed=1)]
    position = {image.tobytes(): i for i, image in enumerate(train)}
    pixels, labels = whole(data.split("train"))
    assert labels.tolist() == [position[print_] % 10 for print_ in fingerprints(data.split("train"))]
    assert pixels.dtype == torch.uint8


def test_mnist_padding_is_black_all_round(tmp_path):
    write_mnist(tmp_path)
    data = vision.mnist(MnistConfig(root=str(tmp_path), pad=2))
    pixels, _ = whole(data.split("test"))
    assert data.info.shape == tuple(pixels.shape[1:]) == (1, 32, 32)
    assert torch.equal(pixels[:, 0, 2:-2, 2:-2], torch.from_numpy(random_images(10, 28, 28, seed=1)))
    assert pixels.long().sum() == pixels[:, :, 2:-2, 2:-2].long().sum()


def test_images_of_another_size_are_an_error(tmp_path):
    write_mnist(tmp_path, side=20)
    with pytest.raises(UserError, match=r"mnist: images are \(1, 20, 20\), expected \(1, 28, 28\)"):
        vision.mnist(MnistConfig(root=str(tmp_path))).split("train")


@pytest.mark.parametrize(
    ("load", "config", "shape", "classes"),
    [
        (vision.mnist, MnistConfig, (1, 28, 28), 10),
        (vision.fashion_mnist, FashionMnistConfig, (1, 28, 28), 10),
        (vision.cifar10, Cifar10Config, (3, 32, 32), 10),
        (vision.cifar100, Cifar100Config, (3, 32, 32), 100),
        (vision.svhn, SvhnConfig, (3, 32, 32), 10),
        (vision.celeba, CelebAConfig, (3, 64, 64), None),
    ],
)
def test_absent_set_is_described_but_reading_it_is_one_line(tmp_path, load, config, shape, classes):
    data = load(config(root=str(tmp_path / "nowhere"), download=False))
    assert (data.info.shape, data.info.num_classes) == (shape, classes)
    assert len(data.info.class_names) == (classes or 0)
    with pytest.raises(UserError, match=r"cannot read the data set in .*nowhere.*data\.root") as caught:
        data.split("test")
    assert "\n" not in str(caught.value)


def test_failed_download_is_one_line(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("<urlopen error\n no network>")

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", unreachable)
    with pytest.raises(UserError, match=r"mnist: cannot read .* no network.*check the network") as caught:
        vision.mnist(MnistConfig(root=str(tmp_path))).split("train")
    assert "\n" not in str(caught.value)


def test_damaged_file_is_one_line(tmp_path):
    write_mnist(tmp_path)
    images = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(UserError, match="mnist: cannot read"):
        vision.mnist(MnistConfig(root=str(tmp_path))).split("train")


def test_labels_that_do_not_match_the_images_are_an_error(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST/raw/train-labels-idx1-ubyte", np.arange(39) % 10)
    with pytest.raises(UserError, match="39 labels for 40 images"):
        vision.mnist(MnistConfig(root=str(tmp_path))).split("train")


def test_root_defaults_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CDM_RUN_DATA", str(tmp_path))
    assert vision.data_root(None) == tmp_path
    assert vision.data_root("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("CDM_RUN_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert vision.data_root(None) == tmp_path / ".cache/cdm-run/data"


def accept_generated_files(monkeypatch, module):
    """torchvision compares MD5 sums with those of the published files; generated ones have others."""
    monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def write_pickle(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("fine", [False, True])
def test_cifar_files_are_read_channels_first(tmp_path, monkeypatch, fine):
    accept_generated_files(monkeypatch, datasets.cifar)
    kind = datasets.CIFAR100 if fine else datasets.CIFAR10
    base, key = tmp_path / kind.base_folder, "fine_labels" if fine else "labels"
    files = [name for name, _ in kind.train_list + kind.test_list]
    for seed, name in enumerate(files):
        write_pickle(
            base / name, {"data": random_images(4, 3072, seed=seed), key: [seed, seed + 1, seed + 2, 9]}
        )
    write_pickle(base / kind.meta["filename"], {kind.meta["key"]: []})
    load, config = (vision.cifar100, Cifar100Config) if fine else (vision.cifar10, Cifar10Config)
    data = load(config(root=str(tmp_path)))
    last = len(files) - 1
    pixels, labels = whole(data.split("test"))
    assert torch.equal(pixels, torch.from_numpy(random_images(4, 3, 32, 32, seed=last)))
    assert labels.tolist() == [last, last + 1, last + 2, 9]
    train = fingerprints(data.split("train")) + fingerprints(data.split("valid"))
    assert sorted(train) == sorted(
        row.tobytes() for seed in range(last) for row in random_images(4, 3072, seed=seed)
    )


def test_svhn_splits_and_extra(tmp_path, monkeypatch):
    accept_generated_files(monkeypatch, datasets.svhn)
    for seed, name in enumerate(("train", "test", "extra")):
        images = random_images(5, 32, 32, 3, seed=seed).transpose(1, 2, 3, 0)
        savemat(tmp_path / f"{name}_32x32.mat", {"X": images, "y": np.array([[1], [2], [10], [4], [5]])})
    data = vision.svhn(SvhnConfig(root=str(tmp_path), download=False))
    pixels, labels = whole(data.split("test"))
    assert torch.equal(pixels, torch.from_numpy(random_images(5, 32, 32, 3, seed=1)).permute(0, 3, 1, 2))
    assert labels.tolist() == [1, 2, 0, 4, 5]  # the file calls the digit zero 10
    assert len(data.split("train")) + len(data.split("valid")) == 5
    more = vision.svhn(SvhnConfig(root=str(tmp_path), download=False, extra=True))
    assert len(more.split("train")) + len(more.split("valid")) == 10
    assert fingerprints(more.split("test")) == fingerprints(data.split("test"))


@pytest.fixture
def celeba_root(tmp_path, monkeypatch):
    accept_generated_files(monkeypatch, datasets.celeba)
    base = tmp_path / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(7)]
    for name in names:
        # the crop is white in a black frame; anything outside it would show as grey
        image = np.zeros((218, 178, 3), np.uint8)
        image[57:185, 25:153] = 255
        Image.fromarray(image).save(base / "img_align_celeba" / name, quality=100, subsampling=0)
    rows = dict(zip(names, (0, 0, 0, 1, 1, 2, 2), strict=True))
    (base / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, p in rows.items()))
    (base / "identity_CelebA.txt").write_text("".join(f"{n} 1\n" for n in names))
    for file, columns in (("list_bbox_celeba.txt", "x y"), ("list_landmarks_align_celeba.txt", "x y")):
        (base / file).write_text(f"7\n{columns}\n" + "".join(f"{n} 1 1\n" for n in names))
    attributes = "".join(f"{n} {-1 if i % 2 else 1} -1\n" for i, n in enumerate(names))
    (base / "list_attr_celeba.txt").write_text("7\nSmiling Young \n" + attributes)
    return tmp_path


def test_celeba_uses_its_own_partition_and_the_ddim_crop(celeba_root):
    data = vision.celeba(CelebAConfig(root=str(celeba_root), download=False))
    assert [len(data.split(name)) for name in ("train", "valid", "test")] == [3, 2, 2]
    pixels, labels = whole(data.split("train"))
    assert labels is None
    assert tuple(pixels.shape) == (3, 3, 64, 64)
    assert pixels.min() >= 250


def test_celeba_attribute_is_a_label(celeba_root):
    data = vision.celeba(CelebAConfig(root=str(celeba_root), download=False, attribute="Smiling"))
    assert data.info.class_names == ("not Smiling", "Smiling")
    assert data.split("train").labels.tolist() == [1, 0, 1]
    wrong = vision.celeba(CelebAConfig(root=str(celeba_root), download=False, attribute="Smilin"))
    with pytest.raises(UserError, match="did you mean 'Smiling'"):
        wrong.split("train")


# ---- image folder


def write_image(path, seed=0, size=(12, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    Image.fromarray(random_images(1, size[1], size[0], *channels, seed=seed)[0], mode=mode).save(path)


def image_folder(root, **settings):
    return folder.load(ImageFolderConfig(root=str(root), **{"size": 8} | settings))


def paths(data):
    return {name: data.split(name).paths for name in ("train", "valid", "test")}


@pytest.fixture
def tree(tmp_path):
    for i in range(120):
        write_image(tmp_path / ("cats" if i % 2 else "dogs/young") / f"{i:03}.png", seed=i)
    (tmp_path / ".thumbnails").mkdir()
    write_image(tmp_path / ".thumbnails/000.png")
    (tmp_path / "cats/notes.txt").write_text("not an image")
    return tmp_path


def test_folder_splits_are_disjoint_and_whole(tree):
    parts = paths(image_folder(tree, test=0.2, valid=0.1))
    together = parts["train"] + parts["valid"] + parts["test"]
    assert sorted(together) == sorted(f"{'cats' if i % 2 else 'dogs/young'}/{i:03}.png" for i in range(120))
    assert len(set(together)) == 120
    assert 12 <= len(parts["test"]) <= 36
    assert 3 <= len(parts["valid"]) <= 20


def test_folder_split_of_an_image_is_stable_when_others_come(tree):
    before = paths(image_folder(tree, test=0.2, valid=0.1))
    for i in range(120, 160):
        write_image(tree / "cats" / f"{i:03}.png", seed=i)
    after = paths(image_folder(tree, test=0.2, valid=0.1))
    assert all(set(before[name]) <= set(after[name]) for name in before)
    assert paths(image_folder(tree, test=0.2, valid=0.1, split_seed=1)) != after


def test_folder_subfolders_are_classes(tree):
    data = image_folder(tree)
    assert data.info.class_names == ("cats", "dogs")
    split = data.split("train")
    _, labels = split.__getitems__([5, 0, 3])
    assert labels.tolist() == [split.labels[i] for i in (5, 0, 3)]
    assert split.labels.tolist() == [0 if path.startswith("cats") else 1 for path in split.paths]


def test_flat_folder_is_unlabelled(tree):
    write_image(tree / "loose.png")
    data = image_folder(tree)
    assert data.info.num_classes is None
    assert data.split("train").labels is None
    assert whole(data.split("test"))[1] is None


def test_named_splits_are_used_and_the_missing_one_is_carved_from_train(tmp_path):
    for i in range(30):
        write_image(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", seed=i)
    for i in range(4):
        write_image(tmp_path / "test" / "ab"[i % 2] / f"{i}.png", seed=100 + i)
    data = image_folder(tmp_path, valid=0.2)
    parts = paths(data)
    assert sorted(parts["test"]) == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]
    assert len(parts["train"]) + len(parts["valid"]) == 30
    assert not set(parts["train"]) & set(parts["valid"])
    assert data.info.class_names == ("a", "b")
    write_image(tmp_path / "test/c/0.png")
    with pytest.raises(UserError, match=r"class 'c'.* test split but not in train"):
        image_folder(tmp_path)


def test_other_folders_do_not_blur_named_splits(tmp_path):
    for name in ("train", "test"):
        for i in range(4):
            write_image(tmp_path / name / f"{i}.png", seed=i)
    (tmp_path / "annotations").mkdir()
    data = image_folder(tmp_path)
    assert len(data.split("train")) + len(data.split("valid")) == len(data.split("test")) == 4
    write_image(tmp_path / "more/0.png")
    with pytest.raises(UserError, match="holds test, train, more: keep one folder a split"):
        image_folder(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "tractor"):
        for i in range(10):
            write_image(tmp_path / name / f"{i}.png", seed=i)
    assert image_folder(tmp_path).info.class_names == ("tractor", "train")


def test_images_of_the_right_size_are_kept_to_the_pixel(tmp_path):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", seed=i, size=(8, 8))
    split = image_folder(tmp_path).split("train")
    expected = random_images(1, 8, 8, 3, seed=int(split.paths[0][0]))[0].transpose(2, 0, 1)
    assert np.array_equal(whole(split)[0][0].numpy(), expected)


def test_images_are_cut_to_a_centred_square_and_reduced(tmp_path):
    image = np.zeros((16, 48, 3), np.uint8)
    image[:, 16:32] = (0, 128, 255)
    for i in range(3):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    pixels, _ = whole(image_folder(tmp_path).split("train"))
    inside = pixels[0, :, :, 2:-2]  # the filter of the outer columns reads a little of the black beside them
    assert torch.equal(inside, torch.tensor([0, 128, 255]).byte()[:, None, None].expand(3, 8, 4))
    assert (pixels[0, :, :, [0, -1]].long() - inside[:, :, :2].long()).abs().max() < 30


def test_grey_and_colour_follow_the_setting(tmp_path):
    for i, mode in enumerate(("L", "RGB", "RGBA")):
        write_image(tmp_path / f"{i}.png", seed=i, mode=mode)
    for channels in (1, 3):
        data = image_folder(tmp_path, channels=channels)
        assert data.info.shape == (channels, 8, 8)
        for name in ("train", "valid", "test"):
            assert whole(data.split(name))[0].shape == (1, channels, 8, 8)


@pytest.mark.parametrize("damage", ["truncated", "text", "small", "deep"])
def test_an_image_that_cannot_be_used_is_named(tmp_path, damage):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", seed=i, size=(40, 40))
    data = image_folder(tmp_path)
    split = data.split("train")
    victim = tmp_path / split.paths[0]
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:2000])
    elif damage == "text":
        victim.write_text("not an image")
    elif damage == "small":
        write_image(victim, size=(20, 7))
    else:
        Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(victim)
    with pytest.raises(UserError, match=f"cannot read image .*{victim.name}") as caught:
        whole(split)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"set data\.root to a folder of images; '' is not"):
        folder.load(ImageFolderConfig())
    with pytest.raises(UserError, match="absent' is not a folder"):
        image_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="no image for the train split"):
        image_folder(tmp_path)
    write_image(tmp_path / "only.png")
    with pytest.raises(UserError, match="no image for the train split"):
        image_folder(tmp_path)


# ---- real files, where they are


def shared_mnist():
    beside = Path(__file__).resolve().parents[4] / "shared"
    return Path(os.environ.get("CDM_SHARED_DIR", beside)) / "data/mnist"


@pytest.mark.skipif(
    not shared_mnist().is_dir(), reason="no MNIST: set CDM_SHARED_DIR to a folder with data/mnist"
)
def test_real_mnist():
    data = vision.mnist(MnistConfig(root=str(shared_mnist()), download=False))
    assert [len(data.split(name)) for name in ("train", "valid", "test")] == [57_000, 3_000, 10_000]
    assert data.split("test").labels[:5].tolist() == [7, 2, 1, 0, 4]
    pixels, _ = whole(data.split("test"))
    assert pixels.double().mean().item() == pytest.approx(33.79, abs=0.01)


# ---- imports


def test_settings_are_read_without_torch():
    code = (
        "import sys, cdm_core.data.configs as c; assert 'torch' not in sys.modules; print(c.DigitsConfig())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
