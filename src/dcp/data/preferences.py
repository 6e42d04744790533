"""Preference pairs: a prompt computed once, and the two answers to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dcp.data.chat import (
    EncodedRecords,
    EncodedStream,
    as_messages,
    entries_of,
    indexed_or_stream,
    options_of,
)
from dcp.data.chat_template import ASSISTANT, Messages
from dcp.data.records import open_records
from dcp.data.samples import IGNORED
from dcp.masks import AttnMask

CHOSEN, REJECTED, PROMPT = 0, 1, -1  # in the field "answer"
_KEYS = ("chosen", "rejected")


@dataclass(frozen=True)
class SharedPromptMasks:
    """A ``mask_fn`` for samples with ``answer_lengths``: a prompt, then answers of so many tokens.

    See :meth:`dcp.AttnMask.shared_prompt`; a sample without that key is causal.

    Calling it raises ``ValueError`` where the answers have more tokens than the sample, and for
    split documents, which have no such lengths: batch with ``over_long="raise"``.
    """

    sample_keys: ClassVar = ("answer_lengths",)  # which the loader leaves to it

    def __call__(self, seqlens: list[int], samples: Sequence[Any]) -> list[AttnMask]:
        return [self._mask(seqlen, samples[i]) for i, seqlen in enumerate(seqlens)]

    def _mask(self, seqlen: int, sample: Any) -> AttnMask:
        if not isinstance(sample, Mapping):
            raise ValueError(
                f"a sample with answers must be a mapping, got {type(sample).__name__} of "
                f"{seqlen} tokens; documents must not be split: set over_long='raise'"
            )
        if sample.get("answer_lengths") is None:
            return AttnMask.causal(seqlen)
        answers = [int(length) for length in sample["answer_lengths"]]
        if sum(answers) > seqlen:
            raise ValueError(
                f"answer_lengths {answers} make more than the sample's {seqlen} tokens"
            )
        return AttnMask.shared_prompt(seqlen - sum(answers), answers)


class PreferencePairs(EncodedRecords):
    """Records with ``prompt``, ``chosen`` and ``rejected``, each one sample.

    The three are strings, or lists of messages; beside a list, a string is a message of the user's
    (prompt) or the assistant's (answers). Answers that repeat the messages of the prompt, and lists
    of messages without a ``prompt``, of which both begin with the same ones, are understood.

    A prompt of P tokens, with answers of C and R, becomes P + 1 + C + R tokens: P - 1 of the
    prompt, which both answers see, then for each answer the prompt's last token again and the
    answer's. So each answer has a token of its own to predict its first one from, positions are
    those of two separate sequences, and so are the log-probabilities of all answer tokens.

    A sample holds, for the loader called with ``fields=pairs.fields`` and ``pairs.mask_fn``:

    - ``input_ids``, and ``labels``, which are -100 but at the C + R tokens of the answers;
    - ``answer``: of each *label*, as the loader shifts labels: 0 at tokens whose label is one of
      the chosen answer, 1 of the rejected, -1 elsewhere; int64 ``[n]``;
    - ``answer_lengths``: ``[1 + C, 1 + R]``, for the mask.

    Args: see :class:`EncodedRecords`.

    Raises (when a record is read, or ``lengths`` are asked for):
        ValueError: with the record's index: a key is missing, the prompt or an answer has no
            token, messages are damaged, or the chat template does not begin with the prompt.
    """

    fields = ("answer",)
    mask_fn = SharedPromptMasks()

    @property
    def tokens_saved(self) -> int:
        """Tokens less than chosen and rejected would have as two sequences each; encodes all."""
        return sum(int(len(s["input_ids"]) - sum(s["answer_lengths"])) for s in self)

    def encode(self, record: Any, index: int) -> dict[str, Any]:
        where = f"record {index}"
        entries = entries_of(record, where)
        if missing := [name for name in _KEYS if name not in entries]:
            found = ", ".join(map(str, entries)) or "nothing"
            raise ValueError(
                f"{where} has no {missing[0]!r} but {found}: a preference pair has prompt, chosen "
                f"and rejected"
            )
        prompt, answers = self._tokens(entries, where)
        if not prompt:
            raise ValueError(
                f"the prompt of {where} has no tokens, so nothing predicts its answers"
            )
        for name, answer in zip(_KEYS, answers, strict=True):
            if not answer:
                raise ValueError(f"{name} of {where} has no tokens: remove the record")
        return answers_to(prompt, answers) | self.kept(entries)

    def _tokens(self, entries: Mapping[str, Any], where: str) -> tuple[list[int], list[list[int]]]:
        """Tokens of the prompt and of each answer."""
        texts = [entries.get("prompt"), *(entries[name] for name in _KEYS)]
        if all(isinstance(text, str) for text in texts):
            found = [self.encoder.split_text(texts[0], text, where) for text in texts[1:]]
        else:
            before, answers = _messages(entries, where)
            options = options_of(entries, where)
            found = [self.encoder.split_messages(before, a, where, **options) for a in answers]
        (prompt, chosen), (_, rejected) = found
        return prompt, [chosen, rejected]


def answers_to(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A prompt and several answers to it as one sample, the prompt computed once (DPO, GRPO).

    The sample is laid out as :class:`PreferencePairs` describes, with any number of answers: masks
    are :class:`SharedPromptMasks`, and ``answer`` numbers them from 0. An answer may be empty. The
    values of all answers' tokens are parted by ``[n - 1 for n in sample["answer_lengths"]]``.

    Args:
        prompt, answers: token ids, in any vectors of integers.

    Raises ``ValueError`` for a prompt without tokens and for no answers.
    """
    start = _token_ids("the prompt", prompt)
    rest = [_token_ids(f"answer {number}", answer) for number, answer in enumerate(answers)]
    if not len(start):
        raise ValueError("the prompt has no tokens, so nothing predicts its answers: give it one")
    if not rest:
        raise ValueError("a prompt without answers has nothing to compute: leave it out")
    shared, last, ignored = start[:-1], start[-1:], np.array([IGNORED])
    tokens, labels = [shared], [np.full(len(shared), IGNORED)]
    numbers = [np.full(len(shared), PROMPT)]
    for number, answer in enumerate(rest):
        tokens += [last, answer]
        labels += [ignored, answer]
        numbers.append(np.append(np.full(len(answer), number), PROMPT))
    return {
        "input_ids": np.concatenate(tokens),
        "labels": np.concatenate(labels),
        "answer": np.concatenate(numbers),
        "answer_lengths": [1 + len(answer) for answer in rest],
    }


