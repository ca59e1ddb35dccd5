"""The joint loss beside its formula, term by term; who is trained by what; what a step pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_core.data import DataInfo
from cdm_core.denoising import DenoisingObjective
from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_core.testing.conformance import normal, randomise
from cdm_plugins_joint.configs import AugmentationConfig, JointConfig, JointObjectiveConfig
from cdm_plugins_joint.model import JointModel
from cdm_plugins_joint.objective import JointObjective
from cdm_plugins_joint.semi_supervised import encoded_alone

ROWS, CLASSES = 6, 5
INFO = DataInfo("test", (1, 8, 8), num_classes=CLASSES)
DROPPED = torch.tensor([-1, 1, 2, -1, 0, 3])  # labels, two of them missing


def small(**changes: Any) -> JointModel:
    """In float64, every weight of it mattering."""
    config = JointConfig(**{**vars(JointConfig.small()), **changes})
    config.check()
    torch.manual_seed(0)
    model = JointModel(config, INFO)
    randomise(model)
    return model.double().eval()


def objective(**changes: Any) -> JointObjective:
    config = JointObjectiveConfig(**changes)
    config.check()
    return JointObjective(config)


def batch() -> tuple[Tensor, Tensor]:
    return normal(ROWS, *INFO.shape, dtype=torch.float64).tanh(), torch.arange(ROWS) % CLASSES


def noised(model: JointModel, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and eps as the objective draws them."""
    draws = Draws(0, len(x0))
    t, eps = draws.integers(len(model.path)), draws.normal(*x0.shape[1:]).double()
    return model.path.noised(x0, t, eps), t, eps


def formula(model: JointModel, x: Tensor, t: Tensor) -> Tensor:
    """Logits by the formula: a pass of its own, every map's mean, the head."""
    z = model.encode(
        x, model.embed(t, None if model.null_label is None else torch.full_like(t, model.null_label))
    )
    return model.logits([h.mean((2, 3)) for h in (*z.skips, z.middle)], t)


def gradients(model: JointModel, loss: Tensor) -> list[Tensor]:
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    assert len(names) == len(found)
    return list(found)


# -- the formula ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classify", ["clean", "noised", "both"])
@pytest.mark.parametrize("head", ["embedded", "official"])
def test_it_is_the_formula_with_a_pass_for_every_term(classify: str, head: str) -> None:
    model, (x0, y) = small(head=head), batch()
    found = objective(classify=classify, w_ce=0.3)(model, x0, y, Draws(0, ROWS))
    x_t, t, eps = noised(model, x0)
    mse = (model(x_t, t) - eps).square().mean()
    clean = F.cross_entropy(formula(model, x0, torch.zeros_like(t)), y)
    noisy = F.cross_entropy(formula(model, x_t, t), y)
    ce = {"clean": clean, "noised": noisy, "both": (clean + noisy) / 2}[classify]
    torch.testing.assert_close(found["mse"], mse.detach())
    torch.testing.assert_close(found["loss"], mse + 0.3 * ce)
    if classify != "noised":
        torch.testing.assert_close(found["ce"], clean.detach())
    if classify != "clean":
        torch.testing.assert_close(found["ce_noised"], noisy.detach())
    for own, expected in zip(gradients(model, found["loss"]), gradients(model, mse + 0.3 * ce), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-7, atol=1e-9)


def test_attributes_have_a_binary_cross_entropy_each() -> None:
    """Mean over images and attributes; accuracy likewise."""
    model, (x0, _) = small(multi_label=True), batch()
    y = (normal(ROWS, CLASSES, seed=3) > 0).long()
    found = objective(classify="clean", w_ce=0.3)(model, x0, y, Draws(0, ROWS))
    logits = formula(model, x0, torch.zeros(ROWS, dtype=torch.int64))
    torch.testing.assert_close(found["ce"], F.binary_cross_entropy_with_logits(logits, y.double()))
    torch.testing.assert_close(found["accuracy"], ((logits > 0) == (y > 0)).double().mean())


def test_smoothing_and_taper_are_what_they_say() -> None:
    model, (x0, y) = small(), batch()
    found = objective(classify="noised", w_ce=1.0, smoothing=0.2, taper=2.0)(model, x0, y, Draws(0, ROWS))
    x_t, t, _ = noised(model, x0)
    ce = F.cross_entropy(formula(model, x_t, t), y, label_smoothing=0.2, reduction="none")
    tapered = ((1 - t / len(model.path)) ** 2 * ce).mean()
    torch.testing.assert_close(found["loss"] - found["mse"], tapered)


def test_the_denoisers_part_is_cores_in_every_form() -> None:
    """KL, learned variance, weights: nothing of it is written anew."""
    model, (x0, y) = small(learn_sigma=True), batch()
    for changes in ({"loss": "kl"}, {"weight": "min-snr"}, {"weight": "p2"}):
        made = objective(train="denoiser")
        config = type(made.config.denoising)(**changes)
        found = objective(train="denoiser", denoising=config)(model, x0, y, Draws(0, ROWS))
        expected = DenoisingObjective(config)(model, x0, None, Draws(0, ROWS))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


