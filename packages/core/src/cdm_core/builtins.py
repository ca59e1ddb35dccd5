"""What core registers through the hooks that plugins use: data, a loss, samplers, adapters, metrics."""

from __future__ import annotations

from collections.abc import Iterable

from cdm_core.adapter_configs import BayesConfig, CFGConfig
from cdm_core.data import configs as data
from cdm_core.denoising_configs import DenoisingConfig
from cdm_core.hookspecs import hookimpl
from cdm_core.records import Adapter, Dataset, Metric, Objective, Sampler
from cdm_core.sampler_configs import ChurnConfig, DDIMConfig, DDPMConfig

_DENOISE = ("denoise",)


@hookimpl
def register_objectives() -> Iterable[Objective]:
    return [
        Objective(
            "denoising",
            "Squared error and likelihood bound of networks on discrete levels (Ho et al. 2020)",
            "cdm_core.denoising:DenoisingObjective",
            DenoisingConfig,
            requires=_DENOISE,
        )
    ]


@hookimpl
def register_samplers() -> Iterable[Sampler]:
    module = "cdm_core.samplers"
    return [
        Sampler(
            "ddim",
            "DDIM, deterministic or with noise (Song et al. 2021)",
            f"{module}:ddim",
            DDIMConfig,
            (),
            _DENOISE,
        ),
        Sampler(
            "ddpm",
            "Ancestral sampling (Ho et al. 2020), right when strided",
            f"{module}:ddpm",
            DDPMConfig,
            (),
            _DENOISE,
        ),
        Sampler(
            "dpm-solver",
            "DPM-Solver, second order in the noise (Lu et al. 2022a)",
            f"{module}:dpm_solver",
            None,
            (),
            _DENOISE,
        ),
        Sampler(
            "dpm-solver++",
            "DPM-Solver++(2M), second order in x0 (Lu et al. 2022b)",
            f"{module}:dpm_solver_pp",
            None,
            (),
            _DENOISE,
        ),
        Sampler(
            "euler",
            "Euler steps, with churn or without (Karras et al. 2022)",
            f"{module}:euler",
            ChurnConfig,
            (),
            _DENOISE,
        ),
        Sampler(
            "heun",
            "Heun steps, with churn or without (Karras et al. 2022)",
            f"{module}:heun",
            ChurnConfig,
            (),
            _DENOISE,
        ),
    ]


@hookimpl
def register_adapters() -> Iterable[Adapter]:
    module = "cdm_core.adapters"
    return [
        Adapter(
            "cfg",
            "Classifier-free guidance: (1 + w) D(x, y) - w D(x)",
            f"{module}:ClassifierFreeGuidance",
            CFGConfig,
            provides=_DENOISE,
            requires=_DENOISE,
        ),
        Adapter(
            "bayes",
            "Bayes' rule on class-conditional densities: one forward pass a class",
            f"{module}:BayesClassifier",
            BayesConfig,
            provides=("class_logits",),
            requires=("log_density",),
        ),
    ]


@hookimpl
def register_datasets() -> Iterable[Dataset]:
    vision = "cdm_core.data.vision"
    return [
        Dataset(
            "digits", "scikit-learn's 8x8 digits, embedded", "cdm_core.data.digits:load", data.DigitsConfig
        ),
        Dataset(
            "gaussian-mixture",
            "Points with exactly known density, score and denoiser",
            "cdm_core.data.mixture:load",
            data.GaussianMixtureConfig,
        ),
        Dataset("mnist", "MNIST, 28x28 grey", f"{vision}:mnist", data.MnistConfig),
        Dataset(
            "fashion-mnist", "Fashion-MNIST, 28x28 grey", f"{vision}:fashion_mnist", data.FashionMnistConfig
        ),
        Dataset("cifar10", "CIFAR-10, 32x32 colour", f"{vision}:cifar10", data.Cifar10Config),
        Dataset("cifar100", "CIFAR-100, 32x32 colour", f"{vision}:cifar100", data.Cifar100Config),
        Dataset("svhn", "Street View House Numbers, 32x32 colour", f"{vision}:svhn", data.SvhnConfig),
        Dataset("celeba", "CelebA faces, cropped", f"{vision}:celeba", data.CelebAConfig),
        Dataset("image-folder", "Any tree of images", "cdm_core.data.folder:load", data.ImageFolderConfig),
    ]


@hookimpl
def register_metrics() -> Iterable[Metric]:
    module, density = "cdm_core.metrics", ("log_density",)
    return [
        Metric("nll", "Mean negative log-likelihood, nats and bits/dim", f"{module}:nll", requires=density),
        Metric(
            "bound",
            "Likelihood that the ancestral sampler guarantees",
            f"{module}:bound",
            requires=_DENOISE,
        ),
        Metric(
            "baselines",
            "Gaussian and Gaussian mixture fitted to the same data",
            f"{module}:baselines",
            requires=density,
        ),
        Metric(
            "nearest-neighbour",
            "Are samples copies of training images?",
            f"{module}:nearest_neighbour",
            requires=_DENOISE,
        ),
        Metric(
            "sliced-wasserstein",
            "Distance of samples from the data",
            f"{module}:sliced_wasserstein",
            requires=_DENOISE,
        ),
        Metric("accuracy", "Accuracy of the classifier", f"{module}:accuracy", requires=("class_logits",)),
    ]
