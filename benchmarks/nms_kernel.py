"""Non-maximum suppression in place of torchvision's compiled one, which ``torchvision_stub`` lacks.

MobileSAM filters its masks by it. This takes milliseconds for a thousand boxes, so that it favours
nobody in a comparison of seconds. Import this module after ``torchvision_stub``.
"""

import importlib

import numpy as np
import torch


def suppress(boxes, scores, iou_threshold):
    """Indices of the boxes [N, 4] xyxy that stay, best score [N] first; ties keep their order."""
    corners = boxes.double().numpy()
    order = torch.sort(scores, stable=True, descending=True).indices.numpy()
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    kept = []
    while order.size:
        best, order = order[0], order[1:]
        kept.append(best)
        least = np.maximum(corners[best, :2], corners[order, :2])
        most = np.minimum(corners[best, 2:], corners[order, 2:])
        common = np.clip(most - least, 0, None).prod(axis=1)
        union = areas[best] + areas[order] - common
        order = order[~(common > iou_threshold * union)]
    return torch.tensor(np.array(kept, dtype=np.int64))


_LIBRARY = torch.library.Library("torchvision", "IMPL")
_LIBRARY.impl("nms", suppress, "CPU")
importlib.import_module("torchvision.extension")._has_ops = lambda: True  # it looks for its own
