import hashlib
import json

import pytest

from .recipe_files import load

card = load("card")


def figure(value, reach=0.02):
    return {"value": value, "low": value - reach, "high": value + reach, "count": 3}


def results_for(path, click=0.6, box=0.6):
    """What ``evaluate.py`` would have written."""
    ious = {"1 click": figure(click), "3 clicks": figure(0.7), "box": figure(box)}
    return {
        "grabcut": True,
        "machine": {"cpu": "a processor", "torch": "2.7", "date": "2026-01-01"},
        "weights": {path.stem: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}},
        "sets": {
            "photographs": {
                "floors": {
                    "1 click": {"disc": figure(0.4), "grabcut": figure(0.63)},
                    "box": {"ellipse": figure(0.58), "grabcut": figure(0.9)},
                },
                "models": {path.stem: {"ious": ious}},
            }
        },
    }


def test_verdicts_count_only_intervals_that_are_apart(tiny_sam_file):
    found = card.verdicts(results_for(tiny_sam_file), tiny_sam_file.stem)
    assert found == [
        "With one click on photographs (0.60) it is better than a disc around the click (0.40).",
        "With one click on photographs (0.60) it is **not clearly different from** GrabCut from "
        "the click (0.63).",
        "With a box on photographs (0.60) it is **not clearly different from** the ellipse "
        "inscribed in the box (0.58).",
        "With a box on photographs (0.60) it is **worse than** GrabCut in the box (0.90).",
    ]


def test_the_supply_is_counted_by_package_and_licence(tmp_path, make_supply):
    assert card.describe_supply(make_supply(tmp_path)) == [
        "| what | package | licence there | images | objects |",
        "|---|---|---|---|---|",
        "| objects: photo | things 1.0 | CC0-1.0 | 2 | 2 |",
        "| backgrounds | grounds 2.0 | CC-BY-4.0 | 2 | - |",
    ]


def test_no_supply_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no table; build the supply first"):
        card.describe_supply(tmp_path)


@pytest.mark.parametrize(
    "history, machine, words",
    [
        (("", 0, 0, 0.0), "", "from scratch, 0 images in 0 steps"),
        (
            ("", 9, 72, 0.51),
            "one GPU",
            "from scratch, 0.5 hours on one GPU, 72 images in 9 steps",
        ),
        (("mine", 1, 8, 0.0), "a laptop", "from `mine`, on a laptop, 8 images in 1 steps"),
        (("", 2000, 1_234_567, 0.0), "", "from scratch, 1 234 567 images in 2 000 steps"),
    ],
)
def test_training_is_told_as_far_as_it_is_known(history, machine, words):
    assert card.describe_training(card.History(*history), machine) == words


def test_the_card_has_every_part(tmp_path, tiny_sam_file, make_supply):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(results_for(tiny_sam_file)))
    (folder / "evaluation.md").write_text("### Photographs\n\n| a table |\n")
    stages = tmp_path / "stages.toml"
    stages.write_text('[learn]\nstart = ""\nbatch_size = 8\n')
    log = tmp_path / "work" / "runs" / "learn" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"kind": "train", "step": 900, "images_per_second": 1.0}\n')
    path = card.build(
        make_supply(tmp_path / "work"),
        tiny_sam_file,
        folder,
        tmp_path / "MODEL_CARD.md",
        stages=stages,
        machine="a laptop",
        name="the_model",
    )
    text = path.read_text()
    size = tiny_sam_file.stat().st_size
    wanted = (
        "# the_model\n",
        "`tiny.safetensors`, " + f"{size:,} bytes".replace(",", " "),
        hashlib.sha256(tiny_sam_file.read_bytes()).hexdigest(),
        "widths 8, 12, 16, 24; strides 2, 2, 1",
        "| images | 64 px",
        "| training | from scratch, 2.0 hours on a laptop, 7 200 images in 900 steps |",
        "| licence of the weights | Apache-2.0 |",
        "| a table |",
        "- With one click on photographs (0.60)",
        "Evaluated on: a processor, torch 2.7, 2026-01-01.",
        "| objects: photo | things 1.0 | CC0-1.0 | 2 | 2 |",
        "No image is contained in the weights file.",
    )
    assert [part for part in wanted if part not in text] == []
    assert str(tmp_path) not in text


def test_the_card_tells_what_a_training_began_with(tmp_path, tiny_sam_file, make_supply):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(results_for(tiny_sam_file)))
    (folder / "evaluation.md").write_text("| a table |\n")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "README.md").write_text("Found in a drawer.\n")
    stages = tmp_path / "stages.toml"
    stages.write_text('[learn]\nstart = "start/old.safetensors"\nbatch_size = 8\n')
    places = make_supply(tmp_path / "work"), tiny_sam_file, folder, tmp_path / "CARD.md"
    text = card.build(*places, stages=stages).read_text()
    assert "| training | from `start/old.safetensors`, " in text
    assert text.endswith("## What the training began with\n\nFound in a drawer.\n")
    assert "U2-Net" not in text and "EfficientNet" not in text


def test_networks_that_taught_are_named_with_their_terms(tmp_path):
    stages = tmp_path / "stages.toml"
    stages.write_text("[common]\nthings = 0.3\n[learn]\nthings = 0.0\n[finish]\n")
    found = card.describe_networks(stages)
    assert "DUTS, are for academic use" in found and "EfficientNet" not in found
    stages.write_text('[learn]\nteacher = "lite2"\nthings = 0.0\n')
    assert "learnt to give the maps of EfficientNet-Lite2" in card.describe_networks(stages)


def test_figures_of_other_weights_are_refused(tmp_path, tiny_sam_file):
    results = results_for(tiny_sam_file)
    results["weights"]["tiny"]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match="Evaluate these weights, then write the card"):
        card.write_card(tiny_sam_file, results, "", [], "")
