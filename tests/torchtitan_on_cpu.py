"""For tests only: lets torchtitan's trainer run on CPU and gloo, which it does not mean to."""

import time
import types

import torch


def run_on_cpu():
    """Replace, in this process and before torchtitan is imported, what asks for an accelerator."""
    torch._utils._get_available_device_type = lambda: "cpu"  # it has no name for "none but CPUs"
    for name, value in {
        "get_device_name": "cpu",
        "get_device_properties": types.SimpleNamespace(total_memory=1 << 34),
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "memory_stats": {},
    }.items():  # what its metrics ask of a device's memory
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, lambda *_, _value=value, **__: _value)
    from torchtitan import trainer
    from torchtitan.distributed import fsdp, utils

    trainer.time = types.SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)
    utils.set_pg_timeouts = lambda **_: None  # gloo's barrier takes no device_ids
    fsdp.disable_fsdp_gradient_division = _sum_gradients
    # in bfloat16, as experts compute, the order of sums would make a difference
    torch._grouped_mm, torch.Tensor.bfloat16 = _grouped_mm, lambda tensor: tensor
    torch.autograd.set_multithreading_enabled(False)  # as it does itself where it makes the group


def _sum_gradients(model):
    """Its own, and by sums: gloo has no reduction that scales first."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _grouped_mm(a, b, *, offs):
    """``[rows, n]``: rows of ``a`` times the matrix of their group, groups ending at ``offs``."""
    ends = [0, *offs.tolist()]
    parts = [a[i:j] @ one for i, j, one in zip(ends, ends[1:], b, strict=False)]
    return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[-1])])
