"""A planning worker: ``python -m dcp.data.worker`` answers requests on stdin, on stdout.

It imports the planner and neither torch nor the training script.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

from dcp.data import messages

ATTEMPTS = 3  # workers in a row that may die on one batch


def answer(request: bytes) -> list[bytes]:
    """Plan the batch of one request message: every rank's plan as bytes."""
    from dcp.planner import plan

    batch, spec, cluster, options = messages.request_from_bytes(request)
    made = plan(batch, spec, cluster, **options)
    return [made.rank_plan(rank).to_bytes() for rank in range(made.num_ranks)]


def answer_or_refusal(request: bytes) -> bytes:
    """The answer message; the planner's errors travel as text."""
    try:
        return messages.answer_to_bytes(answer(request))
    except ValueError as error:
        return messages.refusal_to_bytes(str(error))
    except Exception:
        return messages.refusal_to_bytes(f"the planner failed:\n{traceback.format_exc()}")


def main() -> None:
    """Serve until stdin ends, which it also does when the training process dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    while (request := messages.read_message(sys.stdin.buffer)) is not None:
        try:
            messages.write_message(answers, answer_or_refusal(request))
        except BrokenPipeError:  # the training process has ended
            os._exit(0)  # whatever is still to be written, nobody reads


if __name__ == "__main__":
    main()
