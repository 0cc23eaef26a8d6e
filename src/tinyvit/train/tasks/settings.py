"""The settings of the tasks, as ``settings.py`` describes the loop's; no torch is loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.train.settings import (
    FREE,
    PLACE,
    Flag,
    Group,
    OnBroken,
    Range,
    SettingError,
    Settings,
    Strength,
)

if TYPE_CHECKING:
    from typing_extensions import Self

FeatureLoss: TypeAlias = Literal["mse", "huber", "whitened", "cosine"]

_DATA, _START, _TASK = Group("Data"), Group("What it starts from"), Group("What is learnt")

_Argument = Flag(metavar="DATA", kind="argument")
_Data = Annotated[str | None, Flag(metavar="DATA"), _DATA, PLACE]
_Folder = Annotated[str | None, Flag(metavar="FOLDER"), _DATA, PLACE]
_Store = Annotated[str, Flag(metavar="FOLDER"), _DATA, PLACE]
_ValPart = Annotated[float, _DATA]
_SplitSeed = Annotated[int, Range(0), _DATA]
_OnBroken = Annotated[OnBroken, _DATA, FREE]
_ValBatchSize = Annotated[int, Range(1), _DATA, FREE]
_Weights = Annotated[str | None, Flag(metavar="NAME_OR_FILE"), _START, PLACE]
_Variant = Annotated[str | None, Flag(metavar="VARIANT"), _START]
_Size = Annotated[int | None, Range(1), Flag("--img-size", "--size"), _START]
_Seed = Annotated[int, Range(0), Flag(kind="hidden")]
_Share = Annotated[float, Range(0, 1), _TASK]
_Weight = Annotated[float, Range(0), _TASK]
_Count = Annotated[int, Range(1), _TASK]


@dataclass(frozen=True)
class LabelledSettings(Settings):
    """What classification and distillation of logits have in common.

    Attributes:
        data: A folder with one subfolder for each class, or with train and val in it; a CSV file;
            a tar file, a folder of them, or a pattern such as 'train-*.tar'.
        val: The part to validate on, of any of these kinds. By default the one in the data, or some
            of it that is held out.
        val_part: Part of each class that is held out.
        split_seed: Seed of the choice of what is held out.
        model: A variant of ``tinyvit.list_models()``. By default the checkpoint's; without a
            checkpoint the weights are new.
        checkpoint: A name of ``tinyvit.list_checkpoints()`` or a file of weights. By default
            tinyvit_sam_2m, unless a model is named.
        img_size: Side of the images in pixels. By default the checkpoint's or variant's.
        window_sizes: Sides of the windows of the four stages. By default chosen for the size of
            the images.
        augment: Random changes of each image: none, some, or TinyViT's recipe for ImageNet.
        flip: Mirror half of the images; not for letters and digits.
        on_broken: An image that cannot be read is named and skipped, or ends the run.
        val_batch_size: Images validated together.
        seed: Seed of the weights that are new.
    """

    data: Annotated[str, _Argument, PLACE]
    val: _Data = None
    val_part: _ValPart = 0.1
    split_seed: _SplitSeed = 0
    model: _Variant = None
    checkpoint: _Weights = None
    img_size: _Size = None
    window_sizes: Annotated[tuple[int, ...] | None, Flag(metavar="N,N,N,N"), _START] = None
    augment: Annotated[Strength, _TASK] = "light"
    flip: Annotated[bool, _TASK] = True
    on_broken: _OnBroken = "skip"
    val_batch_size: _ValBatchSize = 64
    seed: _Seed = 0


@dataclass(frozen=True)
class ClassifySettings(LabelledSettings):
    """The settings of classification: those of ``LabelledSettings``, and how labels are softened.

    Attributes:
        mixup: Parameter of mixup, which blends images; 0 for none, 0.8 in TinyViT's recipe.
        cutmix: Parameter of cutmix, which puts parts of images into others; 0 for none, 1.0 in
            TinyViT's recipe.
        smoothing: Part of a label that is spread over all classes.
    """

    mixup: _Weight = 0.0
    cutmix: _Weight = 0.0
    smoothing: Annotated[float, Range(0, below=1), _TASK] = 0.1


@dataclass(frozen=True, kw_only=True)
class DistillLogitsSettings(LabelledSettings):
    """The settings of distillation of logits: those of ``LabelledSettings``, and the teacher's.

    Attributes:
        logits: Folder of a teacher's predictions that 'tinyvit train write-logits' wrote.
    """

    logits: _Store


@dataclass(frozen=True)
class DistillFeaturesSettings(Settings):
    """The settings of distillation of features.

    Attributes:
        loss: Distance of the maps; mse is MobileSAM's, whitened counts each channel by its
            variance.
        held_out: What is validated on and not trained on: a part of the images, or the name of a
            folder below the images' (best where images resemble each other).
        split_seed: Seed of the choice of what is held out; an image stays on its side when others
            are added.
        mask_weight: Weight of the masks' loss, which needs a SAM; 0 for none.
        points: Random points for each image, for the masks' loss.
        val_batch_size: Images validated together.
        val_points: Random points for each image when masks are validated.
    """

    loss: Annotated[FeatureLoss, _TASK] = "mse"
    held_out: Annotated[float | str, Flag(metavar="PART|FOLDER"), _DATA] = 0.1
    split_seed: _SplitSeed = 0
    mask_weight: _Weight = 0.0
    points: _Count = 4
    val_batch_size: _ValBatchSize = 16
    val_points: Annotated[int, Range(1), _DATA] = 8


@dataclass(frozen=True, kw_only=True)
class DistillFeaturesRun(DistillFeaturesSettings):
    """The settings of a whole run of it: student, teacher's features and images as well.

    Attributes:
        data: Folder of the images whose features were stored.
        features: Folder of features that 'tinyvit train store-features' wrote.
        sam: A name or file with a whole SAM: the teacher's. Then masks are validated, and the
            result is a whole SAM.
        checkpoint: What the student starts from: a name of ``tinyvit.list_checkpoints()`` or a
            file of weights. By default tinyvit_sam_2m, unless a model is named.
        model: The student's variant, of ``tinyvit.list_models()``. By default the checkpoint's;
            without a checkpoint the weights are new.
        img_size: Side of the student's images in pixels. By default the checkpoint's or variant's.
        seed: Seed of the weights that are new.
    """

    data: Annotated[str, Flag(metavar="IMAGES", kind="argument"), PLACE]
    features: _Store
    sam: _Weights = None
    checkpoint: _Weights = None
    model: _Variant = None
    img_size: _Size = None
    seed: _Seed = 0


@dataclass(frozen=True)
class SegmentSettings(Settings):
    """The settings of segmentation.

    A learning rate of 5e-4 leaves the plateau at the start quickly with these weights of the
    losses; to fine-tune trained weights, a tenth of it is safe.

    Attributes:
        data: Images with masks: COCO's JSON, a CSV of images and masks, labelme's JSON files, or a
            folder with images and masks in it.
        val: Others to validate on. By default some of the data are held out.
        images: Folder of the images, where the data do not say.
        val_images: Folder of the images to validate on, where that data do not say.
        val_part: Part of the images that is held out.
        split_seed: Seed of the choice of what is held out.
        checkpoint: A name of ``tinyvit.list_checkpoints()`` or a file with a whole SAM. The weights
            are new where it is None, or on the command line where only a model is named.
        model: A SAM variant of ``tinyvit.list_models()``. By default the checkpoint's.
        img_size: Side of the model's input in pixels. By default the checkpoint's or variant's.
        objects: Objects of an image that are prompted in a step.
        augment: Random changes of each image: none; or crop, scale, mirror image and colours.
        least_pixels: Objects with fewer pixels in the model's input are not trained on.
        box_share: Share of objects that are prompted by a box, 0 to 1.
        corrective_share: Share of steps in which clicks correct the predicted masks, 0 to 1.
        most_corrections: The most clicks that correct one object.
        focal: Weight of the focal loss.
        dice: Weight of the dice loss.
        iou: Weight of the predicted IoU's error.
        teacher: What the embedding is to resemble: a name or file of a SAM or its encoder, or an
            ONNX file that takes the same input and gives an embedding, and after it any maps.
        embedding: Weight of the distance from the teacher's embedding, each channel by its
            variance, plus 1 minus the cosine of the other maps; 0 for none.
        final_embedding: The weight of the last step, as a part of the first; it falls in a straight
            line.
        cached_features: Images whose embeddings are kept in memory, where the encoder is not
            trained and images are not changed (augment none); 0 keeps none.
        on_broken: What cannot be read is named and skipped, or ends the run.
        val_masks: The most masks to validate on.
        seed: Seed of the weights that are new.
    """

    data: Annotated[str, _Argument, PLACE]
    val: _Data = None
    images: _Folder = None
    val_images: _Folder = None
    val_part: _ValPart = 0.1
    split_seed: _SplitSeed = 0
    checkpoint: _Weights = DEFAULT_CHECKPOINT
    model: _Variant = None
    img_size: _Size = None
    objects: _Count = 4
    augment: Annotated[Literal["none", "full"], _TASK] = "full"
    least_pixels: Annotated[int, Range(0), _TASK] = 64
    box_share: _Share = 0.4
    corrective_share: _Share = 1 / 3
    most_corrections: _Count = 3
    focal: _Weight = 10.0
    dice: _Weight = 1.0
    iou: _Weight = 1.0
    teacher: _Weights = None
    embedding: _Weight = 0.0
    final_embedding: _Share = 1.0
    cached_features: Annotated[int, Range(0), _TASK] = 0
    on_broken: _OnBroken = "skip"
    val_masks: Annotated[int, Range(1), _DATA] = 200
    seed: _Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.focal + self.dice + self.embedding:
            raise SettingError("focal", "above 0 where dice and embedding are 0", self.focal)
        if self.teacher and not self.embedding:
            raise SettingError("embedding", "above 0 where there is a teacher", self.embedding)
        if self.cached_features and self.augment != "none":
            wanted = "0 without augment='none', since embeddings are kept of unchanged images"
            raise SettingError("cached_features", wanted, self.cached_features)

    @classmethod
    def from_mapping(cls, values: Mapping[str, object], source: str = "") -> Self:
        """As ``Settings.from_mapping``; a model without a checkpoint has new weights."""
        if "model" in values:
            values = {"checkpoint": None, **values}
        return super().from_mapping(values, source)
