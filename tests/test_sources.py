"""Files of documents: read right in every form, or refused with their name and line."""

import bz2
import gzip
import json
import lzma
import os
import pickle

import numpy as np
import pytest

from dcp.data import TokenDataset, open_documents
from dcp.data.batching import BatchesFrom, TokenBudgetBatches, checked_lengths
from tests.loading import DOCUMENTS, LENGTHS, drain, loader_of

TEXTS = ["eins", "zwei, ä", "line\nbreak", "\u2028 and \U0001f600"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
ARRAY = json.dumps([{"text": text} for text in TEXTS], indent=1).encode()
MARK = b"\xef\xbb\xbf"


def zstd(data):
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def parquet(path, columns, **options):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)


def texts_of(source, **options):
    documents = open_documents(source, **options)
    texts = [documents.read(index) for index in range(len(documents))]
    assert documents.num_bytes.tolist() == [len(text) for text in texts]
    return [text.decode() for text in texts]


@pytest.mark.parametrize("packed", ["", *PACK])
@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".jsonl", LINES),
        (".JSONL", LINES),
        (".ndjson", MARK + LINES.replace(b"\n", b"\r\n\r\n")),
        (".json", LINES),
        (".json", ARRAY),
        (".jsonl", MARK + b"\n " + ARRAY),
    ],
)
def test_json_in_every_form(tmp_path, ending, content, packed):
    path = tmp_path / f"a{ending}{packed}"
    path.write_bytes(PACK.get(packed, bytes)(content))
    assert texts_of(path) == texts_of(str(tmp_path)) == TEXTS


@pytest.mark.parametrize("packed", ["", ".GZ", ".xz", ".zst"])
def test_text_files_may_be_packed_and_marked(tmp_path, packed):
    for number, text in enumerate(TEXTS):
        content = MARK * (number % 2) + text.encode()
        (tmp_path / f"{number}.TXT{packed}").write_bytes(PACK.get(packed.lower(), bytes)(content))
    assert texts_of(tmp_path) == TEXTS


def test_parquet_by_any_ending_and_patterns(tmp_path):
    parquet(tmp_path / "b.Parquet", {"text": TEXTS[2:]}, row_group_size=1)
    parquet(tmp_path / "a.pq", {"text": TEXTS[:2]})
    assert texts_of(tmp_path) == TEXTS
    assert texts_of(f"{tmp_path}/**/b.*") == TEXTS[2:]


def test_a_folder_of_several_kinds_is_refused_with_what_to_choose(tmp_path):
    parquet(tmp_path / "a.parquet", {"text": TEXTS})
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "c.txt").write_text("text")
    (tmp_path / "d.txt").write_text("text")
    match = r"several kinds \(2 .txt, 1 .parquet, 1 .jsonl\): choose one by a pattern.*\*.txt\*"
    with pytest.raises(ValueError, match=match):
        open_documents(tmp_path)
    for ending, count in (("txt", 2), ("parquet", 4), ("jsonl", 4)):
        assert len(open_documents(f"{tmp_path}/*.{ending}")) == count


