from __future__ import annotations

from pathlib import Path

from tinyvit.catalog import CHECKPOINTS, VARIANTS
from tinyvit.checkpoints.download import cache_folder


def test_both_tables_name_everything_and_fit_80_columns(run):
    result = run("models")
    assert result.code == 0
    lines = result.out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert all(line == line.rstrip() for line in lines)
    names = [line.split()[0] for line in lines if line]
    assert [name for name in names if name in {row.name for row in VARIANTS}] == [
        row.name for row in VARIANTS
    ]
    assert sorted(names).count("checkpoint") == 1
    assert {row.name for row in CHECKPOINTS} <= set(names)
    assert str(cache_folder()) in result.err


def test_a_row_says_what_a_variant_costs(run):
    row = next(
        line for line in run("models").out.splitlines() if line.startswith("tiny_vit_21m_51")
    )
    assert row.split() == [
        *("tiny_vit_21m_512", "classify", "21.27M", "26.88", "512", "2", "2", "2"),
        *("16", "16", "32", "16"),
    ]


def test_where_each_file_is(run):
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tinysam_42.3.pth").touch()
    rows = {line.split()[0]: line.split()[1:] for line in run("models").out.splitlines() if line}
    assert rows["tinyvit_sam_2m"] == ["tinyvit_sam", "-", "Apache-2.0", "embedded"]
    assert rows["tinysam"] == ["tinysam", "-", "Apache-2.0", "cached"]
    assert rows["lite_medsam"] == ["litemedsam", "-", "Apache-2.0", "by", "hand"]
    assert rows["tiny_vit_5m_1k"] == ["cream", "1000", "MIT", "remote"]


def test_json_has_every_row_and_every_path(run):
    (cache_folder() / "mobile_sam.pt").touch()
    result = run("models", "--json")
    assert result.err == ""
    content = result.json
    assert content["cache"] == str(cache_folder())
    assert [row["name"] for row in content["models"]] == [row.name for row in VARIANTS]
    assert content["models"][0]["image_spec"]["shorter_side"] == 235
    rows = {row["name"]: row for row in content["checkpoints"]}
    assert list(rows) == [row.name for row in CHECKPOINTS]
    assert rows["tinyvit_sam_2m"]["file_is"] == "embedded"
    assert Path(rows["tinyvit_sam_2m"]["path"]).is_file()
    assert rows["mobile_sam"]["path"] == str(cache_folder() / "mobile_sam.pt")
    assert rows["tinysam"] | {"path": None, "file_is": "remote"} == rows["tinysam"]
