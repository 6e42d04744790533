"""Chats, completions and preference pairs: each token learned or not by a rule of the test."""

import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from dcp import AttentionExecutor  # noqa: E402
from dcp.data import (  # noqa: E402
    ChatSamples,
    PreferencePairs,
    SharedPromptMasks,
    open_chat,
    open_preferences,
)
from tests.chat_cases import (  # noqa: E402
    FORGETS,
    MARKED,
    PLAIN,
    ids_of,
    make_tokenizer,
    says,
    written,
)
from tests.loading import drain, loader_of  # noqa: E402
from tests.model_cases import make_config, make_model  # noqa: E402

END = ids_of("</s>")
CHATS = {
    "one turn": says("Hi", "Hello"),
    "turns": says("Hi", "Grüße", "and?", "", "bye", "bye\nbye", system="Be brief."),
    "ends with the user": says("Hi", "Hello", "more", system="<s>"),
    "two answers in a row": [*says("Hi", "a"), {"role": "assistant", "content": "b"}],
    "no answer": says("Hi"),
}
PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "five"}


def only(samples, **options):
    """Tokens and labels of the only batch of a loader, and the count of labels."""
    ((tokens, labels, _, count),) = drain(
        loader_of(samples, seed=None, tokens_per_batch=4096, over_long="raise", **options)
    )
    return tokens, labels, count


def labels_by(ids, mask):
    """What each token predicts, by the mask of the tokens that are learned."""
    return [b if learned else -100 for b, learned in zip(ids[1:], mask[1:], strict=True)] + [-100]


# --------------------------------------------------------------------------- chats


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_assistant_tokens_alone_are_learned(name, template):
    ids, mask = written(CHATS[name], marked=template == MARKED)
    samples = ChatSamples(
        [{"messages": CHATS[name]}], make_tokenizer(template), assistant_only=True
    )
    assert samples[0]["input_ids"].tolist() == ids
    assert samples[0]["loss_mask"].tolist() == mask.tolist()
    assert samples.lengths.tolist() == [len(ids)]
    assert only(samples) == (ids, labels_by(ids, mask), int(mask.sum()))
    everything = ChatSamples([{"messages": CHATS[name], "labels": None}], make_tokenizer(template))
    assert only(everything) == (ids, labels_by(ids, np.ones_like(mask)), len(ids) - 1)


def test_earlier_turns_may_be_written_otherwise_where_the_template_marks_its_answers():
    chat = says("Hi", "Hello", "more", "yes")
    marks = MARKED.replace(
        "{{ m['content'] }}<|im_end|>{% endgen", "{{ m['content'][1:] }}{% endgen"
    )
    found = ChatSamples([{"messages": chat}], make_tokenizer(marks), assistant_only=True)[0]
    learned = found["input_ids"][found["loss_mask"]]
    assert learned.tolist() == ids_of("ello" + "es")
    assert len(ChatSamples([{"messages": chat}], make_tokenizer(FORGETS))[0]["input_ids"])
    single = [{"messages": says("Hi", "Hello")}]
    assert ChatSamples(single, make_tokenizer(FORGETS), assistant_only=True)[0]["loss_mask"].any()


def test_tools_and_options_reach_the_template():
    template = "{% for t in tools or [] %}{{ t['name'] }}{% endfor %}{{ mood }}" + PLAIN
    record = {"messages": says("Hi", "Hello"), "chat_template_kwargs": {"mood": "?"}}
    for tools in ([{"name": "sum"}], json.dumps([{"name": "sum"}])):
        samples = ChatSamples([record | {"tools": tools}], make_tokenizer(template))
        assert samples[0]["input_ids"].tolist()[:5] == ids_of("sum?<|im_start|>")


def test_prompts_with_completions():
    tokenizer = make_tokenizer()
    texts = {"prompt": "Q: ä", "completion": " b"}
    ids, ends = ids_of("Q: ä b</s>"), 3
    mask = np.arange(len(ids)) >= len(ids) - ends
    assert only(ChatSamples([texts], tokenizer)) == (ids, labels_by(ids, mask), ends)
    open_ended = ChatSamples([texts], tokenizer, completion_only=False, add_eos=False)
    assert only(open_ended) == (ids[:-1], [*ids[1:-1], -100], len(ids) - 2)

    chat = says("Hi", "Hello", "more", "yes", system="s")
    ids, both = written(chat, marked=False)
    _, first = written(chat[:4], marked=False)
    answer = both & (np.arange(len(ids)) >= len(first))
    for completion in ("yes", chat[4:]):
        record = {"prompt": chat[:4], "completion": completion}
        assert only(ChatSamples([record], tokenizer))[:2] == (ids, labels_by(ids, answer))
    record = {"prompt": chat[:2], "completion": chat[2:]}
    behind = np.arange(len(ids)) >= len(written(chat[:2], marked=False)[0])
    behind[: len(written(chat[:2], marked=False)[0]) + len(ids_of("<|im_start|>assistant\n"))] = 0
    assert only(ChatSamples([record], tokenizer))[:2] == (ids, labels_by(ids, behind))
    assistant = ChatSamples([record], tokenizer, assistant_only=True)
    assert only(assistant)[:2] == (ids, labels_by(ids, both & behind))


