"""A byte-level tokenizer made here, two chat templates, and what they write by a rule of ours."""

import numpy as np
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
HEAD = "<|im_start|>{{ m['role'] }}{{ '\\n' }}"
END = "<|im_end|>"
LOOP = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
PLAIN = f"{LOOP}{HEAD}{{{{ m['content'] }}}}{END}{{{{ '\\n' }}}}{{% endfor %}}{ASK}"
MARKED = (
    f"{LOOP}{HEAD}{{% if m['role'] == 'assistant' %}}{{% generation %}}{{{{ m['content'] }}}}{END}"
    f"{{% endgeneration %}}{{% else %}}{{{{ m['content'] }}}}{END}{{% endif %}}{{{{ '\\n' }}}}"
    f"{{% endfor %}}{ASK}"
)
# An answer that is not the last one loses its first letter, as templates drop earlier thoughts.
FORGETS = PLAIN.replace(
    "{{ m['content'] }}",
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'][1:] }}",
)


def make_tokenizer(template=PLAIN, *, merges=(), **options):
    """Each byte is a token, each special string one, and each of ``merges`` (pairs of letters)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", chat_template=template, **options
    )


def ids_of(text):
    """Tokens of a text without merges, by a rule of our own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table of bytes
    others = [b for b in range(256) if b not in shown]
    table = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(others)}
    found = []
    while text:
        special = next((s for s in SPECIAL if text.startswith(s)), None)
        if special is None:
            found += [letters.index(table[b]) for b in text[0].encode()]
        else:
            found.append(len(letters) + SPECIAL.index(special))
        text = text[len(special or text[0]) :]
    return found


def written(messages, *, marked):
    """Tokens and mask of a chat by both templates: what the assistant wrote, with its stop."""
    ids, mask = [], []
    for message in messages:
        counts = message["role"] == "assistant"
        pieces = [
            (f"<|im_start|>{message['role']}\n", False),
            (message["content"] + END, counts),
            ("\n", counts and not marked),
        ]
        for text, learned in pieces:
            ids += ids_of(text)
            mask += [learned] * len(ids_of(text))
    return ids, np.array(mask)


def says(*contents, system=None):
    """Messages by user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
