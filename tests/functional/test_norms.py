import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_tricks.functional.norms import (
    group_norms,
    inner_products,
    nonfinite_counts,
    norms_after,
    tensor_norms,
    update_norms,
    zero_counts,
)

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


@pytest.mark.parametrize("value", [1e-25, 1e-38, 1e-42, 1e25, 3e38], ids=repr)
def test_entries_whose_squares_do_not_fit_float32_are_measured(value):
    tensors = [torch.full((300,), value), torch.tensor([3.0, 4.0]), torch.full((2**17,), value)]
    expected = [tensors[i][0].item() * math.sqrt(n) for i, n in ((0, 300), (2, 2**17))]
    norms = tensor_norms(tensors).tolist()
    assert norms[1] == 5
    assert norms[0] == pytest.approx(expected[0], rel=1e-6)
    assert norms[2] == pytest.approx(expected[1], rel=1e-5)  # all entries equal is the worst case


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("length", [2**12 + 3, 2**13 - 1, 2**14 + 1])
def test_what_is_left_of_a_long_tensor_of_tiny_or_huge_entries_is_measured(dtype, length):
    for value in (torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max):
        tensors = [torch.full((length,), value, dtype=dtype), torch.ones(2, dtype=dtype)]
        assert tensor_norms(tensors).tolist() == pytest.approx([value * math.sqrt(length), math.sqrt(2)], rel=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lengths", [(5, 4), (5000, 4)], ids=str)
def test_norms_under_autocast(dtype, lengths):
    tensors = [torch.ones(length, dtype=dtype) for length in lengths]
    expected = [math.sqrt(length) for length in lengths]
    for other in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=other):
            assert tensor_norms(tensors).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x.view(-1, 4)[:, ::2], lambda x: x[:1].expand(2**14)])
def test_equal_entries_with_gaps_between_them(view):
    tensor = view(torch.full((2**15,), 1.885))
    expected = torch.tensor(1.885).item() * math.sqrt(tensor.numel())
    assert tensor_norms([tensor]).item() == pytest.approx(expected, rel=1e-5)


def test_norms_after_changing_sparse_tensors():
    weights, copies = [torch.eye(3).to_sparse()], [torch.zeros(3, 3).to_sparse()]
    assert norms_after(torch._foreach_copy_, copies, weights).item() == pytest.approx(math.sqrt(3))
    assert norms_after(torch._foreach_sub_, copies, weights).item() == 0


def test_nothing_but_empty_tensors():
    assert tensor_norms([torch.empty(0), torch.empty(3, 0)]).tolist() == [0, 0]


def test_infinity_among_huge_entries_stays_infinite():
    assert tensor_norms([torch.tensor([1e38, math.inf])]).isinf().all()


