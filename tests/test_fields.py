"""What samples say beside their tokens, and what masks say of positions and labels."""

import numpy as np
import pytest
import torch

from dcp import AttnMask
from dcp.data import SampleFormat
from tests.loading import drain, loader_of

PADDED = {"input_ids": [5, 6, 7, 8, 0, 0, 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0, 0, 0]}


def one_batch(samples, mask_fn="causal", **options):
    """Tokens, labels, positions and the count of the only batch, in the samples' order."""
    (found,) = drain(loader_of(samples, mask_fn, seed=None, **options))
    return found


# --------------------------------------------------------------------------- fields that are known


MASKS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_tokens_mask")


def by_the_rule(sample):
    """Tokens, labels and positions of a sample, token by token."""
    ids, n = list(sample["input_ids"]), len(sample["input_ids"])
    real = [i for i in range(n) if sample.get("attention_mask", [1] * n)[i]]
    positions = sample.get("position_ids")
    tokens, labels, places = [], [], []
    for place, i in enumerate(real):
        following = real[place + 1] if place + 1 < len(real) else None
        label = -100
        if following is not None:
            label = sample.get("labels", ids)[following]
            masks = [sample[name] for name in MASKS if name in sample]
            if not all(mask[following] for mask in masks):
                label = -100
            if positions is not None and positions[following] <= positions[i]:
                label = -100
        if "shift_labels" in sample:
            out = label == -100 and following is not None
            label = -100 if out else sample["shift_labels"][i]
        tokens.append(ids[i])
        labels.append(label)
        places.append(place if positions is None else positions[i])
    return tokens, labels, places


KNOWN_SAMPLES = {
    "padding on the right": PADDED,
    "padding on the left": {"input_ids": [0, 0, 9, 8, 7], "attention_mask": [0, 0, 1, 1, 1],
                            "position_ids": [1, 1, 0, 1, 2], "labels": [-100, -100, 9, 8, -100]},
    "nothing but padding": {"input_ids": [0, 0], "attention_mask": [0, 0]},
    "loss_mask": {"input_ids": [1, 2, 3, 4, 5], "loss_mask": [1.0, 0.0, 1.0, 0.0, 1.0]},
    "completion_mask": {"input_ids": [1, 2, 3, 4], "completion_mask": [False, False, True, True]},
    "assistant_masks": {"input_ids": [1, 2, 3, 4], "assistant_masks": [0, 1, 0, 1]},
    "assistant_tokens_mask": {"input_ids": [1, 2, 3], "assistant_tokens_mask": [0, 1, 0]},
    "all of them": {"input_ids": [1, 2, 3, 4, 5, 0], "attention_mask": [1, 1, 1, 1, 1, 0],
                    "labels": [1, -100, 3, 4, 5, -100], "loss_mask": [1, 1, 0, 1, 1, 1],
                    "completion_mask": [0, 1, 1, 1, 0, 0]},
    "shift_labels": {"input_ids": [1, 2, 3], "shift_labels": [7, -100, 9]},
    "shift_labels and a mask": {"input_ids": [1, 2, 3], "shift_labels": [7, 8, 9],
                                "loss_mask": [1, 0, 1]},
    "position_ids with a gap": {"input_ids": [1, 2, 3], "position_ids": [10, 11, 15]},
    "keys without a value": {"input_ids": [1, 2], "labels": [1, 2], "extra": None},
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_SAMPLES)
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_known_fields_are_honoured(name, kind):
    sample = {k: v for k, v in KNOWN_SAMPLES[name].items() if v is not None}
    given = {k: v if v is None else kind(v) for k, v in KNOWN_SAMPLES[name].items()}
    tokens, labels, positions, count = one_batch([given, np.array([3, 4])])
    wanted = by_the_rule(sample)
    assert (tokens, labels, positions) == (
        wanted[0] + [3, 4],
        wanted[1] + [4, -100],
        wanted[2] + [0, 1],
    )
    assert count == sum(label != -100 for label in labels)


def test_padding_is_no_label():
    assert one_batch([PADDED]) == ([5, 6, 7, 8], [6, 7, 8, -100], [0, 1, 2, 3], 3)


