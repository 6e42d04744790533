"""Tiny Megatron models: trained over planned batches on ranks, or by Megatron's own attention."""

from __future__ import annotations

import multiprocessing.dummy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest import mock
from zlib import crc32

import numpy as np
import torch

from tests.pool import run_script

STEPS, MICRO_BATCHES, LAYERS, VOCABULARY = 2, 2, 2, 64
# so large an epsilon that small gradients make small steps, and their sums' order no difference
ADAM = {"lr": 0.5, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1.0}
LENGTHS = [70, 33, 5, 1, 120, 64, 17, 90, 40, 11, 77]
LATENT = {
    "multi_latent_attention": True,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
# what the model takes beside its configuration
EMBEDDINGS = {
    "llama3 scaling": {"rope_scaling": True, "rope_scaling_factor": 4.0},
    "YaRN": {"position_embedding_type": "yarn"},
}
KINDS = {  # fields of TransformerConfig
    "dense": {},
    "GQA": {"num_query_groups": 2},
    "MQA": {"num_query_groups": 1},
    "sequence-parallel": {"num_query_groups": 2, "sequence_parallel": True},
    "MoE": {"num_moe_experts": 4, "sequence_parallel": True},
    "balanced MoE": {
        "num_moe_experts": 4,
        "sequence_parallel": True,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.5,
        "moe_z_loss_coeff": 0.05,
    },
    "biased MoE": {
        "num_moe_experts": 4,
        "sequence_parallel": True,
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 0.5,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.1,
    },
    "windows": {"window_size": (19, 0), "window_attn_skip_freq": 2},
    "sinks": {"softmax_type": "learnable", "softmax_scale": 0.3},
    "llama3 scaling": {},
    "YaRN": {
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 32,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": False,
    },
    "MLA": {"rope_type": "rope", "q_lora_rank": 16, **LATENT},
    "MLA and YaRN": {
        "rope_type": "yarn",
        "rotary_scaling_factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale_all_dim": 0.5,
        "q_lora_rank": None,
        **LATENT,
    },
    "interleaved": {
        "num_layers": 4,
        "num_query_groups": 2,
        "overlap_p2p_comm": True,  # Megatron's own rule where there are but two stages
        "batch_p2p_comm": False,
    },
    "layer scaling": {"apply_query_key_layer_scaling": True},
    "recomputed": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recomputed attention": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
    },
}


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, n) for n in LENGTHS]


def start(*, tensor=1, pipeline=1, virtual=None, expert=1):
    """Megatron's groups over the pool's processes, which may have had others before."""
    from megatron.core import parallel_state

    from examples.megatron_on_cpu import run_on_cpu

    run_on_cpu()
    forget_groups()
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        virtual,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=tensor if expert == 1 else 1,
    )


def forget_groups():
    """Megatron leaves its groups to themselves, dozens a start, and each has threads of its own."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def make_config(kind, *, tensor=1, pipeline=1, virtual=None, expert=1, **others):
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    fields = {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": tensor if expert == 1 else 1,
    }
    fields |= KINDS[kind] | others
    fields["sequence_parallel"] = fields.get("sequence_parallel", False) and tensor > 1
    latent = fields.get("multi_latent_attention")
    yarn = {name: fields.pop(name) for name in tuple(fields) if name.startswith("yarn_")}
    config = (MLATransformerConfig if latent else TransformerConfig)(**fields)
    config.kind = kind
    vars(config).update(yarn)  # which Megatron reads, and which its class has no fields for
    return config


def make_model(config, *, planned, chunk=None, own_router=False):
    """This rank's part, of an interleaved pipeline that ``chunk`` of it."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.moe.router import TopKRouter

    from dcp.integrations.megatron import planned_positions, planned_spec

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        normalization="RMSNorm",
        multi_latent_attention=config.multi_latent_attention,
    )
    if planned:
        spec = planned_spec(spec)
        if own_router:
            mlp = spec.submodules.mlp  # by version a ModuleSpec or a partial
            experts = getattr(mlp, "submodules", None) or mlp.keywords["submodules"]
            experts.router = type("OwnRouter", (TopKRouter,), {})
    elif config.multi_latent_attention:  # Megatron's own takes no two widths
        spec.submodules.self_attention.submodules.core_attention = DenseCore
    embeddings = {"position_embedding_type": "rope", **EMBEDDINGS.get(config.kind, {})}
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=128,
        **embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(False, chunk),
        post_process=parallel_state.is_pipeline_last_stage(False, chunk),
        vp_stage=chunk,
    )
    for name, parameter, cut in named(model, config):
        shape = list(parameter.shape)
        if cut is not None:
            shape[cut[0]] *= cut[2]
        with torch.no_grad():
            parameter.copy_(cut_of(name, weight(name, shape), cut))
    return planned_positions(model) if planned else model


