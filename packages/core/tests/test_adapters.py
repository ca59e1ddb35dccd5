"""Adapters against the exact posterior and the exact guided prediction of a Gaussian mixture."""

import copy
import math

import pytest
import torch

from cdm_core.adapter_configs import BayesConfig, CFGConfig
from cdm_core.adapters import BayesClassifier, ClassifierFreeGuidance, Clipped
from cdm_core.capabilities import offered
from cdm_core.errors import UserError
from cdm_core.mixtures import GaussianMixture
from cdm_core.samplers import Prediction, ddim

WEIGHTS = torch.tensor([0.5, 0.3, 0.2]).double()
MEANS = torch.tensor([[-1.0, 0.2], [0.8, 0.5], [0.1, -0.9]])
COVARIANCES = torch.stack([torch.eye(2) * s for s in (0.1, 0.3, 0.2)])


class Conditional(GaussianMixture):
    """The mixture as a class-conditional model that records how it is called."""

    num_classes = 3
    sigmas = torch.tensor([0.1, 1.0]).double()

    def __init__(self):
        super().__init__(WEIGHTS, MEANS, COVARIANCES)
        self.calls = []

    def denoise(self, x, sigma, y=None):
        self.calls.append(("denoise", len(x), y))
        return super().denoise(x, sigma, y)

    def log_density(self, x, y=None, sigma=None):
        self.calls.append(("log_density", len(x), sigma))
        if sigma is not None:
            assert bool((sigma > 0).all())  # sigma None is how a model is asked about clean data
        return super().log_density(x, y, sigma)


class WithNullLabel(Conditional):
    """The last label means "no class"; a batch may mix it with others."""

    null_label = 3

    def denoise(self, x, sigma, y=None):
        self.calls.append(("denoise", len(x), y))
        plain = GaussianMixture.denoise(self, x, sigma)
        labelled = GaussianMixture.denoise(self, x, sigma, y.clamp(max=2))
        return torch.where((y == 3)[:, None, None, None], plain, labelled)


def noisy(rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, 1, 1, generator=generator, dtype=torch.float64)
    sigma = torch.linspace(0.1, 3, rows, dtype=torch.float64)
    return x, sigma, torch.arange(rows) % 3


# ---- Classifier-free guidance


@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0, -0.3])
@pytest.mark.parametrize("model_class", [Conditional, WithNullLabel])
def test_guidance_moves_the_score_by_the_gradient_of_the_posterior(model_class, weight):
    """(1 + w) D(x, y) - w D(x) = D(x, y) + w sigma^2 grad log p(y | x)."""
    x, sigma, y = noisy()
    guided = ClassifierFreeGuidance(CFGConfig(weight=weight), model_class())
    exact = GaussianMixture(WEIGHTS, MEANS, COVARIANCES)
    x.requires_grad_()
    log_posterior = exact.class_logits(x, sigma).log_softmax(1).gather(1, y[:, None]).sum()
    (gradient,) = torch.autograd.grad(log_posterior, x)
    x = x.detach()
    expected = exact.denoise(x, sigma, y) + weight * sigma.view(-1, 1, 1, 1) ** 2 * gradient
    torch.testing.assert_close(guided.denoise(x, sigma, y), expected, rtol=1e-9, atol=1e-9)


def test_guidance_takes_one_doubled_batch_where_the_model_can():
    x, sigma, y = noisy()
    model = WithNullLabel()
    ClassifierFreeGuidance(CFGConfig(weight=1.0), model).denoise(x, sigma, y)
    ((_, rows, labels),) = model.calls
    assert rows == 12
    assert labels.tolist() == [*y.tolist(), *[3] * 6]


def test_guidance_takes_two_calls_elsewhere():
    x, sigma, y = noisy()
    model = Conditional()
    ClassifierFreeGuidance(CFGConfig(weight=1.0), model).denoise(x, sigma, y)
    assert [(rows, labels is None) for _, rows, labels in model.calls] == [(6, False), (6, True)]