@pytest.mark.parametrize("shape", [(2**24,), (3, 2**22), (2**22, 3), (1, 2**23)], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_long_tensor_is_summed_exactly_enough(shape, swapped):
    """One float32 sum over as many entries is wrong by up to a hundredth."""
    tensor = torch.full(shape, 0.1)
    tensor = tensor.t() if swapped and tensor.dim() == 2 else tensor
    expected = tensor[(0,) * tensor.dim()].item() * math.sqrt(tensor.numel())
    assert tensor_norms([tensor, torch.ones(4)]).tolist() == pytest.approx([expected, 2], rel=5e-6)


@every_dtype
def test_zeros_and_entries_that_are_not_finite_are_counted(dtype):
    tensor = torch.tensor([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, 2.0]).to(dtype)
    tensors = [tensor, torch.zeros(3, 2, dtype=dtype).t(), torch.empty(0, dtype=dtype)]
    assert zero_counts(tensors).tolist() == [2, 6, 0]
    assert nonfinite_counts(tensors).tolist() == [3, 0, 0]


def test_zeros_of_a_sparse_tensor_are_those_it_does_not_store_too():
    tensor = torch.sparse_coo_tensor([[0, 0, 2]], [3.0, -3.0, 3.0], (4,), check_invariants=True)
    assert zero_counts([tensor]).tolist() == [3]
    assert nonfinite_counts([tensor]).tolist() == [0]


@every_dtype
def test_the_inner_product_is_its_sum(dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    left, right = (torch.randn(4, 5, dtype=wide).to(dtype).t() for _ in range(2))
    pairs = zip(left.flatten().tolist(), right.flatten().tolist(), strict=True)
    expected = math.fsum((a * b.conjugate()).real for a, b in pairs)
    assert inner_products([left, left], [right, right]).tolist() == pytest.approx([expected] * 2, rel=1e-6, abs=1e-9)


def test_an_inner_product_of_tiny_tensors_does_not_vanish():
    tensor = torch.full((10,), 1e-30)
    assert inner_products([tensor], [tensor]).item() == pytest.approx(10 * tensor[0].item() ** 2, rel=1e-6)


def test_a_conjugate_view_is_measured():
    tensor = torch.randn(3, 4, dtype=torch.complex64)
    assert tensor_norms([tensor.conj()]).tolist() == pytest.approx([norm_by_loop(tensor)], rel=1e-6)


def test_nothing_has_no_norms():
    assert tensor_norms([]).shape == (0,)
    assert tensor_norms([]).dtype == torch.float64
    assert update_norms([], []).shape == (0,)
    assert group_norms(tensor_norms([]), [], 2).tolist() == [0, 0, 0]
    assert zero_counts([]).shape == nonfinite_counts([]).shape == inner_products([], []).shape == (0,)


def test_an_empty_tensor_has_norm_0():
    assert tensor_norms([torch.empty(0), torch.tensor([3.0, 4.0])]).tolist() == [0, 5]


def test_parameters_that_require_a_gradient_are_measured_without_a_graph():
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    assert not tensor_norms([parameter]).requires_grad
    assert not update_norms([torch.zeros(2)], [parameter]).requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_entry_shows(value):
    assert not tensor_norms([torch.tensor([1.0, value])]).isfinite().any()


@pytest.mark.parametrize("change", [torch._foreach_copy_, torch._foreach_sub_], ids=["copied", "subtracted"])
@pytest.mark.parametrize("kinds", [FLOATS[2:3], FLOATS[3:], COMPLEX[:1], FLOATS + COMPLEX], ids=str)
def test_norms_after_a_change_are_those_of_what_is_there_then(change, kinds):
    """Short ones and long ones, views with gaps and in another order, as they come."""
    shapes = [(3,), (2**16 + 5,), (300, 700), (), (2**16,), (5, 0), (2, 2**16)]
    before = [torch.randn(shape, dtype=kinds[i % len(kinds)]) for i, shape in enumerate(shapes)]
    tensors = [torch.randn(shape, dtype=kinds[i % len(kinds)]) for i, shape in enumerate(shapes)]
    before += [torch.randn(400, 300).to(kinds[0]).t(), torch.randn(400, 600).to(kinds[0])[:, ::2]]
    tensors += [torch.randn(300, 400).to(kinds[0]), torch.randn(600, 400).to(kinds[0]).t()[:, ::2]]
    copied = change is torch._foreach_copy_
    expected = [other.clone() if copied else one - other for one, other in zip(before, tensors, strict=True)]
    norms = norms_after(change, before, tensors)
    assert all(torch.equal(one, other) for one, other in zip(before, expected, strict=True))
    assert norms.tolist() == pytest.approx(tensor_norms(expected).tolist(), rel=1e-6)
    assert norms[1].item() == pytest.approx(norm_by_loop(expected[1]), rel=1e-5)


def test_norms_after_copying_half_precision_into_single_are_exact():
    weights, copies = [300 * torch.randn(70_000).half()], [torch.empty(70_000)]
    expected = weights[0].double().norm().item()
    assert norms_after(torch._foreach_copy_, copies, weights).item() == pytest.approx(expected, rel=1e-6)
    assert norms_after(torch._foreach_sub_, copies, weights).item() == 0


def test_norms_on_a_cpu_do_not_depend_on_the_default_device():
    tensors = [torch.ones(5000), torch.ones(4)]
    with torch.device("meta"):
        assert tensor_norms(tensors).tolist() == pytest.approx([math.sqrt(5000), 2])


def test_norms_after_a_change_of_nothing():
    assert norms_after(torch._foreach_copy_, [], []).shape == (0,)


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


# ----------------------------------------------------------------------------------------------- tensors in parts


def compare(tensors, before=None):
    """Norms and the loop over the gathered tensors, for a test outside the ranks to compare."""
    if before is None:
        ours, values = tensor_norms(tensors), [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    else:
        ours = update_norms(before, tensors)
        values = [
            new.full_tensor().double() - old.full_tensor().double() for old, new in zip(before, tensors, strict=True)
        ]
    assert not isinstance(ours, DTensor)
    return ours.tolist(), [norm_by_loop(value) for value in values]


def assert_all_right(told, rel=1e-6):
    for ours, expected in told:
        assert ours == pytest.approx(expected, rel=rel)
    assert all(ours == told[0][0] for ours, _ in told)


@every_dtype
def test_parts_have_the_norm_of_the_whole(dtype):
    def measure():
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        shapes = {
            (4, 3): 0,
            (3, 2): 0,
            (1, 5): 0,
            (2, 3): 1,
            (5,): 0,
            (2, 0): 0,
        }
        wide = torch.complex128 if dtype.is_complex else torch.float64
        wholes = [(torch.randn(shape, dtype=wide).to(dtype), dim) for shape, dim in shapes.items()]
        parts = [distribute_tensor(tensor, mesh, [Shard(dim)]) for tensor, dim in wholes]
        copies = [distribute_tensor(tensor, mesh, [Replicate()]) for tensor, _ in wholes]
        ours, expected = compare([*parts, wholes[0][0], *copies])
        return ours, expected

    assert_all_right(on_ranks(measure), tolerance(dtype))


def test_update_norms_of_parts():
    def measure():
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        before = [distribute_tensor(torch.randn(n, 3).to(d), mesh, [Shard(0)]) for n in (4, 3, 1) for d in FLOATS]
        return compare([tensor * 1.5 for tensor in before], before)

    assert_all_right(on_ranks(measure))


def test_counts_and_inner_products_of_parts():
    def measure():
        mesh = init_device_mesh("cpu", (2,))
        whole = torch.tensor([0.0, 1.0, math.nan, 0.0, 2.0])
        parts = [distribute_tensor(whole, mesh, [way]) for way in (Shard(0), Replicate())]
        other = [distribute_tensor(torch.arange(5.0), mesh, [way]) for way in (Shard(0), Replicate())]
        sums = zero_counts(parts), nonfinite_counts(parts), inner_products(other, other)
        return [each.tolist() for each in sums]

    assert on_ranks(measure) == [[[2.0, 2.0], [1.0, 1.0], [30.0, 30.0]]] * 2


def test_sums_over_ranks_that_are_still_to_be_done_are_done():
    def measure():
        mesh = init_device_mesh("cpu", (2,))
        own = torch.tensor([3.0, 4.0]) * (1 + mesh.get_local_rank())
        return tensor_norms([DTensor.from_local(own, mesh, [Partial()])]).tolist(), [15.0]

    assert_all_right(on_ranks(measure))


def test_ranks_meet_once_for_all_tensors(monkeypatch):
    def measure():
        mesh = init_device_mesh("cpu", (2,))
        meetings, original = [], dist.all_reduce
        monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: meetings.append(1) or original(*args, **kwargs))
        parts = [distribute_tensor(torch.ones(n), mesh, [Shard(0)]) for n in range(1, 9)]
        copies = [distribute_tensor(torch.ones(n), mesh, [Replicate()]) for n in range(1, 9)]
        tensor_norms([*parts, *copies])
        tensor_norms(copies)
        tensor_norms([torch.ones(3)])
        return len(meetings)

    assert on_ranks(measure) == [1, 1]


def test_a_mesh_of_two_dimensions():
    """Replicas of parts, parts of parts, tensors of one dimension alone, and FSDP2 over tensor parallelism."""

    def measure():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        torch.manual_seed(0)
        ways = [[Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(1)], [Shard(0), Shard(0)]]
        ways += [[Replicate(), Replicate()], [Shard(1), Shard(0)]]
        tensors = [distribute_tensor(torch.randn(5, 3), mesh, way) for way in ways]
        tensors += [distribute_tensor(torch.randn(3), mesh[name], [Shard(0)]) for name in ("data", "tensor")]
        layers = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Linear(6, 5))
        parallelize_module(layers, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(layers, mesh=mesh["data"])
        kinds = {type(placement).__name__ for p in layers.parameters() for placement in p.placements}
        assert "_StridedShard" in kinds  # which says of itself that it is no Shard
        return compare([*tensors, *layers.parameters()])

    assert_all_right(on_ranks(measure, count=4))
