"""Tiles are timed once, the fastest kept in a file, and nothing else believed."""

import importlib.util
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace

import pytest
import torch

from dcp.runtime.kernels import Options, get_kernel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

from dcp.runtime.kernels import triton_timing as timing  # noqa: E402
from dcp.runtime.kernels import triton_tuning as tuning  # noqa: E402
from dcp.runtime.kernels.triton_options import DEFAULT, TritonOptions  # noqa: E402
from dcp.runtime.kernels.triton_shapes import SHAPES, Shape  # noqa: E402

CPU = torch.device("cpu")
CASE = tuning.Case("NVIDIA H100", 90, "3.7.1", "bfloat16", 128, DEFAULT)
USUAL = SHAPES[90, 128, 2]
FASTEST = {
    "forward": Shape(128, 32, 8, 4),
    "query_gradient": Shape(128, 64, 8, 3),
    "key_gradient": Shape(64, 64, 4, 2),
    "atomic_key_gradient": Shape(64, 64, 8, 2),
}


class Clock:
    """Recorded times: 1 ms of each kernel's fastest tile, 2 ms of the others; and what it was
    asked."""

    def __init__(self, fastest=FASTEST, failing=()):
        self.fastest, self.failing, self.asked = fastest, failing, []

    def __call__(self, name, shape):
        self.asked.append((name, shape))
        if name in self.failing or (name, shape) in self.failing:
            raise RuntimeError("out of resource: shared memory")
        return 1e-3 if self.fastest.get(name) == shape else 2e-3


def tuned(folder, clock, case=CASE):
    return tuning.tuned_shapes(case, USUAL, clock, folder)


def test_the_fastest_are_kept_and_read_without_timing(tmp_path):
    clock = Clock()
    found = tuned(tmp_path / "new", clock)
    assert {name: getattr(found, name) for name in timing.KERNELS} == FASTEST
    known = [(n, s) for n in timing.KERNELS for s in timing.candidates(n, USUAL, 128, 2)]
    assert clock.asked == known, "each candidate once"
    assert len(known) == len(set(known)) > 20
    again = Clock({})
    assert tuned(tmp_path / "new", again) == found
    assert not again.asked


@pytest.mark.parametrize(
    "change",
    [
        {"device": "NVIDIA H200"},
        {"architecture": 100},
        {"triton": "3.8.0"},
        {"dtype": "float16"},
        {"widest": 64},
        {"forms": TritonOptions(descriptors=True)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_case_is_timed_and_leaves_the_first(tmp_path, change):
    first = tuned(tmp_path, Clock())
    clock = Clock({})
    tuned(tmp_path, clock, replace(CASE, **change))
    assert clock.asked
    assert len(list(tmp_path.iterdir())) == 2
    assert tuned(tmp_path, Clock({})) == first


def test_two_kernels_share_a_table_at_the_least_time_together(tmp_path):
    # forward is fastest alone with 64 rows; with the query gradient's 128 both take less
    times = {("forward", Shape(64, 64, 4, 3)): 1.0, ("forward", Shape(128, 64, 8, 2)): 1.5}
    times[("query_gradient", Shape(128, 64, 8, 2))] = 1.0
    found = tuned(tmp_path, lambda *asked: times.get(asked, 9.0))
    assert found.forward == found.query_gradient == Shape(128, 64, 8, 2)


def test_a_candidate_that_fails_is_left_out(tmp_path):
    found = tuned(tmp_path, Clock(failing={("forward", FASTEST["forward"])}))
    assert found.forward != FASTEST["forward"]
    assert found.query_gradient == FASTEST["query_gradient"]


@pytest.mark.parametrize("failing", [timing.KERNELS, ("atomic_key_gradient",)])
def test_where_all_fail_the_usual_ones_stay_and_nothing_is_kept(tmp_path, failing):
    with pytest.warns(UserWarning, match="the built-in ones are used"):
        assert tuned(tmp_path, Clock(failing=failing)) == USUAL
    assert not list(tmp_path.iterdir())


def put(**change):
    return lambda text: json.dumps(json.loads(text) | change)


def with_tile(**change):
    return lambda text: put(tiles=json.loads(text)["tiles"] | change)(text)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "[]",
        lambda _: "[" * 100_000,
        put(format="dcp triton tiles, 0"),
        put(case={"device": "another"}),
        put(tiles=None),
        put(tiles={"forward": [128, 64, 8, 2]}),
        with_tile(forward=[128, 64, 8, 9]),
        with_tile(forward=[128, 64, 8]),
        with_tile(forward="128"),
        with_tile(forward=[True, 64, 8, 2]),
        with_tile(forward=list(astuple(Shape(64, 64, 4, 3)))),  # shares no table
    ],
)
def test_a_damaged_foreign_or_older_file_is_made_anew_with_one_warning(tmp_path, damage):
    found = tuned(tmp_path, Clock())
    [path] = tmp_path.iterdir()
    sound = path.read_text()
    path.write_text(damage(sound))
    with pytest.warns(UserWarning, match="is not used, and made anew") as warned:
        assert tuned(tmp_path, Clock()) == found
    assert len(warned) == 1
    assert path.read_text() == sound
    assert list(tmp_path.iterdir()) == [path]


def test_who_ends_first_decides_for_all(tmp_path):
    inner = Clock({})

    def outer(name, shape):
        if (name, shape) == ("key_gradient", USUAL.key_gradient):  # the other one begins and ends
            tuned(tmp_path, inner)
        return Clock()(name, shape)

    found = tuned(tmp_path, outer)
    assert inner.asked
    assert found == tuned(tmp_path, Clock()) != tuned(tmp_path / "alone", Clock())


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path):
    path = tmp_path / CASE.file_name
    known = {name: timing.candidates(name, USUAL, 128, 2) for name in timing.KERNELS}
    tuning._write(path, CASE, USUAL)

    def work(number):
        for _ in range(50):
            if number % 2:
                tuning._write(path, CASE, USUAL)
            else:
                assert tuning._read(path, CASE, known) == USUAL

    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        list(pool.map(work, range(4)))
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="not kept for later processes: no space left"):
        found = tuned(tmp_path, Clock())
    assert found.forward == FASTEST["forward"]
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_folder_should_be_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="not kept for later processes"):
        assert tuned(tmp_path / "file", Clock()).forward == FASTEST["forward"]


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_folder() == tmp_path / "dcp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_folder() == tmp_path / ".cache" / "dcp"