# -- who is trained by what ----------------------------------------------------------------------------------


def test_alone_or_together_the_denoiser_sees_the_same_numbers() -> None:
    model, (x0, y) = small(), batch()
    augmentation = AugmentationConfig(crop=0.5, rotate=0.5)
    model.train()
    found = [
        objective(train=train, augmentation=augmentation)(model, x0, y, Draws(0, ROWS))
        for train in ("both", "denoiser", "classifier")
    ]
    torch.testing.assert_close(found[0]["mse"], found[1]["mse"])
    torch.testing.assert_close(found[0]["ce"], found[2]["ce"])
    assert "ce" not in found[1]
    assert "mse" not in found[2]
    torch.testing.assert_close(found[2]["loss"].detach(), found[2]["ce"])


@pytest.mark.parametrize("classify", ["clean", "noised", "both"])
def test_a_classifier_alone_leaves_the_decoder_be(classify: str) -> None:
    model, (x0, y) = small(), batch()
    objective(train="classifier", classify=classify)(model, x0, y, Draws(0, ROWS))["loss"].backward()
    for name, parameter in model.named_parameters():
        decoder = name.startswith(("output_blocks", "out."))
        assert (parameter.grad is None) == decoder, name


def test_a_denoiser_alone_leaves_the_head_be() -> None:
    model, (x0, y) = small(), batch()
    objective(train="denoiser")(model, x0, y, Draws(0, ROWS))["loss"].backward()
    assert all((p.grad is None) == name.startswith("class_head") for name, p in model.named_parameters())


def test_only_what_the_head_is_shown_is_augmented_and_in_training_only() -> None:
    model, (x0, y) = small(), batch()
    plain, changed = (
        objective(classify="both", augmentation=a)
        for a in (AugmentationConfig(), AugmentationConfig(flip=1.0))
    )
    for train in (False, True):
        model.train(train)
        a, b = (o(model, x0, y, Draws(0, ROWS)) for o in (plain, changed))
        assert torch.equal(a["mse"], b["mse"])
        assert torch.equal(a["ce_noised"], b["ce_noised"])
        assert torch.equal(a["ce"], b["ce"]) != train


@pytest.mark.parametrize("classify", ["noised", "both"])
def test_a_class_that_the_denoiser_is_told_does_not_reach_the_head(classify: str) -> None:
    model, (x0, y) = small(class_cond=True), batch()
    made = objective(classify=classify)
    before = made(model.train(), x0, y, Draws(0, ROWS))
    with torch.no_grad():
        model.label_emb.weight[:CLASSES] += 1
    after = made(model, x0, y, Draws(0, ROWS))
    torch.testing.assert_close(after["ce_noised"], before["ce_noised"])
    assert not torch.equal(after["mse"], before["mse"])


def test_the_classifier_may_start_late_and_softly() -> None:
    """Weights by training passes of the head, which are in the state dict: a run that resumes goes on."""
    model, (x0, y) = small(), batch()
    made, weights = objective(w_ce=0.5, late_start=2, ramp=2), []
    for _ in range(5):
        found = made(model.train(), x0, y, Draws(0, ROWS))
        weights.append(float((found["loss"].detach() - found["mse"]) / found["ce"]))
    assert weights == pytest.approx([0, 0, 0.25, 0.5, 0.5], abs=1e-9)


# -- missing labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classify", ["clean", "noised", "both"])
def test_images_without_label_are_for_the_denoiser_alone(classify: str) -> None:
    """The same loss as with the labelled images alone in the head's term."""
    model, (x0, _) = small(head="official"), batch()
    found = objective(classify=classify, w_ce=0.3)(model, x0, DROPPED, Draws(0, ROWS))
    known, (x_t, t, eps) = DROPPED >= 0, noised(model, x0)
    mse = (model(x_t, t) - eps).square().mean()
    clean = F.cross_entropy(formula(model, x0, torch.zeros_like(t))[known], DROPPED[known])
    noisy = F.cross_entropy(formula(model, x_t, t)[known], DROPPED[known])
    ce = {"clean": clean, "noised": noisy, "both": (clean + noisy) / 2}[classify]
    torch.testing.assert_close(found["loss"], mse + 0.3 * ce)


