"""One rank of ``dcp serve``; the first one listens."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import uvicorn

from dcp.data.tokenizers import open_tokenizer
from dcp.errors import DCPError
from dcp.inference.batching import Batcher
from dcp.inference.rank import open_engine
from dcp.inference.server.inbox import Inbox
from dcp.inference.server.metrics import Metrics
from dcp.inference.server.prompts import Prompts
from dcp.inference.server.routes import make_app
from dcp.inference.server.steps import take_steps
from dcp.launch.group import choose_device, joined_group

WATCH_SECONDS = 0.1
CLOSE_SECONDS = 10  # for the last answers to be read


def serve(job: dict[str, Any]) -> None:
    """Serve in the group that the environment describes, until told to end."""
    torch.set_num_threads(1)
    device = choose_device(job["device"])
    with joined_group(device) as group:
        if dist.get_rank(group) == 0:
            with _bound(job["host"], job["port"]) as listener:
                _lead(job, listener, device, group)
        else:
            take_steps(_batcher(job, device, group), None, group=group, device=device)


def _lead(
    job: dict[str, Any], listener: socket.socket, device: torch.device, group: dist.ProcessGroup
) -> None:
    """The first rank: takes steps in this thread, while others listen and watch."""
    batcher, metrics = _batcher(job, device, group), Metrics()
    inbox = Inbox(batcher, max_queue=job["max_queue"], metrics=metrics)
    config = batcher.engine.model.config.get_text_config()
    prompts = Prompts(
        open_tokenizer(job["model"] or "bytes"),
        begin=config.bos_token_id,
        ends=end_tokens(batcher.engine.model),
        max_length=_max_length(job["max_length"], batcher),
    )
    if job["drain"]:
        threading.Thread(target=_watch, args=(Path(job["drain"]), inbox), daemon=True).start()
    app = make_app(inbox, prompts, metrics, name=job["name"])
    with _listening(app, listener):
        host, port = listener.getsockname()[:2]
        print(f"serving {job['name']} on http://{host}:{port}/v1", flush=True)
        try:
            take_steps(batcher, inbox, group=group, device=device)
        except BaseException as error:
            inbox.fail(f"the server ends: {' '.join(str(error).split())}")
            raise


def _batcher(job: dict[str, Any], device: torch.device, group: dist.ProcessGroup | None) -> Batcher:
    return Batcher(
        open_engine(job, device, group),
        token_budget=job["token_budget"],
        most_running=job["max_running"],
        most_kept=job["max_kept"],
        decode=open_tokenizer(job["model"] or "bytes").decode,
    )


def end_tokens(model: Any) -> tuple[int, ...]:
    """Tokens that end a reply: of the model's generation configuration, else of its own."""
    for config in (model.generation_config, model.config.get_text_config()):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return tuple(ends) if isinstance(ends, list) else (ends,)
    return ()


def _max_length(wanted: int | None, batcher: Batcher) -> int:
    """Tokens of prompt and reply that are served."""
    known = batcher.engine.model.config.get_text_config().max_position_embeddings
    most = min(batcher.room.most_tokens, known)
    if wanted is not None and wanted > most:
        why = "the model knows" if most == known else "the cache holds of one conversation"
        raise ValueError(f"--max-length {wanted} is more than the {most} tokens that {why}")
    return wanted or most


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket of this address, taken before a model is loaded in vain."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"cannot listen on --host {host} --port {port}: {error}") from None
    with listener:
        yield listener


@contextmanager
def _listening(app: Any, listener: socket.socket) -> Iterator[None]:
    """The application is served by a thread; at the end, once its answers have been sent."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=CLOSE_SECONDS
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    if not server.started:
        raise DCPError(
            "the HTTP server could not start, its log says why: give another --port or --host"
        )
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(CLOSE_SECONDS + 1)


def _watch(file: Path, inbox: Inbox) -> None:
    """Drain once there is this file."""
    while not file.exists():
        time.sleep(WATCH_SECONDS)
    inbox.drain()
