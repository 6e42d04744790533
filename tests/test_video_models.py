"""Transformers of diffusers, split as they declare: gradients of any mixture equal one process."""

from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import diffusers
from torch import distributed as dist

from dcp.datacentric import DiffusersWorkload, SharedTokens, Workload, families, split_transformer
from dcp.datacentric.exchanged import exchanged_attention
from dcp.datacentric.iteration import Iteration, MicroBatch, RankGroup
from dcp.datacentric.measure import Meter
from dcp.datacentric.sequence_group import SequenceGroup
from dcp.datacentric.step import IterationRunner
from dcp.runtime.communicator import GroupCommunicator
from tests.video_models import FAMILIES, HEAD_SIZE, HEADS, SAMPLES, workload_of


def gradients(name, mixtures):
    """Loss and gradients of iterations: [[(degree, layers kept, [samples of a micro-batch])]]."""
    workload = workload_of(name)
    model = workload.build().train()
    runner = IterationRunner(workload, model, dist.group.WORLD, torch.device("cpu"))
    found = []
    for mixture in mixtures:
        groups = tuple(
            RankGroup(
                degree,
                tuple(
                    MicroBatch(
                        workload.bucket_of[samples[0]],
                        len(samples),
                        1.0,
                        tuple(dict.fromkeys(workload.depth, keep).items()),
                        tuple(samples),
                    )
                    for samples in batches
                ),
            )
            for degree, keep, batches in mixture
        )
        loss, _ = runner.gradients(Iteration(groups), epoch=3)
        found.append((loss, [p.grad.numpy().copy() for p in model.parameters()]))
    return found


def micro_batches(count):
    """All samples by size, ``count`` or fewer together, large ones first."""
    batches = []
    for size in sorted(set(SAMPLES), key=np.prod, reverse=True):
        samples = [number for number, each in enumerate(SAMPLES) if each == size]
        batches += [samples[at : at + count] for at in range(0, len(samples), count)]
    return batches


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_degrees_and_accumulations_equal_one_process(gloo_pool, name):
    one, few = micro_batches(100), micro_batches(2)
    (((loss, wanted),),) = gloo_pool(1).run(gradients, name, [[(1, 2, one)]])
    mixtures = [
        [(2, 1, few[0::3]), (1, 0, few[1::3]), (1, 2, few[2::3])],
        [(3, 0, few[:-1]), (1, 1, few[-1:])],  # 7 words, 35 tokens and 3 heads over 3
        [(4, 1, few)],  # fewer heads than ranks, and of one size fewer tokens
        [(2, 2, few), (2, 0, [])],
    ]
    for results in gloo_pool(4).run(gradients, name, mixtures):
        for found_loss, found in results:
            assert found_loss == pytest.approx(loss, rel=1e-5)
            for gradient, other in zip(found, wanted, strict=True):
                assert abs(gradient - other).max() <= 1e-5 * max(1, abs(other).max())


def measured_layers(name):
    """Costs of a layer of each kind as three of four ranks measure them, in a shallower model."""
    workload = workload_of(name)
    meter = Meter(workload, dist.group.WORLD, torch.device("cpu"), depth=1)
    whole, depth = len(list(workload.model.parameters())), workload.depth
    assert set(depth.values()) == {2}
    assert len(list(meter.model.parameters())) < whole
    return meter.measure(workload.buckets[-1], 3, 2).layers


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_profiled(gloo_pool, name):
    first, *others = gloo_pool(4).run(measured_layers, name)
    kinds = {"blocks", "transformer_blocks", "single_transformer_blocks"}
    assert set(first) <= kinds
    part, width = 12, HEADS * HEAD_SIZE  # of 35 tokens, two samples
    for cost in first.values():
        assert cost.input_bytes == 2 * part * width * 4
        assert cost.activation_bytes > cost.input_bytes
    assert all(other == first for other in others)


# --------------------------------------------------------------------------- the contract


class Written(Workload):
    """SkyReels-V2 declares no plan: its three methods."""

    def sizes(self):
        return SAMPLES

    def loss(self, model, samples, epoch):
        shape = (4, *SAMPLES[samples[0]])
        noise = torch.stack(
            [torch.randn(shape, generator=self.generator(s, epoch)) for s in samples]
        )
        words = torch.ones(len(samples), 5, 16)
        flow = model(noise, torch.full([len(samples)], 500.0), words).sample
        return flow.square().flatten(1).mean(1).sum()

    def split(self, model, group):
        return split_transformer(model, diffusers.WanTransformer3DModel._cp_plan, group)


def sky_reels():
    torch.manual_seed(0)
    return diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=3, attention_head_dim=12, num_layers=2, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=40, rope_max_seq_len=32,
    )  # fmt: skip


def written_cases():
    """A step of all ranks as one group, and a measurement of a model without known layers."""
    workload = Written(sky_reels())
    model = workload.build().train()
    batches = tuple(
        MicroBatch(workload.bucket_of[samples[0]], len(samples), 1.0, (), tuple(samples))
        for samples in micro_batches(2)
    )
    runner = IterationRunner(workload, model, dist.group.WORLD, torch.device("cpu"))
    iteration = Iteration((RankGroup(dist.get_world_size(), batches),))
    loss, _ = runner.gradients(iteration, epoch=0)
    assert not any(module._forward_hooks for module in model.modules())  # it is whole again
    found = [p.grad.numpy().copy() for p in model.parameters()]
    meter = Meter(workload, dist.group.WORLD, torch.device("cpu"), depth=None)
    measured = meter.measure(workload.buckets[-1], dist.get_world_size(), 1)
    return loss, found, measured


