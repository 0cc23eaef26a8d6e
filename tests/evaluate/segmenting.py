"""A data set in memory, and a segmenter whose answers are known."""

import numpy as np


class Discs:
    """An image with two objects."""

    def __init__(self, name="discs.png", labels=("left", "right")):
        self.name, self.labels = name, labels

    def load(self):
        y, x = np.mgrid[0.5:60, 0.5:90]
        masks = np.stack([np.hypot(x - 25.5, y - 30.5) < 15, np.hypot(x - 65.5, y - 30.5) < 10])
        image = np.full((60, 90, 3), 20, np.uint8)
        image[masks[0]], image[masks[1]] = (220, 40, 40), (40, 60, 230)
        return image, masks


class Growing:
    """Answers with discs whose radius grows with each click; a box gets its own pixels."""

    def __init__(self, radius=5.0, step=5.0, score=0.7):
        self.radius, self.step, self.score = radius, step, score
        self.asked = []

    def set_image(self, image):
        self.size = image.shape[:2]

    def predict(
        self,
        point_coords=None,
        point_labels=None,
        box=None,
        mask_input=None,
        multimask_output=True,
    ):
        self.asked.append((point_coords, point_labels, box, mask_input, multimask_output))
        y, x = np.mgrid[0.5 : self.size[0], 0.5 : self.size[1]]
        if box is not None:
            mask = (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
        else:
            radius = self.radius + self.step * (len(point_coords) - 1)
            mask = np.hypot(x - point_coords[0][0], y - point_coords[0][1]) < radius
        count = 3 if multimask_output else 1
        masks = np.stack([mask] * count)
        if count == 3:
            masks[2] = False
        scores = np.array([0.1, self.score, 0.2][-count:], np.float32)
        scores = scores if count == 3 else np.array([self.score], np.float32)
        return masks, scores, np.full((count, 4, 4), len(self.asked), np.float32)
