"""What a model's configuration says of its attention, and that the model asks for just that."""

import pytest
import torch

from dcp import AttentionSpec

T = pytest.importorskip("transformers")

from dcp.inference.model import use_cached_attention  # noqa: E402
from dcp.inference.reach import Reach  # noqa: E402
from dcp.integrations.transformers import attention_of  # noqa: E402
from tests.model_cases import LATENT, WINDOW, make_tiny, relative_error  # noqa: E402

NEAR = f"sliding_window:window={WINDOW}"
MIXED = {"layer_types": ["full_attention", "sliding_attention"]}
SWITCHED = {"use_sliding_window": True, "max_window_layers": 1}
CASES = [  # architecture, its fields, layers of full and of sliding attention
    ("Llama", {}, 2, 0),
    ("Llama", {"num_key_value_heads": 4}, 2, 0),
    ("Mistral", {}, 0, 2),
    ("Mistral", {"sliding_window": None}, 2, 0),
    ("Mistral", MIXED, 0, 2),  # it does not read the list
    ("Ministral", MIXED, 1, 1),
    ("Gemma", {}, 2, 0),
    ("Gemma2", {}, 1, 1),
    ("Gemma3Text", MIXED, 1, 1),
    ("Gemma3Text", {"sliding_window_pattern": 1}, 2, 0),
    ("GptOss", {}, 1, 1),
    ("Qwen2", {}, 2, 0),
    ("Qwen2", SWITCHED, 1, 1),
    ("Qwen3", {}, 2, 0),
    ("Qwen3", SWITCHED, 1, 1),
    ("Qwen2Moe", {}, 2, 0),
    ("Qwen2Moe", SWITCHED, 1, 1),
    ("Qwen3Moe", {}, 2, 0),
    ("Qwen3Moe", SWITCHED, 0, 2),  # it does not read max_window_layers
    ("Mixtral", {}, 0, 2),
    ("Mixtral", {"sliding_window": None}, 2, 0),
    ("Phi3", {}, 0, 2),
    ("Phi3", {"sliding_window": None}, 2, 0),
    ("Phimoe", {}, 0, 2),
    ("Cohere", {}, 2, 0),
    ("Cohere2", MIXED, 1, 1),
    ("Glm", {}, 2, 0),
    ("Glm4", {}, 2, 0),
    ("DeepseekV2", LATENT, 2, 0),
    ("DeepseekV2", LATENT | {"q_lora_rank": None}, 2, 0),
    ("DeepseekV3", LATENT, 2, 0),
]


@pytest.mark.parametrize(("kind", "fields", "num_full", "num_sliding"), CASES)
def test_models_ask_for_what_is_described(kind, fields, num_full, num_sliding):
    model = make_tiny(kind, **fields)
    asked = attention_of(model)
    assert asked == attention_of(model.config)
    layers = {"full": num_full, "sliding": num_sliding}
    assert asked.weights == {name: count for name, count in layers.items() if count}
    expressions = {"full": "causal", "sliding": NEAR}
    assert asked.masks == {name: expressions[name] for name in asked.weights}
    assert list(asked.keywords.values()) == list(asked.masks)
    assert relative_error(model) < 1e-4


def test_sizes_are_those_of_the_published_models():
    llama = T.LlamaConfig(
        num_attention_heads=32, num_key_value_heads=8, hidden_size=4096, dtype=torch.bfloat16
    )
    assert attention_of(llama).spec == AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128)
    assert attention_of(T.DeepseekV3Config(dtype="bfloat16")).spec == AttentionSpec(
        num_heads=128, num_kv_heads=128, head_dim=192, value_dim=128
    )
    gemma = attention_of(T.Gemma3TextConfig(num_hidden_layers=12, sliding_window=1024))
    assert gemma.masks == {"full": "causal", "sliding": "sliding_window:window=1024"}
    assert gemma.weights == {"full": 2, "sliding": 10}
    assert gemma.keywords == {"dcp_mask": "full", "dcp_sliding_mask": "sliding"}


def test_the_dtype_is_the_one_given_or_the_models():
    model = make_tiny("Llama").to(torch.bfloat16)
    model.config.dtype = torch.float16
    assert attention_of(model).spec.dtype == "bfloat16"
    assert attention_of(torch.nn.ModuleList([model])).spec.dtype == "bfloat16"
    assert attention_of(model, dtype=torch.float32).spec.dtype == "float32"
    assert attention_of(model.config).spec.dtype == "float16"
    assert attention_of(T.LlamaConfig()).spec.dtype == "float32"
    whole = T.Gemma3Config(dtype="bfloat16")
    assert attention_of(whole.get_text_config(), dtype=whole.dtype).spec.dtype == "bfloat16"
    with pytest.raises(ValueError, match="Llama cannot be planned: dtype 'int8' is not one of"):
        attention_of(model, dtype="int8")


