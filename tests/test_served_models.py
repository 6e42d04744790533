"""Models with windows, chunks, sinks and soft-caps say what transformers alone would say."""

import json

import pytest
import torch

T = pytest.importorskip("transformers")

from dcp.cli import main  # noqa: E402
from dcp.data.tokenizers import ByteTokenizer  # noqa: E402
from dcp.inference import InferenceEngine  # noqa: E402
from tests.model_cases import make_model  # noqa: E402

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
KINDS = {
    "Mistral": {"sliding_window": 16},
    "Gemma2": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "Gemma3Text": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GptOss": {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
    "Llama4Text": {
        "attention_chunk_size": 16,
        "attn_temperature_tuning": False,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 0],
        "interleave_moe_layer_step": 2,
    },
}
TURNS = [list(range(3, 43)), [9] * 21, [5]]
TOKENS = 14


def make(kind, **others):
    config = getattr(T, f"{kind}Config")(**SIZES | KINDS[kind] | others)
    config._attn_implementation = "eager"
    return make_model(config).eval()


def said_alone(model):
    said = []
    for turn in TURNS:
        ids = torch.tensor([[*said, *turn]])
        said = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
        )[0].tolist()
    return said


@pytest.fixture(scope="module")
def alone():
    """What transformers' own generate says in one process."""
    torch.set_num_threads(1)
    return {kind: said_alone(make(kind)) for kind in KINDS}


def converse(kinds, num_ranks=None):
    """What an engine says, the first turn beside another conversation that ends with it."""
    found = {}
    for kind in kinds:
        # soft-caps on a CPU: torch's FlexAttention without its compiler takes a second a step
        engine = InferenceEngine(
            make(kind), num_ranks=num_ranks, num_pages=40, page_size=8, kernel="dense"
        )
        for turn, prompt in enumerate(TURNS):
            others = {} if turn else {"b": list(range(90, 101))}
            engine.generate({"a": prompt} | others, max_new_tokens=TOKENS)
        found[kind] = engine.tokens("a")
    return found


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_each_kind_says_what_one_process_says(alone, num_ranks):
    assert converse(KINDS, num_ranks) == alone


@pytest.mark.parametrize(
    ("world", "kinds"), [(2, ["Gemma2", "GptOss"]), (3, ["Gemma3Text", "Llama4Text"])]
)
def test_each_kind_on_real_ranks_says_what_one_process_says(gloo_pool, alone, world, kinds):
    for said in gloo_pool(world).run(converse, kinds):
        assert said == {kind: alone[kind] for kind in kinds}


@pytest.mark.parametrize(
    ("kind", "field"), [("Mistral", "sliding_window"), ("Llama4Text", "attention_chunk_size")]
)
def test_the_windows_of_these_models_matter(alone, kind, field):
    assert said_alone(make(kind, **{field: 4000})) != alone[kind]


def test_a_model_of_windows_alone_needs_no_more_room_however_long_it_talks(alone):
    """Pages for 56 tokens, 28 on each of two ranks: those of the first prompt, and then any number
    of tokens."""
    engine = InferenceEngine(make("Mistral"), num_ranks=2, num_pages=7, page_size=4)
    first = engine.generate({"a": TURNS[0]}, max_new_tokens=TOKENS)["a"]
    assert first == alone["Mistral"][40 : 40 + TOKENS]
    for _ in range(3):
        engine.generate({"a": [9]}, max_new_tokens=30)
        # at most two windows of 16 tokens: that of now, and that of before this call
        assert (engine.attention.caches[0].free_pages >= 1).all()
    before = engine.tokens("a")
    assert len(before) > 2 * 56
    with pytest.raises(ValueError, match="the KV cache is full"):
        engine.generate({"a": [1] * 5, "b": [2] * 300}, max_new_tokens=5)
    assert engine.tokens("a") == before


GEMMA = {"num_ranks": 2, "num_pages": 12, "window_pages": 8, "page_size": 4}