REFUSED = [
    ("a.jsonl:17 is not UTF-8 text, it holds byte 0xff", "a.jsonl",
     LINES * 4 + b'{"text": "\xff"}\n'),
    ("a.jsonl:5 is not a JSON line: Expecting", "a.jsonl", LINES + b'{"text": \n'),
    ("a.jsonl:5 has no text under 'text' but fields id, body; set", "a.jsonl",
     LINES + b'{"id": 1, "body": "a"}\n'),
    ("a.jsonl:5 has no text under 'text' but None", "a.jsonl", LINES + b'{"text": null}'),
    ("a.jsonl.gz:5 has no text under 'text' but 3.5", "a.jsonl.gz",
     gzip.compress(LINES + b'{"text": 3.5}')),
    ("a.jsonl:1 has no text under 'text' but 7", "a.jsonl", b"7\n"),
    ("a.jsonl:1 has text that is no Unicode: surrogates", "a.jsonl", b'{"text": "\\ud800"}'),
    ("a.jsonl:1 is not a JSON line: maximum recursion", "a.jsonl", b'{"a":' * 100000),
    ("a.json, record 2, has no text under 'text' but 3", "a.json", b'[{"text": "a"}, {"text": 3}]'),
    ("a.json is not a JSON array: .*line 2", "a.json", b'[{"text": "a"},\n{"text": }]'),
    ("a.json:3 is not UTF-8 text", "a.json", b'[\n{"text": "a"},\n{"text": "\xe4"}]'),
    ("a.jsonl is empty: remove it", "a.jsonl", b""),
    ("a.json is empty: remove it", "a.json", b"[]"),
    ("a.jsonl.gz is empty", "a.jsonl.gz", gzip.compress(b"\n")),
    ("a.jsonl.gz cannot be read: Compressed file ended", "a.jsonl.gz", gzip.compress(LINES)[:-9]),
    ("a.jsonl.gz cannot be read: Not a gzipped file", "a.jsonl.gz", LINES),
    ("a.txt.bz2 cannot be read", "a.txt.bz2", bz2.compress(LINES)[:-9]),
    ("a.txt.xz cannot be read", "a.txt.xz", b"no such thing"),
    ("a.txt.zst cannot be read", "a.txt.zst", b"no such thing"),
    ("a.txt:3 is not UTF-8 text, it holds byte 0xfc", "a.txt", b"a\nb\nf\xfcr\n"),
    ("a.md:1 is not UTF-8 text, it holds byte 0x00", "a.md", b"a\0b"),
    ("a.txt is UTF-16, not UTF-8 text", "a.txt", "text".encode("utf-16")),
    ("a.txt is gzip, not UTF-8 text", "a.txt", gzip.compress(b"text")),
    ("there is no text in", "a.txt", b""),
    (r"a.csv is a table as text \(.csv\), which is not read: convert", "a.csv", b"text\na\n"),
    ("a.TSV is a table as text", "a.TSV", b"text\na\n"),
    ("a.csv.gz is a table as text", "a.csv.gz", gzip.compress(b"text\na\n")),
    ("a.pkl is a pickle", "a.pkl", pickle.dumps(TEXTS, 0)),
    ("a.npz is NumPy", "a.npz", b"PK"),
    ("a.arrow is Arrow", "a.arrow", b"ARROW1"),
    ("a.tar.gz is an archive", "a.tar.gz", b""),
    ("a.parquet.gz is a compressed Parquet file: decompress", "a.parquet.gz", b""),
    ("a.parquet is not a Parquet file", "a.parquet", b"PAR1 and no more"),
    ("a is Parquet, not UTF-8 text", "a", b"PAR1 and more"),
]  # fmt: skip


@pytest.mark.parametrize(("match", "name", "content"), REFUSED, ids=range(len(REFUSED)))
def test_damaged_and_foreign_files_are_refused_by_name(tmp_path, match, name, content):
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=match) as caught:
            open_documents(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("match", "columns"),
    [
        ("a.parquet, row group 1, row 1 has no text under 'text'", {"text": ["a", "b", "c", None]}),
        ("a.parquet, row group 0: column 'text' holds int64, not text", {"text": [1, 2]}),
        ("a.parquet has no column 'text' but body, id", {"body": ["a"], "id": [1]}),
        ("a.parquet is empty", {"text": np.array([], dtype=str)}),
    ],
)
def test_parquet_is_refused_with_row_group_and_row(tmp_path, match, columns):
    parquet(tmp_path / "a.parquet", columns, row_group_size=2)
    with pytest.raises(ValueError, match=match):
        open_documents(tmp_path)


def test_damaged_parquet_pages_name_the_row_group(tmp_path):
    import pyarrow

    path, bad = tmp_path / "a.parquet", pyarrow.py_buffer(b"\xff\xfea")
    offsets = pyarrow.py_buffer(np.array([0, 2, 3], dtype=np.int32).tobytes())
    parquet(path, {"text": pyarrow.StringArray.from_buffers(2, offsets, bad)})
    with pytest.raises(ValueError, match=r"row group 0 has no text under 'text': Invalid UTF8"):
        open_documents(path)
    parquet(path, {"text": ["x" * 99] * 9})
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    with pytest.raises(ValueError, match=r"a.parquet, row group 0 is damaged: "):
        open_documents(path)