class DenseCore(torch.nn.Module):
    """Causal attention of one document, ``[tokens, 1, heads, width]`` each."""

    def __init__(self, *, softmax_scale, softcap=None, **_):
        super().__init__()
        self.scale, self.softcap = softmax_scale, softcap

    def forward(self, query, key, value, *_, **__):
        copies = query.shape[2] // key.shape[2]
        key, value = (each.repeat_interleave(copies, dim=2) for each in (key, value))
        scale = query.shape[3] ** -0.5 if self.scale is None else self.scale
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * scale
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def weight(name, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode())))
    return 1 + 0.1 * values if "layernorm" in name else 0.2 * values


def named(model, config):
    """(name in the whole model, parameter, (dim, rank, ranks) of its cut) of a rank's part."""
    from megatron.core import parallel_state

    first_layer = model.decoder.layers[0].layer_number - 1
    first_expert = parallel_state.get_expert_model_parallel_rank() * (config.num_moe_experts or 0)
    first_expert //= config.expert_model_parallel_size
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        for before, first in (("layers", first_layer), ("local_experts", first_expert)):
            if before in parts:
                at = parts.index(before) + 1
                parts[at] = str(int(parts[at]) + first)
        cut = None
        if getattr(parameter, "tensor_model_parallel", False) or "softmax_offset" in name:
            rank = parallel_state.get_tensor_model_parallel_rank()
            ranks = config.tensor_model_parallel_size
            if "experts" in parts:
                rank = parallel_state.get_expert_tensor_parallel_rank()
                ranks = config.expert_tensor_parallel_size
            cut = max(getattr(parameter, "partition_dim", 0), 0), rank, ranks
        yield ".".join(parts), parameter, cut


def cut_of(name, whole, cut):
    if cut is None:
        return whole
    dim, rank, ranks = cut
    parts = whole.chunk(2) if "linear_fc1" in name else [whole]  # gate and up, each cut
    return torch.cat([part.chunk(ranks, dim)[rank] for part in parts], dim)


def train_planned(kind, split, options):
    """Losses, the documents of each step, and this rank's weights with their cuts."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from dcp.integrations.megatron import (
        mean_loss,
        planned_batches,
        planned_data,
        planned_forward_step,
    )

    start(**split)
    config = make_config(kind, **split)
    chunks = range(split["virtual"]) if "virtual" in split else [None]
    own = options.get("own_router", False)
    bare = [make_model(config, planned=True, chunk=chunk, own_router=own) for chunk in chunks]
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=options.get("distributed", False)
    )
    model = [DistributedDataParallel(config, settings, part) for part in bare]
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [part.no_sync for part in model]
    if len(model) == 1:
        (config.no_sync_func,) = config.no_sync_func
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            **ADAM,
            weight_decay=0.0,
            clip_grad=0.0,
            params_dtype=torch.float32,
            use_distributed_optimizer=options.get("distributed", False),
        ),
        model,
    )
    loader, executor = planned_data(
        documents()[: options.get("documents")],
        config=config,
        tokens_per_batch=160,
        micro_batches=MICRO_BATCHES,
        num_workers=0,
        plan_options={"block_size": 16},
    )
    losses, steps = [], []
    with loader:
        if "load" in options:
            restore(options["load"], bare[0], optimizer, loader)
        batches = planned_batches(loader, executor, config=config)
        for _ in range(options.get("steps", STEPS)):
            for part in model:
                part.zero_grad_buffer()
            optimizer.zero_grad()
            taken = list(islice(batches, MICRO_BATCHES))
            if own:  # one rank has no row that fills up
                taken = [replace(one, padding=None) for one in taken]
            steps.append([piece for one in taken for piece in one.local.pieces.tolist()])
            reports = get_forward_backward_func()(
                forward_step_func=planned_forward_step,
                data_iterator=[iter(taken) for _ in model] if len(model) > 1 else iter(taken),
                model=model,
                num_microbatches=MICRO_BATCHES,
                seq_length=160,
                micro_batch_size=1,
                forward_only=False,
            )
            optimizer.step()
            losses.append(mean_loss(reports))
        if "save" in options:
            keep(options["save"], bare[0], optimizer, loader)
    weights = [
        (name, parameter.detach().numpy().copy(), cut)
        for part in bare
        for name, parameter, cut in named(part, config)
    ]
    return losses, steps, weights


def keep(folder, model, optimizer, loader):
    """A checkpoint of Megatron's, with the place in the data as a common entry."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    state = sharded(model, optimizer, loading=False)
    # its writers are forked, of processes that have threads: here they are threads, too
    with mock.patch.object(filesystem_async.mp, "get_context", return_value=multiprocessing.dummy):
        dist_checkpointing.save(state | {"data": loader.state_dict()}, folder)


