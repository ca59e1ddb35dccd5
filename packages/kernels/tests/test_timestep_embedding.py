import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from cdm_kernels import (
    adm_embedding,
    cpp,
    ddpm_embedding,
    edm_fourier_embedding,
    edm_positional_embedding,
    timestep_embedding,
    use,
)
from cdm_kernels.testing import assert_orders_close, orders
from cdm_kernels.timestep_embedding import reference, sinusoidal_embedding

T = torch.tensor([0.0, 1.0, 37.5, 999.0], dtype=torch.float64)
FREQUENCIES = torch.tensor([0.5, -3.0, 11.0, 1.25], dtype=torch.float64)

CONVENTIONS = {
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
# Half, odd or even, which half is first, factor.
CASES = [
    (1, 2, True, 1.0),
    (1, 3, False, 1.0),
    (5, 10, False, 0.5),
    (13, 27, True, -1.5),
    (64, 128, True, 1.0),
]


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    with use(request.param):
        yield request.param


def place(backend, device):
    return device if backend == "triton" else "cpu"


def inputs(half, dtype, batch=3, device="cpu"):
    """Leaves t and frequencies; phases stay small, where float32 resolves 5e-7."""
    generator = torch.Generator().manual_seed(0)
    t, frequencies = torch.rand(batch, generator=generator) * 8, torch.rand(half, generator=generator)
    return [part.to(device, dtype).requires_grad_() for part in (t, frequencies)]


def operator(function, case):
    return lambda t, frequencies: function(t, frequencies, case[2], case[1], case[3])


def compare(case, dtype, device="cpu"):
    found = orders(operator(sinusoidal_embedding, case), inputs(case[0], dtype, device=device))
    wide = [part.double().detach().requires_grad_() for part in inputs(case[0], dtype)]
    assert found[0][0].dtype == dtype
    on_cpu = [[part.cpu() for part in order] for order in found]
    assert_orders_close(on_cpu, orders(operator(reference, case), wide), dtype)


def worst_error(t, frequencies, dim=None):
    """Of float32 sines and cosines, beside those of the same float32 phases in float64."""
    half = len(frequencies)
    found = sinusoidal_embedding(t, frequencies, True, dim or 2 * half).cpu().double()
    phase = (t[:, None] * frequencies).cpu().double()
    exact = torch.cat([phase.sin(), phase.cos()], 1)
    return (found[:, : 2 * half] - exact).abs().max().item()


# -- the conventions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVENTIONS)
def test_each_convention_is_its_formula(name, backend, device):
    embed, frequencies, order = CONVENTIONS[name]
    expected = []
    for t in T.tolist():
        sines, cosines = [math.sin(t * w) for w in frequencies], [math.cos(t * w) for w in frequencies]
        expected.append(sines + cosines if order == "sin first" else cosines + sines)
    exact = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(embed(T), exact)
    # Phases reach 1e3 radians, where float32 resolves 6e-5 (7e4 and 4e-3 with Fourier frequencies).
    found = embed(T.float().to(place(backend, device))).cpu()
    assert (found - exact).abs().max() < (2e-2 if name == "fourier" else 2e-4)


@pytest.mark.parametrize("backend_name", ["reference", "cpp"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_derivatives_in_time(name, backend_name):
    t = torch.tensor([0.3, 1.7], dtype=torch.float64, requires_grad=True)
    with use(backend_name):
        assert gradcheck(CONVENTIONS[name][0], t)
        assert gradgradcheck(CONVENTIONS[name][0], t)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("embed", [ddpm_embedding, adm_embedding])
def test_odd_widths_end_in_a_zero_and_steps_may_be_integers(embed, backend, device):
    out = embed(torch.tensor([3, 4], device=place(backend, device)), 9)
    torch.testing.assert_close(out[:, :8], embed(torch.tensor([3.0, 4.0], device=out.device), 8))
    assert torch.equal(out[:, 8].cpu(), torch.zeros(2))


def test_edm_positional_with_swapped_halves_is_ddpm():
    cos, sin = edm_positional_embedding(T, 16, endpoint=True).chunk(2, 1)
    torch.testing.assert_close(torch.cat([sin, cos], 1), ddpm_embedding(T, 16))


# -- the kernels ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpp(case, dtype, level):
    with use("cpp"):
        compare(case, dtype)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case, device):
    with use("triton"):
        compare(case, torch.float32, device)


def test_derivatives_of_the_cpp_kernel_in_both_arguments(level):
    with use("cpp"):
        for case in CASES[1:3]:
            assert gradcheck(operator(sinusoidal_embedding, case), inputs(case[0], torch.float64))
            assert gradgradcheck(operator(sinusoidal_embedding, case), inputs(case[0], torch.float64))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives_in_time_alone(case, dtype, level):
    """Frequencies that are no parameter: the first derivative is a kernel of its own."""
    t, frequencies = inputs(case[0], dtype)
    frequencies = frequencies.detach()
    with use("cpp"):
        found = orders(lambda t: operator(sinusoidal_embedding, case)(t, frequencies), [t])
    exact = orders(
        lambda t: operator(reference, case)(t, frequencies.double()), [t.detach().double().requires_grad_()]
    )
    assert_orders_close(found, exact, dtype)
    if dtype == torch.float64:
        assert gradgradcheck(lambda t: operator(sinusoidal_embedding, case)(t, frequencies), [t])


@pytest.mark.parametrize("largest", [1.0, 1e3, 1e5, 1e8, 1e12])
def test_cpp_sines_are_right_for_every_phase(largest, level):
    # Half a unit in the last place below 1 is 3e-8.
    generator = torch.Generator().manual_seed(0)
    t = (torch.rand(400, generator=generator) - 0.5) * largest
    frequencies = torch.randn(67, generator=generator)
    with use("cpp"):
        assert worst_error(t, frequencies) < 4.5e-8
        wide = sinusoidal_embedding(t.double(), frequencies.double(), True, 134)
    exact = [
        [math.sin(w * s) for w in frequencies.tolist()] + [math.cos(w * s) for w in frequencies.tolist()]
        for s in t.tolist()
    ]
    assert (wide - torch.tensor(exact, dtype=torch.float64)).abs().max() < 2.3e-16


@pytest.mark.parametrize("largest", [1.0, 1e5, 1e12])
def test_triton_sines_are_right_for_every_phase(largest, device):
    generator = torch.Generator().manual_seed(0)
    t = ((torch.rand(9, generator=generator) - 0.5) * largest).to(device)
    with use("triton"):
        assert worst_error(t, torch.randn(200, generator=generator).to(device)) < 1.2e-7


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, in Triton's interpreter
def test_times_without_a_sine_give_nan(backend, device):
    t = torch.tensor([math.inf, -math.inf, math.nan, 0.0], device=place(backend, device))
    out = sinusoidal_embedding(t, torch.ones(9, device=t.device), False, 18)
    assert out[:3].isnan().all()
    assert torch.equal(out[3].cpu(), torch.cat([torch.ones(9), torch.zeros(9)]))


@pytest.mark.usefixtures("nan_filled")
def test_strided_arguments(backend, device):
    t, frequencies = (part.detach() for part in inputs(12, torch.float32, 8, place(backend, device)))
    found = sinusoidal_embedding(t[::2], frequencies[1::3], True, 8)
    torch.testing.assert_close(found, reference(t[::2], frequencies[1::3], True, 8))


def test_several_threads_find_the_same(level):
    t, frequencies = (part.detach() for part in inputs(64, torch.float32, 300))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with use("cpp"):
                found.append(sinusoidal_embedding(t, frequencies, True, 128))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_triton_kernel_fits_the_registers_of_an_h100(compile_for_h100):
    pytest.importorskip("triton")
    from cdm_kernels.triton.timestep_embedding import blocks

    block_b, block_f = blocks(128)
    signature = dict.fromkeys(("t", "frequencies", "out"), "*fp32")
    signature |= dict.fromkeys(("batch", "half", "dim"), "i32") | {"factor": "fp32"}
    constants = {"SIN_FIRST": True, "BLOCK_B": block_b, "BLOCK_F": block_f}
    (used,) = compile_for_h100(
        "cdm_kernels.triton.timestep_embedding", [("_embedding", signature, constants, 4)]
    )
    assert used["LOCAL"] == 0
    assert used["STACK"] <= 32  # libdevice's product of a large phase and 2 / pi, not a spilled register
    assert used["REG"] <= 64


# -- frequencies ---------------------------------------------------------------------------------------------


def test_frequencies_are_computed_once(monkeypatch):
    monkeypatch.setattr(timestep_embedding, "_tables", {})
    first = adm_embedding(T, 6)
    monkeypatch.setattr(timestep_embedding, "_table", None)  # whoever asks for another fails
    assert torch.equal(adm_embedding(T, 6), first)


def test_what_a_fake_call_makes_is_not_kept(monkeypatch):
    monkeypatch.setattr(timestep_embedding, "_tables", {})
    with FakeTensorMode():
        adm_embedding(torch.zeros(2), 6)
    assert torch.func.grad(lambda t: adm_embedding(t, 6).sum())(torch.zeros(2)).isfinite().all()
    assert not timestep_embedding._tables


def test_a_table_made_without_grad_serves_training(monkeypatch):
    monkeypatch.setattr(timestep_embedding, "_tables", {})
    with torch.inference_mode():
        adm_embedding(T, 6)
    t = T.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(adm_embedding(t, 6).sum(), t)
    with use("reference"):
        (expected,) = torch.autograd.grad(adm_embedding(t, 6).sum(), t)
    torch.testing.assert_close(gradient, expected)


# -- everything else -----------------------------------------------------------------------------------------


def test_without_a_library_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cpp, "library", lambda: None)
    monkeypatch.setattr(timestep_embedding, "kernels", None)  # whoever asks for one fails
    compare(CASES[3], torch.float32)


@pytest.mark.parametrize(
    ("t", "frequencies", "dim"), [((2,), 4, 10), ((2,), 4, 7), ((2, 1), 4, 8), ((), 4, 8)]
)
def test_shapes_that_do_not_fit_are_refused(t, frequencies, dim, backend):
    with pytest.raises(ValueError, match="dim // 2"):
        sinusoidal_embedding(torch.zeros(t), torch.zeros(frequencies), True, dim)


def test_no_times_give_no_rows(backend, device):
    t = torch.zeros(0, device=place(backend, device), requires_grad=True)
    out = adm_embedding(t, 8)
    (gradient,) = torch.autograd.grad(out.sum(), t)
    assert out.shape == (0, 8)
    assert gradient.shape == (0,)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own
def test_forward_mode_and_transforms_find_the_derivative():
    t = T.clone()
    exact = torch.func.jacrev(lambda t: reference(t, FREQUENCIES, True, 8))(t).sum(2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(t, torch.ones_like(t))
        found = forward_ad.unpack_dual(sinusoidal_embedding(dual, FREQUENCIES, True, 8)).tangent
    torch.testing.assert_close(found, exact)
    each = torch.func.vmap(lambda s: sinusoidal_embedding(s[None], FREQUENCIES, True, 8)[0])(t)
    torch.testing.assert_close(each, reference(t, FREQUENCIES, True, 8))


def through_operators(t, frequencies, *rest):
    return timestep_embedding._embedding(t, frequencies, *rest)


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("function", [sinusoidal_embedding, through_operators])
def test_third_derivatives_are_right(function, learnt):
    t, frequencies = inputs(4, torch.float64)
    frequencies = frequencies.detach().requires_grad_(learnt)
    value = function(t, frequencies, True, 8, 1.0)[:, :4].sum()
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), t, create_graph=True)
    torch.testing.assert_close(value, -((t[:, None] * frequencies).cos() * frequencies**3).sum(1))


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_operator_is_fit_for_the_compiler(case):
    _, dim, *rest = case
    arguments = (*inputs(case[0], torch.float32), rest[0], dim, rest[1])
    torch.library.opcheck(timestep_embedding._embedding, arguments)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_operator_equals_the_function_of_eager(case):
    found = orders(operator(through_operators, case), inputs(case[0], torch.float32))
    expected = orders(operator(sinusoidal_embedding, case), inputs(case[0], torch.float32))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_compiled_second_order_equals_eager():
    def penalty(t):
        (slope,) = torch.autograd.grad(ddpm_embedding(t, 7).pow(3).sum(), t, create_graph=True)
        return slope.square().sum()

    t = inputs(1, torch.float64)[0]
    (expected,) = torch.autograd.grad(penalty(t), t)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
        (found,) = torch.autograd.grad(compiled(t), t)
    torch.testing.assert_close(found, expected)
