"""How ``verify.py`` reaches this package; run ``python tests/golden/verify.py --adapter`` on it."""

import pathlib
import sys

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import verify

import tinyvit.modules
from tinyvit.catalog import get_variant
from tinyvit.modules import TinyViT


class Classifier(TinyViT):
    """Cream's classifier: every merge halves the map, no neck."""

    def __init__(self, **ctor):
        stages = len(ctor.get("depths", (2, 2, 6, 2)))
        super().__init__(**ctor, strides=(2,) * (stages - 1), neck_dim=None)


class HQEncoder(TinyViT):
    """Light HQ-SAM's encoder."""

    def forward(self, x):
        return self.forward_hq(x)


class Student(nn.Module):
    """EfficientSAM3's student under the names of its own files."""

    def __init__(self, variant, img_size, embed_size):
        super().__init__()
        row = get_variant(variant.replace("_224", "_sam3"))
        encoder = TinyViT(**{**row.arguments(), "img_size": img_size, "neck_size": embed_size})
        self.head, encoder.neck = encoder.neck, None
        self.backbone = nn.ModuleDict({"model": encoder})

    def forward(self, x):
        return self.head(self.backbone["model"](x))


class Adapter(verify.Adapter):
    def __init__(self, module=None):
        super().__init__(module or tinyvit.modules)

    def classifier(self, ctor):
        return Classifier(**ctor)

    def pooled(self, model, x):
        return model.forward_backbone(x).mean((2, 3))

    def bias_resize(self, table, a, b, antialias):
        from tinyvit.checkpoints.resize import resize_bias_table

        return resize_bias_table(table, b, antialias=antialias)

    def hq(self, ctor):
        return HQEncoder(**ctor)

    def litemed(self, ctor):
        return TinyViT(**ctor, stem="pointwise", head=False)

    def efficientsam3(self, variant, img_size, embed_size):
        return Student(variant, img_size, embed_size)

    def sam(self):
        from tinyvit.sam import build_sam

        return build_sam(variant="tiny_vit_5m_sam")

    def sam_predictor(self, sam):
        from tinyvit.sam import SamPredictor

        # Some scores lie near 0, with tolerances below float32's own rounding through the decoder.
        return SamPredictor(sam, decoder_precision="fp64")

    def transforms(self, target):
        from tinyvit.images.preprocess import ResizeLongestSide

        return ResizeLongestSide(target)

    def preprocess(self, image_chw, target):
        from tinyvit.image_spec import ImageSpec
        from tinyvit.images.preprocess import normalise_and_pad

        return normalise_and_pad(image_chw.to(torch.float32), ImageSpec.sam(target))
