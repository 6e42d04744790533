"""A turn of inference happens, or leaves no trace: what follows is as if it had not been asked."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from dcp.errors import DCPError
from dcp.inference import CachedAttention, InferenceEngine, KVCache, plan_turn
from dcp.inference.model import open_model
from dcp.inference.saved import CONVERSATIONS
from dcp.wire import WireError
from tests.test_inference import SPEC, cluster_of, make_caches, spread

FIRST = {"a": [5, 6, 7], "b": list(range(90, 131))}
NEXT = {"b": [17, 3], "c": [8] * 9}
SAMPLED = {"max_new_tokens": 6, "temperature": 1.5, "seed": 4}


def make_engine(num_ranks=2, **options):
    options = {"num_pages": 12, "page_size": 8} | options
    return InferenceEngine(open_model(None, seed=3), num_ranks=num_ranks, **options)


@pytest.fixture(scope="module")
def undisturbed():
    """What is said where no turn fails."""
    torch.set_num_threads(1)
    engine = make_engine()
    engine.generate(FIRST, **SAMPLED)
    return engine.generate(NEXT, **SAMPLED)


def broken_after(calls, monkeypatch):
    """A model whose last layer fails from its so many-th call on."""
    found = {"calls": 0}

    def fail(*_):
        found["calls"] += 1
        if found["calls"] >= calls:
            raise RuntimeError("out of memory")

    return fail


@pytest.mark.parametrize("calls", [1, 4])
def test_a_model_that_fails_leaves_no_trace(undisturbed, monkeypatch, calls):
    engine = make_engine()
    engine.generate(FIRST, **SAMPLED)
    free = engine.attention.caches[1].free_pages.tolist()
    hook = engine.model.model.layers[1].register_forward_pre_hook(broken_after(calls, monkeypatch))
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate({"d": [9] * 30, "a": [1]}, **SAMPLED)
    hook.remove()
    assert engine.attention.caches[1].free_pages.tolist() == free
    assert engine.generate(NEXT, **SAMPLED) == undisturbed


def test_interrupted_and_full_turns_leave_no_trace(undisturbed, monkeypatch):
    engine = make_engine()
    engine.generate(FIRST, **SAMPLED)
    with pytest.raises(ValueError, match="the KV cache is full"):
        engine.generate({"d": [1, 2]}, max_new_tokens=500)
    with pytest.raises(ValueError, match="the KV cache is full"):
        engine.generate({"d": [1, 2], "a": [3] * 400}, max_new_tokens=1)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "isfinite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.generate({"d": [1, 2]}, max_new_tokens=3)
    assert engine.generate(NEXT, **SAMPLED) == undisturbed
    with pytest.raises(ValueError, match="no conversation 'd'"):
        engine.tokens("d")


def fail_on_one_rank():
    """Rank 1's sampling fails once; then all go on."""
    import torch.distributed as dist

    engine = make_engine(None)
    engine.generate(FIRST, **SAMPLED)
    real = torch.isfinite
    said = None
    if dist.get_rank() == 1:
        torch.isfinite = lambda *_: torch.zeros(1)
    try:
        engine.generate({"d": [1, 2], "e": [4], "f": [8]}, max_new_tokens=4)
    except DCPError as error:
        said = str(error)
    torch.isfinite = real
    return said, engine.generate(NEXT, **SAMPLED)


def test_a_rank_that_fails_ends_the_turn_of_all(gloo_pool, undisturbed):
    (first, then), (second, also) = gloo_pool(2).run(fail_on_one_rank)
    assert first == "rank 1 failed in this turn, of which nothing is kept"
    assert "logits are not finite" in second
    assert then == also == undisturbed


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([258], r"prompt\[0\] must be 257 or less, got 258; the model has tokens 0 to 257"),
        ([5, -1], r"prompt\[1\] must be 0 or more, got -1"),
        ([1 << 70], "must be 257 or less, got 1180591620717411303424"),
        (np.array([5, 300]), "must be 257 or less, got 300"),
        (torch.tensor([999]), "must be 257 or less, got 999"),
        ([True], "whole number, got True"),
        ([4, True], "whole number, got True"),
        ([1.0], "whole number, got 1.0"),
        ([4, math.nan], "whole number, got nan"),
        (np.array([1.5]), "whole number, got 1.5"),
        (torch.tensor([True]), "whole number, got True"),
        (np.array([[1, 2]]), r"whole number, got \[1, 2\]"),
        ([[1, 2]], r"whole number, got \[1, 2\]"),
        (["7"], "whole number, got '7'"),
        ("hello", "list of whole numbers, got 'hello'"),
        (b"hello", "list of whole numbers, got b'hello'"),
        (None, "list of whole numbers, got None"),
        (7, "list of whole numbers, got 7"),
        (torch.tensor(7), "list of whole numbers, got tensor"),
        ([None], "whole number, got None"),
    ],
)
def test_what_is_no_token_is_refused_before_anything_changes(undisturbed, prompt, said):
    engine = REUSED
    with pytest.raises(ValueError, match=said):
        engine.generate({"d": [1], "a": prompt}, max_new_tokens=1)
    assert list(engine._conversations) == []
    assert engine.attention.caches[0].sequences == []


