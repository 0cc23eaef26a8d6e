"""Data sets as other tools write them. Right values: squares are counted by hand (20 x 20 = 400
pixels by every rule), run lengths and rings follow pycocotools, labelme's masks its own source."""

import base64
import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from tinyvit.images.mask_ops import encode
from tinyvit.train import open_data_set, open_mask_set
from tinyvit.train.data.annotations import read_mask_file

from .tiny_images import png, write_folder

RING = [10, 10, 30, 10, 30, 30, 10, 30]
POINTS = [[10, 10], [30, 10], [30, 30], [10, 30]]
ROW = {"id": 1, "file_name": "a.png", "height": 40, "width": 60}
OBJECT = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [RING]}


def image(path, size=(40, 60), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path, **options)


def coco(path, images=(ROW,), annotations=(OBJECT,), encoding="utf-8", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": list(images), "annotations": list(annotations), **more}
    path.write_text(json.dumps(content), encoding=encoding)
    return path


def labelme(path, *shapes, encoding="utf-8", **more):
    content = {"imagePath": "a.png", "imageData": None, "shapes": list(shapes), **more}
    path.write_text(json.dumps(content), encoding=encoding)
    return path


def areas(found):
    return [int(mask.sum()) for sample in found for mask in sample.load()[1]]


# -- files and names ---------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark(tmp_path, encoding):
    image(tmp_path / "a.png")
    assert areas(open_mask_set(coco(tmp_path / "c.json", encoding=encoding))) == [400]
    (tmp_path / "c.json").unlink()
    labelme(tmp_path / "a.json", {"label": "a", "points": POINTS}, encoding=encoding)
    assert areas(open_mask_set(tmp_path)) == [400]


@pytest.mark.parametrize(
    "name",
    ["sub\\a.png", "..\\..\\upload\\sub\\a.png", "C:\\x\\a.png", "/gone/a.png", "./sub/a.png",
     "/data/local-files/?d=sub/a.png", "sub/%61.png"],
)  # fmt: skip
def test_names_of_other_machines(tmp_path, name):
    image(tmp_path / ("a.png" if "x" in name or "gone" in name else "sub/a.png"))
    path = coco(tmp_path / "c.json", [ROW | {"file_name": name}])
    assert areas(open_mask_set(path)) == [400]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_tables_of_excel(tmp_path, mark):
    image(tmp_path / "img" / "a.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[5:10, 5:15] = 255
    (tmp_path / "m.png").write_bytes(png(mask))
    text = f"Picture{mark}Mask{mark}label\nimg\\a.png{mark}m.png{mark}cat\n"
    (tmp_path / "m.csv").write_text(f"sep={mark}\n{text}", encoding="utf-8-sig")
    found = open_mask_set(tmp_path / "m.csv")
    assert (areas(found), found[0].labels) == ([50], ("cat",))
    write_folder(tmp_path / "c", ("a", "b"), count=2)
    rows = [f"c\\{name}\\{number}.png{mark}{name}" for name in "ab" for number in (0, 1)]
    (tmp_path / "l.csv").write_text("\n".join([f"path{mark}label", *rows]), encoding="utf-16")
    assert open_data_set(tmp_path / "l.csv", val_part=0.5).classes == ("a", "b")


# -- where exporters put things ----------------------------------------------------------------


@pytest.mark.parametrize(
    "json_name, image_name",
    [
        ("annotations/instances_default.json", "images/a.png"),  # CVAT
        ("annotations/instances_default.json", "images/default/a.png"),  # datumaro
        ("annotations/instances_val2017.json", "val2017/a.png"),  # COCO
        ("result.json", "images/a.png"),  # Label Studio
        ("_annotations.coco.json", "a.png"),  # Roboflow
    ],
)
def test_folders_of_exporters(tmp_path, json_name, image_name):
    image(tmp_path / image_name)
    path = coco(tmp_path / json_name)
    assert areas(open_mask_set(tmp_path)) == areas(open_mask_set(path)) == [400]
    captions = coco(path.parent / "captions_val2017.json", annotations=[{"image_id": 1}])
    if path.name.startswith("instances"):
        assert open_mask_set(tmp_path).faults == ()
    captions.unlink()


def test_a_folder_of_coco_files_and_of_sa_1b(tmp_path):
    for number in (1, 2):
        image(tmp_path / "p" / f"{number}.png")
        coco(tmp_path / "m" / f"{number}.json", [ROW | {"file_name": f"{number}.png"}])
        row = {"id": 5, "segmentation": encode(np.eye(40, 60) > 0)}
        about = {"image_id": number, "width": 60, "height": 40, "file_name": f"{number}.png"}
        sa1b = tmp_path / "p" / f"sa_{number}.json"
        sa1b.write_text(json.dumps({"image": about, "annotations": [row]}))
    assert areas(open_mask_set(tmp_path / "m", tmp_path / "p")) == [400, 400]
    assert areas(open_mask_set(tmp_path / "p")) == [40, 40]


def test_images_that_are_not_found_name_the_option(tmp_path):
    coco(tmp_path / "c.json")
    with pytest.raises(ValueError, match=r"say with images=... \(--images\)"):
        open_mask_set(tmp_path / "c.json")


# -- damaged rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        None, "text", 7,
        ROW | {"id": 2, "file_name": None}, ROW | {"id": 2, "file_name": ["a.png"]},
        ROW | {"id": [1]}, ROW | {"id": None},
    ],
)  # fmt: skip
def test_a_damaged_row_of_an_image_costs_itself_only(tmp_path, row):
    image(tmp_path / "a.png")
    categories = [None, {"id": None, "name": None}, {"id": [1], "name": 3}]
    path = coco(tmp_path / "c.json", [ROW, row], categories=categories)
    found = open_mask_set(path)
    assert areas(found) == [400]
    assert any("images 1" in fault for fault in found.faults)


