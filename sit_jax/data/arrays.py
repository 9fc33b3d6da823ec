"""Images in memory."""

import hashlib

import numpy as np

from sit_jax.errors import UserError


class Arrays:
    """images uint8 [N, H, W, C] with labels [N]; classes: one more than the largest."""

    def __init__(self, images, labels, classes: int = None, flip: bool = False):
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim != 4 or images.dtype != np.uint8:
            raise UserError(
                f"images are {images.dtype} {list(images.shape)}; give uint8 "
                "[N, H, W, C]"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise UserError(
                f"labels are {labels.dtype} {list(labels.shape)}; give "
                f"{len(images)} integers"
            )
        least, most = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        self.classes = most + 1 if classes is None else classes
        if least < 0 or most >= self.classes:
            raise UserError(
                f"labels go from {least} to {most}, but there are {self.classes} "
                f"classes (0..{self.classes - 1})"
            )
        self.images, self.labels = images, labels.astype(np.int32)
        self.shape, self.flip = images.shape[1:], flip
        self.class_names = [str(label) for label in range(self.classes)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": self.labels[i]}

    def mirrored(self, i):
        """Record i, its right side left."""
        return {"image": self.images[i][:, ::-1], "label": self.labels[i]}

    def name(self, i):
        return f"image {i}"

    def listing(self):
        """sha256 of the images and their labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()
