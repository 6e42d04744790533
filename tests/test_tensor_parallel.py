"""Weights shared out inside a node, attention between: the tokens of one process."""

import json

import pytest
import torch
import torch.distributed as dist

T = pytest.importorskip("transformers")

from dcp.cli import main  # noqa: E402
from dcp.data.tokenizers import ByteTokenizer  # noqa: E402
from dcp.inference import InferenceEngine  # noqa: E402
from dcp.inference.model import open_model  # noqa: E402
from dcp.inference.rank import meshes  # noqa: E402
from dcp.inference.weights import weight_bytes  # noqa: E402
from tests.test_served_models import TOKENS, TURNS, make, said_alone  # noqa: E402

KINDS = ("Mistral", "Gemma3Text", "Qwen3")  # Gemma's embeddings are its head's weights, too


def converse(folder):
    """Turns, the last one by an engine that has read what was written; weights on this rank."""
    group, tensor_group = meshes(torch.device("cpu"), 2)
    found = {}
    for kind in KINDS:
        model = open_model(f"{folder}/{kind}", tensor_group=tensor_group)
        engine, again = (
            InferenceEngine(
                model, group=group, tensor_group=tensor_group, num_pages=40, page_size=8
            )
            for _ in range(2)
        )
        for turn in TURNS[:2]:
            engine.generate({"a": turn}, max_new_tokens=TOKENS)
        engine.save(f"{folder}/{kind}/said")
        again.load(f"{folder}/{kind}/said")
        again.generate({"a": TURNS[2]}, max_new_tokens=TOKENS)
        spec = again.spec
        heads = spec.num_heads, spec.num_kv_heads, again.attention.caches[0].pools[0].shape[2]
        found[kind] = again.tokens("a"), weight_bytes(model), heads
    engine.model.lm_head.weight.data.fill_(float("nan"))
    try:
        engine.generate({"a": [1]}, max_new_tokens=1)
    except Exception as error:
        found["failed"] = str(error)
    return found


def test_two_by_two_ranks_say_what_one_process_says_with_half_the_weights(gloo_pool, tmp_path):
    torch.set_num_threads(1)
    alone, whole, shared = {}, {}, {}
    for kind in KINDS:
        model = make(kind)
        model.save_pretrained(tmp_path / kind)
        alone[kind], whole[kind] = said_alone(model), weight_bytes(model)
        norms = [p for name, p in model.named_parameters() if "norm" in name]
        shared[kind] = whole[kind] - sum(p.numel() * p.itemsize for p in norms)
    for found in gloo_pool(4).run(converse, str(tmp_path)):
        failed = found.pop("failed")  # on both ranks that have the last token, and so on all
        assert "logits are not finite" in failed or "failed in this turn" in failed
        for kind, (said, held, heads) in found.items():
            assert said == alone[kind], kind
            assert heads == (2, 1, 1)
            assert held == whole[kind] - shared[kind] // 2  # all but the norms in halves


def refused_on_rank():
    _, tensor_group = meshes(torch.device("cpu"), dist.get_world_size())
    said = []
    for kind, others in (("GptOss", {}), ("Mistral", {"num_key_value_heads": 1})):
        from dcp.inference.weights import share_weights

        try:
            share_weights(make(kind, **others), tensor_group)
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_cannot_be_shared_out_is_refused(gloo_pool):
    for no_plan, no_heads in gloo_pool(2).run(refused_on_rank):
        assert no_plan.startswith("GptOssForCausalLM has no plan in transformers to share out")
        assert "1 KV heads, which 2 ranks of tensor parallelism do not divide" in no_heads
    words = ["generate", "--prompt", "x", "--num-processes", "3", "--tensor-parallel", "2"]
    assert main(words) == 2


def test_the_command_shares_out_weights(tmp_path, capfd):
    make("Qwen3").save_pretrained(tmp_path)
    ByteTokenizer().for_transformers().save_pretrained(tmp_path)
    words = ["generate", "--model", str(tmp_path), "--num-processes", "2", "--json"]
    words += ["--tensor-parallel", "2", "--prompt", "x" * 60, "--max-new-tokens", "5"]
    assert main(words) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    ids = torch.tensor([[256, *b"x" * 60]])
    wanted = make("Qwen3").generate(ids, max_new_tokens=5, do_sample=False)[0, 61:].tolist()
    assert found["tokens"] == [wanted]
