"""ReLU made smooth: what is replaced, how it is counted, that it can be undone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_core.errors import UserError
from cdm_plugins_guidance.softplus import SoftReLU6, smooth, smoothed

X = torch.linspace(-2, 2, 12).view(1, 3, 2, 2)


class Activation(nn.ReLU):
    """As other libraries have theirs."""


class Block(nn.Module):
    """One shared activation, called twice; others under names that tell nothing, one in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.again = self.relu
        self.gate = Activation()
        self.steps = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        return self.steps[0](self.gate(self.again(self.mix(self.relu(self.mix(x))))))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Conv2d(3, 2, 1)).eval()


def test_every_module_under_every_name_is_replaced_and_counted(net) -> None:
    before = {name: p.clone() for name, p in net.state_dict().items()}
    report = smooth(net, 3.0, X)
    assert (report.modules, report.calls) == (3, 4)
    assert not any(isinstance(part, nn.ReLU) for part in net.modules())
    block = net[0]
    assert block.relu is block.again
    assert all(not part.training for part in net.modules())
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    assert "3 ReLU modules, called 4 times" in str(report)


def test_it_computes_softplus(net) -> None:
    block = net[0]
    smooth(net, 5.0, X)
    h = F.softplus(block.mix(F.softplus(block.mix(X), 5)), 5)
    expected = net[1](F.softplus(block.steps[0][0](F.softplus(h, 5)), 5))
    assert torch.equal(net(X), expected)


def test_undone_it_is_bitwise_the_network_before(net) -> None:
    before, parts = net(X), list(net.modules())
    with smoothed(net, 3.0, X) as report:
        assert report.modules == 3
        assert not torch.equal(net(X), before)
    assert torch.equal(net(X), before)
    assert list(net.modules()) == parts


def test_beta_inf_changes_nothing() -> None:
    net = nn.Sequential(nn.GELU())
    report = smooth(net, math.inf, X)
    assert (report.modules, report.calls) == (0, 0)
    assert isinstance(net[0], nn.GELU)


@pytest.mark.parametrize("old", [nn.ReLU, nn.ReLU6])
def test_large_beta_is_the_original(old) -> None:
    z = torch.linspace(-3, 9, 101, dtype=torch.float64)
    net = nn.Sequential(old())
    expected = net(z)
    smooth(net, 1e6, z)
    torch.testing.assert_close(net(z), expected, rtol=0, atol=1e-6)


def test_smooth_relu6_is_bounded_and_has_a_curvature() -> None:
    soft, z = SoftReLU6(3.0), torch.tensor([-1e3, 0.0, 3.0, 1e3], dtype=torch.float64, requires_grad=True)
    value = soft(z)
    torch.testing.assert_close(
        value[[0, 2, 3]], torch.tensor([0.0, 3.0, 6.0], dtype=torch.float64), rtol=0, atol=1e-4
    )
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    assert curvature[1] == pytest.approx(3 / 4, rel=1e-6)


class Functional(nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.act, self.call = nn.ReLU(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.act(x))


CALLS = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "method": Tensor.relu,
    "in place": lambda x: x.clone().relu_(),
    "F.relu6": F.relu6,
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: x.clamp_min(0.0),
    "clamp to 6": lambda x: torch.clamp(x, 0, 6),
}


@pytest.mark.parametrize("call", CALLS)
def test_functions_out_of_reach_are_refused_and_nothing_changed(call) -> None:
    net = Functional(CALLS[call])
    act = net.act
    with pytest.raises(UserError, match="Functional calls ReLU as a function"):
        smooth(net, 3.0, X)
    assert net.act is act


def test_other_clamps_are_none_of_its_business() -> None:
    net = Functional(lambda x: x.clamp(-1, 1).clamp(min=1e-5).clamp(max=0))
    assert smooth(net, 3.0, X).calls == 1


def test_no_relu_names_what_there_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU(), nn.SiLU())
    with pytest.raises(
        UserError, match=r"no ReLU to make smooth in Sequential: its activations are GELU, SiLU"
    ):
        smooth(net, 3.0, X)
    with pytest.raises(UserError, match="it has no activation modules"):
        smooth(nn.Sequential(nn.Conv2d(3, 3, 1)), 3.0, X)


def test_what_cannot_be_done() -> None:
    with pytest.raises(UserError, match="itself a ReLU"):
        smooth(nn.ReLU(), 3.0, X)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="out of range"):
            smooth(nn.Sequential(nn.ReLU()), beta, X)


def test_a_trial_that_fails_leaves_the_network_as_it_was(net) -> None:
    parts = list(net.modules())
    with pytest.raises(RuntimeError):
        smooth(net, 3.0, torch.zeros(1, 5, 2, 2))
    assert list(net.modules()) == parts


@pytest.mark.parametrize(
    ("name", "modules", "calls"),
    [("resnet18", 9, 17), ("resnet50", 17, 49), ("resnet101", 34, 100), ("mobilenet_v2", 35, 35)],
)
def test_published_networks(name, modules, calls) -> None:
    models = pytest.importorskip(
        "torchvision.models", reason="torchvision is not installed", exc_type=Exception
    )
    with torch.device("meta"):
        net = models.get_model(name).eval()
        report = smooth(net, 3.0, torch.zeros(1, 3, 64, 64))
    assert (report.modules, report.calls) == (modules, calls)
