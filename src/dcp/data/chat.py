"""Chats, prompts with completions, texts and tokens: records as samples of the loader."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dcp.data.chat_template import ASSISTANT, ChatEncoder, Messages, checked_messages
from dcp.data.records import open_records
from dcp.data.samples import KNOWN, as_names

# What a record may be; the first of which it has all keys is the one it is read as.
_FORMS = (("input_ids",), ("messages",), ("prompt", "completion"), ("text",))
_OF_TOKENS = [name for name in KNOWN if name != "group_id"]


class EncodedRecords(Sequence[Any]):
    """Records as samples, each encoded when it is indexed. Subclasses implement :meth:`encode`.

    Args:
        records: mappings, by index; or a stream of them, for :class:`EncodedStream` alone.
        tokenizer: of transformers, or with its ``__call__`` and ``apply_chat_template``.
        keep: keys of a record that go into its sample as they are, for the loader's ``fields``.
            ``group_id`` always does; keys of which nothing here knows are not looked at.
        add_eos: strings end with the tokenizer's end token, where it has one; templates end turns
            by themselves.
    """

    def __init__(
        self, records: Any, tokenizer: Any, *, keep: str | Sequence[str] = (), add_eos: bool = True
    ) -> None:
        if isinstance(records, (str, Mapping)):
            raise ValueError(
                f"records must be a sequence of mappings, got {records!r:.60}: for a path, use "
                f"open_chat or open_preferences"
            )
        self.records, self.encoder = records, ChatEncoder(tokenizer, add_eos=add_eos)
        self.keep = (*as_names(keep), "group_id")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        return self.encode(self.records[index], index)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))  # no IndexError of records ends it

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, padding left out: int64 ``[n]``; encodes every record once."""
        return np.array([_length(sample) for sample in self], dtype=np.int64)

    def encode(self, record: Any, index: int) -> dict[str, Any]:
        """The sample of a record; ``ValueError``, with its index, where it cannot be one."""
        raise NotImplementedError

    def kept(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Of a record's entries those that go into its sample as they are."""
        return {name: entries[name] for name in self.keep if name in entries}


class EncodedStream:
    """Records that can only be iterated, as a stream of samples.

    Hands on ``set_epoch``, ``state_dict`` and ``load_state_dict``, where the records have them.
    """

    def __init__(self, samples: EncodedRecords) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, record in enumerate(self._samples.records):
            yield self._samples.encode(record, index)

    def __getattr__(self, name: str) -> Any:
        if name not in ("set_epoch", "state_dict", "load_state_dict"):
            raise AttributeError(f"a stream of samples has no attribute {name!r}")
        return getattr(self._samples.records, name)


class ChatSamples(EncodedRecords):
    """Samples ``input_ids`` and, where not all tokens are to be learned, ``loss_mask``.

    A record is read as the first of these of which it has all keys (None counts as absent):

    - ``input_ids``: with whatever else :class:`SampleFormat` knows, as it is;
    - ``messages``: by the chat template, with ``tools`` and ``chat_template_kwargs`` if there;
    - ``prompt`` and ``completion``: two strings, or lists of messages. Where one of them is a
      list, a string is a message of the user's, or the assistant's;
    - ``text``: a string, all of it learned.

    Args:
        records, tokenizer, keep, add_eos: see :class:`EncodedRecords`.
        assistant_only: of messages, learn the tokens that an assistant wrote; see
            :mod:`dcp.data.chat_template` for which those are. A conversation without any is kept,
            with no token to learn. ``text`` and strings have no assistant, and stay as they are.
        completion_only: of ``prompt`` and ``completion``, learn the completion alone.

    Raises (when a record is read, or ``lengths`` are asked for):
        ValueError: with the record's index: it is none of the above, or has labels beside its
            messages; messages without role or content; a chat template that is missing, that
            refuses the messages, or that tells no exact mask.
    """

    def __init__(
        self,
        records: Any,
        tokenizer: Any,
        *,
        assistant_only: bool = False,
        completion_only: bool = True,
        keep: str | Sequence[str] = (),
        add_eos: bool = True,
    ) -> None:
        super().__init__(records, tokenizer, keep=keep, add_eos=add_eos)
        self.assistant_only, self.completion_only = assistant_only, completion_only

    def encode(self, record: Any, index: int) -> dict[str, Any]:
        where = f"record {index}"
        entries = entries_of(record, where)
        form = next((keys for keys in _FORMS if entries.keys() >= {*keys}), None)
        if form is None:
            known = "; ".join(" and ".join(keys) for keys in _FORMS)
            pairs = " (PreferencePairs reads chosen and rejected)" if "chosen" in entries else ""
            found = ", ".join(map(str, entries)) or "nothing"
            raise ValueError(f"{where} has {found}, none of what is known: {known}{pairs}")
        if form == ("input_ids",):
            return {name: entries[name] for name in _OF_TOKENS if name in entries} | self.kept(
                entries
            )
        if beside := [name for name in _OF_TOKENS if name in entries]:
            raise ValueError(
                f"{where} has {beside[0]!r} beside {form[0]!r}: it belongs to input_ids, give "
                f"these too, or leave it out"
            )
        if form == ("text",):
            tokens, mask = self.encoder.text(entries["text"], where), None
        elif form == ("messages",):
            messages = checked_messages(entries["messages"], f"messages of {where}")
            tokens, mask = self._chat(messages, options_of(entries, where), where)
        else:
            tokens, mask = self._completion(entries, where)
        sample: dict[str, Any] = {"input_ids": np.array(tokens, dtype=np.int64)}
        return sample | ({} if mask is None else {"loss_mask": mask}) | self.kept(entries)

    def _chat(
        self, messages: Messages, options: dict[str, Any], where: str
    ) -> tuple[list[int], np.ndarray | None]:
        if self.assistant_only:
            return self.encoder.marked(messages, where, **options)
        return self.encoder.messages(messages, where, **options), None

    def _completion(
        self, entries: Mapping[str, Any], where: str
    ) -> tuple[list[int], np.ndarray | None]:
        prompt, completion = entries["prompt"], entries["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            first, rest = self.encoder.split_text(prompt, completion, where)
            return first + rest, self._behind(len(first), len(rest))
        options = options_of(entries, where)
        before = as_messages(prompt, "user", f"prompt of {where}")
        after = as_messages(completion, ASSISTANT, f"completion of {where}")
        tokens, mask = self._chat([*before, *after], options, where)
        if self.completion_only:
            first, rest = self.encoder.split_messages(before, after, where, **options)
            behind = self._behind(len(first), len(rest))
            mask = behind if mask is None else mask & behind
        return tokens, mask

    def _behind(self, prompt: int, completion: int) -> np.ndarray | None:
        return np.repeat([False, True], [prompt, completion]) if self.completion_only else None


def open_chat(
    source: Any, tokenizer: Any, *, split: str = "train", **options: Any
) -> ChatSamples | EncodedStream:
    """Chats of files, of a Hugging Face dataset or of any records, for the loader.

    Args:
        source, split: see :func:`dcp.data.open_records`.
        tokenizer, options: see :class:`ChatSamples`.

    Returns the samples by index; a stream of them where the records can only be iterated.
    """
    return indexed_or_stream(ChatSamples(open_records(source, split=split), tokenizer, **options))


def indexed_or_stream(samples: Any) -> Any:
    """Samples as they are, or as a stream where their records have no length or index."""
    records = samples.records
    if hasattr(records, "__len__") and hasattr(records, "__getitem__"):
        return samples
    if not hasattr(records, "__iter__"):
        raise ValueError(
            f"records of type {type(records).__name__} can be neither indexed nor read"
        )
    return EncodedStream(samples)


def entries_of(record: Any, where: str) -> dict[str, Any]:
    """A record's values by key, those that are there."""
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{where} must be a mapping such as {{'messages': […]}}, got {record!r:.60}"
        )
    return {name: value for name, value in record.items() if value is not None}


def as_messages(value: Any, role: str, name: str) -> Messages:
    """Messages, or one of a string."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return checked_messages(value, name)


def options_of(entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a record says to its template."""
    options, tools = dict(entries.get("chat_template_kwargs", {})), entries.get("tools")
    if isinstance(tools, str):  # tables often hold them so, as no two tools have the same fields
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools of {where} are no JSON: {error}") from None
    return options | ({"tools": tools} if tools else {})


def _length(sample: Mapping[str, Any]) -> int:
    """Tokens of a sample, padding left out."""
    return int(np.count_nonzero(sample.get("attention_mask", np.ones(len(sample["input_ids"])))))