REFUSED = [
    ({"foo": [1, 2, 3]}, r"unknown field 'foo' of document 1: name it in fields=\('foo',\)"),
    ({"attention_mask": [1, 0, 1]}, r"attention_mask of document 1 is 0 at token 1, between"),
    ({"attention_mask": [[1, 1, 1]]}, r"attention_mask of document 1 .* shape \(1, 3\)"),
    ({"attention_mask": [1, 2, 2]}, "attention_mask of document 1 must hold 0 and 1 only, got 2"),
    ({"loss_mask": [1, 0.5, 0]}, "loss_mask of document 1 must hold 0 and 1 only, got 0.5"),
    ({"loss_mask": [1, float("nan"), 0]}, "loss_mask of document 1 must hold 0 .* got nan"),
    ({"completion_mask": [1, 1]}, "completion_mask of document 1 has 2 entries for 3 tokens"),
    ({"labels": [1, 2]}, "labels of document 1 has 2 entries for 3 tokens"),
    ({"labels": 1}, r"labels of document 1 must be a vector of integers, got int64 of shape \(\)"),
    ({"labels": [1.0, 2.0, 3.0]}, "labels of document 1 must be a vector of integers, got float64"),
    ({"labels": [1, 2, -1]}, "labels of document 1 has -1: ids must be 0 or more"),
    ({"labels": [1, 2, 9], "shift_labels": [2, 3, 4]}, "token 1 comes 9 by the one and 3 by"),
    ({"shift_labels": [1, 2, 50]}, "shift_labels of document 1 has 50: .* below vocab_size=50"),
    ({"position_ids": [[0, 1, 2]] * 3}, r"position_ids of document 1 .* shape \(3, 3\)"),
    ({"position_ids": [-1, 0, 1]}, "position_ids of document 1 has -1, below 0"),
    ({"position_ids": [0, 1, 0]}, r"document 1 begins at token 2 .*\.documents\(\[2, 1\]"),
    ({"input_ids": [1.0, 2.0, 3.0]}, "input_ids of document 1 must be a vector of integers, got f"),
    ({"input_ids": [True, False]}, "input_ids of document 1 must be a vector of integers, got b"),
    ({"input_ids": [[1, 2, 3]]}, r"input_ids of document 1 .* shape \(1, 3\)"),
    ({"input_ids": [[1], [2, 3]]}, "input_ids of document 1 is not an array"),
    ({"input_ids": [1, None, 3]}, "input_ids of document 1 must be a vector of integers, got obj"),
    ({"input_ids": "one"}, "input_ids of document 1 must be a vector of integers, got <U3"),
    ({"input_ids": [1, -2, 3]}, "input_ids of document 1 has -2: ids must be 0 or more"),
    ({"input_ids": [1, 50, 3]}, "input_ids of document 1 has 50: .* and below vocab_size=50"),
    ({"input_ids": np.array([1 << 63], dtype=np.uint64)}, "has 9223372036854775808, beyond int64"),
    ({"input_ids": None}, "document 1 has no 'input_ids', it has input_ids"),
    ({"group_id": [1, 2]}, "a group must be a number or a name: .*unhashable"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), REFUSED)
def test_samples_that_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        one_batch([[7], {"input_ids": [1, 2, 3]} | change], vocab_size=50)


def test_a_refusal_reaches_the_reader_where_lengths_are_given():
    class Known(list):
        lengths = np.array([3])

        def num_loss_tokens(self, index, start, stop):
            return 2

    with pytest.raises(ValueError, match="unknown field 'foo' of document 0"):
        one_batch(Known([{"input_ids": [1, 2, 3], "foo": 1}]))
    with pytest.raises(ValueError, match="position_ids of document 0 begin anew at token 1"):
        one_batch(Known([{"input_ids": [1, 2, 3], "position_ids": [0, 0, 1]}]))
    with pytest.raises(ValueError, match="document 0 has a group_id, but the dataset gives its le"):
        one_batch(Known([{"input_ids": [1, 2, 3], "group_id": 1}]))
    del Known.num_loss_tokens
    with pytest.raises(ValueError, match="document 0 has 2 tokens, the dataset's lengths say 3"):
        one_batch(Known([{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0]}]))


def test_keys_may_be_ignored():
    sample = {"input_ids": [1, 2, 3], "text": "abc", "attention_mask": [1, 1, 0]}
    assert one_batch([sample], ignore=("text", "attention_mask"))[0] == [1, 2, 3]
    assert one_batch([sample], ignore="text")[0] == [1, 2]
    with pytest.raises(ValueError, match="fields names 'labels', which the loader reads itself"):
        SampleFormat(fields="labels")


# --------------------------------------------------------------------------- segments


class Segmented(AttnMask):
    """A mask that tells its segments."""

    def __init__(self, mask, segments):
        super().__init__(mask.q_len, mask.k_len, mask.bands)
        self.segments = np.array(segments)


def documents(*lengths):
    starts = np.cumsum([0, *lengths[:-1]])
    return Segmented(AttnMask.documents(list(lengths)), [[s, 0] for s in starts])


def question(seqlen):
    """A fifth is the question, four answers share the rest."""
    first, answer = int(seqlen * 0.2), (seqlen - int(seqlen * 0.2)) // 4
    segments = [[0, 0], *([first + i * answer, first] for i in range(4))]
    return Segmented(AttnMask.shared_question(seqlen, 0.2, 4), segments)


def test_positions_and_labels_follow_the_segments_of_the_mask():
    found = one_batch([np.arange(10, 20), np.arange(30, 35)], lambda s, _: [question(10), "causal"])
    tokens, labels, positions, count = found
    assert tokens == [*range(10, 20), *range(30, 35)]
    assert positions == [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, *range(5)]
    assert labels == [11, -100, 13, -100, 15, -100, 17, -100, 19, -100, 31, 32, 33, 34, -100]
    assert count == 9