def test_a_token_across_the_boundary_does_not_move_it():
    tokenizer = make_tokenizer(merges=[("a", "b")])
    (merged,) = tokenizer("ab")["input_ids"]
    sample = ChatSamples([{"prompt": "xa", "completion": "bab"}], tokenizer)[0]
    x, a, b = (tokenizer(letter)["input_ids"][0] for letter in "xab")
    assert sample["input_ids"].tolist() == [x, a, b, merged, tokenizer.eos_token_id]
    assert sample["loss_mask"].tolist() == [False, False, True, True, True]


def test_a_tokenizer_that_ends_every_string_does_not_end_the_prompt():
    tokenizer = make_tokenizer()
    ends = tokenizer.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    ends.post_processor = TemplateProcessing("<s> $0 </s>", None, [("<s>", 258), ("</s>", 259)])
    sample = ChatSamples([{"prompt": "a", "completion": "b"}], tokenizer)[0]
    assert sample["input_ids"].tolist() == ids_of("<s>ab</s>")
    assert sample["loss_mask"].tolist() == [False, False, True, True]


def test_texts_and_tokens_pass():
    records = [
        {"text": "abc", "url": "not looked at"},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "text": "not read"},
        {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]},
    ]
    samples = ChatSamples(records, make_tokenizer(), assistant_only=True)
    assert samples.lengths.tolist() == [4, 3, 2]
    text = ids_of("abc</s>")
    wanted = ([*text, 5, 6, 7, 5, 6], [*text[1:], -100, 6, -100, -100, 6, -100], 5)
    assert only(samples) == wanted
    kept = ChatSamples([{"text": "abc", "weight": 0.5}], make_tokenizer(), keep="weight")
    with loader_of(kept, fields="weight") as loader:
        ((batch, _),) = loader
        assert batch.fields["weight"].tolist() == [0.5] * 4


CHAT = {"messages": says("Hi", "Hello")}
REFUSED = [
    ({"url": "x"}, "record 1 has url, none of what is known: input_ids; messages; prompt and com"),
    ({}, "record 1 has nothing, none of"),
    (PAIR, r"record 1 has prompt, .* \(PreferencePairs reads chosen and rejected\)"),
    ("Hi", "record 1 must be a mapping"),
    (CHAT | {"labels": [1]}, "record 1 has 'labels' beside 'messages': it belongs to input_ids"),
    ({"messages": []}, "messages of record 1 holds no message"),
    ({"messages": "Hi"}, "messages of record 1 must be a list of messages, got 'Hi'"),
    ({"messages": ["Hi"]}, "message 0 of messages of record 1 must be a mapping"),
    ({"messages": [{"content": "Hi"}]}, "message 0 .* of record 1 has no 'role' but content"),
    ({"messages": [*says("a"), {"role": "assistant"}]}, "message 1 .* no 'content' but role"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part 'image'"),
    ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "has weight 0, and only 1"),
    ({"messages": says("Hi", "Hello", "more", "yes")}, "first 2 messages of record 1 otherwise"),
    ({"messages": says("Hi", "Hello")[1:]}, "record 1 begins with an assistant's message"),
    (CHAT | {"tools": "{"}, "tools of record 1 are no JSON"),
    ({"prompt": "a", "completion": 3}, "record 1 has 3 where a string is needed|must be a list"),
    ({"text": ["a"]}, r"record 1 has \['a'\] where a string is needed"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "match"), REFUSED)
def test_records_that_are_refused(record, match):
    samples = ChatSamples([CHAT, record], make_tokenizer(FORGETS), assistant_only=True)
    with pytest.raises(ValueError, match=match):
        only(samples)
    with pytest.raises(ValueError, match=match):
        samples[1]


def test_tokenizers_and_records_that_are_refused():
    with pytest.raises(ValueError, match="no chat template, by which messages of record 0"):
        ChatSamples([CHAT], make_tokenizer(None))[0]
    raises = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="cannot write record 0: roles must alternate"):
        ChatSamples([CHAT], raises)[0]
    with pytest.raises(ValueError, match="for a path, use open_chat"):
        ChatSamples("chats.jsonl", make_tokenizer())
    with pytest.raises(ValueError, match="records of type int can be neither"):
        open_chat(3, make_tokenizer())


