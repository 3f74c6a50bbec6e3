import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional.norms import group_norms, tensor_norms, update_norms

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
every_dtype = pytest.mark.parametrize("dtype", FLOATS + COMPLEX, ids=str)


def norm_by_loop(tensor):
    return math.sqrt(math.fsum(abs(value) ** 2 for value in tensor.flatten().tolist()))


def tolerance(dtype):
    """Half precision is summed in float32, so that no norm is worse than that."""
    return 1e-13 if dtype in (torch.float64, torch.complex128) else 1e-6


@every_dtype
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (1000,)], ids=str)
def test_the_norm_is_the_root_of_the_sum_of_squares(dtype, shape):
    tensor = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    norms = tensor_norms([tensor])
    assert norms.dtype == torch.float64
    assert norms.tolist() == pytest.approx([norm_by_loop(tensor)], rel=tolerance(dtype))


def test_tensors_of_different_dtypes_keep_their_order():
    tensors = [torch.full((n,), float(n), dtype=dtype) for n, dtype in enumerate(2 * (FLOATS + COMPLEX), start=1)]
    expected = [norm_by_loop(t) for t in tensors]
    assert tensor_norms(tensors).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 60000.0), (torch.float16, 1e-4), (torch.bfloat16, 1e15), (torch.float64, 1e150)],
    ids=repr,
)
def test_squares_that_do_not_fit_the_dtype_do_not_spoil_the_norm(dtype, value):
    tensor = torch.full((300,), value, dtype=dtype)
    assert tensor_norms([tensor]).tolist() == pytest.approx([norm_by_loop(tensor)], rel=tolerance(dtype))


def test_a_long_half_precision_tensor_is_summed_exactly_enough():
    tensor = torch.ones(100_000, dtype=torch.bfloat16)
    assert tensor_norms([tensor]).item() == pytest.approx(math.sqrt(100_000), rel=1e-6)


@every_dtype
def test_views_are_measured(dtype):
    tensor = torch.randn(4, 6).to(dtype)
    expected = [norm_by_loop(tensor), norm_by_loop(tensor[:, ::2])]
    assert tensor_norms([tensor.t(), tensor[:, ::2]]).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_conjugate_view_is_measured():
    tensor = torch.randn(3, 4, dtype=torch.complex64)
    assert tensor_norms([tensor.conj()]).tolist() == pytest.approx([norm_by_loop(tensor)], rel=1e-6)


def test_nothing_has_no_norms():
    assert tensor_norms([]).shape == (0,)
    assert tensor_norms([]).dtype == torch.float64
    assert update_norms([], []).shape == (0,)
    assert group_norms(tensor_norms([]), [], 2).tolist() == [0, 0, 0]


def test_an_empty_tensor_has_norm_0():
    assert tensor_norms([torch.empty(0), torch.tensor([3.0, 4.0])]).tolist() == [0, 5]


def test_parameters_that_require_a_gradient_are_measured_without_a_graph():
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    assert not tensor_norms([parameter]).requires_grad
    assert not update_norms([torch.zeros(2)], [parameter]).requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_entry_shows(value):
    assert not tensor_norms([torch.tensor([1.0, value])]).isfinite().any()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 3)), max_size=12))
def test_group_norms_and_the_total_are_their_formula(members):
    norms = torch.tensor([norm for norm, _ in members], dtype=torch.float64)
    result = group_norms(norms, [group for _, group in members], 4).tolist()
    expected = [math.sqrt(sum(n**2 for n, g in members if g == group)) for group in range(4)]
    total = math.sqrt(sum(n**2 for n, _ in members))
    assert result == pytest.approx([*expected, total], rel=1e-12)


def test_the_total_is_the_norm_of_all_tensors_together():
    tensors = [torch.randn(n, dtype=torch.float64) for n in (3, 5, 2)]
    total = group_norms(tensor_norms(tensors), [0, 1, 0], 2)[-1]
    assert total.item() == pytest.approx(torch.cat(tensors).norm().item(), rel=1e-12)


@every_dtype
def test_the_update_norm_is_the_norm_of_the_difference(dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    before = [torch.randn(4, 3, dtype=wide).to(dtype), torch.randn(5, dtype=wide).to(dtype)]
    after = [(b.to(wide) + 0.1 * torch.randn(b.shape, dtype=wide)).to(dtype) for b in before]
    kept = [t.clone() for t in before + after]
    expected = [norm_by_loop(a.to(wide) - b.to(wide)) for a, b in zip(after, before, strict=True)]
    assert update_norms(before, after).tolist() == pytest.approx(expected, rel=max(torch.finfo(dtype).eps, 1e-13))
    assert all(torch.equal(t, k) for t, k in zip(before + after, kept, strict=True))


def test_the_update_norm_of_half_precision_survives_squares_that_overflow():
    before, after = torch.full((10,), -1000.0, dtype=torch.float16), torch.full((10,), 1000.0, dtype=torch.float16)
    assert update_norms([before], [after]).item() == pytest.approx(2000 * math.sqrt(10), rel=1e-6)


def test_the_update_takes_generators_and_wants_them_of_one_length():
    before = [torch.zeros(2), torch.zeros(1)]
    after = [torch.tensor([3.0, 4.0]), torch.tensor([2.0])]
    assert update_norms((t for t in before), (t for t in after)).tolist() == [5, 2]
    with pytest.raises(ValueError, match="zip"):
        update_norms(before, after[:1])


def test_a_sparse_tensor_with_repeated_entries_is_measured():
    tensor = torch.sparse_coo_tensor([[0, 0, 2]], [3.0, 1.0, 3.0], (4,), check_invariants=True)
    assert tensor_norms([tensor]).tolist() == [5.0]


def test_updates_of_half_precision_do_not_overflow():
    before, after = torch.tensor([6e4], dtype=torch.float16), torch.tensor([-6e4], dtype=torch.float16)
    assert update_norms([before], [after]).tolist() == [2 * before.double().item()]