def restore(folder, model, optimizer, loader):
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(sharded(model, optimizer, loading=True), folder)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["data"])


def sharded(model, optimizer, *, loading):
    state = {"model": model.sharded_state_dict()}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading)
    return state


def train_alone(kind, steps):
    """Losses and weights of one process with Megatron's own attention, document by document."""
    start()
    config = make_config(kind, recompute_granularity=None)
    model = make_model(config, planned=False)
    betas = ADAM["adam_beta1"], ADAM["adam_beta2"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=ADAM["lr"], betas=betas, eps=ADAM["adam_eps"], weight_decay=0
    )
    losses = []
    for pieces in steps:
        optimizer.zero_grad()
        labels = sum(max(stop - begin - 1, 0) for _, begin, stop in pieces)
        total = 0.0
        for document, begin, stop in pieces:
            ids = torch.from_numpy(documents()[document][begin:stop])[None]
            if ids.shape[1] > 1:
                places = torch.arange(ids.shape[1])[None]
                found = model(ids, places, None, labels=ids.roll(-1))[0, :-1].sum() / labels
                found.backward()
                total += found.item()
        optimizer.step()
        losses.append(total)
    return losses, {name: p.detach().numpy().copy() for name, p, _ in named(model, config)}


def run_example(words):
    """What the example prints on this rank."""
    forget_groups()
    return run_script(str(Path(__file__).parents[1] / "examples" / "megatron_gpt.py"), words)


def called_with_an_executor():
    """Logits of this rank's tokens, and those of dense attention, both with a soft-cap; learned
    positions."""
    import torch.distributed as dist
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec

    import dcp
    from dcp.integrations.megatron import attention_spec, planned_core_attention

    start()
    config, executor = make_config("GQA"), dcp.AttentionExecutor(dist.group.WORLD)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    models = []
    capped = {"softcap": 0.3}
    for core in (
        planned_core_attention(executor, **capped),
        ModuleSpec(DenseCore, params=capped),
    ):
        spec.submodules.self_attention.submodules.core_attention = core
        model = GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=128)
        for name, parameter, _ in named(model, config):
            parameter.data.copy_(weight(name, parameter.shape))
        models.append(model)
    lengths = [70, 33, 5]
    batch = dcp.SequenceBatch(lengths)
    cluster = dcp.Cluster(devices_per_node=executor.num_ranks)
    plan = dcp.plan(batch, attention_spec(config), cluster, strategy="zigzag", block_size=16)
    executor.prepare(plan)
    own = torch.from_numpy(np.array(plan.token_indices(executor.rank)))
    ids = [torch.arange(n) * 7 % VOCABULARY for n in lengths]
    places = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        found = models[0](torch.cat(ids)[own][None], places[own][None], None)[0]
        alone = [models[1](one[None], torch.arange(len(one))[None], None)[0] for one in ids]
    return found.numpy(), torch.cat(alone)[own].numpy()


def refusals():
    """What models say that were made or called otherwise: message by what should be in it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.identity_op import IdentityOp

    from dcp.integrations.megatron import (
        planned_batches,
        planned_data,
        planned_forward_step,
        planned_positions,
        planned_spec,
    )

    start()
    config = make_config("windows")
    model, bare = make_model(config, planned=True), make_model(config, planned=False)
    without = get_gpt_layer_local_spec()
    without.submodules.self_attention = IdentityOp
    loader, executor = planned_data(documents(), config=config, tokens_per_batch=160, num_workers=0)
    with loader:
        batches = planned_batches(loader, executor, config=config)
        batch = next(batches)
        rows = batch.tokens, batch.positions
        mask = torch.zeros(1, 1, 160, 160, dtype=torch.bool)
        return {
            "planned_positions(model)": said(planned_forward_step, batches, bare),
            "is one mask": said(planned_data, documents(), "causal", config=config),
            "got NoneType": said(model.decoder.layers[0].self_attention, *hidden(config), None),
            "attention_mask": said(model, *rows, mask, packed_seq_params=batch.params),
            "'mrope'": said(planned_positions, positioned(bare, "mrope")),
            "IdentityOp has no core_attention": said(planned_spec, without),
            "packed_seq_params": said(model, *rows, None, packed_seq_params=PackedSeqParams()),
        }


def hidden(config):
    return (torch.zeros(5, 1, config.hidden_size),)


def positioned(model, kind):
    model.position_embedding_type = kind
    return model


def said(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "nothing"
