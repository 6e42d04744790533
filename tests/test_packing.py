"""What surrounds the kernels: which rows travel without a copy, where partial results go."""

import numpy as np
import pytest
import torch

from dcp import AttentionSpec, Cluster, SequenceBatch, plan
from dcp.program import Launch, Reduce
from dcp.runtime.kernels import merge
from dcp.runtime.packing import Part, in_place, packed, unpacked
from dcp.runtime.prepared import Exchange, Fold, PreparedPlan
from dcp.runtime.rows import MANY_RUNS, place_rows
from dcp.tables import Move
from dcp.transfers import OUT

CPU = torch.device("cpu")
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")


def rows_of(*runs):
    first, rows = np.array(runs).T
    [placed] = place_rows([(first, rows)], CPU)
    return placed


def numbers(rows):
    keys = [
        k.tolist() if isinstance(k, torch.Tensor) else range(k.start, k.stop) for k in rows.keys
    ]
    return [row for key in keys for row in key]


def test_neighbours_are_one_run_and_many_runs_are_row_numbers():
    assert rows_of((3, 2), (5, 4)).run == slice(3, 9)
    assert rows_of((3, 2), (6, 4)).run is None
    many = rows_of(*((10 * i, 3) for i in range(MANY_RUNS + 1)))
    assert isinstance(many.where, torch.Tensor)
    assert numbers(many) == [10 * i + j for i in range(MANY_RUNS + 1) for j in range(3)]


@pytest.mark.parametrize("runs", [[(2, 3)], [(2, 3), (7, 1)], [(2 * i, 1) for i in range(6)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_messages_hold_their_rows_field_by_field(runs, dtype):
    """In the dtype in which each travels, whether rows are copied, gathered or sent as they lie."""
    wide, narrow = torch.randn(12, 4), torch.randn(12, 4, 8).bfloat16()
    rows = rows_of(*runs)
    parts = [Part(OUT, 1, wide, dtype, rows), Part(OUT, 0, narrow, torch.bfloat16, rows)]
    message = packed(parts)
    assert message.dtype == torch.uint8
    assert message.numel() == sum(part.num_bytes for part in parts)
    for part, values in unpacked(message, parts):
        assert values.dtype == part.dtype
        torch.testing.assert_close(values, part.tensor[numbers(rows)].to(part.dtype))


def test_one_run_of_one_field_is_sent_from_where_it_lies():
    tensor = torch.randn(12, 4)
    one, two = rows_of((2, 3)), rows_of((2, 3), (7, 1))
    lying = in_place([Part(0, 0, tensor, torch.float32, one)])
    assert lying.data_ptr() == tensor[2:].data_ptr()
    assert lying.view(torch.float32).equal(tensor[2:5].flatten())
    assert in_place([Part(0, 0, tensor, torch.float32, two)]) is None
    assert in_place([Part(0, 0, tensor, torch.bfloat16, one)]) is None
    assert in_place([Part(0, i, tensor, torch.float32, one) for i in range(2)]) is None


@pytest.mark.parametrize("strategy", ["hypergraph", "bisection", "zigzag"])
@pytest.mark.parametrize("backward", [False, True])
def test_folds_take_from_messages_what_the_plan_reduces(strategy, backward):
    """Row by row, against the plan's tables; and the rows to land in are never put."""
    batch, cluster = SequenceBatch([700, 300, 41, 1]), Cluster(num_nodes=2, devices_per_node=3)
    made = plan(batch, SPEC, cluster, strategy=strategy, block_size=32)
    saved = 0
    for rank in range(cluster.num_ranks):
        rank_plan = made.rank_plan(rank)
        prepared = PreparedPlan(rank_plan)
        program = rank_plan.mask_program(None)
        plain = program.instructions(backward=backward)
        placed = prepared.instructions(None, CPU, backward=backward)
        arrived = {}  # by peer and buffer: the plan's landing rows, in the message's order
        for instruction, ready in zip(plain, placed, strict=True):
            if isinstance(instruction, Launch):
                assert isinstance(ready, Exchange)
                for move in instruction.receives[instruction.receives[:, Move.BUFFER] >= OUT]:
                    peer, buffer, row, rows = move[:4].tolist()
                    arrived.setdefault((peer, buffer), []).extend(range(row, row + rows))
            if isinstance(instruction, Reduce):
                assert isinstance(ready, Fold)
                found = set()
                for peer, buffer, rows in ready.targets:
                    targets = numbers(rows)
                    assert len(set(targets)) == len(targets)
                    assert max(targets) < prepared.num_rows(None)[buffer]
                    landed = arrived.pop((peer, buffer))
                    found |= {(buffer, a, b) for a, b in zip(landed, targets, strict=True)}
                want = {
                    (buffer, source + i, target + i)
                    for buffer, source, target, rows in instruction.rows[:, :4].tolist()
                    for i in range(rows)
                }
                assert found == want
        assert not arrived
        saved += program.buffer_rows.sum() - sum(prepared.num_rows(None))
    assert saved > 0


def merged_by_triton(*parts):
    from dcp.runtime.kernels.triton import KERNEL

    KERNEL.merge(*parts)
    return parts[:2]


@pytest.mark.parametrize("width", [16, 24])
def test_tritons_merge_equals_torchs(interpreter, width):
    """Rows that see nothing on one side or on both, and not-a-number, included."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    lse, more_lse = (3 * torch.randn(37, 3, generator=generator) for _ in range(2))
    out, more_out = (torch.randn(37, 3, width, generator=generator) for _ in range(2))
    for row in (0, 1):
        lse[row], out[row] = -torch.inf, 0
    for row in (1, 2):
        more_lse[row], more_out[row] = -torch.inf, 0
    lse[3, 0], more_out[4, 1, 2] = torch.nan, torch.nan
    found = interpreter(merged_by_triton, out, lse, more_out.bfloat16(), more_lse)
    merge(out, lse, more_out.bfloat16(), more_lse)
    for ours, theirs in zip(found, (out, lse), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
