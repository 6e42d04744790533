"""Data-centric execution: gradients of any mixture equal one process; jobs run from the command."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from torch import distributed as dist

from dcp import cli
from dcp.datacentric.buckets import Bucket
from dcp.datacentric.clips import CHANNELS, TEXT_SIZE, WORDS, rendered_latents, synthetic_latents
from dcp.datacentric.config import VideoArguments
from dcp.datacentric.iteration import Iteration, MicroBatch, RankGroup
from dcp.datacentric.measure import LayerProbe, Meter, SavedBytes
from dcp.datacentric.sequence_group import SequenceGroup
from dcp.datacentric.step import IterationRunner
from dcp.datacentric.trainer import open_workload
from dcp.datacentric.video import VideoWorkload
from dcp.datacentric.workload import keep_activations_of
from dcp.jobs import JOBS, arguments_of, read_options
from dcp.runtime.communicator import GroupCommunicator
from dcp.train.arguments import RunArguments
from tests.trainer_work import launched

QUIET = {"preset": "inter+PAC", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
VIDEO = QUIET | {"job": "video", "video_samples": 15, "hidden_size": 32, "num_layers": 2}
TEXT = QUIET | {
    "job": "data-centric",
    "config_overrides": "hidden_size=32,intermediate_size=96,num_hidden_layers=2",
    "max_seqlen": 100,
}
# sizes that nothing divides: 3 x 5 latents are 2 x 3 patches, the last ones padded
BUCKETS = [Bucket("a", (1, 2, 2)), Bucket("b", (3, 3, 5)), Bucket("c", (5, 4, 6))]


def workload_of(values):
    with launched():
        arguments = arguments_of(values)
    if values["job"] == "video":
        return VideoWorkload(arguments[0], buckets=BUCKETS)
    return open_workload(arguments, torch.device("cpu"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(24):
        text = "".join(f"{number} and {n}. " for n in range(number * 5 % 23))
        (folder / f"{number:02}.txt").write_text(text)
    (folder / "one.txt").write_text("")
    return folder


# --------------------------------------------------------------------------- gradients


def gradients(values, plan):
    """Loss and gradients of an iteration: [(degree, keep, [samples of each micro-batch])]."""
    workload = workload_of(values)
    model = workload.build().double().train()
    runner = IterationRunner(workload, model, dist.group.WORLD, torch.device("cpu"))
    groups = tuple(
        RankGroup(
            degree,
            tuple(
                MicroBatch(
                    workload.bucket_of[samples[0]], len(samples), 1.0, tuple(keep.items()), samples
                )
                for samples in batches
            ),
        )
        for degree, keep, batches in plan
    )
    loss, busy = runner.gradients(Iteration(groups), epoch=3)
    assert len(busy) == dist.get_world_size()
    return loss, [parameter.grad.numpy().copy() for parameter in model.parameters()]


def by_bucket(values, count):
    """Samples of at least three buckets, as micro-batches of ``count`` or fewer."""
    bucket_of = workload_of(values).bucket_of
    batches = []
    for bucket in sorted(set(bucket_of)):
        samples = [i for i, name in enumerate(bucket_of) if name == bucket]
        batches += [tuple(samples[i : i + count]) for i in range(0, len(samples), count)]
    assert len(set(bucket_of)) >= 2
    return batches


@pytest.mark.parametrize("kind", ["video", "text"])
def test_mixed_degrees_and_accumulations_equal_one_process(gloo_pool, kind, texts):
    values = VIDEO if kind == "video" else TEXT | {"data": str(texts)}
    kinds = ("spatial", "temporal") if kind == "video" else ("layer",)
    nothing, some, everything = (dict.fromkeys(kinds, n) for n in (0, 1, 2))
    one, few = by_bucket(values, 100), by_bucket(values, 3)
    ((loss, wanted),) = gloo_pool(1).run(gradients, values, [(1, everything, one)])
    mixtures = [
        [(2, some, few[0::3]), (1, nothing, few[1::3]), (1, everything, few[2::3])],
        [(3, nothing, few[:-1]), (1, some, few[-1:])],
        [(4, some, few)],
        [(2, everything, few), (2, nothing, [])],
    ]
    for mixture in mixtures:
        for found_loss, found in gloo_pool(4).run(gradients, values, mixture):
            assert found_loss == pytest.approx(loss, abs=1e-6 if kind == "text" else 1e-10)
            for gradient, other in zip(found, wanted, strict=True):
                assert abs(gradient - other).max() <= 1e-10


@pytest.mark.parametrize("kind", ["video", "text"])
def test_recomputing_changes_no_gradient_and_saves_bytes(gloo_pool, kind, texts):
    values = VIDEO if kind == "video" else TEXT | {"data": str(texts)}
    results = gloo_pool(1).run(recompute_cases, values)[0]
    saved = [num_bytes for _, num_bytes in results]
    assert saved[0] < saved[1] < saved[2]
    for found, _ in results[1:]:
        assert all((a == b).all() for a, b in zip(found, results[0][0], strict=True))


def recompute_cases(values):
    """Gradients and saved bytes with no, some and all layers keeping their activations."""
    cases = []
    for count in (0, 1, 2):
        workload = workload_of(values)
        model = workload.build().double().train()
        layers = workload.layers(model)
        keep_activations_of(layers, dict.fromkeys(layers, count))
        batch = workload.load(by_bucket(values, 2)[-1], epoch=0)
        with SavedBytes(list(model.parameters())) as saved:
            loss = workload.summed_loss(model, batch, SequenceGroup(0, 1, 0))
        loss.backward()
        cases.append(([p.grad.numpy() for p in model.parameters()], saved.num_bytes))
    return cases


def test_what_a_layer_keeps_is_what_the_knapsack_counts():
    workload = workload_of(VIDEO)
    model = workload.build().train()
    layers = workload.layers(model)
    batch = workload.stand_in(BUCKETS[2], 3)

    def saved(keep):
        keep_activations_of(layers, keep)
        with SavedBytes(list(model.parameters())) as counted:
            workload.summed_loss(model, batch, SequenceGroup(0, 1, 0))
        return counted.num_bytes

    probe = LayerProbe(layers, torch.device("cpu"))
    keep_activations_of(layers, {"spatial": 2, "temporal": 2})
    workload.summed_loss(model, batch, SequenceGroup(0, 1, 0)).backward()
    probe.close()
    costs = probe.costs()
    for kind in layers:
        more = saved({kind: 2}) - saved({kind: 1})
        # a layer's input, which checkpointing holds without autograd's hooks, and words and
        # modulation, which all layers share, may be counted once with the layer
        assert costs[kind].activation_bytes == pytest.approx(more, rel=0.1)
        assert costs[kind].input_bytes == 3 * 5 * 6 * 32 * 4
        assert min(costs[kind].forward_seconds, costs[kind].backward_seconds) > 0


# --------------------------------------------------------------------------- groups


def switch_there_and_back(size, shape, gather, split):
    """A group of the first ranks: the exchange of a known tensor, its way back and its gradient."""
    rank = dist.get_rank()
    if rank >= size:
        return None
    group = SequenceGroup(0, size, rank, GroupCommunicator(dist.group.WORLD))
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    mine = whole[(slice(None),) * gather + (group.part(shape[gather]),)].clone().requires_grad_()
    switched = group.switch(mine, gather=gather, split=split, total=shape[gather])
    wanted = whole[(slice(None),) * split + (group.part(shape[split]),)]
    back = group.switch(switched, gather=split, split=gather, total=shape[split])
    (switched * wanted).sum().backward()
    return torch.equal(switched, wanted), torch.equal(back, mine), torch.equal(mine.grad, mine)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("gather", "split"), [(0, 1), (2, 0)])
def test_groups_switch_without_communicators_of_their_own(gloo_pool, size, gather, split):
    for shape in [(5, 7, 3), (2, 1, 6), (0, 3, 2)]:
        found = gloo_pool(4).run(switch_there_and_back, size, shape, gather, split)
        assert all(all(each) for each in found if each is not None)


def runs_there_and_back(size):
    """Two runs of tokens one after the other, exchanged for heads and gathered whole."""
    rank = dist.get_rank()
    if rank >= size:
        return None
    group = SequenceGroup(0, size, rank, GroupCommunicator(dist.group.WORLD))
    runs = [torch.arange(float(n * 3)).view(n, 3) + 100 * n for n in (5, 7)]
    whole = torch.cat(runs)
    mine = torch.cat([run[group.part(len(run))] for run in runs]).requires_grad_()
    by_heads = group.switch(mine, gather=0, split=1, total=(5, 7))
    back = group.switch(by_heads, gather=1, split=0, total=3, parted=(5, 7))
    gathered = group.gather(mine, dim=0, total=(5, 7))
    (gathered * (rank + 1)).sum().backward()
    weights = size * (size + 1) / 2  # every rank's gradient comes home
    return (
        torch.equal(by_heads, whole[:, group.part(3)]),
        torch.equal(back, mine),
        torch.equal(gathered, whole),
        torch.equal(mine.grad, torch.full_like(mine, weights)),
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sequences_side_by_side_are_whole_one_after_the_other(gloo_pool, size):
    found = gloo_pool(4).run(runs_there_and_back, size)
    assert all(all(each) for each in found if each is not None)


def count_groups(values, plans):
    from torch.distributed import distributed_c10d as c10d

    before = len(c10d._world.pg_map)
    for plan in plans:
        gradients(values, plan)
    return len(c10d._world.pg_map) - before


def test_switching_groups_makes_no_process_groups(gloo_pool):
    batch = by_bucket(VIDEO, 2)[:1]
    plans = [[(d, {}, batch), (4 - d, {}, batch)] for d in (1, 2, 3)]
    assert gloo_pool(4).run(count_groups, VIDEO, plans) == [0] * 4


# --------------------------------------------------------------------------- measuring and jobs


def measure_cases(values):
    workload = workload_of(values)
    meter = Meter(workload, dist.group.WORLD, torch.device("cpu"), depth=1)
    return [meter.measure(BUCKETS[i], degree, 2) for i in (0, 2) for degree in (1, 3, 4)]


def test_all_ranks_measure_the_same(gloo_pool):
    first, *others = gloo_pool(4).run(measure_cases, VIDEO)
    assert all(other == first for other in others)
    assert all(m.seconds > 0 and m.peak_bytes > 0 for m in first)
    one, three, four = (m.layers["temporal"].activation_bytes for m in first[3:])
    assert one > three >= four


BEFORE, AFTER = -1, 100  # the forward pass


def fail_on_rank_one(values, kind, exchanges, degree):
    """Two measurements, the first with a failure on rank 1 after so many exchanges of its group."""
    workload = workload_of(values)
    meter = Meter(workload, dist.group.WORLD, torch.device("cpu"), depth=1)
    summed_loss, left = workload.summed_loss, [exchanges]

    def failing(model, batch, group):
        exchange = group.exchange

        def counted(*args):
            if dist.get_rank() == 1 and left[0] == 0:
                raise kind("on purpose")
            left[0] -= 1
            return exchange(*args)

        if dist.get_rank() == 1 and exchanges == BEFORE:
            raise kind("on purpose")
        group.exchange = counted
        loss = summed_loss(model, batch, group)
        if dist.get_rank() == 1 and exchanges == AFTER:
            raise kind("on purpose")
        return loss

    workload.summed_loss = failing
    try:
        first = meter.measure(BUCKETS[2], degree, 2)
    except (ValueError, RuntimeError) as error:
        first = str(error)
    workload.summed_loss = summed_loss
    return first, meter.measure(BUCKETS[2], degree, 2)


@pytest.mark.parametrize(
    ("exchanges", "degree"),  # 0 and 1 exchanges are in the forward pass, 3 in the backward one
    [(BEFORE, 1), (BEFORE, 2), (0, 3), (1, 2), (3, 2), (3, 3), (AFTER, 1), (AFTER, 3)],
)
def test_a_rank_that_fails_in_a_measurement_fails_it_for_all(gloo_pool, exchanges, degree):
    for kind in (torch.OutOfMemoryError, MemoryError, ValueError):
        found = gloo_pool(3).run(fail_on_rank_one, VIDEO, kind, exchanges, degree)
        for rank, (first, second) in enumerate(found):
            if kind is ValueError:
                assert ("on purpose" if rank == 1 else "rank 1 failed when a micro") in first
            else:
                assert first is None
            assert second == found[0][1] is not None


DATA_CENTRIC = "--job=data-centric"


JOB = VIDEO | {
    "num_layers": 1,
    "preset": "inter",
    "max_steps": 3,
    "calculate_imbalance": True,
    "max_batch_size": 1,
    "video_samples": 4,
}


def test_a_job_profiles_once_and_trains(gloo_pool, tmp_path):
    profiled = JOB | {"output_dir": str(tmp_path), "profile_only": True}
    gloo_pool(2).run(only_profile, profiled)
    profile = (tmp_path / "profile.json").read_text()
    assert not (tmp_path / "checkpoint-3").exists()
    gloo_pool(2).run(train, JOB | {"output_dir": str(tmp_path)})
    assert (tmp_path / "profile.json").read_text() == profile
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert sum(group["degree"] for group in row["groups"]) == 2
        assert 0 <= row["predicted_imbalance"] < 1
        assert 0 <= row["measured_imbalance"] < 1
        assert len(row["measured_rank_seconds"]) == 2
    assert (
        sum(epoch["steps"] for epoch in json.loads((tmp_path / "imbalance.json").read_text())) == 3
    )


def test_runs_of_one_shape_share_a_profile(gloo_pool, tmp_path):
    folder = tmp_path / "profiles"
    shared = {"profile_path": f"{folder}/", "profile_only": True}
    jobs = {"first": {}, "second": {"max_steps": 9}, "wider": {"hidden_size": 64}}
    written = []
    for name, change in jobs.items():
        values = JOB | change | shared | {"output_dir": str(tmp_path / name)}
        gloo_pool(2).run(only_profile, values)
        written.append({path.name: path.read_text() for path in folder.glob("*.json")})
    assert len(written[0]) == 1
    assert written[1] == written[0], "nothing is measured again"
    assert len(written[2]) == 2
    assert written[0].items() <= written[2].items()


def only_profile(values):
    from dcp.datacentric import trainer as data_centric

    with launched():
        data_centric.train(values, arguments_of(values), dist.group.WORLD, torch.device("cpu"))


def train(values):
    """Losses, learning rates and final weights of a job in this process."""
    from dcp.datacentric import trainer as data_centric

    with launched():
        found = data_centric.train(
            values, arguments_of(values), dist.group.WORLD, torch.device("cpu")
        )
    dist.barrier()
    lines = [line for line in found.state.log_history if "loss" in line]
    losses, rates = ([line[name] for line in lines] for name in ("loss", "learning_rate"))
    return losses, rates, [p.detach().numpy() for p in found.model.parameters()]


def test_all_ranks_log_one_loss_and_one_learning_rate(gloo_pool, tmp_path, texts):
    values = TEXT | {"data": str(texts), "max_steps": 3, "max_batch_size": 2, "profile_depth": 1}
    (losses, rates, weights), *others = gloo_pool(4).run(
        train, values | {"output_dir": str(tmp_path)}
    )
    for other_losses, other_rates, other_weights in others:
        assert (other_losses, other_rates) == (losses, rates)
        assert all((a == b).all() for a, b in zip(weights, other_weights, strict=True))


def test_stopping_and_resuming_changes_nothing(gloo_pool, tmp_path):
    values = JOB | {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    losses, _, weights = gloo_pool(1).run(train, values)[0]
    resumed = {"resume_from_checkpoint": str(tmp_path / "checkpoint-1")}
    every, _, again = gloo_pool(1).run(train, values | resumed)[0]
    assert every == losses
    assert all((a == b).all() for a, b in zip(weights, again, strict=True))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("match", "values"),
    [
        (r"bucket '\w+ x \d+' does not fit: one sample needs", {"memory_limit_mb": 1}),
        ("--sp-size 2 is more than the 1 ranks", {"dynamic_sp": False, "sp_size": 2}),
        ("profile of another model: hidden_size is 32 there, 64 here", {"hidden_size": 64}),
    ],
)
def test_what_cannot_run_is_named(gloo_pool, tmp_path, match, values):
    job = JOB | {"max_steps": 1, "output_dir": str(tmp_path), "num_layers": 2}
    if "hidden_size" in values:
        gloo_pool(1).run(train, job | {"profile_only": True})
    with pytest.raises(AssertionError, match=f"ValueError: .*{match}"):
        gloo_pool(1).run(train, job | values)


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("--mask belongs to --job planned, this is", [DATA_CENTRIC, "--mask=full"]),
        ("--strategy belongs to --job planned, this is", [DATA_CENTRIC, "--strategy=ring"]),
        ("--packing belongs to --job planned, this is", [DATA_CENTRIC, "--packing=ordered"]),
        ("--planning-pool belongs to --job planned", [DATA_CENTRIC, "--planning-pool=ray"]),
        ("--tokens-per-batch belongs to --job planned", [DATA_CENTRIC, "--tokens-per-batch=99"]),
        ("--data belongs to --job planned and data-cen", ["--job=video", "--data=x"]),
        ("--preset belongs to --job data-centric and video, this is", ["--preset=intra"]),
        ("--profile-depth belongs to --job data-centric and vid", ["--profile-depth=3"]),
        ("--profile-only belongs to --job data-centric and video", ["--profile-only"]),
        ("--video-samples belongs to --job video", [DATA_CENTRIC, "--video-samples=9"]),
        ("--sp-size 2 has no effect where", [DATA_CENTRIC, "--preset=intra", "--sp-size=2"]),
        ("--preset must be one of", [DATA_CENTRIC, "--preset=outer"]),
        ("--preset must be one of", [DATA_CENTRIC, "--preset=bucket"]),
        ("--alloc-memory-fraction must be above 0", ["--job=video", "--alloc-memory-fraction=0"]),
    ],
)
def test_mistakes_get_one_line(capfd, match, arguments):
    assert cli.main(["train", *arguments]) == 2
    shown = capfd.readouterr().err
    assert match in shown
    assert len(shown.splitlines()) == 1


def test_latents_depend_on_the_sample_alone():
    for make in (synthetic_latents, rendered_latents):
        latents, text = make((3, 4, 7), np.random.default_rng([0, 5]))
        assert latents.shape == (CHANNELS, 3, 4, 7)
        assert text.shape == (WORDS, TEXT_SIZE)
        assert latents.std() > 0.05
        assert abs(latents).max() < 4
        again, _ = make((3, 4, 7), np.random.default_rng([0, 5]))
        other, _ = make((3, 4, 7), np.random.default_rng([0, 6]))
        assert (again == latents).all()
        assert (other != latents).any()


def test_rendered_clips_move():
    latents, _ = rendered_latents((6, 8, 8), np.random.default_rng(1))
    assert all((a != b).any() for a, b in itertools.pairwise(latents.transpose(1, 0, 2, 3)))


def test_a_sample_is_the_same_in_any_batch():
    workload = workload_of(VIDEO | {"video_source": "rendered"})
    few = by_bucket(VIDEO, 3)[0]
    together = workload.load(few, epoch=1)
    for place, sample in enumerate(few):
        alone = workload.load([sample], epoch=1)
        for name in ("latents", "noise", "time", "text"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[place])
    later = workload.load(few, epoch=2)
    assert torch.equal(later.latents, together.latents)
    assert not torch.equal(later.noise, together.noise)


def test_the_example_is_a_configuration():
    options, _ = read_options([str(Path(__file__).parents[1] / "examples" / "data_centric.yaml")])
    assert options["job"] == "video"
    with launched():
        video, config, _ = arguments_of(options | {"use_cpu": True})
    assert isinstance(video, VideoArguments)
    assert (config.dynamic_sp, config.dynamic_recompute) == (True, True)


def test_each_job_has_the_options_it_uses_and_help_shows_no_others(capsys):
    ours = {
        name: {field for kind in kinds if kind is not RunArguments
               for field in kind.__dataclass_fields__}
        for name, kinds in JOBS.items()
    }  # fmt: skip
    assert {"strategy", "mask", "data"} <= ours["planned"]
    assert {"preset", "data", "model"} <= ours["data-centric"]
    assert {"preset", "video_source"} <= ours["video"]
    assert not {"preset", "profile_only", "video_source"} & ours["planned"]
    assert not {"strategy", "mask", "tokens_per_batch", "video_source"} & ours["data-centric"]
    assert not {"strategy", "data", "model", "max_seqlen"} & ours["video"]
    every = set().union(*ours.values())
    for job in JOBS:
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "--job", job, "--help"])
        assert ended.value.code == 0
        shown = set(re.findall(r"^  --([a-z_]+)", capsys.readouterr().out, flags=re.MULTILINE))
        assert every & shown == ours[job]


def test_switches_of_the_command_win_over_the_preset(capfd):
    words = ["--preset=inter", "--dynamic-sp=false", "--sp-size=2", "--num-processes=0"]
    assert cli.main(["train", DATA_CENTRIC, *words]) == 2
    assert "--num-processes must be 1" in capfd.readouterr().err  # and nothing before it