@pytest.mark.parametrize(
    ("tensor_parallel", "num_heads", "num_kv_heads"),
    [(1, 24, 6), (2, 12, 3), (3, 8, 2), (6, 4, 1), (12, 2, 1), (24, 1, 1)],
)
def test_ranks_of_tensor_parallelism_share_the_heads(tensor_parallel, num_heads, num_kv_heads):
    config = T.LlamaConfig(num_attention_heads=24, num_key_value_heads=6, hidden_size=192)
    spec = attention_of(config, tensor_parallel=tensor_parallel).spec
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (num_heads, num_kv_heads, 8)


@pytest.mark.parametrize("tensor_parallel", [4, 5, 8, 48])
def test_heads_that_do_not_divide_are_refused(tensor_parallel):
    config = T.LlamaConfig(num_attention_heads=24, num_key_value_heads=6, hidden_size=192)
    words = f"Llama has .*=24, .*=6, which tensor_parallel={tensor_parallel} does not share"
    with pytest.raises(ValueError, match=words):
        attention_of(config, tensor_parallel=tensor_parallel)


def test_latent_attention_shares_all_its_heads():
    spec = attention_of(T.DeepseekV3Config(), tensor_parallel=8).spec
    assert (spec.num_heads, spec.num_kv_heads) == (16, 16)


REFUSED = [
    ("T5", {}, "T5 is an encoder-decoder .*use a decoder-only model"),
    ("Bart", {}, "Bart is an encoder-decoder"),
    ("Bert", {}, "model_type='bert'.*is an encoder.*is_decoder=True"),
    ("ModernBert", {}, "model_type='modernbert'.*is an encoder"),
    ("ViT", {}, "ViT has no vocab_size"),
    ("Llama4Text", {}, "chunked_attention .attention_chunk_size=8192.*dcp_any_mask=True"),
    ("Lfm2", {"layer_types": ["conv"], "num_hidden_layers": 1}, "Lfm2 has layers of conv: "),
    ("Qwen3Next", {}, "Qwen3Next has layers of linear_attention: .*use a model"),
    ("Jamba", {}, "Jamba has layers of linear_attention"),
    ("FalconH1", {}, "FalconH1 has layers of hybrid"),
    ("Rwkv", {}, "Rwkv has no num_attention_heads.*AttentionSpec"),
    ("Gemma", {"use_bidirectional_attention": True}, "Gemma sees .*use_bidirectional_attention=Tr"),
    ("Gemma3Text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True.*plan"),
    ("Gemma3", {}, "Gemma3 .*images or a prefix.*get_text_config"),
    ("PaliGemma", {}, "PaliGemma sees later tokens .use_bidirectional_attention=True"),
    ("Gemma4Text", {}, "Gemma4Text has layers with heads of their own .per_layer_config"),
    ("DeepseekV32", {}, "DeepseekV32 selects keys .*index_topk=2048.*without sparse"),
    ("Falcon", {}, "Falcon .model_type='falcon'. does not use the attention registry"),
    ("Qwen2", {"layer_types": ["sliding_attention"] * 32}, "Qwen2 has layers of sl.*got None"),
    ("Mistral", {"sliding_window": 0}, "Mistral has layers of sliding.*1 or more, got 0"),
]


@pytest.mark.parametrize(("kind", "fields", "words"), REFUSED)
def test_attention_without_a_plan_by_name_is_refused(kind, fields, words):
    with pytest.raises(ValueError, match=words) as refusal:
        attention_of(getattr(T, f"{kind}Config")(**fields))
    assert kind in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_is_no_model_of_transformers_is_refused():
    for given in (torch.nn.Linear(2, 2), "gpt2", None):
        with pytest.raises(ValueError, match="takes a model of transformers or its configuration"):
            attention_of(given)
    with pytest.raises(ValueError, match="tensor_parallel must be 1 or more, got 0"):
        attention_of(T.LlamaConfig(), tensor_parallel=0)


def test_models_that_cannot_be_served_are_refused():
    with pytest.raises(ValueError, match=r"BloomForCausalLM .*takes no position_ids"):
        attention_of(make_tiny("Bloom"))


def test_caches_hold_what_is_described():
    model = make_tiny("Qwen3")
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
    assert use_cached_attention(model) == (spec, [Reach(), Reach()])
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM has latent attention"):
        use_cached_attention(make_tiny("DeepseekV3", **LATENT))