@pytest.mark.parametrize(
    "size", [{"height": None}, {"height": "x"}, {"width": None, "height": None}, {"height": 0}]
)
def test_a_size_that_says_nothing_is_none(tmp_path, size):
    image(tmp_path / "a.png")
    assert areas(open_mask_set(coco(tmp_path / "c.json", [ROW | size]))) == [400]
    assert areas(open_mask_set(coco(tmp_path / "c.json", [{"id": 1, "file_name": "a.png"}])))


@pytest.mark.parametrize(
    "segmentation",
    [
        None, [], 5, "x", {}, {"size": None, "counts": [1]}, {"size": [40, 60], "counts": None},
        {"size": [40, 60], "counts": [400, None]}, {"size": [None, 60], "counts": [400]},
        {"size": [40, 60], "counts": [400, -10, 2010]}, {"size": [40, 60], "counts": "?!"},
        [[1, 2]], [None], [["a", "b"]], [[float("nan")] * 6], [[100, 100, 120, 100, 120, 120]],
    ],
)  # fmt: skip
def test_a_damaged_object_costs_itself_only_and_is_named_by_its_id(tmp_path, segmentation):
    image(tmp_path / "a.png")
    bad = {"id": 77, "image_id": 1, "category_id": [1], "segmentation": segmentation}
    found = open_mask_set(coco(tmp_path / "c.json", annotations=[bad, None, OBJECT]))
    assert areas(found) == [400]
    assert any("annotation 77" in fault for fault in found.faults)


def test_bad_rings_cost_themselves_only(tmp_path):
    """As detectron2: rings of an even number of at least six numbers stay."""
    image(tmp_path / "a.png")
    for bad in ([20, 20], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], []):
        rows = [OBJECT | {"id": 9, "segmentation": [bad, RING]}]
        found = open_mask_set(coco(tmp_path / "c.json", annotations=rows))
        assert (areas(found), len(found.faults)) == ([400], 1)
        assert "annotation 9: polygon 0 of 2" in found.faults[0]
    rows = [OBJECT | {"segmentation": RING}]  # not in a list
    assert areas(open_mask_set(coco(tmp_path / "c.json", annotations=rows))) == [400]


def test_masks_of_a_brush_are_objects_whatever_iscrowd_says(tmp_path):
    image(tmp_path / "a.png")
    counts = {"size": [40, 60], "counts": [400, 10, 1990]}
    rows = [{"id": 1, "image_id": "1", "iscrowd": 1, "segmentation": counts}]
    assert areas(open_mask_set(coco(tmp_path / "c.json", annotations=rows))) == [10]


# -- labelme and its relatives -----------------------------------------------------------------


def test_shapes_of_labelme(tmp_path):
    """A mask lies between two corners, both inside: labelme puts it at [y1:y2+1, x1:x2+1]."""
    image(tmp_path / "a.png")
    small = np.zeros((21, 21), np.uint8)
    small[3:9, 4:12] = 255
    mask = {
        "label": "m", "shape_type": "mask", "points": [[10, 10], [30, 30]],
        "mask": base64.b64encode(png(small)).decode(),
    }  # fmt: skip
    square = {"label": None, "points": POINTS, "group_id": None}
    kinds = ("rectangle", "rotation", None, "polygon")
    bad = [None, "x", {"points": None}, mask | {"mask": "!"}, mask | {"mask": None}]
    labelme(tmp_path / "a.json", mask, *[square | {"shape_type": k} for k in kinds], *bad)
    found = open_mask_set(tmp_path)
    assert areas(found) == [48, 400, 400, 400, 400]
    assert np.argwhere(found[0].load()[1][0]).min(0).tolist() == [13, 14]
    assert len(found.faults) == len(bad)
    outside = mask | {"points": [[-15, -5], [5, 15]]}
    labelme(tmp_path / "a.json", outside, square)
    assert "shape 0: the mask is empty" in open_mask_set(tmp_path).faults[0]


