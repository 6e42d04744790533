"""Megatron-Core trains a tiny GPT on Python's sources, with the tokens of every batch shared out
over its data-parallel ranks.

torchrun --nproc-per-node 4 examples/megatron_gpt.py --tensor-parallel 2

The losses are the same for any split of the ranks. Megatron's own DistributedDataParallel,
optimizer and pipeline schedules run; without CUDA, megatron_on_cpu.py lets them. Megatron-Core is
installed with ``pip install --no-deps megatron-core``.
"""

import argparse
import json
import os
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from dcp.data import ByteTokenizer, TokenDataset, open_documents
from dcp.integrations.megatron import (
    mean_loss,
    planned_batches,
    planned_data,
    planned_forward_step,
    planned_positions,
    planned_spec,
)

MICRO_BATCHES, TOKENS, LAYERS = 2, 2048, 2


def main() -> None:
    args = parse()
    device = set_up(args)
    config = make_config(args)
    model = make_model(config).to(device)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp, model)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = model.no_sync
    settings = OptimizerConfig(optimizer="adam", lr=3e-3, params_dtype=torch.float32)
    optimizer = get_megatron_optimizer(settings, [model])

    dataset = TokenDataset(open_documents("python", limit=400), ByteTokenizer())
    options = {"tokens_per_batch": TOKENS, "over_long": "split", "device": device}
    options["micro_batches"] = MICRO_BATCHES  # documents are dealt to, so that all take as long
    loader, executor = planned_data(dataset, config=config, **options)
    losses = []
    with loader:
        batches = planned_batches(loader, executor, config=config)
        for step in range(args.steps):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            reports = get_forward_backward_func()(
                forward_step_func=planned_forward_step,
                data_iterator=batches,
                model=[model],
                num_microbatches=MICRO_BATCHES,
                seq_length=TOKENS,
                micro_batch_size=1,
                forward_only=False,
            )
            optimizer.step()
            losses.append(mean_loss(reports, device=device))
            if dist.get_rank() == 0 and not args.json:
                print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
    if dist.get_rank() == 0 and args.json:
        print(json.dumps({"losses": losses}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print only the losses, as JSON")
    return parser.parse_args()


def set_up(args: argparse.Namespace) -> torch.device:
    """Process groups; returns this rank's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    else:
        from megatron_on_cpu import run_on_cpu

        run_on_cpu()
        torch.set_num_threads(1)
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(args.tensor_parallel, args.pipeline_parallel)
    if device.type == "cuda":
        model_parallel_cuda_manual_seed(0)
    return device


def make_config(args: argparse.Namespace) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,  # planned attention has none,
        calculate_per_token_loss=True,  # its ranks have different numbers of labels,
        variable_seq_lengths=True,  # and of rows, which the stages of a pipeline tell each other
        moe_token_dispatcher_type="alltoall",  # which Megatron then wants
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
        sequence_parallel=args.sequence_parallel,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )


def make_model(config: TransformerConfig) -> Any:
    """This rank's part of the model, with the same weights however the ranks are split."""
    spec = planned_spec(get_gpt_layer_local_spec(normalization="RMSNorm"))
    model = GPTModel(
        config,
        spec,
        vocab_size=ByteTokenizer().vocab_size,
        max_sequence_length=TOKENS,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    for name, parameter in model.named_parameters():
        fill(name, parameter, config)
    return planned_positions(model)


def fill(name: str, parameter: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Give a rank its part of a weight that depends on the name alone."""
    if "layernorm" in name:
        return
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:  # which count from 0 on every stage
        stage = parallel_state.get_pipeline_model_parallel_rank()
        parts[2] = str(int(parts[2]) + stage * LAYERS // config.pipeline_model_parallel_size)
    ranks, rank = config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
    split = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    shape = [size * ranks if dim == split else size for dim, size in enumerate(parameter.shape)]
    generator = torch.Generator().manual_seed(crc32(".".join(parts).encode()))
    whole = torch.randn(shape, generator=generator) * 0.05
    if split is not None:
        pieces = whole.chunk(2) if "linear_fc1" in name else [whole]  # gate and up, each split
        whole = torch.cat([piece.chunk(ranks, split)[rank] for piece in pieces], split)
    with torch.no_grad():
        parameter.copy_(whole)


if __name__ == "__main__":
    main()
