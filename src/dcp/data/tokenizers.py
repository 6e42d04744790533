"""Text to tokens: bytes, which need no vocabulary file, or a Hugging Face tokenizer."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What :class:`dcp.data.TokenDataset` asks of a tokenizer."""

    vocab_size: int

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of one document: int64 ``[length]``."""

    def decode(self, tokens: np.ndarray) -> str:
        """The text of some tokens; special tokens give nothing."""

    def length_of(self, num_bytes: np.ndarray) -> np.ndarray | None:
        """Tokens of documents of so many bytes, or None where only encoding tells."""

    def for_transformers(self) -> Any:
        """The same as a tokenizer of transformers, to encode chats and to be saved."""


_BYTE_CHATS = (
    "<begin>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class ByteTokenizer:
    """A token per byte between a begin and an end token: a vocabulary of 258."""

    begin, end, vocab_size = 256, 257, 258

    def encode(self, text: bytes) -> np.ndarray:
        tokens = np.empty(len(text) + 2, dtype=np.int64)
        tokens[0], tokens[-1] = self.begin, self.end
        tokens[1:-1] = np.frombuffer(text, dtype=np.uint8)
        return tokens

    def decode(self, tokens: np.ndarray) -> str:
        return bytes(t for t in np.asarray(tokens).tolist() if t < 256).decode(errors="replace")

    def length_of(self, num_bytes: np.ndarray) -> np.ndarray:
        return np.asarray(num_bytes, dtype=np.int64) + 2

    def for_transformers(self) -> Any:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        inner = Tokenizer(models.BPE(letters, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        ends = {"<begin>": self.begin, "<end>": self.end}
        inner.add_special_tokens([AddedToken(name, special=True) for name in ends])
        inner.post_processor = processors.TemplateProcessing(
            single="<begin> $A <end>", special_tokens=list(ends.items())
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            bos_token="<begin>",
            eos_token="<end>",
            chat_template=_BYTE_CHATS,
        )


class PretrainedTokenizer:
    """A Hugging Face tokenizer from a local folder (nothing is downloaded)."""

    def __init__(self, path: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError(
                f"tokenizer {path!r} needs the transformers package: pip install transformers"
            ) from None
        try:
            self._inner = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # the library raises many kinds for a wrong folder
            reason = str(error).splitlines()[0]
            raise ValueError(f"tokenizer {path!r} cannot be loaded: {reason}") from None
        self.vocab_size = len(self._inner)

    def encode(self, text: bytes) -> np.ndarray:
        tokens = self._inner(text.decode(errors="replace"), verbose=False)["input_ids"]
        return np.asarray(tokens, dtype=np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        return str(self._inner.decode(np.asarray(tokens).tolist(), skip_special_tokens=True))

    def length_of(self, num_bytes: np.ndarray) -> None:
        return None

    def for_transformers(self) -> Any:
        return self._inner


def open_tokenizer(name: str) -> Tokenizer:
    """``"bytes"``, or the path of a Hugging Face tokenizer's folder."""
    return ByteTokenizer() if name == "bytes" else PretrainedTokenizer(name)
