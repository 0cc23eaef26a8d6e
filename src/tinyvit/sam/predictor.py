"""``SamPredictor``: one image, then prompts; segment-anything's class on tinyvit's engine.

Methods, arguments, results and attributes are segment-anything's. What differs: images may be
files, any orientation in EXIF is applied, wrong prompts are errors in words, and the encoder and
the decoder run in their fast forms. ``Segmenter`` is the way for many images or many prompts.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.image_spec import Placement
from tinyvit.images.decode import ImageSource
from tinyvit.images.preprocess import ResizeLongestSide
from tinyvit.inference.bundle import is_exported
from tinyvit.inference.derived import version_of
from tinyvit.lazy import need_torch

from .embedding import ImageEmbedding, ImageEncoder, prepare_image, prepare_resized
from .open import AnySam, StoredSam, choose_decoder, open_sam
from .prompts import Prompt, PromptBatch, Size, stack_prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import Self

    from tinyvit.inference.backend import Backend, BackendName, Prepared
    from tinyvit.inference.engine import Engine

    from .model import Sam

_NOT_SET = "An image must be set with .set_image(...) before mask prediction."


class SamPredictor:
    """Segments one image by prompts.

    It holds the image that was set last: give each thread a predictor of its own (they may share
    ``sam_model``), or use ``Segmenter``, which holds none. It can be copied and pickled.

    Args:
        sam_model: The model, which is never changed; or the name of a checkpoint, or the path of a
            file or folder that holds a whole SAM; or a folder of ``tinyvit export``, for which
            torch is not needed. When its weights change, what was derived of them is rebuilt, and
            an image that was encoded before must be set again.
        engine: Runs ``sam_model.image_encoder``; None makes one from the arguments that follow.
        backend: As for ``tinyvit.Engine``.
        precision: As for ``tinyvit.Engine``.
        device: Where to compute: a torch device, "auto", or None for where the model is now.
        pad: As for ``tinyvit.Engine``: False spends no work on padding, with other numbers.
        decoder_precision: "fp32"; or "fp64", three times slower, for masks and scores that are
            exact to float32's last digit.
        fast: False runs the model's own modules, as training wants it, instead of fast forms.

    Raises:
        TypeError: ``sam_model`` is neither a ``Sam`` nor the name or path of one.
        ValueError: An engine and arguments for one, or values that ``Engine`` refuses.
        MissingExtraError: The package of the backend is not installed.

    Examples:
        >>> import numpy as np
        >>> from tinyvit.sam import SamPredictor
        >>> predictor = SamPredictor.from_checkpoint()
        >>> predictor.set_image(np.zeros((48, 64, 3), np.uint8))
        >>> masks, scores, logits = predictor.predict(np.array([[32, 24]]), np.array([1]))
        >>> masks.shape, scores.shape, logits.shape
        ((3, 48, 64), (3,), (3, 64, 64))
    """

    original_size: Size | None
    input_size: Size | None
    _embedding: ImageEmbedding | None
    _prepared: Prepared | None
    _features: Tensor | None

    def __init__(
        self,
        sam_model: AnySam | str | os.PathLike[str],
        *,
        engine: Engine | None = None,
        backend: BackendName | Backend = "auto",
        precision: str = "fp32",
        device: str | torch.device | None = None,
        pad: bool | None = None,
        decoder_precision: str = "fp32",
        fast: bool = True,
    ) -> None:
        is_plain = engine is not None or not fast or decoder_precision != "fp32"
        kind = "torch" if is_plain and not is_exported(sam_model) else backend
        model = open_sam(sam_model, "SamPredictor", kind, device, precision=precision)
        self._encoding = engine, backend, precision, device, pad, None, 8, fast
        self._decoding = decoder_precision, fast
        self._use(model)
        self.transform = ResizeLongestSide(max(self._encoder.image_spec.size))
        self.reset_image()

    def _use(self, model: AnySam) -> None:
        self._model = model
        self._encoder = ImageEncoder(model, *self._encoding)
        engine, device = self._encoder.engine, self._encoder.device
        self._decoder = choose_decoder(model, engine, device, *self._decoding)

    @property
    def model(self) -> Sam:
        """The model; one that was opened without torch is built when it is asked for."""
        if isinstance(self._model, StoredSam):
            self._use(self._model.build())
            self._prepared = None
        return cast("Sam", self._model)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        engine: Engine | None = None,
        backend: BackendName | Backend = "auto",
        precision: str = "fp32",
        device: str | torch.device | None = "auto",
        pad: bool | None = None,
        decoder_precision: str = "fp32",
    ) -> Self:
        """A predictor for a checkpoint, on a GPU if there is one.

        ``checkpoint`` is a name of ``tinyvit.list_checkpoints()``, or the path of a file or folder
        that holds a whole SAM; None takes the embedded weights. All other arguments are those of
        the class; the device "auto" takes a GPU if there is one.

        Raises:
            CheckpointError: The file cannot be read, or holds no whole SAM.
            DownloadError: The checkpoint cannot be fetched.
            ValueError: A value that the class refuses.
        """
        return cls(
            DEFAULT_CHECKPOINT if checkpoint is None else checkpoint,
            engine=engine,
            backend=backend,
            precision=precision,
            device=device,
            pad=pad,
            decoder_precision=decoder_precision,
        )

    def set_image(self, image: ImageSource, image_format: str = "RGB") -> None:
        """Encode an image for the predictions that follow.

        Args:
            image: [H, W, 3] uint8, 0..255. Also anything that ``tinyvit.images.decode`` reads: a
                path, bytes, a PIL image, arrays in grey or with transparency; files come upright.
            image_format: Order of an array's channels, "RGB" or "BGR".

        Raises:
            ImageError: The image cannot be read, or the array is no image.
            TypeError: It is nothing that could be an image.
            ValueError: Another format, or "BGR" for something that says its order itself.
        """
        self.reset_image()
        spec = self._encoder.image_spec
        prepared = prepare_image(image, image_format, self._model.image_format, spec)
        self._take(*self._encoder.encode_prepared([prepared]))

    def set_torch_image(self, transformed_image: Tensor, original_image_size: Size) -> None:
        """Encode an image that has been resized already.

        Args:
            transformed_image: RGB in 0..255, [1, 3, h, w], its longer side the model's; as
                ``transform.apply_image_torch`` gives it.
            original_image_size: (H, W) of the image before resizing.

        Raises:
            ValueError: Another shape.
        """
        need_torch("SamPredictor.set_torch_image")
        self.reset_image()
        spec = self._encoder.image_spec
        prepared = prepare_resized(transformed_image, original_image_size, spec)
        self._take(*self._encoder.encode_prepared([prepared]))

    def set_embedding(self, embedding: ImageEmbedding) -> None:
        """Take an image that was encoded before, here or elsewhere.

        Args:
            embedding: Made by the same image encoder.

        Raises:
            ValueError: Another encoder made it, or of an image prepared otherwise.
        """
        self._encoder.check(embedding)
        self._take(embedding)

    @property
    def embedding(self) -> ImageEmbedding:
        """The image's embedding, to be kept and set again.

        Raises:
            RuntimeError: No image is set.
        """
        return replace(self._current(), placement=self._placement())

    @property
    def features(self) -> Tensor | None:
        """The image's features [1, C, h, w] float32 on ``device``; None without an image.

        They may be set by hand, with ``original_size``, ``input_size`` and ``is_image_set``.
        """
        if self._features is None and self._embedding is not None:
            need_torch("SamPredictor.features")
            import torch

            self._features = torch.from_numpy(self._embedding.features)[None].to(self.device)
            self._version = version_of(self._features)
        return self._features

    @features.setter
    def features(self, features: Tensor | None) -> None:
        self._features, self._version = features, -1  # of no tensor: they are not ours

    def get_image_embedding(self) -> Tensor:
        """The image's features [1, C, h, w], float32 on ``device``.

        Raises:
            RuntimeError: No image is set.
        """
        self._current()
        return cast("Tensor", self.features)

    def reset_image(self) -> None:
        """Forget the image."""
        self.is_image_set = False
        self.original_size = self.input_size = None
        self._embedding = self._prepared = self._features = None
        self._version = -1

    @property
    def device(self) -> torch.device:
        """Where masks are computed."""
        need_torch("SamPredictor.device")
        import torch

        return torch.device(self._decoder.device)

    def __repr__(self) -> str:
        size = self.original_size
        image = "no image set" if size is None else f"image {size[0]}x{size[1]}"
        return f"SamPredictor({image}; {self._encoder.engine!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    def predict(
        self,
        point_coords: NDArray[np.generic] | None = None,
        point_labels: NDArray[np.generic] | None = None,
        box: NDArray[np.generic] | None = None,
        mask_input: NDArray[np.generic] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> tuple[NDArray[np.generic], NDArray[np.float32], NDArray[np.float32]]:
        """Segment what one prompt means.

        Args:
            point_coords: [N, 2], (x, y) in pixels of the original image.
            point_labels: [N]: 1 the object, 0 not the object.
            box: [4], (x0, y0, x1, y1) in pixels of the original image; or [N, 4], N boxes of N
                objects, with ``multimask_output=False`` and without points and masks.
            mask_input: [1, h4, w4] low-res logits of an earlier prediction; or [H, W] bool.
            multimask_output: Give the three masks of an ambiguous prompt instead of one.
            return_logits: Give logits instead of masks.
            hq_token_only: For Light HQ-SAM: give the high-quality mask alone.

        Returns:
            (masks [K, H, W] bool, or float32 logits; predicted IoU [K] float32; low-res logits
            [K, h4, w4] float32); for N > 1 boxes [N, 1, H, W], [N, 1] and [N, 1, h4, w4].

        Raises:
            RuntimeError: No image is set, or the encoder's weights have changed since.
            ValueError: The prompt is none, not finite, outside of the image, or of a wrong shape.
        """
        embedding, placement = self._current(), self._placement()
        if point_coords is not None and point_labels is None:
            raise ValueError(
                "point_labels must be supplied if point_coords is supplied: 1 (the object) or 0 "
                "(not the object) for each point"
            )
        is_many = box is not None and np.ndim(box) == 2 and len(box) > 1
        if is_many and (point_coords is not None or mask_input is not None):
            raise ValueError(
                f"points and a mask go with one box, came {len(cast(Any, box))}; give several "
                "boxes alone, or prompts of any kind to Segmenter"
            )
        if is_many and multimask_output:
            raise ValueError(
                f"the three masks of multimask_output are for one box, came {len(cast(Any, box))}; "
                "give several boxes with multimask_output=False, or to predict_torch or Segmenter"
            )
        if is_many:
            prompts = [Prompt(box=one) for one in cast(Any, box)]
        else:
            prompts = [Prompt(point_coords, point_labels, box, mask_input)]
        for prompt in prompts:
            prompt.check_in(placement.original_size, embedding.low_res_size)
        stride = self._decoder.logit_stride
        batch = stack_prompts(prompts, placement, embedding.low_res_size, stride)
        low_res, scores = self._decoder.decode(
            self._prepare(embedding), batch, multimask_output, hq_token_only=hq_token_only
        )
        threshold = None if return_logits else self._model.mask_threshold
        if not is_many:
            low_res, scores = low_res[0], scores[0]
        return self._decoder.masks(low_res, placement, threshold), scores, low_res

    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Segment what each of several prompts means; coordinates in pixels of the model's input.

        Args:
            point_coords: [B, N, 2], (x, y), as ``transform.apply_coords_torch`` gives them.
            point_labels: [B, N]: 1 the object, 0 not the object, -1 no point at all.
            boxes: [B, 4], as ``transform.apply_boxes_torch`` gives them.
            mask_input: [B, 1, h4, w4] low-res logits of an earlier prediction.
            multimask_output: Give the three masks of an ambiguous prompt instead of one.
            return_logits: Give logits instead of masks.
            hq_token_only: For Light HQ-SAM: give the high-quality mask alone.

        Returns:
            (masks [B, K, H, W] bool, or float32 logits; predicted IoU [B, K]; low-res logits
            [B, K, h4, w4]), on ``device``.

        Raises:
            RuntimeError: No image is set, or the encoder's weights have changed since.
            ValueError: The prompts are none, not finite, or of a wrong shape.
        """
        need_torch("SamPredictor.predict_torch")
        import torch

        embedding = self._current()
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels go together; came only one of them")
        points = None
        if point_coords is not None:
            coords = _array("point_coords", point_coords, ("B", "N", 2))
            labels = _array("point_labels", point_labels, coords.shape[:2]).astype(np.int64)
            if unknown := sorted(set(labels.ravel().tolist()) - {-1, 0, 1}):
                raise ValueError(
                    f"labels of points must be 1, 0, or -1 for no point at all; came {unknown}"
                )
            points = coords, labels
        batch = PromptBatch(
            points,
            None if boxes is None else _array("boxes", boxes, ("B", 4)),
            None if mask_input is None else _array("mask_input", mask_input, ("B", 1, "h4", "w4")),
        )
        low_res, scores = self._decoder.decode(
            self._prepare(embedding), batch, multimask_output, hq_token_only=hq_token_only
        )
        threshold = None if return_logits else self._model.mask_threshold
        found = self._decoder.masks(low_res, self._placement(), threshold), scores, low_res
        masks, iou, logits = (torch.from_numpy(array).to(self.device) for array in found)
        return masks, iou, logits

    def _take(self, embedding: ImageEmbedding) -> None:
        self.reset_image()
        self._embedding = embedding
        self.original_size = embedding.placement.original_size
        self.input_size = embedding.placement.resized_size
        self.is_image_set = True

    def _current(self) -> ImageEmbedding:
        """The embedding, or one of features that were put in by hand or written to since."""
        features = self._features
        if not self.is_image_set or (features is None and self._embedding is None):
            raise RuntimeError(_NOT_SET)
        if features is not None and version_of(features) != self._version:
            spec = self._encoder.image_spec
            self._embedding = ImageEmbedding(cast(Any, features[0]), self._placement(), spec)
            self._prepared, self._version = None, version_of(features)
        embedding = cast(ImageEmbedding, self._embedding)
        if embedding.weights_sha256 not in (None, self._encoder.weights_sha256()):
            raise RuntimeError(
                "the image encoder's weights have changed since the image was encoded; call "
                ".set_image(...) again"
            )
        return embedding

    def _prepare(self, embedding: ImageEmbedding) -> Any:
        if self._prepared is None:
            self._prepared = self._decoder.prepare(embedding)
        return self._prepared

    def _placement(self) -> Placement:
        """Made of the public attributes, which callers may set by themselves."""
        if self.original_size is None or self.input_size is None:
            raise RuntimeError(_NOT_SET)
        spec, (height, width) = self._encoder.image_spec, self.input_size
        model_size = spec.size if spec.pad else (height, width)
        return Placement(self.original_size, (height, width), (0, 0), model_size)


def _array(name: str, tensor: Tensor | None, shape: tuple[int | str, ...]) -> NDArray[np.float32]:
    """A caller's tensor as an array of finite numbers of a shape, in which letters stand for any.

    numpy has no bfloat16, and float16 is as good in float32.
    """
    if not hasattr(tensor, "detach"):
        raise ValueError(f"{name} must be a tensor, came {type(tensor).__name__}")
    array = np.array(cast("Tensor", tensor).detach().cpu().float().numpy())
    wanted = ", ".join(map(str, shape))
    sides = zip(shape, array.shape, strict=False)
    if len(shape) != array.ndim or any(isinstance(x, int) and x != side for x, side in sides):
        raise ValueError(f"{name} must have the shape [{wanted}]; came {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers; came some that are NaN or infinite")
    return array
