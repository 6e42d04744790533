"""``python -m lab serve``: many clients at once against ``dcp serve``, and what came of it.

Clients of the ``openai`` package ask again and again, at random: on both routes, streaming or not,
greedy or seeded; some leave in the middle. Every reply must have the tokens that an engine of one
rank says to that request alone; at the end nobody may be left behind, and the server must end with
status 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dcp.bench.conditions import conditions
from dcp.data.tokenizers import ByteTokenizer
from dcp.inference.engine import InferenceEngine
from dcp.inference.model import open_model

START_SECONDS, END_SECONDS = 120.0, 120.0
DTYPE = "float64"  # sums in another order change no token: see docs/tutorials/serving.md
PAGES, PAGE_SIZE = 96, 16  # fewer than all clients at once need
LEAVING = 0.05  # of all requests: their client leaves in the middle


@dataclass(frozen=True)
class Ask:
    """A request, and the tokens that answer it."""

    chat: bool
    options: dict[str, Any]
    tokens: list[int] = field(default_factory=list)


@dataclass
class Tally:
    """What clients have seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    num_tokens: int = 0
    first_token_seconds: list[float] = field(default_factory=list)
    request_seconds: list[float] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=120.0, help="default: %(default)s")
    parser.add_argument("--num-processes", type=int, default=2, help="ranks of the server")
    parser.add_argument("--kinds", type=int, default=60, help="different requests")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests and clients")
    parser.add_argument("--out", type=Path, help="folder for serve.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Serve, ask, compare, print, write; 1 where anything is lost or wrong."""
    if min(args.clients, args.num_processes, args.kinds) < 1 or args.seconds <= 0:
        raise ValueError("--clients, --num-processes, --kinds and --seconds must be above 0")
    asks = make_asks(args.kinds, seed=args.seed)
    words = ["--num-processes", str(args.num_processes), "--max-queue", str(args.clients)]
    with serving([*words, "--num-pages", str(PAGES)]) as (server, url):
        tally = asyncio.run(
            storm(url, asks, clients=args.clients, seconds=args.seconds, seed=args.seed)
        )
        figures = idle_figures(url)
        server.send_signal(signal.SIGTERM)
        status = server.wait(END_SECONDS)
    result = {
        "conditions": conditions(),
        "clients": args.clients,
        "seconds": args.seconds,
        "num_processes": args.num_processes,
        "outcomes": dict(tally.outcomes),
        "wrong": tally.wrong[:10],
        "num_wrong": len(tally.wrong),
        "reply_tokens": tally.num_tokens,
        "median_first_token_seconds": median(tally.first_token_seconds or [0.0]),
        "median_request_seconds": median(tally.request_seconds or [0.0]),
        "shared_tokens": figures["dcp_shared_tokens"],
        "left_behind": figures["dcp_running"] + figures["dcp_queue"],
        "exit_status": status,
    }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "serve.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return int(bool(tally.wrong) or status != 0 or result["left_behind"] != 0)


@contextmanager
def serving(words: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of the tiny model on a free port, once it listens: its process and its address."""
    command = [sys.executable, "-m", "dcp.cli", "serve", "--port", "0", "--dtype", DTYPE]
    command += ["--page-size", str(PAGE_SIZE), *words]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stdout is not None
    assert server.stderr is not None
    try:
        line = server.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise ValueError(f"dcp serve did not begin: {line}{server.stderr.read()[-1000:]}")
        yield server, found[0]
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        server.stderr.close()


def make_asks(count: int, *, seed: int) -> list[Ask]:
    """Requests of many lengths and kinds, each answered by an engine that does nothing else."""
    of = random.Random(seed)
    torch.set_num_threads(1)
    model = open_model(None, dtype=DTYPE)
    return [answered(_ask(of), model) for _ in range(count)]


def _ask(of: random.Random) -> Ask:
    text = "".join(of.choices("abcdefgh ,.é\n", k=of.choice([1, 8, 40, 150, 300])))
    options: dict[str, Any] = {"model": "bytes", "max_tokens": of.choice([1, 4, 16, 40])}
    if of.random() < 0.5:
        options |= {"temperature": 0}
    else:
        options |= {"temperature": 1.2, "top_p": 0.9, "seed": of.randrange(1000)}
    if of.random() < 0.5:
        return Ask(False, options | {"prompt": text})
    return Ask(True, options | {"messages": [{"role": "user", "content": text}]})


def answered(ask: Ask, model: Any) -> Ask:
    """The same with the tokens that an engine of one rank, made for it, says."""
    tokenizer, options = ByteTokenizer(), ask.options
    engine = InferenceEngine(model, num_ranks=1, num_pages=8)
    if ask.chat:
        chat = tokenizer.for_transformers().apply_chat_template(
            options["messages"], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        prompt = chat["input_ids"]
    else:
        prompt = tokenizer.encode(options["prompt"].encode()).tolist()[:-1]
    known = ("temperature", "top_p", "seed")
    sampling = {name: options[name] for name in known if name in options}
    tokens = engine.generate(
        {0: prompt}, max_new_tokens=options["max_tokens"], end=tokenizer.end, **sampling
    )[0]
    return Ask(ask.chat, options, tokens)


async def storm(
    url: str, asks: Sequence[Ask], *, clients: int, seconds: float, seed: int = 0
) -> Tally:
    """So many clients at once, each asking one thing after another until the time is over."""
    from openai import AsyncOpenAI

    tally, end = Tally(), time.monotonic() + seconds

    async def be_client(number: int) -> None:
        of = random.Random(f"{seed} {number}")
        while time.monotonic() < end:
            ask, began = of.choice(asks), time.monotonic()
            try:
                outcome = await _once(client, ask, of, tally)
            except Exception as error:  # of any kind: it is what is counted
                outcome = "error"
                tally.wrong.append(f"{type(error).__name__}: {error}")
            tally.outcomes[outcome] += 1
            tally.request_seconds.append(time.monotonic() - began)

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
        await asyncio.gather(*map(be_client, range(clients)))
    return tally


async def _once(client: Any, ask: Ask, of: random.Random, tally: Tally) -> str:
    """One request: how it ended."""
    create = client.chat.completions.create if ask.chat else client.completions.create
    more = {"extra_body": {"return_token_ids": True}}
    tokens: list[int] = []
    if of.random() < 0.5:
        reply = await create(**ask.options, **more)
        tokens, kind = reply.choices[0].token_ids, "whole"
    else:
        leaves, began, kind = of.random() < 2 * LEAVING, time.monotonic(), "streamed"
        async with await create(**ask.options, **more, stream=True) as stream:
            async for chunk in stream:
                if not tokens:
                    tally.first_token_seconds.append(time.monotonic() - began)
                tokens += chunk.choices[0].token_ids
                if leaves:
                    return "left"
    tally.num_tokens += len(tokens)
    if tokens != ask.tokens:
        tally.wrong.append(f"{ask.options}: {tokens} instead of {ask.tokens}")
    return kind


def idle_figures(url: str) -> dict[str, float]:
    """Figures of ``/metrics``, once nobody is served any more."""
    end = time.monotonic() + END_SECONDS
    while True:
        found = figures(url)
        if found["dcp_running"] + found["dcp_queue"] == 0 or time.monotonic() > end:
            return found
        time.sleep(0.1)


def figures(url: str) -> dict[str, float]:
    """Figures of ``/metrics`` by name and labels."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as page:
        lines = page.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}