def test_what_a_turn_forgot_is_back_when_it_is_taken_back():
    engine, other = (InferenceEngine(make("Gemma3Text"), **GEMMA) for _ in range(2))
    for each in (engine, other):
        each.generate({"a": TURNS[0]}, max_new_tokens=4)
    with pytest.raises(ValueError, match="the KV cache is full"):
        engine.generate({"a": [9]}, max_new_tokens=2000)  # when the window has moved on by 50
    assert len(engine.tokens("a")) == 44
    wanted = other.generate({"a": [4]}, max_new_tokens=20)
    assert engine.generate({"a": [4]}, max_new_tokens=20) == wanted


def test_local_layers_give_their_pages_back_though_global_ones_keep_all(tmp_path):
    engine, again = (InferenceEngine(make("Gemma3Text"), **GEMMA) for _ in range(2))
    engine.generate({"a": TURNS[0]}, max_new_tokens=45)
    cache = engine.attention.caches[0]
    tables = {
        reach.is_all: of for reach, of in zip(cache.kinds, cache.known("a").tables, strict=True)
    }
    used = {is_all: len(table.pages[0]) for is_all, table in tables.items()}
    assert used == {True: 11, False: 3}  # of 42 tokens here, and of 8 here of the last 16
    assert [len(pool) for pool in cache.pools] == [8 * 4, 12 * 4]
    engine.save(tmp_path)
    again.load(tmp_path)
    wanted = engine.generate({"a": [7]}, max_new_tokens=5)
    assert again.generate({"a": [7]}, max_new_tokens=5) == wanted


def test_a_fork_of_a_model_with_windows_says_what_an_unshared_one_says(alone):
    wanted, length = alone["Gemma3Text"], 40 + TOKENS
    engine = InferenceEngine(make("Gemma3Text"), num_ranks=3, num_pages=40, page_size=8)
    engine.generate({"system": TURNS[0]}, max_new_tokens=1)
    assert engine.longest_prefix([*TURNS[0], 3]) == ("system", 40)
    engine.fork("a", from_="system", num_tokens=40)
    assert engine._conversations["a"].num_pending == 1
    engine.generate({"a": []}, max_new_tokens=TOKENS)
    assert engine.tokens("a") == wanted[:length]
    engine.generate({"a": TURNS[1]}, max_new_tokens=TOKENS)
    engine.fork("b", from_="a", num_tokens=length)  # forgotten: it is read again
    assert engine._conversations["b"].num_pending == length
    engine.generate({"b": TURNS[1]}, max_new_tokens=TOKENS)
    assert engine.tokens("b") == engine.tokens("a") == wanted[: length + 21 + TOKENS]


def test_what_a_layer_asks_for_beside_its_configuration_is_refused():
    model = make("Mistral")
    engine = InferenceEngine(model, num_ranks=1)
    model.config.sliding_window = 7
    with pytest.raises(
        ValueError, match=r"MistralAttention of layer 0 cannot be served with Reach"
    ):
        engine.generate({"a": list(range(30))}, max_new_tokens=1)
    with pytest.raises(ValueError, match="attn_temperature_tuning"):
        InferenceEngine(make("Llama4Text", attn_temperature_tuning=True), num_ranks=1)


def test_the_command_serves_a_folder_with_windows(tmp_path, capfd):
    make("Gemma3Text").save_pretrained(tmp_path)
    ByteTokenizer().for_transformers().save_pretrained(tmp_path)
    words = ["generate", "--model", str(tmp_path), "--num-processes", "2", "--json"]
    words += ["--page-size", "8", "--num-pages", "5", "--window-pages", "4"]
    assert main([*words, "--prompt", "x" * 60, "--max-new-tokens", "5"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    ids = torch.tensor([[256, *b"x" * 60]])
    wanted = make("Gemma3Text").generate(ids, max_new_tokens=5, do_sample=False)[0, 61:].tolist()
    assert found["tokens"] == [wanted]