REUSED = make_engine()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"max_new_tokens": -3}, "got -3"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, got 1.5"),
        ({"max_new_tokens": True}, "got True"),
        ({"temperature": -1}, "temperature must be 0 or more, got -1"),
        ({"temperature": math.nan}, "got nan"),
        ({"temperature": math.inf}, "got inf"),
        ({"temperature": "hot"}, "got 'hot'"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"top_k": 2.0}, "got 2.0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"seed": 1 << 70}, "got 1180591620717411303424"),
        ({"end": -1}, "end must be 0 or more, got -1"),
        ({"prompts": {True: [1]}}, "named by a str or an int, not True"),
        ({"prompts": {(1,): [1]}}, "not \\(1,\\)"),
        ({"prompts": {"a": []}}, "'a' is new and its prompt is empty"),
        ({"prompts": {"a": [1], "b": torch.zeros(0)}}, "'b' is new and its prompt is empty"),
        ({"prompts": [[1, 2]]}, "prompts must map names to tokens, got a list"),
    ],
)
def test_options_are_checked(options, said):
    given = {"prompts": {"a": [1]}, "max_new_tokens": 1} | options
    with pytest.raises(ValueError, match=said):
        REUSED.generate(given.pop("prompts"), **given)
    assert list(REUSED._conversations) == []


def test_tokens_of_any_library_are_tokens():
    wanted = make_engine(1).generate({"a": [5, 6]}, max_new_tokens=3)
    for prompt in (np.array([5, 6], np.uint8), torch.tensor([5, 6]), (5, np.int32(6)), range(5, 7)):
        assert make_engine(1).generate({"a": prompt}, max_new_tokens=3) == wanted


def test_a_tiny_temperature_is_greedy():
    greedy = make_engine(1).generate(FIRST, max_new_tokens=5)
    assert make_engine(1).generate(FIRST, max_new_tokens=5, temperature=1e-320) == greedy


def test_weights_that_are_not_finite_are_not_sampled():
    engine = make_engine(1)
    engine.model.lm_head.weight.data[3, 0] = math.nan
    with pytest.raises(DCPError, match="logits are not finite"):
        engine.generate({"a": [5]}, max_new_tokens=1)


def test_a_cache_refuses_what_makes_no_sense_and_goes_back():
    cache = KVCache(SPEC, num_layers=1, num_pages=4, page_size=4)
    with pytest.raises(ValueError, match=r"named twice: \['a', 'a'\]"):
        cache.extend(["a", "a"], spread([[1], [1]]))
    for owners in ([[-1]], [[0.0]], [0], [[0, 1]], [[0], [0]]):
        with pytest.raises(ValueError, match="owners must be a rank below 1 for each new token"):
            cache.extend(["a"], owners)
    cache.extend(["a"], spread([[3]]))
    before, rows = cache.extent(), cache.rows(["a"]).tolist()
    cache.extend(["a", "b"], spread([[5], [2]]))
    cache.undo(before)
    assert cache.sequences == ["a"]
    assert cache.rows(["a"]).tolist() == rows
    assert cache.free_pages.tolist() == [3]
    [rows] = cache.extend(["b"], spread([[12]]))
    assert sorted(rows.tolist()) == list(range(4, 16))


def test_a_turn_that_cannot_begin_leaves_the_caches(monkeypatch):
    attention = CachedAttention(make_caches(2))
    a_plan = plan_turn([3], [[0, 0]], SPEC, cluster_of(2))
    monkeypatch.setattr("dcp.inference.attention._share", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention.begin(a_plan, ["a"])
    assert all(cache.sequences == [] for cache in attention.caches)
    with pytest.raises(ValueError, match="no turn has begun"):
        attention.attention(0, torch.zeros(1, 8, 8), torch.zeros(1, 2, 2, 8))


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    engine = make_engine()
    engine.generate(FIRST, max_new_tokens=2)
    engine.save(tmp_path / "one")
    engine.generate({"a": []}, max_new_tokens=1)
    engine.save(tmp_path / "two")
    said = engine.tokens("a")
    (tmp_path / "two/rank-1.kv").write_bytes((tmp_path / "one/rank-1.kv").read_bytes())
    with pytest.raises(ValueError, match=r"rank-1\.kv was not saved together with"):
        engine.load(tmp_path / "two")
    path = tmp_path / "one" / CONVERSATIONS
    damaged = bytearray(path.read_bytes())
    damaged[-20] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(WireError, match="damaged dcp conversations"):
        engine.load(tmp_path / "one")
    assert engine.tokens("a") == said
