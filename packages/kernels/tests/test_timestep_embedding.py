import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cdm_kernels import adm_embedding, ddpm_embedding, edm_fourier_embedding, edm_positional_embedding

T = torch.tensor([0.0, 1.0, 37.5, 999.0], dtype=torch.float64)
FREQUENCIES = torch.tensor([0.5, -3.0, 11.0, 1.25], dtype=torch.float64)

CASES = {
    "ddpm": (lambda t: ddpm_embedding(t, 8), [10000 ** (-i / 3) for i in range(4)], "sin first"),
    "adm": (lambda t: adm_embedding(t, 8), [10000 ** (-i / 4) for i in range(4)], "cos first"),
    "edm": (lambda t: edm_positional_embedding(t, 8), [10000 ** (-i / 4) for i in range(4)], "cos first"),
    "edm-endpoint": (
        lambda t: edm_positional_embedding(t, 8, endpoint=True),
        [10000 ** (-i / 3) for i in range(4)],
        "cos first",
    ),
    "fourier": (
        lambda t: edm_fourier_embedding(t, FREQUENCIES),
        [2 * math.pi * f for f in FREQUENCIES.tolist()],
        "cos first",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_convention_is_its_formula(name):
    embed, frequencies, order = CASES[name]
    expected = []
    for t in T.tolist():
        sines, cosines = [math.sin(t * w) for w in frequencies], [math.cos(t * w) for w in frequencies]
        expected.append(sines + cosines if order == "sin first" else cosines + sines)
    torch.testing.assert_close(embed(T), torch.tensor(expected, dtype=torch.float64))
    # Phases reach 1e3 radians, where float32 resolves 6e-5 (7e4 and 4e-3 with Fourier frequencies).
    assert (embed(T.float()) - embed(T)).abs().max() < (2e-2 if name == "fourier" else 2e-4)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_in_time(name):
    t = torch.tensor([0.3, 1.7], dtype=torch.float64, requires_grad=True)
    assert gradcheck(CASES[name][0], t)
    assert gradgradcheck(CASES[name][0], t)


@pytest.mark.parametrize("embed", [ddpm_embedding, adm_embedding])
def test_odd_widths_end_in_a_zero_and_steps_may_be_integers(embed):
    out = embed(torch.tensor([3, 4]), 9)
    torch.testing.assert_close(out[:, :8], embed(torch.tensor([3.0, 4.0]), 8))
    assert torch.equal(out[:, 8], torch.zeros(2))


def test_edm_positional_with_swapped_halves_is_ddpm():
    cos, sin = edm_positional_embedding(T, 16, endpoint=True).chunk(2, 1)
    torch.testing.assert_close(torch.cat([sin, cos], 1), ddpm_embedding(T, 16))
