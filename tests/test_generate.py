"""Generation over ranks: the tokens that one process alone would say, turn after turn."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcp.cli import main
from dcp.data.tokenizers import ByteTokenizer

transformers = pytest.importorskip("transformers")

from dcp.inference import InferenceEngine  # noqa: E402
from dcp.inference.model import open_model  # noqa: E402

# Three turns of three conversations; one starts late, one has nothing to add to the second turn.
TURNS = [
    {"a": [5, 6, 7], "b": [256, *range(90, 131)]},
    {"b": [], "a": [9] * 20, "c": [1]},
    {"c": [4, 4], "a": [5], "b": [17, 3]},
]
TOKENS = 70  # 210 of each in all


def make_engine(num_ranks=None, **options) -> InferenceEngine:
    options = {"num_pages": 80, "page_size": 16} | options
    return InferenceEngine(open_model(None, seed=3), num_ranks=num_ranks, **options)


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    """What transformers' own generate says in one process."""
    model, said = open_model(None, seed=3), {}
    for turn in TURNS:
        for name, prompt in turn.items():
            ids = torch.tensor([[*said.get(name, []), *prompt]])
            said[name] = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0].tolist()
    return said


def converse(engine: InferenceEngine, **options) -> dict[str, list[int]]:
    for turn in TURNS:
        engine.generate(turn, max_new_tokens=TOKENS, **options)
    return {name: engine.tokens(name) for name in "abc"}


def by_size(new, cached, spec, cluster) -> str:
    return "pass_kv" if new > 30 else "pass_q"


@pytest.mark.parametrize("strategy", ["pass_kv", by_size])
def test_tokens_are_those_of_one_process(alone, strategy):
    torch.set_num_threads(1)
    assert converse(make_engine(3, strategy=strategy)) == alone
    assert len(alone["a"]) - 24 == 3 * TOKENS


def converse_on_rank(**options):
    return converse(make_engine(**options))


def test_tokens_on_real_ranks_are_those_of_one_process(gloo_pool, alone):
    for said in gloo_pool(2).run(converse_on_rank):
        assert said == alone


def sample(engine: InferenceEngine) -> dict[str, list[int]]:
    options = {"max_new_tokens": 15, "temperature": 2.0, "top_k": 40, "end": 257}
    for turn in TURNS:
        engine.generate(turn, seed=4, **options)
    return {name: engine.tokens(name) for name in "abc"}


def test_sampling_depends_on_the_seed_and_not_on_the_ranks():
    said = sample(make_engine(1))
    assert said == sample(make_engine(4))
    greedy = make_engine(1)
    greedy.generate(TURNS[0], max_new_tokens=15)
    assert said["a"][:18] != greedy.tokens("a")[:18]


def test_a_conversation_stops_at_its_end_and_others_go_on():
    engine = make_engine(2)
    free = engine.generate(TURNS[0], max_new_tokens=12)
    end = free["a"][4]
    bound = make_engine(2).generate(TURNS[0], max_new_tokens=12, end=end)
    for name in "ab":
        stop = free[name].index(end) + 1 if end in free[name] else 12
        assert bound[name] == free[name][:stop]
    assert len(bound["a"]) == 5


def save_and_load(folder):
    """Two turns, then the third by an engine that has read what the first one wrote."""
    engine = make_engine()
    for turn in TURNS[:2]:
        engine.generate(turn, max_new_tokens=TOKENS)
    engine.evict("c")
    engine.save(folder)
    again = make_engine()
    again.load(folder)
    return again.generate({"a": [5], "b": [17, 3]}, max_new_tokens=5)


def test_conversations_survive_disk_and_eviction(gloo_pool, tmp_path, alone):
    for said in gloo_pool(2).run(save_and_load, str(tmp_path)):
        for name, length in (("a", 3 + 70 + 20 + 70 + 1), ("b", 42 + 70 + 70 + 2)):
            assert said[name] == alone[name][length : length + 5]
    with pytest.raises(ValueError, match="holds a cache of"):
        make_engine(1, page_size=8).load(tmp_path)


