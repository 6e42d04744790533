"""The examples of loops of one's own: their losses are those of one process and eager attention."""

import json
from functools import cache
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(pool, name):
    """The losses that an example prints on the first rank."""
    from tests.trainer_work import run_example

    printed = pool.run(run_example, str(EXAMPLES / name), [])[0]
    return json.loads(printed.splitlines()[-1])["losses"]


@cache
def alone(steps, batches_per_step):
    """Losses of one process that attends document by document, by the examples' settings."""
    import torch

    from dcp.data import DCPDataLoader
    from examples.tiny import SPEC, TOKENS, make_byte_model, sources

    model = make_byte_model(attn_implementation="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with DCPDataLoader(
        sources(), spec=SPEC, tokens_per_batch=TOKENS, over_long="split", num_workers=0
    ) as loader:
        batches = (batch for batch, _ in loader)
        for _ in range(steps):
            taken = list(islice(batches, batches_per_step))
            labels = sum(batch.num_loss_tokens for batch in taken)
            total = 0.0
            for batch in taken:
                for sequence in batch.sequence_ids.unique():
                    own = (batch.sequence_ids == sequence).nonzero()[:, 0]
                    own = own[batch.positions[own].argsort()]
                    logits = model(input_ids=batch.tokens[own][None]).logits[0]
                    loss = torch.nn.functional.cross_entropy(
                        logits, batch.labels[own], reduction="sum"
                    )
                    (loss / labels).backward()
                    total += loss.item() / labels
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses


def test_two_pipeline_stages_of_two_attention_ranks(gloo_pool):
    assert run(gloo_pool(4), "pipelining.py") == pytest.approx(alone(2, 3), rel=1e-5)


def test_accelerate(gloo_pool):
    assert run(gloo_pool(2), "accelerate_loop.py") == pytest.approx(alone(4, 1), rel=1e-5)


def test_lightning(gloo_pool):
    pytest.importorskip("lightning_fabric")
    assert run(gloo_pool(2), "lightning_loop.py") == pytest.approx(alone(4, 1), rel=1e-5)
