"""Architectures of transformers, tiny: right against their own attention, or refused by name."""

import copy

import pytest
import torch

from dcp import AttentionExecutor, AttentionSpec, Cluster, SequenceBatch, plan

T = pytest.importorskip("transformers")

from dcp.inference import InferenceEngine  # noqa: E402
from dcp.integrations.model_checks import check_model, try_model  # noqa: E402
from dcp.integrations.transformers import (  # noqa: E402
    balance_loss,
    local_logits,
    local_output,
    register_attention,
)
from tests.model_cases import make_config, make_model, make_tokens  # noqa: E402

WINDOW = 5
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SERVED = (
    "Apertus Arcee AriaText BioGpt BitNet CTRL CodeGen Cohere Cohere2 Ernie4_5 Exaone4 FlexOlmo GPT2 "
    "GPTJ GPTNeoX Gemma Gemma2 Gemma3Text Glm Glm4 GptOss Granite GraniteMoe Helium Llama Ministral "
    "Ministral3 Mistral Mixtral ModernBertDecoder NanoChat OPT Olmo Olmo2 Olmo3 Olmoe Persimmon Phi "
    "Phi3 Phimoe Qwen2 Qwen2Moe Qwen3 Qwen3Moe SeedOss SmolLM3 Starcoder2"
).split()


def make(kind, **others):
    """A tiny model of an architecture, with its own attention, and the sizes that it has."""
    register_attention()
    config_kind = getattr(T, f"{kind}Config")
    known = config_kind()
    sizes = {
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rotary_dim": 8,
        "layer_types": None,
        "sliding_window": WINDOW,
        "n_embd": 32,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "dff": 48,
        "query_pre_attn_scalar": 8,
        **EXPERTS,
    }
    values = {name: value for name, value in sizes.items() if hasattr(known, name)}
    values |= {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0}
    values |= {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(config_kind(**values | others)).eval()


def make_executor(model, seqlens):
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    spec = AttentionSpec(
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype="float32",
    )
    masks = {"all": "causal", "near": f"sliding_window:window={WINDOW}"}
    executor = AttentionExecutor()
    executor.prepare(plan(SequenceBatch(seqlens, masks), spec, Cluster(devices_per_node=1)))
    return executor


@pytest.mark.parametrize("kind", SERVED)
def test_architectures_that_are_served(kind):
    model, seqlens = make(kind), [12, 7]
    tokens = make_tokens(seqlens)
    with torch.no_grad():
        wanted = [model(input_ids=of[None]).logits[0] for of in tokens.split(seqlens)]
        model.set_attn_implementation("dcp")
        positions = torch.cat([torch.arange(seqlen) for seqlen in seqlens])
        executor = make_executor(model, seqlens)
        found = local_logits(model, tokens, positions, executor, dcp_sliding_mask="near")
    error = (found - torch.cat(wanted)).abs().max()
    assert error < 1e-4 * found.abs().max()


REFUSED = {
    "Bloom": "takes no position_ids",
    "Mpt": "takes no position_ids",
    "Bart": "takes no position_ids",
    "RecurrentGemma": "mix tokens outside attention .*recurrent",
    "Lfm2": "mix tokens outside attention .*Conv1d, Lfm2ShortConv",
    "FalconH1": "mix tokens outside attention .*FalconH1Mixer",
    "Qwen3Next": "mix tokens outside attention .*Qwen3NextGatedDeltaNet",
    "MiniMax": "mix tokens outside attention .*MiniMaxLightningAttention",
    "Jamba": "mix tokens outside attention .*JambaMambaMixer",
    "Bamba": "mix tokens outside attention .*BambaMixer",
    "Mamba": "takes no position_ids",
    "NemotronH": "mix tokens outside attention .*NemotronHMamba2Mixer",
    "StableLm": "StableLmAttention got none",
    "Nemotron": "NemotronAttention got none",
    "Falcon": "0 of 2 attention layers of FalconForCausalLM",
    "GPTNeoXJapanese": "0 of 2 attention layers of GPTNeoXJapaneseForCausalLM",
    "XGLM": "0 of 2 attention layers of XGLMForCausalLM",
    "Doge": "compute with the attention mask",
    "DiffLlama": "4 of 2 attention layers of DiffLlamaForCausalLM",
    "Bert": "BertSelfAttention asks for bidirectional attention",
    "Roberta": "RobertaSelfAttention asks for bidirectional attention",
}
TINY = {  # what else a small one needs
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 5},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "Qwen3Next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2},
    "Jamba": {"num_hidden_layers": 8, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "Bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "Mamba": {"state_size": 4},
    "Bart": {"decoder_layers": 2, "decoder_ffn_dim": 48, "d_model": 32},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "NemotronH": {"layer_types": ["mamba", "attention"]},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_architectures_that_are_refused_by_name(kind):
    model = make(kind, **TINY.get(kind, {}))
    model.set_attn_implementation("dcp")
    with pytest.raises(ValueError, match=REFUSED[kind]) as refusal:
        local_logits(model, make_tokens([12]), torch.arange(12), make_executor(model, [12]))
    assert kind in str(refusal.value)
    assert "\n" not in str(refusal.value)
