"""Draw docs/images/data_centric.png: an iteration of each preset on 8 simulated H100."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dcp.cluster import Cluster
from dcp.datacentric.buckets import RESOLUTIONS, draw_buckets, video_buckets
from dcp.datacentric.iteration import Iteration, imbalance
from dcp.datacentric.schedule import epoch_iterations
from lab.data_centric import MEMORY_BYTES, chooser_for
from lab.video_cost import VideoCost

NUM_RANKS, SAMPLES, LOOK = 8, 3000, 20  # of the first LOOK iterations, one of most groups is shown
COLORS = dict(
    zip(RESOLUTIONS, ("#bee3f8", "#63b3ed", "#48bb78", "#ed8936", "#c53030"), strict=True)
)
PANELS = {
    "bucket": "bucket parallel: one degree",
    "intra": "intra: degree and batch size retuned",
    "inter": "inter: accumulation fills the time",
    "inter+PAC": "inter+PAC: short videos keep activations",
}


def draw_iteration(axes: Axes, iteration: Iteration, title: str) -> None:
    """Ranks downwards, time to the right, a box for each micro-batch of a group."""
    rank, longest = 0, float(iteration.rank_seconds().max())
    for group in iteration.groups:
        at = 0.0
        for batch in group.micro_batches:
            resolution, frames = batch.bucket.split(" x ")
            box = Rectangle(
                (at, rank + 0.06),
                batch.seconds,
                group.degree - 0.12,
                facecolor=COLORS[resolution],
                edgecolor="white",
                lw=0.5,
            )
            axes.add_patch(box)
            if batch.seconds > 0.12 * longest:
                label = f"{batch.batch_size} of {resolution}, {frames} frames"
                if any(kept for _, kept in batch.keep):
                    label += "\nkeeps " + "+".join(str(kept) for _, kept in batch.keep)
                middle = (at + batch.seconds / 2, rank + group.degree / 2)
                axes.annotate(label, middle, ha="center", va="center", fontsize=5, clip_on=True)
            at += batch.seconds
        rank += group.degree
    share = imbalance(iteration.rank_seconds())
    axes.set(xlim=(0, longest), ylim=(NUM_RANKS, 0), ylabel="GPU", xlabel="predicted seconds")
    axes.set_title(f"{title}\n{share:.1%} of the time spent waiting", fontsize=9)
    axes.tick_params(labelsize=7)


def draw(docs: Path) -> None:
    cost = VideoCost(Cluster.preset("h100", devices_per_node=NUM_RANKS))
    buckets = video_buckets()
    profile = cost.profile(buckets, memory_bytes=MEMORY_BYTES, max_batch=512)
    sizes = {bucket.name: bucket.size for bucket in buckets}
    names = [bucket.name for bucket in draw_buckets(buckets, SAMPLES, "balanced")]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, (preset, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        chooser = chooser_for(preset, profile, sizes, degree=4, steps=2)
        iterations = epoch_iterations(chooser, names, NUM_RANKS, seed=0, epoch=0)
        shown = max(islice(iterations, LOOK), key=lambda iteration: len(iteration.groups))
        draw_iteration(axes, shown, title)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, COLORS, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(docs / "images" / "data_centric.png", dpi=130)
