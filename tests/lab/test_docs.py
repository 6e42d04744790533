"""The documentation's pictures and tables: drawn into another folder, text around them kept."""

from xml.etree import ElementTree

from lab.__main__ import main


def test_tables_are_written_between_their_marks(tmp_path, capsys):
    page = tmp_path / "measured.md"
    names = ("attention", "emulated", "emulated_layers", "learn", "train", "trainer", "dynamic")
    names += ("planner", "limit", "ablation", "rules", "overlap", "host")
    marks = "".join(f"<!-- begin {n} -->\nold\n<!-- end {n} -->\n" for n in names)
    page.write_text(f"before\n{marks}after\n")
    assert main(["draw", "--only", "measured", "idea", "--docs", str(tmp_path)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- begin attention -->\n### ")
    assert text.endswith("<!-- end host -->\nafter\n")
    assert "old" not in text
    assert "| strategy | tokens/s" in text
    assert "| documents | system | tokens/s" in text
    for name in ("attention", "train"):
        assert (tmp_path / "images" / f"measured_{name}.png").stat().st_size > 10_000
    picture = ElementTree.parse(tmp_path / "images" / "idea.svg").getroot()
    drawn = list(picture.iter())
    blocks = (len([each for each in drawn if each.tag.endswith("path")]) - 2) / 2  # two arrows
    strips = [each for each in drawn if "6.0" in (each.get("width"), each.get("height"))]
    assert blocks >= 4, "each document has its diagonal in both matrices"
    assert len(strips) == 4 * blocks, "of queries and of keys, in both matrices"
    assert "idea: images/idea.svg" in capsys.readouterr().out
