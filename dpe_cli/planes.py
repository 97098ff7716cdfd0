"""Pictures as their file holds them: planes of samples, and how a change of the RGB picture is carried into them.

RGB to YUV and back loses a level here and there. So a source's own planes go to the encoder, and of an edited RGB
picture only the pixels that changed are converted and put in: everywhere else, every sample is the source's.
"""

import functools
from dataclasses import dataclass

import av
import cv2
import numpy as np

# H.273 number of the matrix -> the shares of red and of blue in the luma
LUMA = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
LUMA |= {9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
CHROMA = {(1, 1): "444", (2, 1): "422", (2, 2): "420", (1, 2): "440", (4, 1): "411", (4, 4): "410"}
DEPTHS = (8, 9, 10, 12, 14, 16)
UNNAMED = {"yuv440p10le", "yuv440p12le"}  # NUT, the way to the encoder, has no name for these


@dataclass(frozen=True)
class Layout:
    """Which planes a picture has: Y U V, G B R or grey, and alpha last. One chroma sample for across x down pixels."""

    family: str  # yuv, gbr, gray
    bits: int = 8
    alpha: bool = False
    across: int = 1
    down: int = 1

    @property
    def name(self) -> str:
        """ffmpeg's name of the format."""
        chroma = CHROMA[self.across, self.down] if self.family == "yuv" else ""
        kind = "gray" if self.family == "gray" else f"{self.family}{'a' * self.alpha}{chroma}p"
        return kind if self.bits == 8 else f"{kind}{self.bits}le"

    @property
    def dtype(self) -> type[np.generic]:
        """Of one sample."""
        return np.uint8 if self.bits == 8 else np.uint16


@functools.cache
def layout_of(name: str) -> Layout | None:
    """The planes that hold all of a format of ffmpeg, whatever its packing or byte order; None if none does."""
    form = av.VideoFormat(name)
    if form.is_bayer or "f16" in name or "f32" in name or name.startswith("xyz"):
        return None
    alpha = any(part.is_alpha for part in form.components)
    bits = max(part.bits for part in form.components)
    colours = len(form.components) - alpha
    if form.is_rgb or form.has_palette or (colours == 1 and alpha):
        found = ("gbr", alpha or form.has_palette, 1, 1)
    elif colours == 1:
        found = ("gray", False, 1, 1)
    else:  # asked for 16 x 16 pixels, as a bare format has no size
        found = ("yuv", alpha, 16 // form.chroma_width(16), 16 // form.chroma_height(16))
    if (found[2], found[3]) not in CHROMA:
        return None
    for depth in DEPTHS:
        layout = Layout(found[0], depth, *found[1:])
        if depth >= bits and layout.name not in UNNAMED and _exists(layout.name):
            return layout
    return None


def _exists(name: str) -> bool:
    try:
        av.VideoFormat(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class Original:
    """A source picture's own planes, upright, with the RGB picture that was made of them."""

    rgb: np.ndarray  # (H, W, 3) uint8, or uint16 where the planes have more than 8 bits
    layout: Layout
    planes: tuple[np.ndarray, ...]  # (H, W) each, chroma rounded up
    matrix: int = 1  # of H.273
    full_range: bool = False

    def edited(self, rgb: np.ndarray) -> tuple[np.ndarray, ...]:
        """The planes of an edited picture, `rgb` as `self.rgb`. Samples of unchanged pixels are kept bit for bit.

        A chroma sample is shared by several pixels and reaches, when it is shown, its neighbours' too: it changes only
        where all of these did, so that nothing outside the edited region changes its colour.
        """
        part = None if rgb is self.rgb else self._changed_part(rgb)
        if part is None:
            return self.planes
        picture, planes = rgb[part], list(self.planes)
        changed = (picture != self.rgb[part]).any(-1)
        across, down = self.layout.across, self.layout.down
        samples = cv2.split(cv2.transform(picture.astype(np.float32), self._from_rgb(np.iinfo(rgb.dtype).max)))
        for index, new in enumerate(samples[: 1 if self.layout.family == "gray" else 3]):
            place, where = part, changed
            if index and (across, down) != (1, 1):
                place = (slice(part[0].start // down, -(-part[0].stop // down)),
                         slice(part[1].start // across, -(-part[1].stop // across)))  # fmt: skip
                new, where = _shrunk(new, across, down), _wholly_changed(changed, across, down)
            planes[index] = planes[index].copy()
            planes[index][place][where] = np.clip(np.rint(new[where]), 0, self._top)
        return tuple(planes)

    @property
    def _top(self) -> int:
        return (1 << self.layout.bits) - 1

    def _changed_part(self, rgb: np.ndarray) -> tuple[slice, slice] | None:
        """The rectangle of all changes with a margin, in whole chroma samples."""
        height, width = rgb.shape[:2]
        rows = np.flatnonzero((rgb != self.rgb).reshape(height, -1).any(1))
        if not len(rows):
            return None
        band = slice(rows[0], rows[-1] + 1)
        columns = np.flatnonzero((rgb[band] != self.rgb[band]).any(0).any(-1))
        margin = 2 * max(self.layout.across, self.layout.down)
        limits = []
        for found, step, length in ((rows, self.layout.down, height), (columns, self.layout.across, width)):
            low, high = max(0, int(found[0]) - margin), min(length, int(found[-1]) + 1 + margin)
            limits.append(slice(low // step * step, min(length, -(-high // step) * step)))
        return tuple(limits)

    def _from_rgb(self, white: int) -> np.ndarray:
        """(3, 4) float32: RGB, of which `white` is the greatest value, and 1 to the samples of the planes."""
        rows, offsets = np.eye(3)[[1, 2, 0]], np.zeros(3)  # green, blue, red
        spans = np.full(3, float(self._top))  # grey has full range too
        if self.layout.family != "gbr":
            red, blue = LUMA[self.matrix]
            luma = np.array([red, 1 - red - blue, blue])
            rows = np.array([luma, (np.eye(3)[2] - luma) / (2 * (1 - blue)), (np.eye(3)[0] - luma) / (2 * (1 - red))])
            step = 1 << (self.layout.bits - 8)
            offsets[1:] = 128 * step
            if not self.full_range and self.layout.family == "yuv":
                spans, offsets[0] = np.array([219.0, 224.0, 224.0]) * step, 16 * step
        return np.column_stack([rows * spans[:, None] / white, offsets]).astype(np.float32)


def _shrunk(change: np.ndarray, across: int, down: int) -> np.ndarray:
    """The mean of each across x down pixels, the last ones repeated where the size is odd."""
    height, width = change.shape
    padded = np.pad(change, ((0, -height % down), (0, -width % across)), mode="edge")
    return cv2.resize(padded, (padded.shape[1] // across, padded.shape[0] // down), interpolation=cv2.INTER_AREA)


def _wholly_changed(changed: np.ndarray, across: int, down: int) -> np.ndarray:
    """Per chroma sample, whether all pixels changed that it reaches; single ones that came out equal do not count."""
    closed = cv2.morphologyEx(
        changed.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3)), borderType=cv2.BORDER_REPLICATE
    )
    inner = cv2.erode(closed, np.ones((2 * down + 1, 2 * across + 1)), borderType=cv2.BORDER_REPLICATE)
    return _shrunk(inner.astype(np.float32), across, down) == 1


def planes_of(frame: av.VideoFrame, layout: Layout) -> tuple[np.ndarray, ...]:
    """Copies of the planes of a picture in the format `layout`."""
    return tuple(_samples(plane, layout).copy() for plane in frame.planes)


def frame_of(planes: tuple[np.ndarray, ...], layout: Layout) -> av.VideoFrame:
    """A picture for an encoder."""
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], layout.name)
    for target, plane in zip(frame.planes, planes, strict=True):
        _samples(target, layout)[:] = plane
    return frame


def _samples(plane: av.video.plane.VideoPlane, layout: Layout) -> np.ndarray:
    """A view (H, W) of a plane's samples."""
    rows = np.frombuffer(plane, layout.dtype, plane.line_size * plane.height // np.dtype(layout.dtype).itemsize)
    return rows.reshape(plane.height, -1)[:, : plane.width]


def oriented(plane: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """A plane or picture (H, W[, C]) made upright: rows and columns swapped, mirrored, turned upside down."""
    swapped, mirrored, upside_down = turn
    plane = plane.swapaxes(0, 1) if swapped else plane
    return np.ascontiguousarray(plane[:: -1 if upside_down else 1, :: -1 if mirrored else 1])
