"""Fields of the user's own, results back to samples, groups of samples, batches without labels."""

import re

import numpy as np
import pytest
import torch

from dcp.data import gather_samples, scatter_samples
from tests.loading import AtOnce, loader_of

# --------------------------------------------------------------------------- fields of one's own


def field_samples():
    """Each value tells its token, whose id tells its document and place."""
    return [
        {
            "input_ids": np.arange(n) + 100 * i,
            "advantages": (np.arange(n) + 100 * i) / 4,
            "pair": np.stack([np.arange(n), np.full(n, i)], axis=1),
            "reward": i,
        }
        for i, n in enumerate([5, 30, 0, 12, 1, 7])
    ]


def check_fields(batch):
    ids = batch.tokens
    assert batch.sample_ids.tolist() == (ids // 100).tolist()
    assert torch.equal(batch.fields["advantages"], (ids / 4).float())
    assert torch.equal(batch.fields["pair"], torch.stack([ids % 100, ids // 100], dim=1))
    assert torch.equal(batch.fields["reward"], ids // 100)
    documents, starts = torch.from_numpy(batch.pieces[:, :2]).unbind(1)
    assert torch.equal(documents[batch.sequence_ids], batch.sample_ids)
    assert torch.equal(starts[batch.sequence_ids] + batch.positions, ids % 100)


def fields_on_each_rank(to):
    """Which tokens came where, and what gathering gives."""
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    options = {"tokens_per_batch": 16, "fields": ("advantages", "pair", "reward")}
    found = []
    with loader_of(field_samples(), group=group, **options) as loader:
        for batch, _ in loader:
            check_fields(batch)
            values = torch.stack([batch.tokens, batch.tokens + 1], dim=1).double()
            gathered = gather_samples(batch, values, group=group, to=to)
            if gathered:
                assert torch.equal(scatter_samples(batch, gathered), values)
            found.append((batch.tokens.tolist(), {k: v.tolist() for k, v in gathered.items()}))
    return found


def test_fields_and_gathered_results_alone():
    gathered = [one for _, one in fields_on_each_rank(None)]
    check_gathered(gathered)
    with loader_of(field_samples(), ignore=["advantages", "pair", "reward"]) as loader:
        batch, _ = next(iter(loader))
        with pytest.raises(ValueError, match=r"rank 0 gathers 1 rows, it has \d+ tokens"):
            gather_samples(batch, torch.zeros(1))
        with pytest.raises(ValueError, match="to=3 names ranks that are not below 1"):
            gather_samples(batch, batch.tokens, to=3)
        with pytest.raises(ValueError, match=r"sample \d+ is missing, the batch has"):
            scatter_samples(batch, {})


def check_gathered(batches):
    """Over an epoch every token of every sample is there once, those of a batch in order."""
    seen = {i: [] for i in range(6)}
    for gathered in batches:
        for sample, rows in gathered.items():
            ids = [int(row[0]) for row in rows]
            assert ids == sorted(ids)
            assert all(row == [i, i + 1] for row, i in zip(rows, ids, strict=True))
            seen[sample] += ids
    for i, n in enumerate([5, 30, 0, 12, 1, 7]):
        assert sorted(seen[i]) == [100 * i + place for place in range(n)]


@pytest.mark.parametrize(("world", "to"), [(2, None), (3, [2])])
def test_fields_and_gathered_results_on_ranks(gloo_pool, world, to):
    results = gloo_pool(world).run(fields_on_each_rank, to)
    for batches in zip(*results, strict=True):
        tokens = [token for mine, _ in batches for token in mine]
        assert len(tokens) == len(set(tokens))
    for rank, batches in enumerate(results):
        if to is None or rank in to:
            check_gathered([gathered for _, gathered in batches])
        else:
            assert all(gathered == {} for _, gathered in batches)


@pytest.mark.parametrize(
    ("match", "values"),
    [
        ("document 1 has no 'score', which the loader's fields name", None),
        ("field 'score' of document 1 has 2 entries for 3 tokens", [1, 2]),
        ("field 'score' of document 1 must hold numbers, got <U1", ["a", "b", "c"]),
        (r"field 'score' of document 1 has the shape \(2,\) per token, that of others \(\)",
         np.zeros((3, 2))),
    ],
)  # fmt: skip
def test_fields_that_are_refused(match, values):
    samples = [{"input_ids": [1, 2], "score": [1, 2]}, {"input_ids": [1, 2, 3], "score": values}]
    with pytest.raises(ValueError, match=match):
        next(iter(loader_of(samples, fields="score")))


def test_a_batch_has_one_kind_of_each_field():
    samples = [
        {"input_ids": [1, 2, 3, 4], "attention_mask": [0, 1, 1, 0], "a": [9, 1, 2, 9], "b": True},
        {"input_ids": [5], "a": torch.tensor([0.5], dtype=torch.bfloat16), "b": [False]},
        {"input_ids": [], "a": [], "b": []},
    ]
    batch, _ = next(iter(loader_of(samples, seed=None, fields=("a", "b"))))
    assert batch.fields["a"].dtype == torch.float32
    assert batch.fields["a"].tolist() == [1.0, 2.0, 0.5]
    assert batch.fields["b"].tolist() == [True, True, False]


# --------------------------------------------------------------------------- groups


@pytest.mark.parametrize("packing", [{}, {"bucket_window": 5}, {"packing": "ordered"}])
@pytest.mark.parametrize("where", ["sample", "dataset", "loader"])
def test_groups_stay_in_one_batch(packing, where):
    names = ["x", None, "y", "x", "y", None, "x"]
    lengths = [5, 9, 7, 3, 2, 40, 4]
    tokens = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    if where == "sample":
        dataset = [{"input_ids": t, "group_id": n} for t, n in zip(tokens, names, strict=True)]
    else:
        dataset = type("Dataset", (list,), {"group_ids": names if where == "dataset" else None})
        dataset = dataset(tokens)
    options = packing | ({"group_ids": names} if where == "loader" else {})
    if "packing" not in packing:
        options |= {"max_seqlen": 16}
    batches_of = {}
    with loader_of(dataset, tokens_per_batch=40, planning_pool=AtOnce(), **options) as loader:
        for epoch in range(3):
            seen = []
            for batch, _ in loader:
                assert len(batch.tokens) <= 40
                seen += batch.tokens.tolist()
                for document in batch.pieces[:, 0].tolist():
                    batches_of.setdefault((epoch, document), set()).add(batch.index)
            if "packing" not in packing:
                assert sorted(seen) == np.concatenate(tokens).tolist()
            for one, other in [(0, 3), (0, 6), (2, 4)]:
                assert batches_of.get((epoch, one)) == batches_of.get((epoch, other))
    assert any(len(found) == 1 for found in batches_of.values())


def test_group_errors():
    with pytest.raises(ValueError, match="the group of documents 0, 2 has 40 tokens, more than"):
        loader_of([np.arange(20), [1], np.arange(20)], tokens_per_batch=30, group_ids=[1, 2, 1])
    with pytest.raises(ValueError, match="group_ids names 1 documents, the dataset has 2"):
        loader_of([[1], [2]], group_ids=[1])
    state = loader_of([[1], [2]], group_ids=[1, 1]).state_dict()
    with pytest.raises(ValueError, match=re.escape("cannot resume: groups was ")):
        loader_of([[1], [2]], group_ids=[1, 2]).load_state_dict(state)


# --------------------------------------------------------------------------- batches without labels


def test_a_batch_without_labels_has_loss_zero():
    batch, _ = next(iter(loader_of([[3], [4]])))
    assert batch.num_loss_tokens == 0
    logits = torch.randn(2, 8, requires_grad=True)
    summed = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    loss = batch.mean_loss(summed)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