@pytest.mark.parametrize("width", [24, 64, 128, 192, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_width_has_candidates_the_usual_first(width, itemsize):
    usual = SHAPES[80, 64 if width < 64 else 256 if width > 128 else width, itemsize]
    for name in timing.KERNELS:
        shapes = timing.candidates(name, usual, width, itemsize)
        assert shapes[0] == getattr(usual, name)
        assert 6 <= len(shapes) == len(set(shapes))


def test_on_the_cpu_it_is_refused():
    with pytest.raises(ValueError, match="tiles are timed on CUDA devices only"):
        get_kernel(tuning.TunedTritonKernel(), CPU, torch.float32, Options(64, 0.125))


def test_a_device_is_asked_once_for_each_width_and_dtype(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tuning.Case, "of", lambda *_: CASE)
    monkeypatch.setattr(tuning, "choose_shapes", lambda *_: USUAL)
    monkeypatch.setattr(tuning, "on_device", lambda *_: clock)
    kernel = tuning.TunedTritonKernel(folder=tmp_path)
    found = kernel.shapes(torch.device("cuda"), 128, torch.bfloat16)
    next(tmp_path.iterdir()).unlink()
    assert kernel.shapes(torch.device("cuda"), 128, torch.bfloat16) == found
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- in the interpreter


def faults(name, shape, forms, spoil=False):
    """What the comparison says of a tile, of a kernel that may drop a number of what it made."""
    from dcp.runtime.kernels import trial, triton

    launch, trial.SEQLENS = triton.launch, (90, 50)

    def spoilt(code, tensors, *rest):
        launch(code, tensors, *rest)
        if code == name.removeprefix("atomic_"):
            tensors[2 if code == "forward" else -1][-1].zero_()

    triton.launch = spoilt if spoil else launch
    try:
        return timing.wrong(name, shape, CPU, 16, torch.float32, forms)
    finally:
        triton.launch = launch


@pytest.mark.parametrize("name", timing.KERNELS)
def test_what_is_wrong_is_found(interpreter, name):
    shape = Shape(64, 64, 4, 1)
    assert interpreter(faults, name, shape, DEFAULT) is None
    assert " is off by " in interpreter(faults, name, shape, DEFAULT, True)


def test_forms_are_tried_as_they_run(interpreter):
    assert interpreter(faults, "forward", Shape(128, 64, 4, 1), TritonOptions(pack_heads=4)) is None


def launched(name):
    """Its launch in the timed case, twice: results finite, the user's random numbers untouched."""
    state = torch.get_rng_state()
    spec = timing.AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")
    work = timing.launch_of(name, Shape(64, 64, 4, 1), spec, CPU, tokens=100)
    work(), work()
    return torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", timing.KERNELS)
def test_the_timed_case_runs_and_draws_nothing_of_the_users(interpreter, name):
    assert interpreter(launched, name)
