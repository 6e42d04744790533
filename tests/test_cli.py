"""The command line: its figures, its files and its one-line errors."""

import json
import subprocess
import sys

import pytest

import dcp
from dcp import AttentionSpec, Cluster, Plan, SequenceBatch, plan
from dcp.cli import main
from dcp.mask_names import parse_mask
from dcp.masks import named_mask
from dcp.placement import strategy_names

SMALL = ["--seqlens", "3000,500,1,0", "--devices-per-node", "2", "--head-dim", "16"]
FIELDS = {
    "strategy": str,
    "block_size": int,
    "num_tokens": int,
    "num_compute_blocks": int,
    "planning_seconds": float,
    "compute_balance": float,
    "token_balance": float,
    "inter_node_bytes": int,
    "intra_node_bytes": int,
    "max_rank_recv_bytes": int,
    "max_rank_send_bytes": int,
    "num_divisions": int,
    "simulated": dict,
}
SIMULATED = ("forward_seconds", "backward_seconds", "exposed_comm_seconds")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """The first planning ever says that it compiles; here nothing else may be said."""
    plan(SequenceBatch([1]), AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=8), Cluster())


def run(capsys, *arguments):
    """Standard output of a command that must succeed."""
    assert main([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def assert_figures(figures):
    for name, kind in FIELDS.items():
        assert isinstance(figures[name], kind), name
    # the simulator joins events closer than its grain, so that a difference may fall below 0
    assert all(figures["simulated"][name] > -1e-6 for name in SIMULATED)
    assert min(figures["compute_balance"], figures["token_balance"]) >= 1 - 1e-9


def test_plan_json_has_every_field(capsys):
    out = run(capsys, "plan", *SMALL, "--kv-heads", 2, "--json")
    figures = json.loads(out)
    assert_figures(figures)
    assert figures["num_tokens"] == 3501
    assert figures["inter_node_bytes"] == 0, "one node"


def test_the_example_of_the_readme(capsys):
    figures = json.loads(
        run(capsys, "plan", "--seqlens", "65536,20000,15000,12000,8000,6000,4000,2000",
            "--mask", "causal", "--nodes", 4, "--devices-per-node", 8, "--heads", 8,
            "--kv-heads", 2, "--head-dim", 128, "--json")
    )  # fmt: skip
    assert_figures(figures)
    assert figures["num_tokens"] == 132_536


def test_plan_for_people(capsys):
    out = run(capsys, "plan", *SMALL, "--mask", "streaming:sink=64,window=512")
    assert "3,501 tokens in 4 sequences, mask streaming:sink=64,window=512, 2 ranks" in out
    assert "balance" in out


def test_the_mask_and_the_block_size_matter(capsys):
    def figures(*arguments):
        return json.loads(run(capsys, "plan", *SMALL, *arguments, "--json"))

    zigzag = ("--strategy", "zigzag", "--block-size", 100)
    causal, window = figures(*zigzag), figures(*zigzag, "--mask", "sliding_window:window=50")
    assert window["num_compute_blocks"] < causal["num_compute_blocks"]
    assert causal["block_size"] <= 100
    assert causal["strategy"] == "zigzag"


def test_compare_shows_every_strategy(capsys):
    rows = json.loads(run(capsys, "compare", *SMALL, "--json"))
    names = [row["strategy"].split()[0] for row in rows]
    assert sorted(names) == sorted(["auto", *strategy_names()])
    assert names[0] == "auto"  # never worse than the rest, and the best comes first
    seconds = [row["layer_seconds"] for row in rows if "layer_seconds" in row]
    assert seconds == sorted(seconds)
    for row in rows:
        if "error" not in row:
            assert_figures(row)
    text = run(capsys, "compare", *SMALL)
    assert all(name in text for name in strategy_names())


def test_batches_from_a_file(capsys, tmp_path):
    batches = [
        {"name": "one", "seqlens": [300, 20], "nodes": 2, "devices_per_node": 1},
        {"name": "two", "seqlens": [64] * 5, "nodes": 1, "devices_per_node": [3]},
    ]
    path = tmp_path / "batches.json"
    path.write_text(json.dumps(batches))
    lines = run(capsys, "plan", "--batches", path, "--strategy", "zigzag", "--json").splitlines()
    figures = [json.loads(line) for line in lines]
    assert [(f["name"], f["num_tokens"]) for f in figures] == [("one", 320), ("two", 320)]
    lines = run(capsys, "compare", "--batches", path, "--nodes", 1, "--json").splitlines()
    assert [json.loads(line)[0]["name"] for line in lines] == ["one", "two"]


def test_save_and_report(capsys, tmp_path):
    plan_file, page = tmp_path / "a.plan", tmp_path / "a.html"
    run(capsys, "plan", *SMALL, "--save", plan_file, "--report", page)
    assert Plan.load(plan_file).num_tokens == 3501
    assert "</html>" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seqlens=-5"], "-5"),
        (["--seqlens", "12,x"], "'12,x'"),
        (["--seqlens", "4", "--mask", "casual"], "'casual' is not one of"),
        (["--seqlens", "4", "--mask", "streaming:sinks=3"], "sinks"),
        (["--seqlens", "4", "--mask", "streaming:sink"], "'sink' is not KEY=NUMBER"),
        (["--seqlens", "4", "--kv-heads", "3"], "num_kv_heads=3"),
        (["--seqlens", "4", "--dtype", "int8"], "'int8'"),
        (["--seqlens", "4", "--strategy", "best"], "'best' is not one of auto"),
        (["--seqlens", "4", "--block-size", "0"], "block_size"),
        (["--seqlens", "4", "--block-size", "many"], "'many'"),
        (["--seqlens", "4", "--nodes", "0"], "num_nodes"),
        (["--seqlens", "4", "--nodes", "2", "--devices-per-node", "1,2,3"], "devices_per_node"),
        (["--seqlens", "4", "--cluster", "abacus"], "'abacus'"),
        (["--batches", "/no/such/file"], "/no/such/file"),
        (["--batches", __file__], "is not JSON"),
        ([], "--seqlens"),
        (["--seqlens", "4", "--wat"], "--wat"),
    ],
)
def test_mistakes_get_one_line(capsys, arguments, said):
    try:
        status = main(["plan", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("dcp")
    assert err.count("\n") == 1
    assert said in err


def test_parse_mask():
    assert named_mask("streaming:sink=2,window=7", 90) == named_mask(
        "streaming", 90, sink=2, window=7
    )
    assert parse_mask("causal") == ("causal", {})
    assert parse_mask("shared_question:question_fraction=0.5,num_answers=2") == (
        "shared_question",
        {"question_fraction": 0.5, "num_answers": 2},
    )


def test_planning_never_imports_torch():
    code = (
        "import sys, dcp.cli; dcp.cli.main(['plan', '--seqlens', '99']);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"dcp {dcp.__version__}\n"


@pytest.mark.parametrize("command", [[], ["plan"], ["compare"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "usage: dcp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["comapre"], "did you mean compare?"),
        (["plan", *SMALL, "--stratgy", "ring"], "did you mean --strategy?"),
        (["plan", *SMALL, "--strategy", "zigzga"], "did you mean zigzag?"),
        (["plan", *SMALL, "--mask", "causl"], "did you mean causal?"),
        (["plan", *SMALL, "--cluster", "h10"], "did you mean h100?"),
        (["bench", "kernls"], "did you mean kernels?"),
    ],
)
def test_what_was_meant(capsys, words, meant):
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.strip().endswith(meant)


def test_what_people_read_fits_80_columns(capsys):
    texts = [
        run(capsys, "plan", *SMALL),
        run(capsys, "compare", *SMALL, "--kv-heads", 2, "--heads", 8, "--nodes", 3),
    ]
    for words in ([], ["plan"], ["compare"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        texts.append(capsys.readouterr().out)
    assert max(len(line) for text in texts for line in text.splitlines()) <= 80
    wide = run(capsys, "compare", *SMALL, "--wide")
    assert "divisions" in wide
    assert "divisions" not in texts[1]


def test_shells_complete_every_command(capsys):
    script = run(capsys, "completion", "bash")
    for word in ("compare", "--devices-per-node", "--temperature", "kernels", "--learning_rate"):
        assert word in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