def test_forks_share_pages_and_say_what_unshared_conversations_say(tmp_path):
    base, ends = list(range(40, 140)), {"left": [1, 2, 3], "right": [7] * 9}
    apart = make_engine(3)
    whole = {name: [*base, *end] for name, end in ends.items()}
    wanted = apart.generate(whole, max_new_tokens=20)
    engine = make_engine(3)
    engine.generate({"base": base}, max_new_tokens=12)
    assert engine.longest_prefix([*base, 1, 2]) == ("base", 100)
    assert engine.longest_prefix([1, 2]) == (None, 0)
    free = engine.attention.caches[0].free_pages
    for name in ends:
        engine.fork(name, from_="base", num_tokens=100)
    lost = (free - engine.attention.caches[0].free_pages).tolist()
    assert lost == [0, 2, 2]  # 32, 33 and 34 tokens in pages of 16: a last page for each fork
    engine.save(tmp_path)
    again = make_engine(3)
    again.load(tmp_path)
    for each in (engine, again):
        assert each.generate(ends, max_new_tokens=20) == wanted
    engine.fork("twin", from_="left")
    engine.evict("left")
    apart.generate({"left": []}, max_new_tokens=5)
    engine.generate({"twin": []}, max_new_tokens=5)
    assert engine.tokens("twin") == apart.tokens("left")
    with pytest.raises(ValueError, match="no conversation 'left'"):
        engine.fork("new", from_="left")
    with pytest.raises(ValueError, match="a conversation 'twin' already"):
        engine.fork("twin", from_="base")
    with pytest.raises(ValueError, match="num_tokens must be 112 or less, got 113"):
        engine.fork("new", from_="base", num_tokens=113)


def test_mistakes_are_named_and_a_full_cache_changes_nothing():
    engine = make_engine(2, num_pages=2)
    with pytest.raises(ValueError, match="the KV cache is full"):
        engine.generate({"a": list(range(50))}, max_new_tokens=40)
    with pytest.raises(ValueError, match="no conversation 'a'"):
        engine.tokens("a")
    said = make_engine(2).generate({"a": list(range(50))}, max_new_tokens=8)["a"]
    assert engine.generate({"a": list(range(50))}, max_new_tokens=8)["a"] == said
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more"):
        engine.generate({"a": []}, max_new_tokens=0)
    with pytest.raises(ValueError, match="'b' is new and its prompt is empty"):
        engine.generate({"b": []}, max_new_tokens=1)
    with pytest.raises(ValueError, match="no conversation 'b'"):
        engine.evict("b")
    with pytest.raises(ValueError, match="temperature"):
        engine.generate({"a": []}, max_new_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match="'/nowhere' is no folder"):
        open_model("/nowhere")


def test_the_command_says_what_one_process_says(capfd):
    prompts = ["Hello there", "Hi"]
    words = ["generate", "--num-processes", "2", "--max-new-tokens", "9", "--seed", "3"]
    words += [word for prompt in prompts for word in ("--prompt", prompt)]
    assert main([*words, "--then", "And?", "--json"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert len(found["tokens"]) == len(found["text"]) == 2
    engine, encode = make_engine(1), ByteTokenizer().encode
    first = {i: encode(text.encode()).tolist()[:-1] for i, text in enumerate(prompts)}
    replies = engine.generate(first, max_new_tokens=9, end=257)
    then = engine.generate({i: list(b"And?") for i in replies}, max_new_tokens=9, end=257)
    assert found["tokens"] == [replies[i] + then[i] for i in replies]
    assert found["turns"][1]["tokens"] == list(then.values())
    assert main(["generate", "--prompt", "x", "--model", "/nowhere"]) == 2
    assert "no folder" in capfd.readouterr().err


def test_a_rank_that_generates_knows_no_training():
    code = "import sys, dcp.inference.rank; print([m for m in sys.modules if m.startswith('dcp.')])"
    words = [sys.executable, "-c", code]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "dcp.inference.engine" in shown
    assert "dcp.train" not in shown
    assert "dcp.datacentric" not in shown


def test_the_ten_lines_of_the_documentation_run(capsys):
    page = Path(__file__).parents[1] / "docs" / "tutorials" / "serving.md"
    text = page.read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    exec(compile(code, page.name, "exec"), {})
    assert "What is a ring?" in capsys.readouterr().out