def test_an_image_inside_of_labelme(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (60, 40), (9, 8, 7)).save(data, "PNG")
    inside = base64.b64encode(data.getvalue()).decode()
    labelme(tmp_path / "a.json", {"label": "a", "points": POINTS}, imageData=inside)
    found = open_mask_set(tmp_path)
    assert areas(found) == [400]
    assert found[0].load()[0][0, 0].tolist() == [9, 8, 7]


# -- files of masks ----------------------------------------------------------------------------


def soft_disc():
    y, x = np.mgrid[:120, :160]
    return np.clip((40 - np.hypot(y - 60, x - 80)) * 40 + 128, 0, 255).astype(np.uint8)


def test_a_soft_mask_in_any_mode_is_one_object(tmp_path):
    soft = soft_disc()
    wanted = soft > 127
    images = {
        **{mode: Image.fromarray(soft).convert(mode) for mode in ("L", "RGB", "RGBA", "LA")},
        "254 as the most": Image.fromarray(np.minimum(soft, 254)),
        "16 bits": Image.fromarray(soft.astype(np.uint16) * 257),
        "red": Image.fromarray(np.stack([soft, soft * 0, soft * 0], -1)),
        "cut out": Image.merge("LA", (Image.new("L", (160, 120), 255), Image.fromarray(soft))),
    }
    for name, made in images.items():
        made.save(tmp_path / "m.png")
        ids = read_mask_file(tmp_path / "m.png", is_one_object=False)
        assert np.unique(ids).tolist() == [0, 1], name
        assert ((ids > 0) == wanted).all(), name
    images["RGB"].save(tmp_path / "m.jpg", quality=60)
    ids = read_mask_file(tmp_path / "m.jpg", is_one_object=False)
    assert ((ids > 0) != wanted).sum() < 30


def test_numbers_of_objects_stay_numbers(tmp_path):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4).repeat(10, 0).repeat(10, 1)
    for made in (Image.fromarray(ids), Image.fromarray(ids).convert("RGB")):
        made.save(tmp_path / "m.png")
        np.testing.assert_array_equal(read_mask_file(tmp_path / "m.png", is_one_object=False), ids)
    dots = np.zeros((60, 60), np.uint8)
    dots[::3, ::3] = np.arange(400).reshape(20, 20) % 200 + 1  # single pixels, apart
    Image.fromarray(dots).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask_file(tmp_path / "m.png", is_one_object=False), dots)
    Image.fromarray(ids * 0 + np.eye(30, 40, dtype=np.uint8) * 100).save(tmp_path / "m.png")
    assert read_mask_file(tmp_path / "m.png", is_one_object=True).sum() == 30


