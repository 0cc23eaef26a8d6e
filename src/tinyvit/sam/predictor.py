"""``SamPredictor``: one image, then prompts; segment-anything's class on tinyvit's engine.

Methods, arguments, results and attributes are segment-anything's. What differs: images may be
files, any orientation in EXIF is applied, wrong prompts are errors in words, and the encoder and
the decoder run in their fast forms. ``Segmenter`` is the way for many images or many prompts.

Shapes: B prompts, N points, K masks of a prompt, C channels, H W the image, h w the embedding's
grid, h4 w4 the low-res logits. Sizes are (height, width).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.image_spec import Placement
from tinyvit.images.decode import ImageSource
from tinyvit.images.preprocess import PreparedImage, ResizeLongestSide
from tinyvit.inference import Backend, Engine
from tinyvit.inference.backend import BackendName, choose_device

from .build import build_sam
from .decoder import PromptDecoder, PromptTensors, stack_prompts
from .embedding import ImageEmbedding, ImageEncoder, prepare_image, prepare_resized
from .model import Sam
from .prompts import Prompt, Size
from .segmenter import enlarge

if TYPE_CHECKING:
    from typing_extensions import Self


_NOT_SET = "An image must be set with .set_image(...) before mask prediction."


class SamPredictor:
    """Segments one image by prompts.

    It holds the image that was set last: give each thread a predictor of its own (they may share
    ``sam_model``), or use ``Segmenter``, which holds none.

    Args:
        sam_model: The model; never changed. When its weights change, what was derived of them is
            made anew, and an image that was encoded before must be set again.
        engine: Runs ``sam_model.image_encoder``; None makes one from the arguments that follow.
        backend: As for ``tinyvit.Engine``.
        precision: As for ``tinyvit.Engine``.
        device: Where to compute: a torch device, "auto", or None for where the model is now.
        pad: As for ``tinyvit.Engine``: False spends no work on padding, with other numbers.
        decoder_precision: "fp32"; or "fp64", three times slower, for masks and scores that are
            exact to float32's last digit.

    Raises:
        TypeError: ``sam_model`` is no ``Sam``.
        ValueError: An engine and arguments for one, or values that ``Engine`` refuses.
        MissingExtraError: The package of the backend is not installed.

    Example:
        >>> import numpy as np
        >>> from tinyvit.sam import SamPredictor
        >>> predictor = SamPredictor.from_checkpoint()
        >>> predictor.set_image(np.zeros((48, 64, 3), np.uint8))
        >>> masks, scores, logits = predictor.predict(np.array([[32, 24]]), np.array([1]))
        >>> masks.shape, scores.shape, logits.shape
        ((3, 48, 64), (3,), (3, 64, 64))
    """

    def __init__(
        self,
        sam_model: Sam,
        *,
        engine: Engine | None = None,
        backend: BackendName | Backend = "auto",
        precision: str = "fp32",
        device: str | torch.device | None = None,
        pad: bool | None = None,
        decoder_precision: str = "fp32",
    ) -> None:
        if not isinstance(sam_model, Sam):
            raise TypeError(
                f"SamPredictor wants a Sam, as sam_model_registry makes it, came "
                f"{type(sam_model).__name__}; SamPredictor.from_checkpoint takes a name or a path"
            )
        place = choose_device(str(sam_model.device if device is None else device))
        self.model = sam_model
        own = isinstance(backend, str)
        self._encoder = ImageEncoder(
            sam_model,
            engine=engine,
            backend=backend,
            precision=precision,
            device=place if own else "auto",
            pad=pad,
        )
        self.transform = ResizeLongestSide(max(self._encoder.image_spec.size))
        self._decoder = PromptDecoder(sam_model, place, decoder_precision)
        self.reset_image()

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
        """A predictor for a checkpoint.

        Args:
            checkpoint: A name of ``tinyvit.list_checkpoints()``, or the path of a file that holds
                a whole SAM; None takes the embedded weights.
            engine: As for the class.
            backend: As for the class.
            precision: As for the class.
            device: As for the class; "auto" takes a GPU if there is one.
            pad: As for the class.
            decoder_precision: As for the class.

        Returns:
            The predictor.

        Raises:
            CheckpointError: The file cannot be read, or holds no whole SAM.
            DownloadError: The checkpoint cannot be fetched.
            ValueError: A value that the class refuses.
        """
        sam = build_sam(DEFAULT_CHECKPOINT if checkpoint is None else checkpoint)
        return cls(
            sam,
            engine=engine,
            backend=backend,
            precision=precision,
            device=device,
            pad=pad,
            decoder_precision=decoder_precision,
        )

    # -- the image ---------------------------------------------------------------------------

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
        self._encode(prepare_image(image, image_format, self.model.image_format, spec))

    def set_torch_image(self, transformed_image: Tensor, original_image_size: Size) -> None:
        """Encode an image that has been resized already.

        Args:
            transformed_image: RGB in 0..255, [1, 3, h, w], its longer side the model's; as
                ``transform.apply_image_torch`` gives it.
            original_image_size: (H, W) of the image before resizing.

        Raises:
            ValueError: Another shape.
        """
        self.reset_image()
        spec = self._encoder.image_spec
        self._encode(prepare_resized(transformed_image, original_image_size, spec))

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
        features = self._current()
        is_ours = features is self._made_features
        return ImageEmbedding(
            features[0],
            self._placement(),
            self._encoder.image_spec,
            self._made_by if is_ours else None,
            self._interm_features if is_ours else None,
        )

    def get_image_embedding(self) -> Tensor:
        """The image's features [1, C, h, w], float32 on ``device``.

        Raises:
            RuntimeError: No image is set.
        """
        return self._current()

    def reset_image(self) -> None:
        """Forget the image."""
        self.is_image_set = False
        self.features: Tensor | None = None
        self.original_size: Size | None = None
        self.input_size: Size | None = None
        self._interm_features: Tensor | None = None
        self._made_features: Tensor | None = None
        self._made_by: str | None = None

    @property
    def device(self) -> torch.device:
        """Where masks are computed."""
        return torch.device(self._decoder.device)

    # -- prompts -------------------------------------------------------------------------------

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
            box: [4], (x0, y0, x1, y1) in pixels of the original image.
            mask_input: [1, h4, w4] low-res logits of an earlier prediction; or [H, W] bool.
            multimask_output: Give the three masks of an ambiguous prompt instead of one.
            return_logits: Give logits instead of masks.
            hq_token_only: For Light HQ-SAM: give the high-quality mask alone.

        Returns:
            (masks [K, H, W] bool, or float32 logits; predicted IoU [K] float32; low-res logits
            [K, h4, w4] float32).

        Raises:
            RuntimeError: No image is set, or the encoder's weights have changed since.
            ValueError: The prompt is none, not finite, outside of the image, or of a wrong shape.
        """
        features = self._current()
        if point_coords is not None and point_labels is None:
            raise ValueError(
                "point_labels must be supplied if point_coords is supplied: 1 (the object) or 0 "
                "(not the object) for each point"
            )
        prompt = Prompt(point_coords, point_labels, box, mask_input)
        placement = self._placement()
        low_res_size = self._decoder.low_res_size(features)
        prompt.check_in(placement.original_size, low_res_size)
        tensors = stack_prompts([prompt], placement, low_res_size, self._decoder.frame(features))
        masks, scores, low_res = self._predict(
            features, tensors, multimask_output, return_logits, hq_token_only
        )
        return masks[0].numpy(), scores[0].cpu().numpy(), low_res[0].cpu().numpy()

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
        """Segment what each of several prompts means; coordinates in the model's frame.

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
        features = self._current()
        points = None
        if point_coords is not None and point_labels is not None:
            points = point_coords, point_labels
        elif point_coords is not None or point_labels is not None:
            raise ValueError("point_coords and point_labels go together; came only one of them")
        tensors = PromptTensors(points, boxes, mask_input)
        masks, scores, low_res = self._predict(
            features, tensors, multimask_output, return_logits, hq_token_only
        )
        return masks.to(self.device), scores, low_res

    # -- inside --------------------------------------------------------------------------------

    def _encode(self, prepared: PreparedImage) -> None:
        (embedding,) = self._encoder.encode_prepared([prepared])
        self._take(embedding)

    def _take(self, embedding: ImageEmbedding) -> None:
        self.reset_image()
        self.features = self._made_features = embedding.features[None].to(self.device)
        self.original_size = embedding.placement.original_size
        self.input_size = embedding.placement.resized_size
        self._interm_features = embedding.interm_features
        self._made_by = embedding.weights_sha256
        self.is_image_set = True

    def _current(self) -> Tensor:
        """The features, unless there are none, or of weights that are no more."""
        if not self.is_image_set or self.features is None:
            raise RuntimeError(_NOT_SET)
        is_ours = self.features is self._made_features and self._made_by is not None
        if is_ours and self._encoder.weights_sha256() != self._made_by:
            raise RuntimeError(
                "the image encoder's weights have changed since the image was encoded; call "
                ".set_image(...) again"
            )
        return self.features

    def _placement(self) -> Placement:
        """Made of the public attributes, which callers may set by themselves."""
        if self.original_size is None or self.input_size is None:
            raise RuntimeError(_NOT_SET)
        height, width = self.input_size
        spec = self._encoder.image_spec
        frame = spec.size if spec.pad else (height, width)
        return Placement(self.original_size, (height, width), (0, 0), frame)

    def _predict(
        self,
        features: Tensor,
        prompts: PromptTensors,
        multimask_output: bool,
        as_logits: bool,
        hq_token_only: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(masks on the CPU, predicted IoU and low-res logits on the device)."""
        low_res, scores = self._decoder.decode(
            features,
            prompts,
            multimask_output,
            # Features that a caller put in by hand have no early map here.
            interm_features=self._interm_features if features is self._made_features else None,
            hq_token_only=hq_token_only,
        )
        threshold = None if as_logits else self.model.mask_threshold
        masks = enlarge(low_res, self._placement(), self._decoder.pitch, threshold)
        return masks, scores, low_res