def test_segments_inside_one_sample_with_fields_of_its_own():
    sample = {"input_ids": np.arange(8), "loss_mask": [1, 1, 0, 1, 1, 1, 1, 1]}
    found = one_batch([sample], lambda s, _: [documents(3, 0, 5)])
    assert found[1:] == ([1, -100, -100, 4, 5, 6, 7, -100], [0, 1, 2, 0, 1, 2, 3, 4], 5)
    shifted = {"input_ids": np.arange(8), "shift_labels": np.arange(20, 28)}
    assert one_batch([shifted], lambda s, _: [documents(3, 5)])[1] == [*range(20, 28)]


def test_split_documents_follow_the_segments_of_their_pieces():
    found = one_batch([np.arange(10)], lambda s, _: [documents(2, n - 2) for n in s], max_seqlen=6)
    assert found[1:] == ([1, *[-100], 3, 4, 5, -100, 7, -100, 9, -100],
                         [0, 1, 0, 1, 2, 3, 0, 1, 0, 1], 6)  # fmt: skip


PACKED = {"input_ids": np.arange(8), "position_ids": [0, 1, 2, 0, 1, 2, 3, 4]}
PLAIN = AttnMask.from_slices(8, 8, [(0, 3, 0, 3, "causal"), (3, 8, 3, 8, "causal")])
WANTED = ([1, 2, -100, 4, 5, 6, 7, -100], PACKED["position_ids"], 6)


@pytest.mark.parametrize("mask", [documents(3, 5), PLAIN])
def test_packed_samples_agree_with_their_mask(mask):
    assert one_batch([PACKED], lambda s, _: [mask])[1:] == WANTED
    named = {"global": [mask], "local": [PLAIN]}
    assert one_batch([PACKED], lambda s, _: named)[1:] == WANTED
    plain = [np.arange(8)]
    assert one_batch(plain, lambda s, _: {"a": [documents(3, 5)], "b": [PLAIN]})[1:] == WANTED


@pytest.mark.parametrize(
    ("match", "masks"),
    [
        (r"begins at token 3 \(position 0\), but by mask 'default'", ["causal"]),
        (r"begins at token 3 .* by mask 'default'", ["full"]),
        (r"put token 3 at 0, its mask has segments .* \[\[0, 0\], \[4, 0\]\]", [documents(4, 4)]),
        (r"masks 'a' and 'b' of document 0 have other segments \(\[\[0, 0\], \[3, 0\]\] and",
         {"a": [documents(3, 5)], "b": [documents(4, 4)]}),
        (r"token 3 .* but by mask 'b' its tokens see those before it",
         {"a": [documents(3, 5)], "b": [AttnMask.sliding_window(8, 2)]}),
    ],
)  # fmt: skip
def test_segments_that_disagree_are_refused(match, masks):
    with pytest.raises(ValueError, match=match):
        one_batch([PACKED], lambda s, _: masks)


def test_answers_may_see_their_question_by_a_plain_mask():
    shared = AttnMask.shared_question(10, 0.2, 4)
    positions = [0, 1, 2, 3, 2, 3, 2, 3, 2, 3]
    plain = AttnMask(10, 10, shared.bands)
    sample = {"input_ids": np.arange(10), "position_ids": positions}
    found = one_batch([sample], lambda s, _: [plain])
    assert found[2] == positions
    assert [i for i, label in enumerate(found[1]) if label == -100] == [3, 5, 7, 9]
    wrong = {"input_ids": np.arange(10), "position_ids": [0, 1, 2, 3, 1, 2, 3, 4, 5, 6]}
    with pytest.raises(ValueError, match=r"begins at token 4 \(position 1\), but by mask"):
        one_batch([wrong], lambda s, _: [plain])


def segments_on_each_rank():
    samples = [{"input_ids": np.arange(50), "bonus": np.arange(50) * 0.5}, np.arange(100, 107)]
    samples[1] = {"input_ids": samples[1], "bonus": np.zeros(7)}
    masks = lambda seqlens, _: [question(n) if n == 50 else "causal" for n in seqlens]  # noqa: E731
    group = torch.distributed.group.WORLD
    with loader_of(samples, masks, group=group, fields="bonus") as loader:
        ((batch, _),) = loader
        parts = (batch.tokens, batch.labels, batch.positions, batch.fields["bonus"])
        return list(zip(*(part.tolist() for part in parts), strict=True)), batch.num_loss_tokens


def test_segments_reach_ranks_that_do_not_plan(gloo_pool):
    results = gloo_pool(3).run(segments_on_each_rank)
    ends = {9, 19, 29, 39, 49, 106}
    wanted = [
        (t, -100 if t in ends else t + 1, t if t < 10 else 10 + t % 10, t * 0.5) for t in range(50)
    ] + [(t, -100 if t in ends else t + 1, t - 100, 0.0) for t in range(100, 107)]
    assert sorted(row for rows, _ in results for row in rows) == wanted
    assert {count for _, count in results} == {57 - len(ends)}