def test_links_folders_and_special_files(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone.txt is a link to '.*nowhere', where no file is"):
        open_documents(tmp_path)
    (tmp_path / "gone.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    for source in (tmp_path, tmp_path / "pipe.txt"):
        with pytest.raises(ValueError, match=r"pipe.txt is no regular file"):
            open_documents(source)
    (tmp_path / "pipe.txt").unlink()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"loop is a link to .*, which is in the data already"):
        open_documents(tmp_path)
    for source in ("", "/no/such/place", f"{tmp_path}/nothing", "a\0b"):
        with pytest.raises(ValueError, match="is neither a path or pattern here"):
            open_documents(source)
    with pytest.raises(ValueError, match="the dataset is empty"):
        open_documents(f"{tmp_path}/*.nothing")


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("text")

    def denied(name, *args, **options):
        raise PermissionError(13, "Permission denied", str(name))

    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: Permission denied"):
        open_documents(tmp_path)
    monkeypatch.setattr("os.stat", denied)
    with pytest.raises(ValueError, match=r"a.txt"):
        from dcp.data.files import PinnedFile

        PinnedFile(str(path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_changes_after_it_was_listed_is_refused(tmp_path, name):
    path = tmp_path / name
    parquet(path, {"text": TEXTS}) if name == "a.parquet" else path.write_bytes(LINES)
    dataset = TokenDataset(open_documents(path))
    loader = loader_of(dataset, tokens_per_batch=1024)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=f"{name} has changed since its documents were listed"):
        drain(loader)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} cannot be read: No such file"):
        drain(loader_of(dataset, tokens_per_batch=1024))


@pytest.mark.parametrize("limit", [0, 2.5, "3"])
def test_limits_are_whole_numbers(tmp_path, limit):
    with pytest.raises(ValueError, match=f"limit of documents must be 1 or more, got {limit!r}"):
        open_documents(tmp_path, limit=limit)


# --------------------------------------------------------------------------- lengths and options


class Told(list):
    """Documents, and lengths that somebody else counted."""

    def __init__(self, lengths):
        super().__init__(DOCUMENTS)
        self.lengths = lengths


@pytest.mark.parametrize(
    ("match", "lengths"),
    [
        ("has 9 documents but gives 8 lengths", LENGTHS[:-1]),
        ("has 9 documents but gives 10 lengths", [*LENGTHS, 4]),
        ("must be 0 or more, got -3 for document 8", [*LENGTHS[:-1], -3]),
        ("vector of integers, got float64 .* with nan", [*LENGTHS[:-1], float("nan")]),
        ("vector of integers, got float64 .* with 5.0", np.array(LENGTHS, dtype=float)),
        ("vector of integers, got object .* with None", [*LENGTHS[:-1], None]),
        ("vector of integers, got bool .* with True", [True] * 9),
        (r"vector of integers, got int64 of shape \(9, 1\)", np.array(LENGTHS)[:, None]),
        ("vector of integers", [[1, 2], [3]]),
        ("must be 0 or more, got 18446744073709551615", np.full(9, 2**64 - 1, dtype=np.uint64)),
    ],
)
def test_lengths_that_cannot_be_are_refused(match, lengths):
    with pytest.raises(ValueError, match=match):
        loader_of(Told(lengths))


def test_lengths_of_any_whole_kind_are_taken():
    assert drain(loader_of(Told(np.array(LENGTHS, dtype=np.uint8)))) == drain(loader_of())
    assert checked_lengths([], 0).dtype == np.int64


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens_per_batch", 64.5), ("tokens_per_batch", True), ("max_seqlen", "8"), ("seed", -1),
     ("seed", 0.5), ("bucket_window", 2.5), ("tokens_per_batch", float("nan"))],
)  # fmt: skip
def test_options_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a whole number, \d or more, got "):
        loader_of(**{name: value})


def test_places_before_the_first_are_refused():
    batches = TokenBudgetBatches(np.array(LENGTHS), 70)
    with pytest.raises(ValueError, match="cannot resume at batch -1 of epoch 0"):
        BatchesFrom(batches, epoch=0, position=-1)
    with pytest.raises(ValueError, match="cannot resume in epoch -1"):
        BatchesFrom(batches, epoch=-1, position=0)
