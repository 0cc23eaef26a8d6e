"""A plain stand-in for Embree: every ray against every triangle. Slow, and right."""

import numpy as np


class PlainScene:
    """Answers as ``embreex`` does."""

    def __init__(self, corners):
        self.corners = np.asarray(corners, dtype=np.float64)

    def run(self, origins, directions, *, output=False, query="INTERSECT"):
        """Moeller and Trumbore's test of all pairs; the nearest hit in front of the origin."""
        first = self.corners[:, 0]
        one, two = self.corners[:, 1] - first, self.corners[:, 2] - first  # [T, 3]
        across = np.cross(directions[:, None], two)  # [N, T, 3]
        size = (across * one).sum(axis=2)
        safe = np.where(size == 0, 1, size)
        away = origins[:, None] - first
        u = (away * across).sum(axis=2) / safe
        other = np.cross(away, one)
        v = (other * directions[:, None]).sum(axis=2) / safe
        far = (other * two).sum(axis=2) / safe
        is_hit = (size != 0) & (u >= 0) & (v >= 0) & (u + v <= 1) & (far > 0)
        far = np.where(is_hit, far, np.inf)
        nearest = far.argmin(axis=1)
        found = np.where(is_hit.any(axis=1), nearest, -1).astype(np.int32)
        if query == "OCCLUDED":
            return np.where(found >= 0, 0, -1).astype(np.int32)
        pick = np.arange(len(origins)), nearest
        return {
            "primID": found,
            "u": u[pick].astype(np.float32),
            "v": v[pick].astype(np.float32),
            "tfar": far[pick].astype(np.float32),
        }
