"""First fit of rows: as the plain rule has it, and fast where many rows arrive at once."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcp.buffers import first_fit

INTERVALS = st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3))


def columns(intervals):
    """(segment, birth, death, size), sorted by segment, birth and falling size."""
    table = np.array(intervals, dtype=np.int64).reshape(-1, 4)
    table[:, 2] += table[:, 1]
    return table[np.lexsort((-table[:, 3], table[:, 1], table[:, 0]))].T


@given(st.lists(INTERVALS, max_size=30))
def test_every_interval_takes_the_lowest_row_that_is_free(intervals):
    segment, birth, death, size = columns(intervals)
    rows = first_fit(segment, birth, death, size)
    for i in range(len(rows)):
        taken = {
            row
            for j in range(i)
            if segment[j] == segment[i] and death[j] >= birth[i]
            for row in range(rows[j], rows[j] + size[j])
        }
        fits = (r for r in range(200) if taken.isdisjoint(range(r, r + size[i])))
        assert rows[i] == next(fits)


def test_many_arrivals_of_a_step_take_no_square_of_time():
    count = 60_000
    segment, birth, death, size = columns([(0, n // (count // 4), 0, 2) for n in range(count)])
    first_fit(segment[:2], birth[:2], death[:2], size[:2])  # compiles
    began = time.process_time()
    rows = first_fit(segment, birth, death, size)
    assert time.process_time() - began < 0.2
    assert rows.max() == 2 * (count // 4 - 1)