def test_no_weight_is_the_model_itself_bitwise_in_one_call():
    x, sigma, y = noisy()
    model = Conditional()
    plain = GaussianMixture(WEIGHTS, MEANS, COVARIANCES).denoise(x, sigma, y)
    assert torch.equal(ClassifierFreeGuidance(CFGConfig(weight=0.0), model).denoise(x, sigma, y), plain)
    assert len(model.calls) == 1


def test_without_labels_the_prediction_is_unconditional():
    x, sigma, _ = noisy()
    model = Conditional()
    guided = ClassifierFreeGuidance(CFGConfig(weight=2.0), model)
    plain = GaussianMixture(WEIGHTS, MEANS, COVARIANCES).denoise(x, sigma)
    assert torch.equal(guided.denoise(x, sigma), plain)
    assert len(model.calls) == 1


def test_guided_samples_move_towards_their_class():
    model, y = Conditional(), torch.zeros(64, dtype=torch.long)
    start = 10 * torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = torch.logspace(1, -2, 60, dtype=torch.float64)
    posterior = []
    for weight in (0.0, 2.0):
        guided = ClassifierFreeGuidance(CFGConfig(weight=weight), model)
        x0 = ddim(lambda x, s, g=guided: g.denoise(x, s, y), start, sigmas)
        posterior.append(float(model.class_logits(x0, 0.0).softmax(1)[:, 0].mean()))
    assert posterior[0] < posterior[1]
    assert posterior[1] > 0.99


def test_a_guided_model_offers_no_density():
    guided = ClassifierFreeGuidance(CFGConfig(), Conditional())
    assert offered(Conditional()) == {"denoise", "log_density", "class_logits"}
    assert offered(guided) == {"denoise", "class_logits"}
    assert torch.equal(guided.sigmas, Conditional.sigmas)
    assert guided.num_classes == 3
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = guided.no_such_thing


class Learned(WithNullLabel):
    """It has learned a variance: its label, so that one sees whose it is."""

    def predict(self, x, sigma, y=None):
        label = torch.full((len(x),), 3) if y is None else y
        return Prediction(
            self.denoise(x, sigma, label), label.to(x.dtype)[:, None, None, None].expand(x.shape)
        )


def test_the_learned_variance_is_the_conditional_one():
    x, sigma, y = noisy()
    guided = ClassifierFreeGuidance(CFGConfig(weight=1.5), Learned())
    x0, variance = guided.predict(x, sigma, y)
    assert torch.equal(variance[:, 0, 0, 0], y.double())
    plain, conditional = (Learned().denoise(x, sigma, label) for label in (torch.full_like(y, 3), y))
    torch.testing.assert_close(x0, 2.5 * conditional - 1.5 * plain)
    assert torch.equal(guided.denoise(x, sigma, y), x0)


def test_some_channels_may_stay_conditional():
    model = Learned()
    x, sigma, y = noisy()
    everywhere = ClassifierFreeGuidance(CFGConfig(weight=1.5), model).denoise(x, sigma, y)
    model.cfg_channels = 1
    first = ClassifierFreeGuidance(CFGConfig(weight=1.5), model).denoise(x, sigma, y)
    assert torch.equal(first[:, :1], everywhere[:, :1])
    assert torch.equal(first[:, 1:], model.denoise(x, sigma, y)[:, 1:])


def test_clipped_predictions_keep_to_the_range_of_the_data():
    x, sigma, y = noisy()
    x = 3 * x
    clipped, model = Clipped(Learned()), Learned()
    x0, variance = clipped.predict(x, sigma, y)
    assert torch.equal(x0, model.denoise(x, sigma, y).clamp(-1, 1))
    assert not torch.equal(x0, model.denoise(x, sigma, y))
    assert torch.equal(clipped.denoise(x, sigma, y), x0)
    assert torch.equal(variance, model.predict(x, sigma, y).variance)
    assert Clipped(Conditional()).predict(x, sigma, y).variance is None
    assert offered(clipped) == offered(model)


