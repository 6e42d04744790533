"""Requests that come and go beside each other say what each would say alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from dcp.data.tokenizers import ByteTokenizer  # noqa: E402
from dcp.inference import InferenceEngine  # noqa: E402
from dcp.inference.batching import Batcher  # noqa: E402
from dcp.inference.inputs import Sampling  # noqa: E402
from dcp.inference.model import open_model  # noqa: E402
from dcp.inference.requests import (  # noqa: E402
    Orders,
    Request,
    pack_orders,
    unpack_orders,
)
from dcp.inference.server.steps import spread  # noqa: E402
from dcp.inference.texts import TextStream  # noqa: E402
from dcp.wire import WireError  # noqa: E402

DECODE = ByteTokenizer().decode


def make_engine(num_ranks=None, **options):
    options = {"num_pages": 40, "page_size": 8} | options
    return InferenceEngine(
        open_model(None, seed=3, dtype="float64"), num_ranks=num_ranks, **options
    )


def make_requests(count, seed=0, **options):
    of = random.Random(seed)
    return [
        Request(
            i,
            tuple(of.randrange(256) for _ in range(of.choice([1, 2, 9, 30, 77]))),
            of.choice([1, 3, 12]),
            **options,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def alone(request, **options):
    """What one request says in an engine of its own, of one rank, its prompt in one step."""
    engine = make_engine(1, **options)
    sampling = request.sampling
    return engine.generate(
        {0: request.tokens},
        max_new_tokens=request.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )[0]


def serve_all(batcher, requests, per_step=2):
    """Tokens and finish of each request, a few of which join before every step."""
    found, finish, left = {r.id: [] for r in requests}, {}, list(requests)
    while left or not batcher.is_idle:
        for request in left[:per_step]:
            batcher.join(request)
        del left[:per_step]
        for piece in batcher.step():
            assert piece.id not in finish
            found[piece.id].append(piece.drawn)
            if piece.finish:
                finish[piece.id] = piece.finish
    batcher.room.drop_all()
    assert batcher.engine.names == []
    caches = batcher.engine.attention.caches
    assert all((cache.free_pages == cache.num_pages).all() for cache in caches)
    return found, finish


def tokens(found):
    return {id: [drawn.token for drawn in of] for id, of in found.items()}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, 50, 0.9, 7)])
@pytest.mark.parametrize(
    ("num_ranks", "budget", "running", "pages"),
    [(1, 2048, None, 40), (1, 5, None, 40), (2, 9, 3, 40), (3, 40, None, 12), (2, 13, None, 8)],
)
def test_tokens_are_those_of_each_request_alone(num_ranks, budget, running, pages, sampling):
    requests = make_requests(9, sampling=sampling)
    batcher = Batcher(
        make_engine(num_ranks, num_pages=pages), token_budget=budget, most_running=running
    )
    found, finish = serve_all(batcher, requests)
    assert tokens(found) == {r.id: alone(r) for r in requests}
    assert set(finish.values()) == {"length"}


def serve_on_rank(count):
    """Orders come from the first rank alone; pieces are the same on both."""
    batcher = Batcher(make_engine(num_pages=12), token_budget=11, decode=DECODE)
    left, found, steps = make_requests(count, stop=("é", "\n")), [], 0
    leads = torch.distributed.get_rank() == 0
    while True:
        orders = Orders((), tuple(left[:1]), not left and batcher.is_idle) if leads else None
        orders = spread(orders, group=torch.distributed.group.WORLD, device="cpu")
        if orders.ends:
            return [(p.id, p.drawn.token, p.text, p.finish) for p in found], steps
        for request in orders.joins:
            batcher.join(request)
        del left[:1]
        found += batcher.step()
        steps += 1


def test_ranks_follow_the_first_one(gloo_pool):
    requests = make_requests(8)
    (first, steps), (second, also) = gloo_pool(2).run(serve_on_rank, 8)
    assert first == second
    assert steps == also
    for request in requests:
        said, text = alone(request), ""
        mine = [token for id, token, *_ in first if id == request.id]
        text = DECODE(np.array(said))
        assert mine == said[: len(mine)]
        whole = "".join(piece for id, _, piece, _ in first if id == request.id)
        cut = min([at for stop in "é\n" if (at := text.find(stop)) >= 0], default=len(text))
        assert whole == text[:cut]
        assert (len(mine) == len(said)) or whole != text


def test_a_long_prompt_enters_in_chunks_beside_replies():
    batcher = Batcher(make_engine(2), token_budget=12)
    batcher.join(Request(0, (5, 6, 7), 30))
    batcher.join(Request(1, tuple(range(100)), 2))
    pieces = [batcher.step() for _ in range(13)]
    held = batcher.engine.attention.caches[0].held([1])
    assert [[piece.id for piece in of] for of in pieces] == [[0]] * 12 + [[0, 1]]
    assert held.tolist() == [[50, 50]]


def test_a_step_has_no_more_tokens_than_the_budget_and_replies_never_wait():
    batcher, sizes = Batcher(make_engine(3), token_budget=20), []
    step = batcher.engine.step
    batcher.engine.step = lambda parts: sizes.append([p.num_tokens for p in parts]) or step(parts)
    serve_all(batcher, make_requests(12), per_step=5)
    assert all(sum(of) <= 20 for of in sizes)
    assert any(max(of) > 1 and of.count(1) > 1 for of in sizes)


def test_replies_that_outgrow_the_cache_wait_and_go_on():
    requests = [Request(i, tuple(range(i, i + 20)), 40) for i in range(4)]
    batcher = Batcher(make_engine(2, num_pages=9), token_budget=64)
    backs = []
    put_back = batcher._put_back
    batcher._put_back = lambda reply: backs.append(reply.num_new) or put_back(reply)
    found, _ = serve_all(batcher, requests, per_step=4)
    assert max(backs) > 1  # in the middle of a reply
    assert tokens(found) == {r.id: alone(r) for r in requests}


@pytest.mark.parametrize(("num_ranks", "pages", "kept"), [(1, 60, 9), (2, 24, 9), (3, 16, 2)])
def test_prompts_that_begin_alike_share_pages(num_ranks, pages, kept):
    of = random.Random(1)
    stems = [tuple(of.randrange(256) for _ in range(length)) for length in (70, 33, 9)]
    ends = [tuple(of.randrange(256) for _ in range(length)) for length in (0, 3, 25, 25)]
    requests = [Request(i, of.choice(stems) + of.choice(ends), 8) for i in range(14)]
    engine = make_engine(num_ranks, num_pages=pages)
    batcher = Batcher(engine, token_budget=50, most_kept=kept)
    found, _ = serve_all(batcher, requests, per_step=1)
    assert batcher.room.num_shared_tokens > 70
    assert tokens(found) == {r.id: alone(r) for r in requests}


def test_a_conversation_goes_on_from_its_own_pages():
    batcher = Batcher(make_engine(2), token_budget=50)
    first = Request(0, tuple(range(60)), 10)
    batcher.join(first)
    said = []
    while not batcher.is_idle:
        said += [piece.drawn.token for piece in batcher.step()]
    assert (batcher.room.num_kept, batcher.room.num_shared_tokens) == (1, 0)
    second = Request(1, (*first.tokens, *said, 5, 6), 4)
    found, _ = serve_all(batcher, [second])
    assert batcher.room.num_shared_tokens == 69  # all that was in the cache
    assert tokens(found) == {1: alone(second)}


def test_layers_that_see_a_window():
    config = transformers.Gemma2Config(
        vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    requests = [Request(i, tuple(range(30 + 3 * i)), 20) for i in range(5)]
    said = {}
    for request in requests:
        engine = InferenceEngine(model, num_ranks=1, num_pages=40, page_size=8)
        said[request.id] = engine.generate({0: request.tokens}, max_new_tokens=20)[0]
    batcher = Batcher(
        InferenceEngine(model, num_ranks=2, num_pages=16, page_size=8), token_budget=25
    )
    found, _ = serve_all(batcher, requests)
    assert tokens(found) == said


@settings(max_examples=25)
@given(st.data())
def test_no_rank_holds_more_than_is_reckoned(data):
    """However prompts are cut by what else is there, pages suffice; 1 to 4 ranks."""
    num_ranks = data.draw(st.integers(1, 4))
    batcher = Batcher(
        STEPLESS[num_ranks], token_budget=data.draw(st.integers(2 * num_ranks + 1, 40))
    )
    caches = batcher.engine.attention.caches
    requests = [
        Request(i, (7,) * data.draw(st.integers(1, 60)), data.draw(st.integers(1, 30)))
        for i in range(data.draw(st.integers(1, 6)))
    ]
    for request in requests:
        batcher.join(request)
    while not batcher.is_idle:
        batcher.step()
        for reply in batcher._running:
            held = caches[0].held([reply.request.id])[0]
            assert held.max() <= batcher.room._share_of(int(held.sum()), reply.skew)
    batcher.room.drop_all()
    assert all((cache.free_pages == cache.num_pages).all() for cache in caches)


class Stepless(InferenceEngine):
    """An engine whose model draws a 0 and computes nothing."""

    def _forward(self, parts):
        real, self.model = self.model, None
        try:
            super()._forward(parts)
        except AttributeError:  # the model, when the cache has been extended
            return {i: torch.ones(3) for i in range(len(parts))}
        finally:
            self.model = real


STEPLESS = {
    n: Stepless(open_model(None, seed=3), num_ranks=n, num_pages=64, page_size=4)
    for n in (1, 2, 3, 4)
}


def test_one_that_fails_harms_no_other():
    requests = make_requests(5)
    engine = make_engine(2)
    embed = engine.model.get_input_embeddings()
    bad = Request(9, (200, 201, 202), 5)
    good = [r for r in requests if not {201} & set(r.tokens)]
    assert len(good) > 2
    said = {r.id: alone(r) for r in good}
    assert all(201 not in of for of in said.values())
    embed.weight.data[201] = float("nan")
    batcher = Batcher(engine, token_budget=60)
    pieces = []
    for request in [good[0], bad, *good[1:]]:
        batcher.join(request)
    while not batcher.is_idle:
        pieces += batcher.step()
    [failed] = [piece for piece in pieces if piece.id == 9]
    assert failed.finish == "error"
    assert "logits are not finite" in failed.error
    for request in good:
        assert [p.drawn.token for p in pieces if p.id == request.id] == said[request.id]
    batcher.room.drop_all()
    assert engine.attention.caches[0].sequences == []


def test_those_who_leave_free_their_place():
    batcher = Batcher(make_engine(2, num_pages=12), token_budget=40)
    requests = [Request(i, tuple(range(i, i + 30)), 9) for i in range(5)]
    for request in requests:
        batcher.join(request)
    batcher.step()
    assert (batcher.num_running, batcher.num_waiting) == (2, 3)
    for id in (0, 4, 77):  # runs, waits, is unknown
        batcher.leave(id)
    assert (batcher.num_running, batcher.num_waiting) == (1, 2)
    with pytest.raises(ValueError, match="there is a request 1 already"):
        batcher.join(requests[1])
    found = {id: [] for id in range(5)}
    while not batcher.is_idle:
        for piece in batcher.step():
            found[piece.id].append(piece.drawn.token)
    left = {r.id: alone(r) for r in requests[1:4]}
    assert found == {0: [], 4: []} | left
    batcher.room.drop_all()
    assert batcher.engine.attention.caches[0].sequences == []


def test_log_probabilities_are_those_of_the_model():
    model = open_model(None, seed=3, dtype="float64")
    request = Request(0, (256, 70, 71), 4, num_likeliest=3)
    [drawn] = serve_all(Batcher(make_engine(2)), [request])[0].values()
    plain = Request(1, (256, 70, 71), 4)
    assert [each.logprob for each in serve_all(Batcher(make_engine(2)), [plain])[0][1]] == [
        None
    ] * 4
    said = [*request.tokens, *(each.token for each in drawn)]
    with torch.no_grad():
        logprobs = model(torch.tensor([said])).logits[0].log_softmax(-1)
    for position, each in enumerate(drawn, start=2):
        values, ids = logprobs[position].topk(3)
        assert each.logprob == pytest.approx(float(values[0]), abs=1e-9)
        assert [token for token, _ in each.likeliest] == ids.tolist()
        assert [value for _, value in each.likeliest] == pytest.approx(values.tolist(), abs=1e-9)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(0, 1), st.integers(0, 99))
def test_top_p_draws_from_the_fewest_that_suffice(scores, top_p, position):
    logits = torch.tensor(scores, dtype=torch.float64)
    token = Sampling(1.0, None, top_p, 3).draw(logits, position)
    shares = logits.softmax(0).tolist()
    likelier = sum(share for share in shares if share > shares[token])
    assert likelier <= top_p + 1e-9


def test_what_can_never_be_served_is_refused():
    batcher = Batcher(make_engine(2, num_pages=4))
    fits = batcher.room.most_tokens
    batcher.check(Request(0, (1,), fits - 1))
    with pytest.raises(ValueError, match=f"more than the {fits} that can be kept"):
        batcher.join(Request(0, (1,), fits))
    with pytest.raises(ValueError, match="must be 257 or less, got 258"):
        batcher.join(Request(0, (258,), 1))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        batcher.join(Request(0, (1,), 1, stop=("x",)))
    for options, said in (
        ({"tokens": ()}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"stop": ("",)}, "none of them empty"),
        ({"num_likeliest": 21}, "must be 20 or less"),
    ):
        with pytest.raises(ValueError, match=said):
            Request(**{"id": 0, "tokens": (1,), "max_new_tokens": 1} | options)
    with pytest.raises(ValueError, match="token_budget must be 5 or more"):
        Batcher(make_engine(2), token_budget=4)
    engine = make_engine(1)
    engine.generate({"a": [1]}, max_new_tokens=1)
    with pytest.raises(ValueError, match="has 1 conversations"):
        Batcher(engine)


@given(
    st.text(max_size=30),
    st.lists(st.text(min_size=1, max_size=3), max_size=3),
    st.binary(max_size=5),
)
def test_text_stops_before_the_first_stop_text(text, stops, junk):
    data = text.encode("utf-8", "surrogatepass") + junk
    stream, pieces = TextStream(DECODE, stops), []
    for byte in data:
        pieces.append(stream.add(byte))
        if stream.is_stopped:
            break
    pieces.append(stream.end())
    whole = data.decode(errors="replace")
    cuts = [at for stop in stops if (at := whole.find(stop)) >= 0]
    assert "".join(pieces) == whole[: min(cuts, default=len(whole))]
    assert stream.is_stopped == bool(cuts)


def test_orders_survive_their_message_and_damage_is_refused():
    requests = make_requests(3, sampling=Sampling(0.7, 5, 0.25, 2**63 - 1), stop=("a", "é"))
    orders = Orders((5, 6), tuple(requests), False)
    message = pack_orders(orders)
    assert unpack_orders(message) == orders
    assert unpack_orders(pack_orders(Orders(ends=True))) == Orders(ends=True)
    with pytest.raises(WireError):
        unpack_orders(message[:-1])
    import dcp.inference.requests as module

    for change in ({"max_new_tokens": "4"}, {"stop": [1]}, {"id": 1.5}, {"more": 1}):
        meta, arrays = module.unpack("serving orders", message)
        meta["joins"][0] |= change
        with pytest.raises(WireError):
            unpack_orders(module.pack("serving orders", meta, arrays))
