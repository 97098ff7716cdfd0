"""The preview: source, driving and result side by side, written in the pass that writes the result."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dpe_cli.errors import OutputError
from dpe_cli.motion import MotionTrack
from dpe_cli.video import Frame, VideoInfo, read_frames
from dpe_cli.writer import write_video

PREVIEW_HEIGHT = 512  # pixels, at most


def side_by_side(source: np.ndarray, result: np.ndarray, moment: float, views: list["DriverView"]) -> np.ndarray:
    """source | driving at `moment` seconds | result, equally high. (H, W, 3) uint8 with even H and W"""
    height = min(PREVIEW_HEIGHT, source.shape[0]) // 2 * 2
    pictures = [source, *(view.at(moment) for view in views), result]
    return np.hstack([to_height(picture, height) for picture in pictures])


def to_height(rgb: np.ndarray, height: int) -> np.ndarray:
    """The picture at this height, its width rounded to even."""
    width = max(2, round(rgb.shape[1] * height / rgb.shape[0] / 2) * 2)
    way = cv2.INTER_AREA if height < rgb.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(rgb, (width, height), interpolation=way)


class DriverView:
    """The driving's picture at any time, for the preview: keeps one second of small frames, whichever way time runs."""

    def __init__(self, info: VideoInfo, times: list[Fraction], end: str, fps: Fraction | None = None):
        self.fps = fps
        self.info, self.first, self.end = info, times[0], end
        seconds = np.array([float(moment - times[0]) for moment in times])
        self.clock = MotionTrack(seconds, seconds[:, None])  # its code at any moment is the time in the driving
        self.second: int | None = None
        self.frames: list[Frame] = []

    def at(self, moment: float) -> np.ndarray:
        """The driving frame for `moment` seconds of the source. (H, W, 3) uint8, H at most PREVIEW_HEIGHT"""
        place = float(self.clock.at(moment, self.end)[0])
        second = int(place + 0.001)  # a code is float32
        if second != self.second:
            self.second, self.frames = second, self._read(second) or self.frames
        wanted = float(self.first) + place
        return min(self.frames, key=lambda frame: abs(float(frame.time) - wanted)).rgb8

    def _read(self, second: int) -> list[Frame]:
        """The frames of one second of the driving, small."""
        height, start = min(PREVIEW_HEIGHT, self.info.height) // 2 * 2, self.first + second
        frames = read_frames(self.info.path, start, start + 1, fps=self.fps)
        return [replace(frame, rgb=to_height(frame.rgb8, height)) for frame in frames]


class PushedVideo:
    """`write_video` turned round: frames are pushed in and a thread writes them, so one pass writes two videos.

    Leaving the `with` block by an error abandons the file; leaving it normally waits for it and raises what went wrong.
    """

    def __init__(self, info: VideoInfo, path: Path, options: dict[str, Any]):
        self._frames: queue.Queue[Frame | None] = queue.Queue(maxsize=4)
        self._failure: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._write, args=(info, path, options), daemon=True)

    def __enter__(self) -> "PushedVideo":
        self._thread.start()
        return self

    def push(self, frame: Frame) -> None:
        """Hands over one frame; waits while four are waiting. Raises what stopped the writing, if it stopped."""
        while self._thread.is_alive():
            try:
                return self._frames.put(frame, timeout=0.5)
            except queue.Full:
                continue
        raise self._failure or OutputError("the preview stopped early", "leave --preview out and report this")

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._abandoned = kind is not None
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._frames.put(None, timeout=0.5)  # the end
                break
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure

    def _write(self, info: VideoInfo, path: Path, options: dict[str, Any]) -> None:
        try:
            write_video(self._pushed(), info, path, **options)
        except BaseException as error:  # carried to the thread that pushes
            self._failure = error

    def _pushed(self) -> Iterator[Frame]:
        while (frame := self._frames.get()) is not None:
            yield frame
        if self._abandoned:
            raise OutputError("the edit stopped", "see its own message")