def test_no_prediction_goes_round_an_adapter():
    """A sampler that finds `predict` takes it for the whole model's."""
    bayes = BayesClassifier(BayesConfig(), Learned())
    for name in ("predict", "predict_step", "begin_step"):
        assert not hasattr(bayes, name)


def test_an_adapter_can_be_copied():
    guided = copy.deepcopy(ClassifierFreeGuidance(CFGConfig(weight=2.0), Conditional()))
    assert guided.weight == 2.0
    assert guided.num_classes == 3


# ---- Bayes' rule


@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0])
def test_the_bayes_classifier_is_the_exact_posterior(noise):
    x, _, _ = noisy(20)
    sigma = torch.full((20,), noise, dtype=torch.float64)
    prior = tuple(WEIGHTS.tolist())
    logits = BayesClassifier(BayesConfig(prior=prior), Conditional()).class_logits(x, sigma)
    exact = GaussianMixture(WEIGHTS, MEANS, COVARIANCES).class_logits(x, sigma)
    torch.testing.assert_close(logits.softmax(1), exact.softmax(1), rtol=1e-10, atol=1e-12)


def test_its_logits_are_joint_densities_in_nats():
    x, sigma, _ = noisy()
    logits = BayesClassifier(BayesConfig(prior=(5.0, 3.0, 2.0)), Conditional()).class_logits(x, sigma)
    density = GaussianMixture(WEIGHTS, MEANS, COVARIANCES).log_density(x, None, sigma)
    torch.testing.assert_close(logits.logsumexp(1), density)


def test_no_prior_is_a_uniform_one():
    x, sigma, _ = noisy()
    logits = BayesClassifier(BayesConfig(), Conditional()).class_logits(x, sigma)
    columns = [Conditional().log_density(x, torch.full((6,), k), sigma) - math.log(3) for k in range(3)]
    torch.testing.assert_close(logits, torch.stack(columns, 1))


def test_clean_and_noisy_rows_may_share_a_batch():
    x, sigma, _ = noisy()
    sigma[[0, 3]] = 0
    classifier = BayesClassifier(BayesConfig(), Conditional())
    together = classifier.class_logits(x, sigma)
    alone = torch.cat([classifier.class_logits(x[[i]], sigma[[i]]) for i in range(6)])
    torch.testing.assert_close(together, alone)


def test_a_class_costs_one_pass():
    x, sigma, _ = noisy()
    model = Conditional()
    BayesClassifier(BayesConfig(), model).class_logits(x, sigma)
    assert [(name, rows) for name, rows, _ in model.calls] == [("log_density", 6)] * 3


def test_the_classifier_adds_to_what_the_model_offers():
    classifier = BayesClassifier(BayesConfig(), Conditional())
    assert offered(classifier) == {"denoise", "log_density", "class_logits"}
    x, sigma, y = noisy()
    assert torch.equal(classifier.denoise(x, sigma, y), Conditional().denoise(x, sigma, y))


def test_a_prior_of_the_wrong_length_is_refused():
    with pytest.raises(UserError, match=r"2 entries.* 3 classes"):
        BayesClassifier(BayesConfig(prior=(1.0, 1.0)), Conditional())


@pytest.mark.parametrize("classes", [None, 0])
def test_a_model_without_classes_is_refused(classes):
    model = Conditional()
    model.num_classes = classes
    with pytest.raises(UserError, match="needs a class-conditional model"):
        BayesClassifier(BayesConfig(), model)


@pytest.mark.parametrize("prior", [(0.0, 1.0), (-1.0, 2.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_a_prior_that_is_none_is_refused(prior):
    with pytest.raises(ValueError, match="prior must hold positive"):
        BayesConfig(prior=prior).check()