# --------------------------------------------------------------------------- files and streams


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_chats_of_files(tmp_path, kind):
    import gzip

    records = [{"messages": chat, "id": i} for i, chat in enumerate(CHATS.values())]
    path = tmp_path / f"chats.{kind}"
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    else:
        lines = json.dumps(records) if kind == "json" else "\n".join(map(json.dumps, records))
        data = lines.encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    tokenizer = make_tokenizer()
    for source in (path, str(tmp_path), f"{tmp_path}/*.{kind}"):
        found = open_chat(source, tokenizer, assistant_only=True)
        assert [s["input_ids"].tolist() for s in found] == [
            written(chat, marked=False)[0] for chat in CHATS.values()
        ]
    assert only(found) == only(ChatSamples(records, tokenizer, assistant_only=True))


def test_files_that_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2 is no JSON object but \[1\]"):
        open_chat(tmp_path, make_tokenizer())
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no file at all: records are read from"):
        open_chat(tmp_path, make_tokenizer())
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"a.txt: records are read from .jsonl"):
        open_preferences(tmp_path, make_tokenizer())


class Stream:
    """Records that can only be iterated, and resumed."""

    def __init__(self, records):
        self.records, self.epochs, self.next = records, [], 0

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]

    def __iter__(self):
        while self.next < len(self.records):
            self.next += 1
            yield self.records[self.next - 1]
        self.next = 0


def test_streams_of_records():
    records = [{"messages": chat} for chat in CHATS.values()]
    stream = Stream(records)
    samples = open_chat(stream, make_tokenizer(), assistant_only=True)
    assert not hasattr(samples, "lengths")
    with loader_of(samples, seed=None, tokens_per_batch=4096, over_long="raise") as loader:
        batch, _ = next(iter(loader))
    indexed = only(ChatSamples(records, make_tokenizer(), assistant_only=True))
    assert (batch.tokens.tolist(), batch.labels.tolist()) == indexed[:2]
    assert stream.epochs[0] == 0
    plain = open_preferences(iter([PAIR, {"prompt": "a"}]), make_tokenizer())
    assert not hasattr(plain, "state_dict")
    with pytest.raises(ValueError, match="record 1 has no 'chosen' but prompt"):
        list(plain)


# --------------------------------------------------------------------------- preference pairs


def test_a_pair_is_one_sample():
    pairs = PreferencePairs([PAIR, PAIR | {"prompt": "?", "group_id": 3}], make_tokenizer())
    prompt, chosen, rejected = ids_of("2+2="), ids_of("4</s>"), ids_of("five</s>")
    sample = pairs[0]
    assert sample["input_ids"].tolist() == prompt + chosen + prompt[-1:] + rejected
    assert sample["labels"].tolist() == [-100] * 4 + chosen + [-100] + rejected
    assert sample["answer"].tolist() == [-1] * 3 + [0, 0, -1] + [1] * 5 + [-1]
    assert sample["answer_lengths"] == [3, 6]
    assert pairs[1]["group_id"] == 3
    assert pairs.lengths.tolist() == [12, 9]
    assert pairs.tokens_saved == 2 * 4 + 2 + 5 - 12 + 2 * 1 + 2 + 5 - 9


