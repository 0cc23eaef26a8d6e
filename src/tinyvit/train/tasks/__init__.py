"""The tasks of ``tinyvit train``: classify, segment, distil features or logits."""
