"""DCPTrainer beside plain Trainer: the same steps, the same losses, and figures of both."""

import numpy as np
import pytest
import torch

from lab.trainer import CASES, as_text, compare, make_case
from lab.trainer_rank import OURS, PLAIN, share_out, train

STEPS = [[50, 30, 7, 1], [80, 8], [20, 30, 38]]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_every_system_trains_the_same_steps_to_the_same_losses(tmp_path):
    """Equal losses say, too, that documents of a packed row do not see each other."""
    job = {"steps": STEPS, "output": str(tmp_path), "cluster": None}
    runs = {system: [[train(job | {"system": system})]] for system in (OURS, *PLAIN)}
    for [[rank]] in runs.values():
        np.testing.assert_allclose(rank["losses"], runs[OURS][0][0]["losses"], rtol=1e-5)
        assert len(rank["seconds"]) == len(rank["rows"]) == len(STEPS)
        assert rank["memory_peak_bytes"] >= rank["memory_before_bytes"] > 0
    text = as_text("here", {"rounds": 1, "cases": {"short": compare(STEPS, runs)}})
    assert f"of {next(iter(PLAIN))}: target 0.95" in text


@pytest.mark.parametrize("case", CASES)
def test_steps_of_a_case_have_the_same_tokens_and_a_row_for_each_rank(case):
    steps = make_case(case, 3, tokens=4096)
    assert len({sum(step) for step in steps}) == 1
    for lengths in steps:
        rows = share_out(range(len(lengths)), lengths, 2)
        assert sorted(rows[0] + rows[1]) == list(range(len(lengths)))
        assert all(rows)


def test_documents_are_shared_out_evenly_and_whole():
    assert share_out([0, 1, 2, 3], [5, 4, 3, 2], 2) == [[0, 3], [1, 2]]
    assert share_out([3, 1], [5, 4, 3, 2], 2) == [[1], [3]]
