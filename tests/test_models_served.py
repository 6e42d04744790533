"""Architectures of transformers, tiny: right against their own attention, or refused by name."""

import pytest
import torch

from dcp import AttentionExecutor, AttentionSpec, Cluster, SequenceBatch, plan

T = pytest.importorskip("transformers")

from dcp.integrations.model_checks import check_model, try_model  # noqa: E402
from dcp.integrations.transformers import (  # noqa: E402
    balance_loss,
    local_logits,
    local_output,
    register_attention,
)
from tests.model_cases import (  # noqa: E402
    make_config,
    make_executor,
    make_model,
    make_tiny,
    make_tokens,
    relative_error,
)

SERVED = [
    "Apertus", "Arcee", "AriaText", "BioGpt", "BitNet", "CTRL", "CodeGen", "Cohere", "Cohere2",
    "Ernie4_5", "Exaone4", "FlexOlmo", "GPT2", "GPTJ", "GPTNeoX", "Gemma", "Gemma2",
    "Gemma3Text", "Glm", "Glm4", "GptOss", "Granite", "GraniteMoe", "Helium", "Llama",
    "Ministral", "Ministral3", "Mistral", "Mixtral", "ModernBertDecoder", "NanoChat", "OPT",
    "Olmo", "Olmo2", "Olmo3", "Olmoe", "Persimmon", "Phi", "Phi3", "Phimoe", "Qwen2",
    "Qwen2Moe", "Qwen3", "Qwen3Moe", "SeedOss", "SmolLM3", "Starcoder2",
]  # fmt: skip


@pytest.mark.parametrize("kind", SERVED)
def test_architectures_that_are_served(kind):
    assert relative_error(make_tiny(kind)) < 1e-4


REFUSED = {
    "Bloom": "takes no position_ids",
    "Mpt": "takes no position_ids",
    "Bart": "takes no position_ids",
    "RecurrentGemma": "mix tokens outside attention .*RecurrentGemmaRecurrentBlock",
    "Lfm2": "mix tokens outside attention .*Conv1d, Lfm2ShortConv",
    "FalconH1": "mix tokens outside attention .*Conv1d, hybrid",
    "Qwen3Next": "mix tokens outside attention .*Qwen3NextGatedDeltaNet",
    "MiniMax": "mix tokens outside attention .*MiniMaxLightningAttention",
    "Jamba": "mix tokens outside attention .*JambaMambaMixer",
    "Bamba": "mix tokens outside attention .*Conv1d, linear_attention",
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
    "Bamba": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "attn_layer_indices": [1],
    },
    "Mamba": {"state_size": 4},
    "Bart": {"decoder_layers": 2, "decoder_ffn_dim": 48, "d_model": 32},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "NemotronH": {"layer_types": ["mamba", "attention"]},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_architectures_that_are_refused_by_name(kind):
    model = make_tiny(kind, **TINY.get(kind, {}))
    model.set_attn_implementation("dcp")
    with pytest.raises(ValueError, match=REFUSED[kind]) as refusal:
        local_logits(model, make_tokens([12]), torch.arange(12), make_executor([12]))
    assert kind in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["Falcon", "GPTNeo"])
def test_models_with_a_list_of_their_own_say_so_when_they_are_made(kind):
    register_attention()
    with pytest.raises(ValueError, match=f"{kind} models do not use the attention registry"):
        T.AutoModelForCausalLM.from_config(
            getattr(T, f"{kind}Config")(
                hidden_size=32,
                num_attention_heads=4,
                num_hidden_layers=2,
                num_layers=2,
                attention_types=[[["global"], 2]],
                vocab_size=50,
            ),
            attn_implementation="dcp",
        )


def test_encoder_decoders_are_refused():
    register_attention()
    config = T.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = T.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration.*is an encoder-decoder"):
        check_model(model)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (T.LlamaForSequenceClassification, r"logits of shape \(1, 2\) for \d+ tokens"),
        (T.LlamaModel, "LlamaModel returns no logits"),
    ],
)
def test_heads_without_a_result_per_token_are_refused(head, words):
    model = head(make_config("dcp", pad_token_id=0))
    with pytest.raises(ValueError, match=words):
        local_logits(model, make_tokens([40]), torch.arange(40), make_executor([40]))