def test_three_methods_are_enough(gloo_pool):
    ((loss, wanted, alone),) = gloo_pool(1).run(written_cases)
    for found_loss, found, measured in gloo_pool(4).run(written_cases):
        assert found_loss == pytest.approx(loss, rel=1e-5)
        for gradient, other in zip(found, wanted, strict=True):
            assert abs(gradient - other).max() <= 1e-5 * max(1, abs(other).max())
        assert measured.layers == alone.layers == {}
        assert 0 < measured.peak_bytes < alone.peak_bytes


def test_a_method_that_is_missing_is_named():
    workload = type("Half", (Workload,), {})(torch.nn.Linear(2, 2))
    calls = {"sizes": (), "loss": (workload.model, [0], 0), "split": (workload.model, None)}
    for name, given in calls.items():
        with pytest.raises(NotImplementedError, match=rf"Half needs {name}\(\)"):
            getattr(workload, name)(*given)


# --------------------------------------------------------------------------- what is refused


def refused(make, match, **options):
    with pytest.raises(ValueError, match=match):
        DiffusersWorkload(make(), **options)


def test_models_that_a_plan_cannot_split_are_refused_by_name():
    refused(sky_reels, r"SkyReelsV2Transformer3DModel declares no .*_cp_plan.* three methods")
    small = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    refused(
        lambda: diffusers.LTX2VideoTransformer3DModel(**small, audio_num_attention_heads=1),
        "tokens that no plan splits, audio_hidden_states",
    )
    refused(
        lambda: diffusers.LatteTransformer3DModel(
            **small, in_channels=4, sample_size=8, patch_size=2, caption_channels=8
        ),
        "transformer_blocks.*attends by AttnProcessor2_0, which knows no dispatcher",
        plan=diffusers.WanTransformer3DModel._cp_plan,
    )
    refused(
        lambda: FAMILIES["HunyuanVideo"].model(image_condition_type="token_replace"),
        "token_replace.*by their place",
    )


def mask_cases():
    """What is said of masks that cannot be honoured, by a group of two."""
    group = SequenceGroup(0, 2, dist.get_rank(), GroupCommunicator(dist.group.WORLD))
    shared = SharedTokens(group)
    said = []
    for name, total in (("hidden_states", 5), ("encoder_hidden_states", 3)):
        shared.split(torch.zeros(total), 0, name)
    local = sum(group.part(total).stop - group.part(total).start for total in (5, 3))
    x = torch.zeros(1, local, 2, 4)
    for mask in (torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 6), torch.ones(1, 1, local, 8)):
        with pytest.raises(ValueError) as error:
            exchanged_attention(x, x, x, mask, None, shared, crossed=False)
        said.append(str(error.value))
    with pytest.raises(ValueError) as error:
        exchanged_attention(x[:, :0], x, x, None, None, shared, crossed=False)
    return [*said, str(error.value)]


def test_what_attention_cannot_honour_is_raised(gloo_pool):
    for order, keys, queries, tokens in gloo_pool(2).run(mask_cases):
        assert "nothing says in which order" in order
        assert "[1, 1, 1, 6] fits neither the 8 queries and 8 keys" in keys
        assert "fits neither the 8 queries" in queries
        assert "no part of what the plan splits" in tokens
    for said in gloo_pool(2).run(past_the_dispatcher):
        assert "no attention of CogVideoXTransformer3DModel went through diffusers'" in said


def past_the_dispatcher():
    """What is said of CogVideoX with processors of its own, split by its plan."""
    model = FAMILIES["CogVideoX"].model()
    plan = families.FAMILIES["CogVideoXTransformer3DModel"].plan
    group = SequenceGroup(0, 2, dist.get_rank(), GroupCommunicator(dist.group.WORLD))
    split_transformer(model, plan, group)
    with pytest.raises(ValueError) as error:
        model(torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 3, 16), torch.zeros(1))
    return str(error.value)


def test_the_backend_is_active_only_while_a_split_model_attends():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before, _ = registry.get_active_backend()
    workload = workload_of("Wan")
    model = workload.build()
    group = SequenceGroup(0, 2, 0, communicator=object())
    with pytest.raises(AttributeError):  # at the first message, which nobody can carry
        workload.summed_loss(model, workload.load([0], 0), group)
    assert registry.get_active_backend()[0] == before
    assert all(block.attn1.processor._parallel_config is None for block in model.blocks)


def test_a_model_keeps_the_attention_backend_that_it_was_given(gloo_pool):
    for calls in gloo_pool(2).run(backend_calls):
        assert calls == 2 * 2  # attention of two blocks, to the video and to the text


def backend_calls():
    """Attention calls that diffusers' math backend gets from a split model."""
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    workload, calls = workload_of("Wan"), []
    model = workload.build()
    model.set_attention_backend("_native_math")
    name = AttentionBackendName._NATIVE_MATH
    plain = registry._backends[name]

    def counted(**options):
        calls.append(options)
        return plain(**options)

    group = SequenceGroup(0, 2, dist.get_rank(), GroupCommunicator(dist.group.WORLD))
    with mock.patch.dict(registry._backends, {name: counted}):
        workload.summed_loss(model, workload.load([1], 0), group)
    model.reset_attention_backend()
    return len(calls)
