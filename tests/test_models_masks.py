"""What a model asks of attention is what the plan holds, or it is refused by name."""

import copy

import pytest
import torch

from dcp import AttentionExecutor, AttentionSpec, AttnMask, Cluster, SequenceBatch, plan

transformers = pytest.importorskip("transformers")

from dcp.integrations.transformers import dcp_attention, local_logits  # noqa: E402
from tests.model_cases import make_config, make_model, make_tokens  # noqa: E402

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
T = transformers


def make_executor(seqlens, masks="causal"):
    executor = AttentionExecutor()
    a_plan = plan(SequenceBatch(seqlens, masks), SPEC, Cluster(devices_per_node=1))
    executor.prepare(a_plan.rank_plan(0))
    return executor


def logits_of(model, masks, seqlens=(12,), **others):
    positions = torch.cat([torch.arange(seqlen) for seqlen in seqlens])
    tokens = make_tokens(seqlens)
    with torch.no_grad():
        return local_logits(model, tokens, positions, make_executor(seqlens, masks), **others)


def own_logits(config, seqlen=12, **others):
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.no_grad():
        return make_model(config)(input_ids=make_tokens([seqlen])[None], **others).logits[0]


def test_the_band_of_a_mask_by_its_dense_form():
    documents = AttnMask.documents([5, 4, 3])
    masks = {
        "causal": ["causal", "causal", "causal"],
        "full": ["full", "full", "full"],
        "window": [AttnMask.sliding_window(n, 4) for n in (12, 3, 0)],
        "documents": [documents, "causal", "causal"],
        "mixed": ["full", "causal", "causal"],
        "split": [  # causal, in two pieces
            AttnMask.from_slices(12, 12, [(0, 6, 0, 6, "causal"), (6, 12, 0, 12, "causal")]),
            *("causal", "causal"),
        ],
    }
    batch = SequenceBatch([12, 3, 0], masks)
    for name in masks:
        seen, size = [], []
        lo, hi, whole = batch.band(name)
        for mask in batch.masks[name]:
            dense = torch.from_numpy(mask.to_dense())
            q, k = dense.nonzero().T
            seen += (k - q).tolist()
            distance = torch.arange(mask.k_len)[None] - torch.arange(mask.q_len)[:, None]
            size.append((dense == ((lo <= distance) & (distance <= hi))).all())
        assert (lo, hi, whole) == (min(seen), max(seen), all(size)), name


@pytest.mark.parametrize(
    "mask", ["causal", "streaming:sink=1,window=3", "shared_question", "sliding_window:window=3"]
)
def test_causal_models_take_what_restricts_causal_attention(mask):
    logits_of(make_model(make_config("dcp")), mask, [12, 5])


@pytest.mark.parametrize("mask", ["full", "prefix_lm:prefix=5"])
def test_causal_models_see_later_tokens_on_purpose_only(mask):
    model = make_model(make_config("dcp"))
    with pytest.raises(ValueError, match=r"LlamaAttention asks for causal.*dcp_any_mask=True"):
        logits_of(model, mask)
    shown = getattr(AttnMask, mask.split(":")[0])(12, *([5] if "prefix" in mask else []))
    dense = torch.from_numpy(shown.to_dense())[None, None]
    wanted = own_logits(model.config, attention_mask=(~dense).float() * -1e30)
    assert (logits_of(model, mask, dcp_any_mask=True) - wanted).abs().max() < 1e-5


def test_a_configuration_may_ask_for_bidirectional_attention():
    config = make_config("dcp", is_causal=False)
    with pytest.raises(ValueError, match=r"bidirectional attention.*'default' holds causal"):
        logits_of(make_model(config), "causal")
    found = logits_of(make_model(config), "full")
    causal = make_config("eager")
    assert (found - own_logits(config)).abs().max() < 1e-5
    assert (found - own_logits(causal)).abs().max() > 1e-3, "the flag would prove nothing"


@pytest.mark.parametrize("kind", [T.GemmaConfig, T.Gemma3TextConfig])
def test_a_flag_for_bidirectional_attention_is_not_dropped(kind):
    layers = {"layer_types": ["full_attention"] * 2} if kind is T.Gemma3TextConfig else {}
    config = make_config("dcp", kind, use_bidirectional_attention=True, pad_token_id=0, **layers)
    with pytest.raises(ValueError, match=r"bidirectional attention.*holds causal attention"):
        logits_of(make_model(config), "causal")