def test_colours_with_soft_edges_are_told(tmp_path):
    soft = soft_disc()
    image(tmp_path / "images" / "a.png", soft.shape)
    (tmp_path / "masks").mkdir()
    colours = np.stack([soft, 255 - soft, soft // 2], -1)
    Image.fromarray(colours).save(tmp_path / "masks" / "a.png")
    with pytest.warns(UserWarning, match=r"is read as \d+ objects, half .* soft edges"):
        open_mask_set(tmp_path)
    Image.fromarray(colours).save(tmp_path / "masks" / "a.jpg")
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a.jpg is a JPEG, which does not keep the colours"):
        open_mask_set(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_its_image(tmp_path, orientation):
    ids = np.zeros((40, 60), np.uint8)
    ids[2:15, 3:20] = 1
    for folder, pixels in (("images", ids * 200), ("masks", ids)):
        (tmp_path / folder).mkdir()
        made = Image.fromarray(pixels)
        exif = made.getexif()
        exif[0x0112] = orientation
        made.save(tmp_path / folder / "a.png", exif=exif)
    ((pixels, masks),) = [sample.load() for sample in open_mask_set(tmp_path)]
    assert (masks[0] == (pixels[..., 0] > 100)).all()


def test_pages_of_a_stack_are_told(tmp_path):
    pages = [Image.new("L", (6, 4), value) for value in (1, 2)]
    pages[0].save(tmp_path / "m.tif", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match="has 2 pages; the first one is taken"):
        assert read_mask_file(tmp_path / "m.tif", is_one_object=False).max() == 1


@pytest.mark.parametrize("ending, form", [("jfif", "JPEG"), ("JPE", "JPEG"), ("pgm", "PPM")])
def test_endings_that_the_commands_read(tmp_path, ending, form):
    (tmp_path / "images").mkdir()
    Image.new("L", (60, 40)).save(tmp_path / "images" / f"a.{ending}", form)
    mask = np.zeros((40, 60), np.uint8)
    mask[5:10, 5:15] = 255
    for folder in ("masks", "Masks2"):
        (tmp_path / folder).mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / f"a.{ending}", form, quality=100)
    assert areas(open_mask_set(tmp_path))[0] == pytest.approx(50, abs=3)


# -- one image in one part ---------------------------------------------------------------------


def where(part):
    return {os.path.realpath(part.source(index)) for index in range(len(part))}


def test_one_id_of_two_images_is_told(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        image(tmp_path / name)
    rows = [ROW, ROW | {"file_name": "b.png"}, ROW | {"id": 2, "file_name": "c.png"}]
    objects = [OBJECT, OBJECT | {"id": 2, "image_id": 2}]
    found = open_mask_set(coco(tmp_path / "c.json", rows, objects))
    assert [sample.name for sample in found] == ["c.png"]  # which mask is whose is not known
    assert "the id 1 is that of 'a.png' and of 'b.png'" in found.faults[0]
    with pytest.raises(ValueError, match="the id 1 is that of"):
        open_mask_set(tmp_path / "c.json", on_fault="error")


def test_an_image_of_several_ids_or_files_is_one_sample(tmp_path):
    image(tmp_path / "a.png")
    rows = [ROW, ROW | {"id": 2, "file_name": "./a.png"}]
    objects = [OBJECT, OBJECT | {"id": 2, "image_id": 2}]
    found = open_mask_set(coco(tmp_path / "c.json", rows, objects))
    assert [len(sample) for sample in found] == [2]
    (tmp_path / "c.json").unlink()
    for name in ("1.json", "2.json"):
        labelme(tmp_path / name, {"label": "a", "points": POINTS})
    assert [len(sample) for sample in open_mask_set(tmp_path)] == [2]


@pytest.mark.skipif(sys.platform == "win32", reason="links want rights there")
def test_links_and_repeated_rows_leak_nothing(tmp_path):
    write_folder(tmp_path, ("a", "b"), count=4)
    for name in "ab":
        for number in range(4):
            source = tmp_path / name / f"{number}.png"
            (tmp_path / name / f"soft{number}.png").symlink_to(source)
            os.link(source, tmp_path / name / f"hard{number}.png")
    for seed in range(3):
        found = open_data_set(tmp_path, val_part=0.3, split_seed=seed)
        assert not where(found.train) & where(found.val)
    rows = [f"{name}/{number}.png,{name}" for name in "ab" for number in range(4)]
    again = [f"./{row}" for row in rows]
    (tmp_path / "l.csv").write_text("\n".join(["path,label", *rows, *rows, *again, "a/0.png,b"]))
    found = open_data_set(tmp_path / "l.csv", val_part=0.3)
    assert not where(found.train) & where(found.val)
    assert len(found.train) + len(found.val) == 25


def test_an_image_of_both_parts_is_only_validated_on(tmp_path):
    write_folder(tmp_path, ("a", "b"), count=3)
    rows = [f"{name}/{number}.png,{name},train" for name in "ab" for number in range(3)]
    rows += ["a/0.png,a,val", "b/0.png,b,val"]
    (tmp_path / "l.csv").write_text("\n".join(["path,label,split", *rows]))
    with pytest.warns(UserWarning, match="2 images stand in both parts"):
        found = open_data_set(tmp_path / "l.csv")
    assert (len(found.train), len(found.val)) == (4, 2)
    with pytest.raises(ValueError, match="all 6 images to train on are validated on too"):
        open_data_set(tmp_path, tmp_path)


# -- parts are no classes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts", [("Train", "Test"), ("TRAIN", "dev"), ("training", "Testing"), ("train", "eval")]
)
def test_parts_in_any_spelling(tmp_path, parts):
    for part, count in zip(parts, (4, 2), strict=True):
        write_folder(tmp_path / part, ("a", "b"), count=count)
    found = open_data_set(tmp_path)
    assert (found.classes, len(found.train), len(found.val)) == (("a", "b"), 8, 4)


def test_parts_that_cannot_be_used(tmp_path):
    write_folder(tmp_path / "train", ("a", "b"), count=4)
    write_folder(tmp_path, ("unlabeled", "test"), count=2)  # images without classes
    found = open_data_set(tmp_path, val_part=0.25)
    assert (found.classes, len(found.train), len(found.val)) == (("a", "b"), 6, 2)
    write_folder(tmp_path, ("cat",), count=2)
    with pytest.raises(ValueError, match=r"'train' in .* called like parts of a data set"):
        open_data_set(tmp_path)
    write_folder(tmp_path / "vehicles", ("train", "bus"), count=2)  # a class of that name
    assert open_data_set(tmp_path / "vehicles").classes == ("bus", "train")