def test_images_without_label_do_not_move_the_norms() -> None:
    """Released bug: the loss of unlabelled images is multiplied by 0, after it has moved the BatchNorms."""
    model, (x0, _) = small(head="official"), batch()
    other = x0.clone()
    other[DROPPED < 0] = 5.0
    seen = []
    for images in (x0, other):
        model.load_state_dict(small(head="official").state_dict())
        objective()(model.train(), images, DROPPED, Draws(0, ROWS))
        seen.append(model.clasifier.bn_1.running_mean.clone())
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("classify", ["clean", "noised", "both"])
def test_images_for_the_head_alone_are_not_denoised(classify: str) -> None:
    model, (x0, y) = small(), batch()
    alone = torch.tensor([False, True, False, False, True, False])
    found = objective(classify=classify, w_ce=0.3)(
        model, x0, torch.where(alone, encoded_alone(y), y), Draws(0, ROWS)
    )
    x_t, t, eps = noised(model, x0)
    mse = (model(x_t, t) - eps)[~alone].square().mean()
    clean = F.cross_entropy(formula(model, x0, torch.zeros_like(t)), y)
    noisy = F.cross_entropy(formula(model, x_t, t), y)
    ce = {"clean": clean, "noised": noisy, "both": (clean + noisy) / 2}[classify]
    torch.testing.assert_close(found["loss"], mse + 0.3 * ce)


def test_attributes_may_be_unknown_one_by_one() -> None:
    """Released bug: with attributes, labels that are missing break the batch."""
    model, (x0, _) = small(multi_label=True), batch()
    y = (normal(ROWS, CLASSES, seed=3) > 0).long()
    y[0], y[1, 2] = -1, -1
    found = objective()(model, x0, y, Draws(0, ROWS))
    logits = formula(model, x0, torch.zeros(ROWS, dtype=torch.int64))
    terms = F.binary_cross_entropy_with_logits(logits, y.double().clamp(min=0), reduction="none")
    means = [row[label >= 0].mean() for row, label in zip(terms[1:], y[1:], strict=True)]
    torch.testing.assert_close(found["ce"], torch.stack(means).mean())


@pytest.mark.parametrize("train", ["both", "classifier"])
@pytest.mark.parametrize("classify", ["clean", "noised", "both"])
@pytest.mark.parametrize("head", ["embedded", "official"])
def test_a_batch_without_labels_is_no_accident(train: str, classify: str, head: str) -> None:
    model, (x0, _) = small(head=head), batch()
    y = torch.full((ROWS,), -1)
    found = objective(train=train, classify=classify)(model.train(), x0, y, Draws(0, ROWS))
    found["loss"].backward()
    suffix = "_noised" if classify == "noised" else ""
    assert float(found[f"ce{suffix}"]) == float(found[f"accuracy{suffix}"]) == 0
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    if train == "both":
        torch.testing.assert_close(found["loss"].detach(), found["mse"])


def test_a_label_that_a_class_conditional_denoiser_misses_is_none() -> None:
    model, (x0, _) = small(class_cond=True), batch()
    found = objective(train="both")(model, x0, DROPPED, Draws(0, ROWS))
    x_t, t, eps = noised(model, x0)
    told = torch.where(DROPPED < 0, CLASSES, DROPPED)
    torch.testing.assert_close(found["mse"], (model(x_t, t, told) - eps).square().mean().detach())


def test_labels_of_another_kind_are_refused() -> None:
    x0, y = batch()
    with pytest.raises(
        UserError, match=r"labels of shape \(6,\), where model.multi_label = true wants \(6, 5\)"
    ):
        objective()(small(multi_label=True), x0, y, Draws(0, ROWS))
    with pytest.raises(UserError, match="trained on labelled data"):
        objective()(small(), x0, None, Draws(0, ROWS))
    objective(train="denoiser")(small(), x0, None, Draws(0, ROWS))


# -- what a step pays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "changes", "encoded", "decoded"),
    [
        ({"classify": "clean"}, {}, [2 * ROWS], [ROWS]),
        ({"classify": "noised"}, {}, [ROWS], [ROWS]),
        ({"classify": "both"}, {}, [2 * ROWS], [ROWS]),
        ({"classify": "noised"}, {"learn_sigma": True}, [ROWS], [ROWS]),  # one pass for both of its terms
        ({"train": "denoiser"}, {}, [ROWS], [ROWS]),
        ({"train": "classifier"}, {}, [ROWS], []),
        ({"classify": "noised"}, {"class_cond": True}, [2 * ROWS], [ROWS]),  # the head may not share it
    ],
)
def test_the_encoder_runs_once_and_over_no_row_twice(
    settings: Any, changes: Any, encoded: list[int], decoded: list[int]
) -> None:
    model, (x0, y) = small(**changes), batch()
    seen: dict[str, list[int]] = {"middle": [], "out": []}
    model.middle_block.register_forward_hook(lambda m, args, h: seen["middle"].append(len(h)))
    model.out["2"].register_forward_hook(lambda m, args, h: seen["out"].append(len(h)))
    objective(**settings)(model.train(), x0, y, Draws(0, ROWS))
    assert (seen["middle"], seen["out"]) == (encoded, decoded)