def test_heads_with_a_result_per_token_are_right():
    torch.manual_seed(0)
    model = T.LlamaForTokenClassification(make_config("dcp")).eval()
    tokens = make_tokens([40])
    found = local_logits(model, tokens, torch.arange(40), make_executor([40]))
    model.set_attn_implementation("eager")
    assert (found - model(input_ids=tokens[None]).logits[0]).abs().max() < 1e-5


class Mixing(torch.nn.Module):
    """A layer that no list knows: it lets tokens meet, or counts rows."""

    def __init__(self, inside, how):
        super().__init__()
        self.inside, self.how = inside, how

    def forward(self, hidden):
        rows = torch.arange(hidden.shape[1])[None, :, None]
        met = {
            "sum": hidden.cumsum(1),
            "shift": hidden.roll(1, 1),
            "mean": hidden.mean(1, keepdim=True).expand_as(hidden),
            "rows": hidden * torch.cos(rows * torch.arange(hidden.shape[2])).to(hidden.dtype),
            "none": hidden,
        }[self.how]
        return self.inside(hidden) + met


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["sum", "shift", "mean", "rows", "none"])
def test_unknown_layers_that_mix_tokens_are_found(how, dtype):
    model = make_model(make_config("dcp")).to(dtype).train()
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, how)
    state = torch.get_rng_state()
    if how == "none":
        try_model(model)
    else:
        with pytest.raises(ValueError, match=r"LlamaForCausalLM.*depends on others or on its row"):
            try_model(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_layers_are_counted_once_whatever_is_recomputed():
    model = make_model(make_config("dcp")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    executor = make_executor([12])
    for _ in range(2):
        local_logits(model, make_tokens([12]), torch.arange(12), executor).sum().backward()
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ValueError, match="1 of 2 attention layers of LlamaForCausalLM called"):
        local_logits(model, make_tokens([12]), torch.arange(12), executor)


def route(messages):
    from dcp.program import RankPlan

    executor = AttentionExecutor()
    executor.prepare(RankPlan.from_bytes(messages[executor.rank]))
    model = mixture("dcp")
    plan_ = executor.plan
    tokens = make_tokens([40, 24])[torch.from_numpy(plan_.token_indices)]
    output = local_output(
        model, tokens, torch.from_numpy(plan_.positions), executor, output_router_logits=True
    )
    loss = balance_loss(output.router_logits, num_experts_per_token=2, num_local_tokens=len(tokens))
    loss.backward()
    return float(loss), [p.grad.numpy() for p in model.parameters() if p.grad is not None]


def mixture(attention):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return make_model(make_config(attention, T.MixtralConfig, **sizes))


@pytest.mark.parametrize("strategy", ["zigzag", "data_parallel"])
def test_balance_loss_of_the_ranks_is_that_of_the_batch(gloo_pool, strategy):
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
    batch, cluster = SequenceBatch([40, 24]), Cluster(devices_per_node=3)
    a_plan = plan(batch, spec, cluster, strategy=strategy, block_size=8)
    assert (a_plan.rank_tokens == 0).any() == (strategy == "data_parallel")
    results = gloo_pool(3).run(route, [a_plan.rank_plan(rank).to_bytes() for rank in range(3)])

    model = mixture("eager")
    outputs = [
        model(input_ids=of[None], output_router_logits=True).router_logits
        for of in make_tokens([40, 24]).split([40, 24])
    ]
    gates = tuple(torch.cat(of_layer) for of_layer in zip(*outputs, strict=True))
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    wanted = load_balancing_loss_func(gates, 4, 2)
    wanted.backward()
    assert abs(sum(loss for loss, _ in results) - float(wanted)) < 1e-5
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for index, grad in enumerate(grads):
        total = sum(torch.from_numpy(of[index]) for _, of in results)
        assert (total - grad).abs().max() < 1e-5 * max(1.0, float(grad.abs().max()))
