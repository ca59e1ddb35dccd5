"""Few labels, and labels of another domain: which images have one, and how often each is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cdm_core.components import build_data
from cdm_core.config import from_toml, resolve, to_toml
from cdm_core.data import Data, DataInfo, TensorSplit
from cdm_core.errors import UserError
from cdm_core.manager import load_registry
from cdm_plugins_joint.configs import DomainsConfig, PartlyLabelledConfig
from cdm_plugins_joint.semi_supervised import (
    adapted,
    chosen,
    decoded,
    encoded_alone,
    fitted,
    partly_labelled,
)


def labels_of(**changes: Any) -> Tensor:
    config = PartlyLabelledConfig(**changes)
    config.check()
    labels = partly_labelled(config).split("train").labels
    assert labels is not None
    return labels


def test_labels_are_read_as_they_are_written() -> None:
    y = torch.tensor([0, 9, 3])
    k, alone = decoded(torch.cat([y, encoded_alone(y), torch.tensor([-1])]))
    assert k.tolist() == [0, 9, 3, 0, 9, 3, -1]
    assert alone.tolist() == [False] * 3 + [True] * 3 + [False]


def test_as_large_a_part_of_every_class_keeps_its_label() -> None:
    whole, few = labels_of(), labels_of(labels=0.1)
    assert len(whole) == len(few)
    assert torch.equal(few[few >= 0], whole[few >= 0])
    kept, there = torch.bincount(few[few >= 0]), torch.bincount(whole)
    assert bool(((kept - 0.1 * there).abs() <= 0.5).all())
    assert torch.bincount(labels_of(labels=1e-9).add(1))[1:].tolist() == [1] * 10  # at least one of each


def test_which_ones_depends_on_the_seed_alone() -> None:
    """Released bug: they were drawn by a generator without seed, others in every process and every run."""
    first = labels_of(labels=0.05)
    torch.manual_seed(1)
    torch.rand(5)
    assert torch.equal(labels_of(labels=0.05), first)
    assert not torch.equal(labels_of(labels=0.05, label_seed=1), first)


def test_an_epoch_has_every_image_once_and_labelled_ones_again_for_the_head() -> None:
    plain, data = labels_of(labels=0.05), partly_labelled(PartlyLabelledConfig(labels=0.05, again=0.25))
    split = data.split("train")
    assert split.labels is not None
    k, alone = decoded(split.labels)
    assert torch.equal(k[~alone], plain)
    assert float(alone.double().mean()) == pytest.approx(0.25, abs=1e-3)
    counts = torch.bincount(k[alone]).double()
    assert float(counts.max() / counts.min()) < 1.5
    pixels, labels = split.__getitems__([0, len(plain), len(split) - 1])
    assert labels is not None
    assert torch.equal(labels, split.labels[[0, len(plain), len(split) - 1]])
    base = partly_labelled(PartlyLabelledConfig()).split("train")
    whole, true = base.__getitems__(list(range(len(base))))
    assert true is not None
    for image, label in zip(pixels[1:], labels[1:], strict=True):
        (place,) = (whole == image).flatten(1).all(1).nonzero()[:1, 0]
        assert int(true[place]) == int(decoded(label)[0])  # an image that is there again has its own label


def test_held_out_images_keep_their_labels() -> None:
    data = partly_labelled(PartlyLabelledConfig(labels=0.05, again=0.5))
    for name in ("valid", "test"):
        labels = data.split(name).labels
        assert labels is not None
        assert bool((labels >= 0).all())


def test_attributes_are_kept_or_lost_image_by_image() -> None:
    y = (torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) > 0.5).long()
    kept = chosen(y, 0.25, 0)
    assert len(kept.unique()) == 10


def test_the_settings_of_the_data_beneath_are_checked_and_kept() -> None:
    registry = load_registry()
    overrides = ["data.labels=0.1", "data.settings.valid=0.2"]
    config = resolve(registry, recipe="joint/semi-supervised-digits", overrides=overrides)
    assert from_toml(to_toml(config), registry) == config
    sizes = [len(build_data(config, registry).split(name)) for name in ("train", "valid")]
    assert sizes[1] == 287  # a fifth of 1437
    wrong = resolve(registry, recipe="joint/semi-supervised-digits", overrides=["data.settings.vaild=0.2"])
    with pytest.raises(
        UserError, match=r"unknown key 'data.settings.vaild'.*did you mean data.settings.valid"
    ):
        build_data(wrong, registry)
    with pytest.raises(UserError, match="no labels, so it has none to lose"):
        partly_labelled(PartlyLabelledConfig(of="core/celeba", settings={"download": False}))


# -- two domains ---------------------------------------------------------------------------------------------


def flat(name: str, shape: tuple[int, int, int], value: int, count: int, classes: int = 3) -> Data:
    """Images of one grey level, `value` and up."""
    pixels = torch.full((count, *shape), value, dtype=torch.uint8)
    split = TensorSplit(pixels, torch.arange(count) % classes)
    return Data(DataInfo(name, shape, classes), dict.fromkeys(("train", "valid", "test"), lambda: split))


def test_the_source_has_labels_and_the_target_is_tested_on() -> None:
    data = adapted(
        flat("a", (3, 4, 4), 10, 6), flat("b", (1, 2, 2), 90, 4), DomainsConfig(size=4, channels=3)
    )
    assert data.info.shape == (3, 4, 4)
    train = data.split("train")
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, -1, -1, -1, -1]
    pixels, labels = train.__getitems__([7, 0, 9])
    assert labels is not None
    assert labels.tolist() == [-1, 0, -1]
    assert pixels[:, :, 1:3, 1:3].amax((1, 2, 3)).tolist() == [90, 10, 90]
    held_out, answers = data.split("test").__getitems__([0, 1])
    assert answers is not None
    assert answers.tolist() == [0, 1]
    assert tuple(held_out.shape) == (2, 3, 4, 4)


def test_images_are_padded_with_black_or_reduced() -> None:
    small = torch.full((1, 1, 2, 2), 90, dtype=torch.uint8)
    found = fitted(small, (3, 4, 4))
    assert int(found.sum()) == 3 * 4 * 90
    assert torch.equal(found[0, 0], found[0, 2])
    assert torch.equal(fitted(small, (1, 2, 2)), small)
    large = torch.full((1, 3, 8, 4), 60, dtype=torch.uint8)
    reduced = fitted(large, (1, 4, 4))
    assert reduced[0, 0].unique().tolist() == [0, 60]
    assert int((reduced == 60).sum()) == 8  # a half: 8x4 becomes 4x2, and is padded to 4x4


def test_domains_of_different_classes_are_refused() -> None:
    with pytest.raises(UserError, match="source has 3 classes and"):
        adapted(flat("a", (1, 4, 4), 1, 6), flat("b", (1, 4, 4), 9, 8, classes=4), DomainsConfig())
