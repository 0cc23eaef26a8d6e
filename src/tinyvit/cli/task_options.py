"""The options of ``tinyvit train`` that one task takes: a table for each task.

The names are those of the task's settings in ``tinyvit.train``; those of the loop are in
``train_options``.
"""

from __future__ import annotations

from tinyvit.cli.option_rows import Row
from tinyvit.cli.options import matching_checkpoints, matching_models

__all__ = ["CLASSIFY", "DISTILL_FEATURES", "DISTILL_LOGITS", "SEGMENT"]

DATA, START, TASK = "Data", "What it starts from", "What is learnt"

_WEIGHTS = Row(
    "checkpoint",
    "text",
    "A name of 'tinyvit models' or a file of weights. By default tinyvit_starter, unless --model "
    "is given, which starts from chance.",
    metavar="NAME_OR_FILE",
    group=START,
    is_free=True,
    complete=matching_checkpoints,
)
_VARIANT = Row(
    "model",
    "text",
    "A variant of 'tinyvit models'. By default the checkpoint's.",
    metavar="VARIANT",
    group=START,
    complete=matching_models,
)
_SIZE = Row("img_size", "int", "Side of the pictures in pixels. By default the checkpoint's or "
            "variant's.", flags=("--img-size", "--size"), group=START)  # fmt: skip
_BROKEN = Row("on_broken", "text", "A broken picture is named and left out, or ends the run.",
              "skip", words=("skip", "error"), group=DATA, is_free=True)  # fmt: skip
_SPLIT_SEED = Row("split_seed", "int", "Which pictures are held out.", 0, group=DATA)

_LABELLED = (
    Row(
        "data",
        "argument",
        "A folder with one subfolder for each class, or with train and val in it; a CSV file; a "
        "tar file, a folder of them, or a quoted pattern such as 'train-*.tar'. May be left out "
        "with --resume.",
        metavar="DATA",
        is_free=True,
    ),
    Row("val", "text", "The part to measure on, of any of these kinds. By default the one in DATA, "
        "or some of it that is held out.", metavar="DATA", group=DATA, is_free=True),
    Row("val_part", "float", "Part of each class that is held out.", 0.1, group=DATA),
    _SPLIT_SEED,
    _BROKEN,
    Row("val_batch_size", "int", "Pictures measured together.", 64, group=DATA, is_free=True),
    _WEIGHTS,
    _VARIANT,
    _SIZE,
    Row("window_sizes", "ints", "Sides of the windows of the four stages. By default chosen for "
        "the size of the pictures.", metavar="N,N,N,N", group=START),
    Row("augment", "text", "Chance that each picture goes through: none, some, or TinyViT's recipe "
        "for ImageNet.", "light", words=("none", "light", "full"), group=TASK),
    Row("flip", "flag", "Mirror half of the pictures; --no-flip for letters and digits.", True,
        group=TASK),
)  # fmt: skip

CLASSIFY = (
    *_LABELLED,
    Row("mixup", "float", "Lay pictures over each other; 0.8 in TinyViT's recipe.", 0.0,
        group=TASK),
    Row("cutmix", "float", "Put parts of pictures into others; 1.0 in TinyViT's recipe.", 0.0,
        group=TASK),
    Row("smoothing", "float", "Part of a label that is spread over all classes.", 0.1, group=TASK),
)  # fmt: skip

DISTILL_LOGITS = (
    *_LABELLED,
    Row("logits", "text", "Folder of answers that 'tinyvit train write-logits' wrote.",
        metavar="FOLDER", group=DATA, is_free=True),
)  # fmt: skip

DISTILL_FEATURES = (
    Row("data", "argument", "Folder of the pictures whose features were stored. May be left out "
        "with --resume.", metavar="PICTURES", is_free=True),
    Row("features", "text", "Folder of features that 'tinyvit train store-features' wrote.",
        metavar="FOLDER", group=DATA, is_free=True),
    Row("held_out", "part", "What is measured on and not learnt from: a part of the pictures, or "
        "the name of a folder below PICTURES.", 0.1, metavar="PART|FOLDER", group=DATA),
    _SPLIT_SEED,
    Row("val_batch_size", "int", "Pictures measured together.", 16, group=DATA, is_free=True),
    Row("val_points", "int", "Points for each picture when masks are measured.", 8, group=DATA),
    _WEIGHTS,
    _VARIANT,
    _SIZE,
    Row("sam", "text", "A file or a name with a whole SAM: the teacher's. Then masks are measured, "
        "and the result is a whole SAM.", metavar="NAME_OR_FILE", group=START, is_free=True,
        complete=matching_checkpoints),
    Row("loss", "text", "Distance of the maps; mse is MobileSAM's.", "mse",
        words=("mse", "huber", "cosine"), group=TASK),
    Row("mask_weight", "float", "Weight of the masks' loss; wants --sam. 0 for none.", 0.0,
        group=TASK),
    Row("points", "int", "Random points for each picture, for the masks' loss.", 4, group=TASK),
)  # fmt: skip

SEGMENT = (
    Row(
        "data",
        "argument",
        "Pictures with masks: COCO's JSON, a CSV of pictures and masks, labelme's JSON files, or a "
        "folder with images and masks in it. May be left out with --resume.",
        metavar="DATA",
        is_free=True,
    ),
    Row("images", "text", "Folder of the pictures, where DATA does not say.", metavar="FOLDER",
        group=DATA, is_free=True),
    Row("val", "text", "Others to measure on. By default some of DATA are held out.",
        metavar="DATA", group=DATA, is_free=True),
    Row("val_images", "text", "Folder of the pictures of --val.", metavar="FOLDER", group=DATA,
        is_free=True),
    Row("val_part", "float", "Part of the pictures that is held out.", 0.1, group=DATA),
    _SPLIT_SEED,
    Row("val_masks", "int", "The most masks to measure on.", 200, group=DATA),
    Row("on_broken", "text", "What is broken is named and left out, or ends the run.", "skip",
        words=("skip", "error"), group=DATA, is_free=True),
    _WEIGHTS,
    _VARIANT,
    _SIZE,
    Row("objects", "int", "Objects of a picture that are prompted in a step.", 4, group=TASK),
    Row("augment", "text", "Chance: none; or crop, scale, mirror image and colours.", "full",
        words=("none", "full"), group=TASK),
    Row("least_pixels", "int", "Smaller objects are not learnt from.", 64, group=TASK),
    Row("box_share", "float", "How many objects are prompted by a box, 0 to 1.", 0.4, group=TASK),
    Row("corrective_share", "float", "In how many steps clicks correct answers. [1/3]",
        group=TASK),
    Row("most_corrections", "int", "The most clicks that correct one object.", 3, group=TASK),
    Row("focal", "float", "Weight of the focal loss.", 10.0, group=TASK),
    Row("dice", "float", "Weight of the dice loss.", 1.0, group=TASK),
    Row("iou", "float", "Weight of the predicted IoU's error.", 1.0, group=TASK),
    Row("cached_features", "int", "Embeddings kept in memory, for --move decoder with --augment "
        "none.", 0, group=TASK),
)  # fmt: skip
