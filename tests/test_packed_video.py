"""LTX-Video with planned attention: a packed batch equals diffusers' own model, video by video."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from torch import distributed as dist

from dcp import AttentionExecutor, Cluster, plan
from dcp.datacentric.sums import sum_over_ranks
from dcp.integrations.packed_video import PackedLTX
from tests.pool import run_script

# latent frames, rows and columns; words of the prompt; an image and a single token among them
BATCHES = {
    "many": [((3, 4, 5), 3), ((1, 2, 2), 1), ((5, 3, 3), 7), ((1, 1, 1), 2), ((2, 1, 7), 4)],
    "one token": [((1, 1, 1), 2)],  # most ranks have none
}
CHANNELS, CAPTION, MOST_WORDS = 6, 10, 9
SCALES = [(8 / 25, 32.0, 32.0), (8 / 30, 32.0, 32.0)]  # of two frame rates


def model_of(*, head_dim=8, patch=1):
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=CHANNELS * patch**2,
        out_channels=CHANNELS * patch**2,
        patch_size=patch,
        num_attention_heads=4,
        attention_head_dim=head_dim,
        cross_attention_dim=4 * head_dim,
        num_layers=2,
        caption_channels=CAPTION,
    )
    return model.train()


def videos_of(name):
    """Shapes, clean latents, noise, times and texts of a batch."""
    rng = torch.Generator().manual_seed(1)
    shapes, words = zip(*BATCHES[name], strict=True)
    clean, noise = (
        [torch.randn(CHANNELS, *shape, generator=rng) for shape in shapes] for _ in range(2)
    )
    times = torch.rand(len(shapes), generator=rng)
    texts = [torch.randn(n, CAPTION, generator=rng) for n in words]
    scales = [SCALES[number % 2] for number in range(len(shapes))]
    return list(shapes), clean, noise, times, texts, scales


def one_process(name, **options):
    """Loss and gradients of the model as it is, one video after the other, texts padded."""
    shapes, clean, noise, times, texts, scales = videos_of(name)
    model = model_of(**options)
    patch = options.get("patch", 1)
    total = torch.zeros(())
    for number, shape in enumerate(shapes):
        noisy = clean[number] + times[number] * (noise[number] - clean[number])
        text = torch.full((1, MOST_WORDS, CAPTION), 7.0)
        text[0, : len(texts[number])] = texts[number]
        mask = (torch.arange(MOST_WORDS) < len(texts[number]))[None]
        f, h, w = shape[0], shape[1] // patch, shape[2] // patch
        flow = model(
            hidden_states=tokens(noisy, patch)[None],
            encoder_hidden_states=text,
            timestep=1000 * times[number][None],
            encoder_attention_mask=mask,
            num_frames=f,
            height=h,
            width=w,
            rope_interpolation_scale=scales[number],
        ).sample[0]
        total = total + (flow - tokens(noise[number] - clean[number], patch)).square().sum()
    loss = total / sum(each.numel() for each in clean)
    loss.backward()
    return loss.item(), [p.grad.numpy() for p in model.parameters()]


def tokens(latents, patch):
    """``[tokens, channels]``, as the library's pipelines pack latents."""
    c, f, h, w = latents.shape
    cut = latents.reshape(c, f, h // patch, patch, w // patch, patch)
    return cut.permute(1, 2, 4, 0, 3, 5).reshape(-1, c * patch**2)


def packed(name, *, recompute=False, block_size=8, another=None, **options):
    """The same of a packed batch on this group's ranks: loss, gradients, tokens of this rank."""
    shapes, clean, noise, times, texts, scales = videos_of(name)
    model = model_of(**options)
    if recompute:
        model.enable_gradient_checkpointing()
    executor = AttentionExecutor(dist.group.WORLD)
    ltx = PackedLTX(model, executor)
    cluster = Cluster(num_nodes=1, devices_per_node=dist.get_world_size())
    made = plan(ltx.batch(shapes), ltx.spec, cluster, block_size=block_size)
    share = ltx.share(made, shapes)
    # a rank loads what it has tokens of; without any, something to know the kind of its numbers by
    mine = {*share.samples} or {0}
    held = [
        [x if n in mine else None for n, x in enumerate(each)] for each in (clean, noise, texts)
    ]
    clean_rows, noise_rows = share.rows(held[0]), share.rows(held[1])
    noisy = clean_rows + share.of_samples(times)[:, None] * (noise_rows - clean_rows)
    executor.prepare(made)
    output = model(**share.inputs(noisy, held[2], 1000 * times, scales=scales)).sample
    flow = share.local(output)
    assert len(flow) == len(noisy)
    loss = (flow - (noise_rows - clean_rows)).square().sum() / sum(c.numel() for c in clean)
    if another:  # prepared before backward, as the next micro-batch may be
        executor.prepare(plan(ltx.batch(another), ltx.spec, cluster))
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    loss = loss.detach()
    sum_over_ranks([*gradients, loss], dist.group.WORLD)
    return loss.item(), [g.numpy() for g in gradients], len(noisy)


def cases(world_of_options):
    return [packed(name, **options) for name, options in world_of_options]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_packed_batch_equals_one_process(gloo_pool, world):
    work = [
        ("many", {}),
        ("many", {"recompute": True, "another": [(2, 2, 2)]}),
        ("many", {"head_dim": 6, "block_size": 5}),  # rotary widths that 6 divides
        ("one token", {}),
        ("one token", {"recompute": True}),
    ]
    wanted = [
        one_process(name, **{k: v for k, v in options.items() if k == "head_dim"})
        for name, options in work
    ]
    for answers in gloo_pool(world).run(cases, work):
        for (loss, gradients, _), (right, others) in zip(answers, wanted, strict=True):
            assert loss == pytest.approx(right, rel=1e-5)
            for gradient, other in zip(gradients, others, strict=True):
                np.testing.assert_allclose(gradient, other, rtol=0, atol=1e-5)


def test_ranks_share_the_tokens(gloo_pool):
    answers = gloo_pool(3).run(cases, [("many", {}), ("one token", {})])
    sizes = [[answer[number][2] for answer in answers] for number in range(2)]
    assert sum(sizes[0]) == 60 + 4 + 45 + 1 + 14
    assert min(sizes[0]) > 0
    assert sorted(sizes[1]) == [0, 0, 1]


def test_the_example_learns_the_same_on_any_number_of_ranks(gloo_pool):
    script = str(Path(__file__).parents[1] / "examples" / "packed_ltx.py")
    first, second = (
        json.loads(gloo_pool(world).run(run_script, script, [])[0])["losses"] for world in (1, 3)
    )
    assert second == pytest.approx(first, rel=1e-5)
    assert first[-1] < first[0]


def test_patches_of_several_latents():
    shapes = [(2, 4, 6), (1, 2, 2)]
    videos = [torch.randn(CHANNELS, *shape) for shape in shapes]
    ltx = PackedLTX(model_of(patch=2), AttentionExecutor())
    made = plan(ltx.batch(shapes), ltx.spec, Cluster(num_nodes=1, devices_per_node=1), block_size=4)
    share = ltx.share(made, shapes)
    whole = torch.cat([tokens(video, 2) for video in videos])
    assert torch.equal(share.rows(videos), whole[torch.from_numpy(made.token_indices(0))])


def test_the_model_goes_back_to_what_it_was():
    name = "many"
    shapes, clean, _, times, texts, scales = videos_of(name)
    model = model_of()
    arguments = {
        "hidden_states": tokens(clean[0], 1)[None],
        "encoder_hidden_states": texts[0][None],
        "timestep": times[:1],
        "encoder_attention_mask": torch.ones(1, len(texts[0])),
        "num_frames": shapes[0][0],
        "height": shapes[0][1],
        "width": shapes[0][2],
        "rope_interpolation_scale": scales[0],
    }
    before = model(**arguments).sample
    executor = AttentionExecutor()
    ltx = PackedLTX(model, executor)
    executor.prepare(
        plan(ltx.batch(shapes[:1]), ltx.spec, Cluster(num_nodes=1, devices_per_node=1))
    )
    with pytest.raises(ValueError, match=r"PackedShare.inputs"):
        model(**arguments)
    model.set_attn_processor(LTXVideoAttnProcessor())
    assert torch.equal(model(**arguments).sample, before)


def test_what_cannot_be_packed_is_refused():
    wan = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="WanTransformer3DModel cannot be given packed videos"):
        PackedLTX(wan, AttentionExecutor())
    ltx = PackedLTX(model_of(), AttentionExecutor())
    shapes = [(2, 2, 2), (1, 3, 3)]
    made = plan(ltx.batch(shapes), ltx.spec, Cluster(num_nodes=1, devices_per_node=1))
    with pytest.raises(ValueError, match=r"not of these 2 videos of 17 tokens in this order"):
        ltx.share(made, shapes[::-1])
    with pytest.raises(ValueError, match="not of these 1 videos of 8 tokens"):
        ltx.share(made, shapes[:1])
    with pytest.raises(ValueError, match=r"video 1 has latents of \(1, 0, 3\)"):
        ltx.batch([(2, 2, 2), (1, 0, 3)])
    share = ltx.share(made, shapes)
    videos = [torch.zeros(CHANNELS, *shape) for shape in shapes]
    with pytest.raises(ValueError, match=r"video 1 has latents None, planned were \(channels"):
        share.rows([videos[0], None])
    with pytest.raises(ValueError, match="1 videos for 2"):
        share.rows(videos[:1])
    rows, times = share.rows(videos), torch.zeros(2)
    with pytest.raises(ValueError, match=r"video 0 has a text of \(0, 10\)"):
        share.inputs(rows, [torch.zeros(0, CAPTION), torch.zeros(2, CAPTION)], times)
    with pytest.raises(ValueError, match="3 values for 2 videos"):
        share.inputs(rows, [torch.zeros(1, CAPTION)] * 2, torch.zeros(3))