@pytest.mark.parametrize("ranks", [False, True])
def test_windows_that_only_the_mask_function_knows(ranks):
    extra = {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = make_config("dcp", T.PhimoeConfig, **extra)
    model = make_model(config)
    if ranks:  # as on a rank that holds pieces
        executor = make_executor([12])
        positions = torch.tensor([0, 1, 2, 8, 9, 10, 11, 3, 4, 5, 6, 7])
        with pytest.raises(ValueError, match="sliding window of 4 tokens"):
            local_logits(model, make_tokens([12]), positions, executor)
    with pytest.raises(ValueError, match=r"PhimoeAttention.*window of 4.*dcp_sliding_mask"):
        logits_of(model, "causal")
    masks = {"all": "causal", "near": "sliding_window:window=4"}
    found = logits_of(model, masks, dcp_sliding_mask="near")
    assert (found - own_logits(config)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("window", "seqlen", "refused"),
    [(3, 12, True), (5, 12, True), (4, 12, False), (3, 4, True), (8, 4, False)],
)
def test_another_window_than_the_planned_one(window, seqlen, refused):
    config = make_config("dcp", T.MistralConfig, sliding_window=4)
    masks = {"all": "causal", "near": f"sliding_window:window={window}"}
    keywords = {"seqlens": [seqlen], "dcp_sliding_mask": "near"}
    if refused:
        with pytest.raises(ValueError, match=f"'near' holds a sliding window of {window} tokens"):
            logits_of(make_model(config), masks, **keywords)
    else:
        found = logits_of(make_model(config), masks, **keywords)
        assert (found - own_logits(config, seqlen)).abs().max() < 1e-5


def test_documents_inside_a_sample_restrict_windows():
    config = make_config("dcp", T.MistralConfig, sliding_window=4)
    inside = AttnMask.from_mask_mod(
        lambda b, h, q, k: (k <= q) & (k > q - 4) & ((q < 7) == (k < 7)), 12, 12
    )
    masks = {"all": [AttnMask.documents([7, 5])], "near": [inside]}
    logits_of(make_model(config), masks, dcp_sliding_mask="near")


def llama4(**others):
    sizes = {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 4}
    return make_config("dcp", T.Llama4TextConfig, **sizes, **others)


def test_chunks_and_temperatures_that_count_rows():
    with pytest.raises(ValueError, match=r"Llama4ForCausalLM.*attn_temperature_tuning"):
        logits_of(make_model(llama4()), "causal")
    model = make_model(llama4(attn_temperature_tuning=False))
    with pytest.raises(ValueError, match=r"Llama4TextAttention.*neither causal.*chunks"):
        logits_of(model, "causal")


def test_padding_is_refused_and_its_absence_is_not():
    model, ones = make_model(make_config("dcp")), torch.ones(1, 12, dtype=torch.int64)
    logits_of(model, "causal", attention_mask=ones)
    ones[0, 8:] = 0
    with pytest.raises(ValueError, match="attention_mask hides 4 tokens"):
        logits_of(model, "causal", attention_mask=ones)


def test_masks_of_images_are_refused():
    from transformers.masking_utils import create_causal_mask

    config, executor = make_config("dcp"), make_executor([5])
    images = torch.tensor([[-1, 0, 0, -1, -1]])
    for keywords in (
        {"block_sequence_ids": images},
        {"or_mask_function": lambda b, h, q, k: images[b, q] == images[b, k]},
    ):
        for positions in (torch.arange(5), torch.tensor([0, 1, 3, 4, 2])):
            mask = create_causal_mask(
                config, torch.zeros(1, 5, 32), None, None, positions[None], **keywords
            )
            q, k = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
            with pytest.raises(ValueError, match="images are; plan it"):
                dcp_attention(None, q, k, k, mask, dcp_executor=executor)
            dcp_attention(None, q, k, k, mask, dcp_executor=executor, dcp_any_mask=True)


@pytest.mark.parametrize("name", ["indices", "position_bias", "cu_seq_lens_q", "sinks"])
def test_other_wishes_are_refused(name):
    q = torch.zeros(1, 4, 5, 8)
    with pytest.raises(ValueError, match=f"{name} cannot be honoured"):
        dcp_attention(
            None, q, q[:, :2], q[:, :2], None, dcp_executor=make_executor([5]), **{name: q}
        )


def test_layers_that_see_both_sides_without_a_mask():
    q = torch.zeros(1, 4, 5, 8)
    with pytest.raises(ValueError, match="bidirectional"):
        dcp_attention(
            None, q, q[:, :2], q[:, :2], None, dcp_executor=make_executor([5]), is_causal=False
        )
