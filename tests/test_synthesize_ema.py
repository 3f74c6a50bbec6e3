"""What is put together from a directory of snapshots, and what is refused."""

import json
import weakref

import pytest
import torch
from kit import Net, assert_same, fit

from lightning_tricks import post_hoc
from lightning_tricks.functional.post_hoc import synthesis
from lightning_tricks.post_hoc import FORMAT, read_manifest, synthesize_ema


def write(folder, steps, sigma_rels=(0.05, 0.1), dtype=torch.float32, seed=0):
    """A directory as PostHocEMA writes it, of random weights; what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    files = []
    for step in steps:
        averages = [{"w": torch.randn(4, 3, generator=generator).to(dtype), "b": torch.randn(2)} for _ in sigma_rels]
        content = {"averages": averages, "dtypes": {"w": torch.bfloat16, "b": torch.float32}}
        content["copied"] = {"count": torch.tensor(step + 1000 * seed), "note": {"kept": step}}
        torch.save(content, folder / f"snapshot-step={step}.pt")
        files.append(content)
    rows = [{"file": f"snapshot-step={step}.pt", "step": step, "due": True} for step in steps]
    manifest = {"format": FORMAT, "run": "r", "sigma_rels": list(sigma_rels), "snapshots": rows}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return files


STEPS = [10 * (index + 1) for index in range(20)]


@pytest.mark.parametrize(("step", "used"), [(None, 20), (200, 20), (120, 12), (118, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_the_sum_of_the_files_by_their_shares(step, used, dtype, tmp_path):
    files = write(tmp_path, STEPS, dtype=dtype)[:used]
    state = synthesize_ema(tmp_path, 0.07, step, tolerance=1)
    shares, _ = synthesis(STEPS[:used], (0.05, 0.1), step or 200, 0.07)
    for name, kind in (("w", torch.bfloat16), ("b", torch.float32)):
        expected = sum(
            share * average[name].double()
            for row, content in zip(shares.tolist(), files, strict=True)
            for share, average in zip(row, content["averages"], strict=True)
        )
        assert_same(state[name], expected.to(kind))
    assert state["count"] == STEPS[used - 1]
    assert state["note"] == {"kept": STEPS[used - 1]}
    assert state.keys() == {"w", "b", "count", "note"}


@pytest.mark.parametrize("step", [60, 200])
def test_stored_average_comes_back(step, tmp_path):
    files = write(tmp_path, STEPS)
    state = synthesize_ema(tmp_path, 0.1, step)
    torch.testing.assert_close(state["b"], files[step // 10 - 1]["averages"][1]["b"], rtol=1e-6, atol=1e-6)


def test_at_a_step_between_two_snapshots_the_error_is_told(tmp_path):
    write(tmp_path, STEPS)
    with pytest.raises(ValueError, match=r"up to step 113 can make, got 0.07. The profile would be wrong by 0\.\d+ of"):
        synthesize_ema(tmp_path, 0.07, 113)


def test_files_are_read_one_at_a_time(tmp_path, monkeypatch):
    write(tmp_path, STEPS)
    alive, most = weakref.WeakSet(), 0

    class Content(dict):
        __hash__ = object.__hash__

    read = post_hoc._read

    def watched(path):
        nonlocal most
        content = Content(read(path))
        alive.add(content)
        most = max(most, len(alive))
        return content

    monkeypatch.setattr(post_hoc, "_read", watched)
    synthesize_ema(tmp_path, 0.07)
    assert most <= 3  # the last one, the one before, and this one


def test_result_does_not_hang_on_the_files(tmp_path):
    write(tmp_path, STEPS)
    state = synthesize_ema(tmp_path, 0.07)
    copies = {name: t.clone() for name, t in state.items() if isinstance(t, torch.Tensor)}
    write(tmp_path, STEPS, seed=1)
    assert_same({name: state[name] for name in copies}, copies)


def test_files_of_lazily_mapped_weights_only(tmp_path, monkeypatch):
    write(tmp_path, STEPS)
    seen, load = [], torch.load

    def watched(path, **options):
        seen.append((options["weights_only"], options["mmap"]))
        return load(path, **options)

    monkeypatch.setattr(torch, "load", watched)
    synthesize_ema(tmp_path, 0.07)
    assert set(seen) == {(True, True)}


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({"sigma_rel": 0.3}, ValueError, r"sigma_rel must be in \[1e-6, 0.2887\) .*, got 0.3"),
        ({"sigma_rel": 0}, ValueError, r"sigma_rel must be in \[1e-6, 0.2887\) .*, got 0"),
        ({"sigma_rel": "0.1"}, TypeError, "sigma_rel must be a number"),
        ({"step": 201}, ValueError, r"step must be at most 200, that of the last snapshot .*, got 201. None takes"),
        ({"step": 0}, ValueError, r"step must be a whole number of at least 1 \(optimizer steps\), got 0"),
        ({"step": 10.0}, TypeError, "step must be a whole number of at least 1"),
        ({"tolerance": -1}, ValueError, r"tolerance must be at least 0 \(fraction\), got -1"),
        ({"sigma_rel": 0.01}, ValueError, r"sigma_rel must be one that the 20 snapshots of \[0.05, 0.1\] up to step"),
    ],
)
def test_what_is_refused(arguments, error, expected, tmp_path):
    write(tmp_path, STEPS)
    with pytest.raises(error, match=f"synthesize_ema: {expected}"):
        synthesize_ema(tmp_path, **{"sigma_rel": 0.1, **arguments})


def test_too_few_snapshots_are_told_and_may_be_allowed(tmp_path):
    write(tmp_path, [50, 100])
    expected = r"the 2 snapshots of .* got 0.2. The profile would be wrong by 0\.\d+ of its norm: .* more snapshots"
    with pytest.raises(ValueError, match=expected):
        synthesize_ema(tmp_path, 0.2)
    assert torch.isfinite(synthesize_ema(tmp_path, 0.2, tolerance=2)["b"]).all()


def test_directories_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="directory must be one with a manifest.json, got .* that PostHocEMA wrote to"):
        synthesize_ema(tmp_path, 0.1)
    write(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="directory must be one with snapshots, got .* Train on until one is taken"):
        synthesize_ema(tmp_path / "empty", 0.1)
    write(tmp_path / "gone", STEPS)
    (tmp_path / "gone" / "snapshot-step=40.pt").unlink()
    with pytest.raises(ValueError, match="directory must be one with snapshot-step=40.pt, got"):
        synthesize_ema(tmp_path / "gone", 0.1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"format": 1, "snapshots": []}')
    with pytest.raises(ValueError, match="directory must be of format 'post-hoc EMA 1', got 1"):
        read_manifest(tmp_path / "other")


def test_module_of_another_program_answers_with_it(tmp_path):
    from lightning_tricks.callbacks.post_hoc_ema import PostHocEMA

    fit([PostHocEMA(directory=str(tmp_path / "s"))])
    fresh = Net()
    before = fresh.head.weight.clone()
    fresh.load_state_dict(synthesize_ema(str(tmp_path / "s"), 0.12))
    assert not torch.equal(fresh.head.weight, before)
    assert fresh.mask[1] == -torch.inf