def _token_ids(name: str, given: Any) -> np.ndarray:
    ids = np.asarray(given)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} must be a vector of token ids, got {ids.dtype} of shape {ids.shape}"
        )
    return ids.astype(np.int64)


def _messages(entries: Mapping[str, Any], where: str) -> tuple[Messages, list[Messages]]:
    """The prompt's messages, and those of each answer behind it."""
    answers = [as_messages(entries[name], ASSISTANT, f"{name} of {where}") for name in _KEYS]
    if "prompt" in entries:
        prompt = as_messages(entries["prompt"], "user", f"prompt of {where}")
        repeated = all(answer[: len(prompt)] == prompt for answer in answers)
    else:
        prompt, repeated = _common(*answers), True
        if not prompt:
            raise ValueError(
                f"{where} has no prompt, and its chosen and rejected do not begin with the same "
                f"messages: give 'prompt'"
            )
    answers = [answer[len(prompt) :] if repeated else answer for answer in answers]
    for name, answer in zip(_KEYS, answers, strict=True):
        if answer and answer[0]["role"] != ASSISTANT:
            raise ValueError(
                f"{name} of {where} goes on from its prompt with a message by "
                f"{answer[0]['role']!r}: leave 'prompt' out, and the messages that both answers "
                f"begin with are the prompt"
            )
        if not answer:
            raise ValueError(f"{name} of {where} has no message behind the prompt's")
    return prompt, answers


def _common(chosen: Messages, rejected: Messages) -> Messages:
    """The messages that both begin with, but for the last of the shorter one."""
    most = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    return chosen[:count]


def open_preferences(
    source: Any, tokenizer: Any, *, split: str = "train", **options: Any
) -> PreferencePairs | EncodedStream:
    """Preference pairs of files, of a Hugging Face dataset or of any records, for the loader.

    Args and what is returned: see :func:`dcp.data.open_chat`, and :class:`PreferencePairs`. The
    masks of a stream are :class:`SharedPromptMasks`, its fields ``("answer",)``.
    """
    pairs = PreferencePairs(open_records(source, split=split), tokenizer, **options)
    return indexed_or_stream(pairs)