def test_pairs_of_messages_in_every_form():
    prompt, yes, no = says("Hi", system="s"), says("?", "yes")[1:], says("?", "no")[1:]
    forms = [
        {"prompt": prompt, "chosen": yes, "rejected": no},
        {"prompt": prompt, "chosen": "yes", "rejected": "no"},
        {"prompt": prompt, "chosen": prompt + yes, "rejected": prompt + no},
        {"chosen": prompt + yes, "rejected": prompt + no},
    ]
    tokenizer = make_tokenizer(MARKED)
    found = [PreferencePairs([form], tokenizer)[0] for form in forms]
    ids, mask = written(prompt + yes, marked=False)
    for sample in found:
        n = len(sample["input_ids"]) - sum(sample["answer_lengths"])
        stop = n + sample["answer_lengths"][0]
        assert sample["input_ids"][:stop].tolist() == ids
        learned = sample["labels"][:stop] != -100
        assert learned.tolist() == mask.tolist()
        assert {k: np.array(v).tolist() for k, v in sample.items()} == {
            k: np.array(v).tolist() for k, v in found[0].items()
        }
    by_string = {"prompt": "Hi", "chosen": says("Hi", "yes"), "rejected": says("Hi", "no")}
    wanted = written(says("Hi", "yes"), marked=False)[0]
    sample = PreferencePairs([by_string], tokenizer)[0]
    assert sample["input_ids"][: len(wanted)].tolist() == wanted


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"prompt": "a", "chosen": "b"}, "record 0 has no 'rejected' but prompt, chosen"),
        ({"chosen": "a", "rejected": "b"}, "record 0 has no prompt, and its chosen and rejected"),
        (PAIR | {"prompt": ""}, "the prompt of record 0 has no tokens"),
        (PAIR | {"chosen": 3}, "chosen of record 0 must be a list of messages, got 3"),
        (PAIR | {"chosen": ""}, None),  # its end token is learned
        (PAIR | {"chosen": says("a", "b"), "rejected": says("a", "c")}, "message by 'user': leave"),
        ({"prompt": says("a"), "chosen": says("a"), "rejected": says("a")}, "no message behind"),
    ],
)
def test_pairs_that_are_refused(record, match):
    pairs = PreferencePairs([record], make_tokenizer())
    if match is None:
        assert pairs[0]["answer_lengths"][0] == 2
        return
    with pytest.raises(ValueError, match=match):
        pairs[0]


def test_masks_of_what_is_no_pair():
    masks = SharedPromptMasks()
    (causal,) = masks([3], [{"input_ids": [1, 2, 3]}])
    assert causal.area == 6
    with pytest.raises(ValueError, match=r"answer_lengths \[2, 2\] make more than the sample's 3"):
        masks([3], [{"answer_lengths": [2, 2]}])
    with pytest.raises(ValueError, match="documents must not be split"):
        masks([3], [np.arange(3)])


RECORDS = [
    PAIR,
    {"prompt": "?", "chosen": "a longer answer", "rejected": ""},
    {"chosen": says("Hi", "Grüße", "so", "yes"), "rejected": says("Hi", "Grüße", "so", "n")},
]


def separate(record):
    """Prompt and answers as tokens, by the rules of the test."""
    if "prompt" in record:
        return ids_of(record["prompt"]), [
            ids_of(record[name] + "</s>") for name in ("chosen", "rejected")
        ]
    whole = [written(record[name], marked=False)[0] for name in ("chosen", "rejected")]
    start = ids_of("<|im_start|>assistant\n")
    prompt = written(record["chosen"][:-1], marked=False)[0] + start
    return prompt, [ids[len(prompt) :] for ids in whole]


def log_probabilities(logits, labels):
    return -torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")


def preference_loss(sums):
    """Something of all answers that no sum over tokens would be: ``sums`` is [pair, answer]."""
    return -torch.nn.functional.logsigmoid(0.1 * (sums[:, 0] - sums[:, 1])).sum()


def make_wide(implementation):
    config = make_config(implementation)
    config.vocab_size = 260
    return make_model(config)


def test_pairs_equal_two_separate_sequences():
    from dcp.integrations.transformers import local_logits

    eager, sums, wanted = make_wide("eager"), [], []
    for record in RECORDS:
        prompt, answers = separate(record)
        for answer in answers:
            ids = torch.tensor(prompt + answer)
            labels = torch.tensor([-100] * (len(prompt) - 1) + answer + [-100])
            found = log_probabilities(eager(input_ids=ids[None]).logits[0], labels)
            wanted.append(found[labels != -100])
            sums.append(found.sum())
    preference_loss(torch.stack(sums).view(-1, 2)).backward()

    pairs, model, executor = (
        PreferencePairs(RECORDS, make_tokenizer()),
        make_wide("dcp"),
        AttentionExecutor(),
    )
    options = {"fields": pairs.fields, "tokens_per_batch": 4096, "over_long": "raise"}
    with loader_of(pairs, pairs.mask_fn, **options) as loader:
        ((batch, plan),) = loader
    executor.prepare(plan)
    logits = local_logits(model, batch.tokens, batch.positions, executor)
    found = log_probabilities(logits, batch.labels)
    answer = batch.fields["answer"]
    assert ((answer >= 0) == (batch.labels != -100)).all()
    assert batch.num_loss_tokens == sum(map(len, wanted))
    for number, alone in enumerate(wanted):
        chosen = (batch.sample_ids == number // 2) & (answer == number % 2)
        assert (found[chosen] - alone).abs().max() < 1e-5
    index = (2 * batch.sample_ids + answer)[answer >= 0]
    sums = torch.zeros(2 * len(pairs)).index_add(0, index, found[answer >= 0])
    preference_loss(sums.view(-1, 2)).backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() < 1e-5
