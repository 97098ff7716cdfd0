"""Who is who: what one face has in common with the faces seen before of a person.

With a face recognition network (a detector that is a FaceRecogniser) by its embeddings, without one by the colours of
the head, which hold within a scene and not much further.
"""

import cv2
import numpy as np

from dpe_cli.crop import cut
from dpe_cli.face import Detection, FaceDetector, FaceRecogniser, crop_box

# Cosines: from SAME on two are one person, up to OTHER they are two. Of 60 clips of 256 x 256 pixels, two frames of one
# against frames of two: mobilefacenet 95 % and 99 % right at 0.4; colours, with the light of one frame changed by up to
# 30 %, 90 % and 90 % right at 0.6. About 2 % of one person's pairs are below the OTHER of the colours.
SAME_NETWORK, OTHER_NETWORK = 0.4, 0.1
SAME_COLOURS, OTHER_COLOURS = 0.6, 0.35

HEAD = 96  # pixels: the side of the crop whose colours are taken
OVAL = (0.5, 0.47), (0.3, 0.4)  # the head in it, as shares: centre and half axes; the rest is background
CELLS = 6  # each way, whose mean colours are taken
BANDS, BINS = 3, (6, 8, 8)  # of hair, eyes and mouth the histograms; their bins of lightness, green-red and blue-yellow
COLOURS = ((0, 100), (-20, 40), (-20, 50))  # what the bins cover, in CIELAB


class Identity:
    """Tells people apart with what a detector offers."""

    def __init__(self, detector: FaceDetector):
        # an insightface pack may come without its recognition network
        knows = isinstance(detector, FaceRecogniser) and getattr(detector, "recogniser", True) is not None
        self.network = knows
        self.sign = detector.embed if knows else sign_by_colours
        self.same, self.other = (SAME_NETWORK, OTHER_NETWORK) if knows else (SAME_COLOURS, OTHER_COLOURS)

    def likeness(self, signature: np.ndarray, known: list[np.ndarray]) -> float:
        """Of a face's signature (K,) to those of a person: from 1 on it is the same person, up to 0 another one."""
        template = np.mean(known, axis=0)
        cosine = float(unit(signature) @ unit(template))
        return (cosine - self.other) / (self.same - self.other)


def sign_by_colours(rgb: np.ndarray, face: Detection) -> np.ndarray:
    """Unit vector (K,) of the colours of a head: their layout, less the overall light, and their histograms."""
    picture = cut(rgb, crop_box(face), HEAD)[0].astype(np.float32) / 255
    lab, oval = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB), head_oval()
    inside = cv2.resize(oval.astype(np.float32), (CELLS, CELLS), interpolation=cv2.INTER_AREA)[..., None]
    layout = cv2.resize(lab * oval[..., None], (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    light = layout.sum((0, 1)) / inside.sum()
    layout = (layout - inside * light * (1, 0.5, 0.5)) * (0.5, 1, 1)
    rows = np.array_split(np.flatnonzero(oval.any(1)), BANDS)
    counts = [np.histogramdd(lab[band][oval[band]], BINS, COLOURS)[0].ravel() for band in rows]
    shares = np.sqrt(np.concatenate([count / max(count.sum(), 1) for count in counts]))
    return unit(np.concatenate([unit(layout.ravel()), unit(shares)]))


def head_oval() -> np.ndarray:
    """(HEAD, HEAD) bool: where the head is in its crop."""
    (x, y), (across, down) = OVAL
    rows, columns = np.mgrid[0:HEAD, 0:HEAD] / (HEAD - 1)
    return ((columns - x) / across) ** 2 + ((rows - y) / down) ** 2 < 1


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector at length 1."""
    return vector / max(float(np.linalg.norm(vector)), 1e-6)
