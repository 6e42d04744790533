"""Planning on a Ray cluster: the same requests and answers as :class:`dcp.data.PlanningPool`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from dcp.data.messages import PoolLost, answer_from_bytes
from dcp.data.worker import ATTEMPTS, answer_or_refusal


class RayPool:
    """Each request is a Ray task of one CPU; Ray deals them to its nodes and tries again itself.

    Joins the Ray that this process is connected to, else the cluster that ``ray.init()`` finds;
    where there is none, that starts one on this machine. Ray's nodes need dcp installed.

    Raises ``ValueError`` without the ray package.
    """

    def __init__(self) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError("planning_pool='ray' needs the ray package: pip install ray") from None
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self._task: Any = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(answer_or_refusal)
        self._cancel = ray.cancel
        self._running: dict[Future, Any] = {}

    def submit(self, request: bytes) -> Future[list[bytes]]:
        """See :class:`dcp.data.Pool`."""
        future: Future[list[bytes]] = Future()
        future.set_running_or_notify_cancel()
        reference = self._task.remote(request)
        self._running[future] = reference
        reference.future().add_done_callback(lambda task: self._finish(future, task))
        return future

    def close(self) -> None:
        """Cancel what is not planned yet. Ray itself goes on."""
        for reference in list(self._running.values()):
            self._cancel(reference, force=False)

    def _finish(self, future: Future[list[bytes]], task: Future[bytes]) -> None:
        """Runs in Ray's thread."""
        self._running.pop(future, None)
        try:
            answer = task.result()
        except Exception as error:  # Ray gave up: its workers or nodes died, or it was cancelled
            reason = str(error).strip().splitlines()
            future.set_exception(PoolLost(f"{type(error).__name__}: {(reason or [''])[0]}"))
            return
        try:
            future.set_result(answer_from_bytes(answer))
        except ValueError as error:
            future.set_exception(error)
