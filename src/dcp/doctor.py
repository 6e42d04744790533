"""``dcp doctor``: does everything that a run needs work here? One line a check."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import wrap
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.rates import measure_line
from dcp.cluster import Cluster
from dcp.launch.group import joined_group
from dcp.launch.ranks import run_ranks
from dcp.placement import StrategyError, strategy_names
from dcp.planner import plan
from dcp.plans import Plan
from dcp.report.trace import write_trace
from dcp.runtime import AttentionExecutor, LocalWorld
from dcp.runtime.kernels import KERNELS, get_kernel
from dcp.runtime.kernels.trial import trial, trial_errors
from dcp.runtime.reference import dense_attention
from dcp.runtime.session import Call
from dcp.simulate import Span

SEQLENS = (70, 33, 9, 1, 0)
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")
CLUSTER = Cluster(num_nodes=2, devices_per_node=2)
MOST_ERROR = 1e-4
AUTO_DTYPES, AUTO_HEAD_DIMS = ("bfloat16", "float32"), (64, 128)
AUTO_SIDE = 256  # of the causal blocks that a kernel's rate is shown of
WIDTH, INDENT = 80, 35  # columns of a line, and those before what was found
Found = str | tuple[str, dict[str, Any]]  # what a check says, and figures of it for programs
Check = tuple[str, Callable[[], Found]]


class Absent(Exception):
    """Something optional is not here; the message says what would bring it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-processes", type=int, default=2, help="ranks of the group check")
    parser.add_argument(
        "--trace", type=Path, metavar="JSON", help="write that run's instructions, for Perfetto"
    )
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE", help="say which kernel its table takes, too"
    )
    parser.add_argument(
        "--megatron", action="store_true", help="check Megatron-Core with planned attention instead"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a check")


def run(args: argparse.Namespace) -> int:
    """Make every check, a line each; 1 where one failed."""
    cluster = Cluster.load(args.cluster) if args.cluster else None
    made = checks(args.num_processes, args.trace, cluster)
    if args.megatron:
        from dcp.integrations import megatron_doctor

        made = megatron_doctor.checks(args.num_processes)
    return report(made, as_json=args.json)


def report(made: Iterable[Check], *, as_json: bool = False) -> int:
    """Make checks and print what each found; the exit status, 1 where one failed."""
    failed = 0
    for name, check in made:
        started, figures = perf_counter(), dict[str, Any]()
        try:
            found = check()
            state, (detail, figures) = "ok", (found, {}) if isinstance(found, str) else found
        except Absent as reason:
            state, detail = "absent", str(reason)
        except Exception as error:  # whatever is broken, the other checks are made
            state, detail = "FAILED", " ".join(f"{type(error).__name__}: {error}".split())[:300]
        failed += state == "FAILED"
        seconds = perf_counter() - started
        if as_json:
            line = {"check": name, "state": state, "detail": detail, "seconds": seconds}
            print(json.dumps(line | figures), flush=True)
        else:
            print(f"{state:7} {name:26} {_indented(detail)}", flush=True)
    return 1 if failed else 0


def _indented(detail: str) -> str:
    """Several lines as a column of their own, within :data:`WIDTH`; one line as it is."""
    if "\n" not in detail:
        return detail
    lines = [
        part
        for line in detail.splitlines()
        for part in wrap(line, WIDTH - INDENT, subsequent_indent="  ")
    ]
    return ("\n" + " " * INDENT).join(lines)


def checks(
    num_processes: int, trace: Path | None, cluster: Cluster | None = None
) -> Iterator[Check]:
    """All checks, those first that the others rest on."""
    yield "python, torch", _versions
    yield "device", _device
    yield "partitioner", _partitioner
    yield "plan on the wire", _wire
    for kernel in KERNELS:
        yield f"kernel {kernel}", partial(_kernel, kernel)
    for dtype in AUTO_DTYPES:
        for head_dim in AUTO_HEAD_DIMS:
            name = f"auto, {dtype}, {head_dim}"
            yield name, partial(auto_kernel, dtype, head_dim, cluster)
    for name in ("auto", *strategy_names()):
        yield f"strategy {name}", partial(_strategy, name)
    yield f"process group of {num_processes}", partial(_group, num_processes, trace)
    for package, purpose in (
        ("transformers", "training Llama models"),
        ("matplotlib", "figures"),
        ("datasets", "Hugging Face data"),
    ):
        yield package, partial(_package, package, purpose)


def _versions() -> str:
    return f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"


def _device() -> str:
    if not torch.cuda.is_available():
        return f"CPU only, {torch.get_num_threads()} threads"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"


def _partitioner() -> str:
    made = plan(SequenceBatch([4000, 900, 70]), SPEC, CLUSTER, strategy="hypergraph", model_width=0)
    balance = made.stats.compute_balance
    if balance > 1.2:
        raise AssertionError(f"compute balance {balance:.3f} of an easy batch")
    return f"Mt-KaHyPar {version('mtkahypar')}, balance {balance:.3f}"


def _wire() -> str:
    made = plan(SequenceBatch(SEQLENS), SPEC, CLUSTER)
    with tempfile.TemporaryDirectory(prefix="dcp-doctor-") as folder:
        path = Path(folder) / "x.plan"
        made.save(path)
        again, size = Plan.load(path), path.stat().st_size
    if again.rank_plan(1).to_bytes() != made.rank_plan(1).to_bytes():
        raise AssertionError("a plan read back is another plan")
    return f"{size / 1e3:.1f} kB, read back"


def _kernel(name: str) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = plan(SequenceBatch(SEQLENS), SPEC, CLUSTER, strategy="zigzag")
    try:
        error = _worst_error(made, kernel=name, device=device)
    except ValueError as reason:  # the kernel says what it cannot serve
        raise Absent(str(reason)) from None
    return f"{device}, error {error:.1e}"


def auto_kernel(dtype: str, head_dim: int, cluster: Cluster | None = None) -> Found:
    """Which kernel "auto" takes on this device for training, and why: a line for each kernel."""
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options, to = Call().options(spec, needs_grad=True), getattr(torch, dtype)
    taken = get_kernel("auto", device, to, options).name
    figures: dict[str, dict[str, Any]] = {}
    lines = [f"{taken} on {device.type}, to train"]
    for name in KERNELS:
        found: dict[str, Any] = {}
        try:
            kernel = get_kernel(name, device, to, options)
            errors = trial_errors(kernel, device, to, options)
            found["error"], found["dense_error"] = map(max, zip(*errors.values(), strict=True))
            found["wrong"] = trial(kernel, device, to, options)
            line = measure_line(kernel, spec, device, "causal", sides=[AUTO_SIDE])
            found["forward_flops"], found["backward_flops"] = line.forward[0], line.backward[0]
            rates = " / ".join(f"{rate / 1e9:.0f}" for rate in (*line.forward, *line.backward))
            by_name = ", by name only" * (device.type in kernel.by_name_on)
            said = found["wrong"] or f"error {found['error']:.1e}, {rates} GFLOP/s{by_name}"
        except ValueError as error:  # it says what it cannot serve
            said = found["refused"] = str(error).partition(f"{name}: ")[2].rstrip(")")
        except Exception as error:  # a device may refuse what runs elsewhere
            said = found["wrong"] = f"it fails: {type(error).__name__}: {error}"
        figures[name] = found
        lines.append(f"{name}: {said}")
    if cluster is not None:
        figures["table"] = {"kernel": (chosen := cluster.kernel_for(spec))}
        lines.append(f"the cluster file takes {chosen}")
    return "\n".join(lines), {"kernel": taken, "kernels": figures}


def _strategy(name: str) -> str:
    try:
        made = plan(SequenceBatch(SEQLENS), SPEC, CLUSTER, strategy=name)
    except StrategyError as reason:
        raise Absent(str(reason)) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    error = _worst_error(made, kernel="auto", device=device)
    return f"4 ranks in one process, forward and backward, error {error:.1e}"


def _worst_error(made: Plan, *, kernel: str, device: str) -> float:
    """Largest difference of outputs and gradients from dense attention, causal."""
    (*inputs, grad), wanted = _case(device)
    out = LocalWorld(made, kernel=kernel).attention(*inputs)
    assert isinstance(out, torch.Tensor)
    return _difference((out, *torch.autograd.grad(out, inputs, grad)), wanted)


def _case(device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """q, k, v and the output's gradient; the output of dense attention and their gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(sum(SEQLENS), heads, SPEC.head_dim, generator=generator).to(device)
        for heads in (SPEC.num_heads, SPEC.num_kv_heads, SPEC.num_kv_heads, SPEC.num_heads)
    )
    inputs = [q, k, v] = [tensor.requires_grad_() for tensor in (q, k, v)]
    rows = torch.arange(len(SEQLENS)).repeat_interleave(torch.tensor(SEQLENS))
    seen = (rows[:, None] == rows[None, :]).tril().to(device)  # causal inside each document
    out, _ = dense_attention(q, k, v, seen)
    return [*inputs, grad], [out, *torch.autograd.grad(out, inputs, grad)]


def _difference(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest of any element, raised where it is too large."""
    pairs = [(a - b).detach() for a, b in zip(found, wanted, strict=True) if a.numel()]
    error = max((float(each.abs().max()) for each in pairs), default=0.0)
    if not error < MOST_ERROR:
        raise AssertionError(f"differs from dense attention by {error:.1e}")
    return error


def _group(num_processes: int, trace: Path | None) -> str:
    with tempfile.TemporaryDirectory(prefix="dcp-doctor-") as folder:
        path, cluster = Path(folder) / "case.plan", Cluster(devices_per_node=max(num_processes, 1))
        plan(SequenceBatch(SEQLENS), SPEC, cluster, strategy="zigzag").save(path)
        job = {"plan": str(path)}
        found = run_ranks("dcp.doctor:run_plan", job, num_processes=num_processes)
    worst = max(each["error"] for each in found)
    spans = [Span(**span) for each in found for span in each["spans"]]
    if trace is not None:
        begin = min((span.start for span in spans), default=0.0)
        moved = [Span(s.rank, s.track, s.name, s.start - begin, s.end - begin) for s in spans]
        write_trace(moved, trace)
    return f"gloo, error {worst:.1e}, {len(spans)} instructions run"


def run_plan(job: dict[str, Any]) -> dict[str, Any]:
    """One rank of the group's check: runs the plan twice, the second time recorded.

    Returns its spans, and how far its share of the result lies from dense attention.
    """
    torch.set_num_threads(1)
    with joined_group(torch.device("cpu")):
        made, executor = Plan.load(job["plan"]), AttentionExecutor()
        executor.prepare(made)
        _error_on_rank(made, executor)
        executor.spans = []
        error = _error_on_rank(made, executor)
        return {"error": error, "spans": [asdict(span) for span in executor.spans]}


def _error_on_rank(made: Plan, executor: AttentionExecutor) -> float:
    def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        return [made.shard(executor.rank, each.detach()) for each in (q, torch.stack((k, v), 1))]

    (*inputs, grad), (dense, *gradients) = _case("cpu")
    q, kv = (tensor.requires_grad_() for tensor in local(*inputs))
    share, grad = (made.shard(executor.rank, each.detach()) for each in (dense, grad))
    dist.barrier()
    out = executor.attention(q, kv)
    found = (out, *torch.autograd.grad(out, (q, kv), grad))
    return _difference(found, [share, *local(*gradients)])


def _package(package: str, purpose: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise Absent(f"needed for {purpose} only: pip install {package}") from None
