"""The one door to torch: uint8 crops in, uint8 crops out, in batches on a device (`device.py`).

Results do not depend on how the crops are split into batches, but for the rounding of floats.

Where landmarks can tell the motion codes (`measured.py`), they do, of the driving and of the source: the networks get
own + (driving - source), with the own code as the encoder reads it, for against that one the generators were trained.
What they draw of the face is then replaced by the source's own pixels (`mesh_warp.py`), and mouth and eyes are painted
over (`retouch.py`).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpe_cli.detail import evened, stretched, with_what_flows, with_what_stays
from dpe_cli.device import (
    AUTOCAST,
    LANES,
    WIDE_BYTES,
    choose_backend,
    choose_batch_size,
    choose_device,
    choose_precision,
    describe_device,
    device_errors,
    fetched,
    is_out_of_memory,
    keep_memory,
    refuse_tf32,
    sent,
)
from dpe_cli.errors import DeviceError, WeightsError
from dpe_cli.factors import follows_space
from dpe_cli.landmarks import FACE_OVAL, FaceShape
from dpe_cli.lending import drawable, possible, where_seen
from dpe_cli.matte import Matte, flow_with_still, standing, with_still
from dpe_cli.measured import MeasuredCodes
from dpe_cli.mesh import FLOW_SIZE, centres, polygon
from dpe_cli.mesh_warp import MeshWarp, over, through
from dpe_cli.models import DPE, Encoded, InferenceDPE
from dpe_cli.models.checkpoint import Unfilled
from dpe_cli.motion_space import POSE_DIM, turn_between
from dpe_cli.retouch import Retoucher
from dpe_cli.runtimes import FORMATS, ExportedDPE, kept
from dpe_cli.weights import Loaded, find, load

T = TypeVar("T")
Key = tuple[bytes | None, ...]  # of a crop, or of a crop and its codes


class Engine:
    """The networks on a device, ready to edit.

    weights: name or path, by default our own. device: auto, cpu, cuda, cuda:N, mps. precision: auto, fp32, bf16, fp16,
    int8; auto is fp32 on a CPU and on MPS, on CUDA bf16 where the GPU computes with it and fp16 elsewhere. backend:
    auto, torch, compile, onnx, openvino; see `choose_backend`. batch_size: crops at once, by default what suits the
    device. measure: False reads codes by the encoder alone, as the paper does. retouch: False leaves pictures as the
    generators draw them, as the paper does; without measured codes it is always so.
    Raises WeightsError, and DeviceError for a device that is not there, cannot do this or has too little memory.
    """

    def __init__(
        self, weights: str | Path | None = None, device: str = "auto", precision: str = "auto",
        batch_size: int | None = None, backend: str = "auto", measure: bool = True, retouch: bool = True,
    ):  # fmt: skip
        self.device = choose_device(device)
        self.shared = Shared(choose_precision(precision, self.device))
        self.backend = choose_backend(backend, self.device, self.precision)
        if self.device.type == "cpu" and find(weights).stat().st_size > WIDE_BYTES:
            keep_memory()
        self.loaded = load(weights)
        with device_errors(self.device):
            torch.ones(1, device=self.device).add(1).cpu()  # a GPU that this torch has no kernels for says so here
            self.networks = build(self.loaded, self.device, self.precision, self.backend)
            known = measure and follows_space(self.loaded.path)
            self.measured = MeasuredCodes(self.loaded.path, str(self.device)) if known else None
            wanted = known and retouch
            self.retoucher = Retoucher(self.measured.space, device=str(self.device)) if wanted else None
            self.mesh = MeshWarp(self.measured.space, self.retoucher.basis) if wanted else None
            self.matte = Matte(device=str(self.device)) if wanted else None
            # Where the encoder reads codes its features are needed twice, and compiling is for one thread.
            self.lane_count = LANES[self.device.type] if self.measured and self.backend == "torch" else 1
            self.batch_size = batch_size or choose_batch_size(self.device, self.loaded.config, self.lane_count)
        self.threads = torch.get_num_threads()
        self.loaded.state.clear()  # the networks have their own form of the weights
        self.forget()

    @property
    def precision(self) -> str:
        """In which the networks compute now, in all lanes."""
        return self.shared.precision

    @property
    def size(self) -> int:
        """Side of the crops in pixels."""
        return self.loaded.config.size

    @property
    def description(self) -> dict[str, Any]:
        """What edits, for the report; ready for JSON."""
        return {
            "weights": str(self.loaded.path),
            "sha256": self.loaded.sha256,
            "size": self.size,
            "codes": "landmarks" if self.measured else "encoder",
            "reader": self.measured and self.measured.reader.sha256,
            "retouch": self.retoucher and self.retoucher.sha256,
            "matte": self.matte and self.matte.sha256,
            "device": describe_device(self.device),
            "precision": self.precision,
            "backend": self.backend,
            "batch_size": self.batch_size,
        }

    def motion_codes(self, crops: np.ndarray) -> np.ndarray:
        """Pose and expression of each crop. (N, S, S, 3) uint8 -> (N, K) float32"""
        self.check_crops(crops)
        if not len(crops):
            return np.zeros((0, self.loaded.config.motion_dim), np.float32)
        return np.stack([told.code for told in self.read(crops)])

    def edit(
        self, crops: np.ndarray, expression: np.ndarray | None, pose: np.ndarray | None,
        told: "Sequence[Told] | None" = None,
    ) -> np.ndarray:  # fmt: skip
        """The crops with the expression, the pose, or both of motion codes. (N, S, S, 3) uint8 -> the same shape

        expression, pose: (N, K) float32, one for each crop; one of them may be None, which keeps the source's own. A
        crop's own codes give its self-reconstruction. told: what `read` says of the crops, where that is known.
        """
        self.check_crops(crops)
        if told:
            self.told = dict(zip(keys_of(crops), told, strict=True))
        if expression is None and pose is None:
            raise ValueError("neither an expression nor a pose is given")
        for codes in (expression, pose):
            if codes is not None and codes.shape != (len(crops), self.loaded.config.motion_dim):
                raise ValueError(f"motion codes {codes.shape} do not go with crops {crops.shape}")
        if not len(crops):
            return crops.copy()
        keys = keys_of(crops, expression, pose)
        fresh = list({key: row for row, key in enumerate(keys) if key not in self.drawn}.values())
        if fresh:
            chosen = [None if array is None else array[fresh] for array in (crops, expression, pose)]
            drawn = zip((keys[row] for row in fresh), self.in_batches(self.edited, *chosen), strict=True)
            self.drawn = {key: self.drawn[key] for key in keys if key in self.drawn} | dict(drawn)
            self.maps = {key: self.maps[key] for key in keys if key in self.maps}
        return np.stack([self.drawn[key] for key in keys])

    def carried(
        self, crops: np.ndarray, expression: np.ndarray | None, pose: np.ndarray | None
    ) -> list[np.ndarray | None]:
        """Where the faces of the pictures that `edit` has just made of these come from in their crops.

        -> of each crop (R, R, 3), for the centres of R x R squares x and y in its pixels, and the share of that in what
        is shown; None where the face is as the generators drew it
        """
        return [self.maps.get(key) for key in keys_of(crops, expression, pose)]

    @staticmethod
    def turns(told: "Sequence[Told]", pose: np.ndarray | None) -> list[float | None]:
        """Degrees, rounded, by which heads that were read are to turn for the pose of codes (N, K); None: not known."""
        if pose is None or not told:
            return [None] * len(told)
        return np.round(turn_between(np.stack([one.code for one in told]), pose), 1).tolist()

    def shifts(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What expression and pose of motion codes add to a latent. (N, K) float32 -> two (N, L) float32"""
        networks = self.networks
        with torch.inference_mode():
            shifts = networks.expression_shift(self.to_device(codes)), networks.pose_shift(self.to_device(codes))
        return fetched(shifts[0]), fetched(shifts[1])

    def check_crops(self, crops: np.ndarray) -> None:
        """Raises ValueError unless these are uint8 crops of our size."""
        if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != (self.size, self.size, 3):
            raise ValueError(f"crops are (N, {self.size}, {self.size}, 3) uint8, not {crops.shape} {crops.dtype}")

    @contextlib.contextmanager
    def lanes(self) -> "Iterator[list[Engine]]":
        """Engines of these networks for as many threads that edit side by side, each with a memory of its own.

        On a CPU two, which share its cores with the thread that asks: small networks, and all that is done around
        them, gain little by the second core, and lose much where it is busy. On a GPU four: it waits for what is done
        around the networks, meshes and outlines, on the CPU.
        """
        if self.lane_count == 1:
            yield [self]
            return
        lanes = [Lane(self) for _ in range(self.lane_count)]
        torch.set_num_threads(lanes[0].threads)
        try:
            yield lanes
        finally:
            torch.set_num_threads(self.threads)

    def forget(self) -> None:
        """Lets go of what the last batch left for the next."""
        self.begin_anew()
        self.told: dict[Key, Told] = {}  # what was read of the last crops
        self.mattes: dict[Key, np.ndarray] = {}  # by crop: see `Matte.persons`
        self.drawn: dict[Key, np.ndarray] = {}  # by crop and codes
        self.maps: dict[Key, np.ndarray | None] = {}  # by crop and codes: see `carried`

    def begin_anew(self) -> None:
        """Lets go of what the networks left half way, on the device; what was read and drawn is done, and stays."""
        self.sources, self.betweens = Remembered(), Remembered()
        self.expressed: dict[Key, np.ndarray] = {}  # of `betweens`, the pictures
        self.bent: dict[Key, np.ndarray | None] = {}  # by crop and expression: what `MeshWarp.expressed` tells

    # A batch

    def faces(self, crops: np.ndarray) -> list[FaceShape | None]:
        """Landmarks of each crop (N, S, S, 3) uint8 as codes were measured by them; None without a face, or measure."""
        return [told.face for told in self.read(crops)]

    def read(self, crops: np.ndarray) -> list["Told"]:
        """Codes and landmarks of crops (N, S, S, 3) uint8; those of the last call from memory."""
        keys = keys_of(crops)
        fresh = list({key: row for row, key in enumerate(keys) if key not in self.told}.values())
        if fresh:
            new = zip((keys[row] for row in fresh), self.in_batches(self.newly_read, crops[fresh]), strict=True)
            self.told = {key: self.told[key] for key in keys if key in self.told} | dict(new)
        return [self.told[key] for key in keys]

    def newly_read(self, crops: np.ndarray) -> list["Told"]:
        """Codes and landmarks of one batch."""
        if self.measured:
            codes, faces = self.measured.measure(crops, lambda rows: self.encoded_codes(crops[rows]))
        else:
            codes, faces = self.encoded_codes(crops), [None] * len(crops)
        return list(map(Told, codes, faces))

    def encoded_codes(self, crops: np.ndarray) -> np.ndarray:
        """Motion codes of one batch as the encoder reads them."""
        return fetched(self.compute(lambda: self.networks.motion_code(self.encode(crops).latent)))

    def edited(self, crops: np.ndarray, expression: np.ndarray | None, pose: np.ndarray | None) -> np.ndarray:
        """One batch, edited."""
        known = self.read(crops) if self.measured else []
        given = expression, pose
        measured = np.stack([told.code for told in known]) if known else None
        if self.mesh and expression is not None:
            expression = where_seen(possible(expression), measured, [told.face for told in known])
        asked, turned = expression, pose
        if self.measured:
            if expression is not None and self.retoucher is None:
                expression = drawable(expression, measured)
            own = self.encoded_codes(crops) - measured
            expression, pose = (None if code is None else code + own for code in (expression, pose))
        keys = keys_of(crops, expression) if expression is not None else []  # of `betweens` and `bent`

        def render() -> Tensor:
            networks, source = self.networks, self.encode(crops)
            if expression is not None:
                codes = self.to_device(expression)

                def expressed(rows: list[int]) -> Tensor:
                    drawn = networks.transfer_expression(taken(source, rows), codes[rows])
                    if self.retoucher is None or not drawn.isfinite().all():  # then `compute` sees to it
                        return drawn
                    chosen = [keys[row] for row in rows], crops[rows], [known[row] for row in rows], asked[rows]
                    return self.retouched(drawn, *chosen)

                if pose is None:
                    return expressed(list(range(len(crops))))

                def between(rows: list[int]) -> Encoded:
                    drawn = expressed(rows)
                    if self.mesh:
                        pictures = to_pictures(drawn.float())
                        self.expressed |= {keys[row]: picture for row, picture in zip(rows, pictures, strict=True)}
                    return networks.encode(drawn)

                source = self.betweens.get(keys, between)
            drawn, places = networks.bend_pose(source, self.to_device(pose))
            if self.mesh:
                flows[:] = flow_maps(places, self.size)
                stands[:] = fetched(standing(self.to_device(mattes), places))
            return drawn

        mattes = np.stack(self.persons(crops)) if self.mesh and pose is not None else None
        flows: list[np.ndarray] = []
        stands: list[np.ndarray] = []
        pictures = to_pictures(self.compute(render))
        if self.mesh is None:
            return pictures
        needed = {*keys, *self.betweens.keys}
        self.bent = {key: where for key, where in self.bent.items() if key in needed}
        maps = [self.bent[key] for key in keys] or [None] * len(crops)
        if pose is not None:
            before = crops
            if expression is not None:
                self.expressed = {key: picture for key, picture in self.expressed.items() if key in needed}
                before = np.stack([self.expressed[key] for key in keys])
                still = centres(FLOW_SIZE, self.size).astype(np.float32)
                maps = [over(where, still) for where in maps]
            pictures = [with_what_flows(*three) for three in zip(pictures, before, flows, strict=True)]
            faces = [told.face for told in known]
            insides = [face and polygon(face.points, FACE_OVAL, self.size, FLOW_SIZE) for face in faces]
            pairs = [evened(*four) for four in zip(pictures, before, flows, insides, strict=True)]
            pairs = [stretched(one, crop, flow) for (one, flow), crop in zip(pairs, before, strict=True)]
            pictures, flows = zip(*pairs, strict=True)
            pictures = np.stack([with_still(*three) for three in zip(pictures, before, stands, strict=True)])
            pictures, then = self.mesh.looked_at(before, pictures, faces, measured, turned, asked, self.shown, mattes)
            flows = [flow_with_still(*two, self.size) for two in zip(flows, stands, strict=True)]
            then = map(over, then, flows)
            maps = [through(*pair, self.size) for pair in zip(maps, then, strict=True)]
        self.maps |= zip(keys_of(crops, *given), maps, strict=True)
        return pictures

    def persons(self, crops: np.ndarray) -> list[np.ndarray]:
        """Mattes of the persons in crops, those of the last batch from memory: see `Matte.persons`."""
        keys = keys_of(crops)
        fresh = list({key: row for row, key in enumerate(keys) if key not in self.mattes}.values())
        if fresh:
            new = zip((keys[row] for row in fresh), self.matte.persons(crops[fresh]), strict=True)
            self.mattes = {key: self.mattes[key] for key in keys if key in self.mattes} | dict(new)
        return [self.mattes[key] for key in keys]

    def retouched(
        self, drawn: Tensor, keys: list[Key], crops: np.ndarray, known: list["Told"], asked: np.ndarray
    ) -> Tensor:
        """Drawn pictures (B, 3, S, S) with the source's own pixels inside of the face, mouth and eyes painted over.

        keys: of `bent`, for what carried the pixels; asked: the codes (B, K) that the pictures are to have.
        """
        faces, own = [told.face for told in known], np.stack([told.code for told in known])
        pictures, maps = self.mesh.expressed(crops, to_pictures(drawn.float()), faces, own, asked)
        self.bent |= zip(keys, maps, strict=True)
        codes = own[:, POSE_DIM:], asked[:, POSE_DIM:]
        pictures = np.stack([with_what_stays(*three) for three in zip(pictures, crops, maps, strict=True)])
        pictures = self.retoucher.looked_at(crops, pictures, faces, *codes, self.expression_of)
        return to_tensor(pictures, self.device)

    def expression_of(self, pictures: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        """Expression (N, 14) of drawn pictures as landmarks tell it, `otherwise` where they show no face."""
        return self.shown(pictures, np.pad(otherwise, ((0, 0), (POSE_DIM, 0))))[:, POSE_DIM:]

    def shown(self, pictures: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        """Codes (N, 20) of drawn pictures as landmarks tell them, `otherwise` where they show no face."""
        return self.measured.measure(pictures, lambda rows: otherwise[rows])[0]

    def compute(self, function: Callable[[], Tensor]) -> Tensor:
        """Runs the networks in the chosen precision; where 16 bits overflow, from then on in 32."""
        half = self.precision in AUTOCAST
        cast = torch.autocast(self.device.type, AUTOCAST[self.precision]) if half else contextlib.nullcontext()
        with torch.inference_mode(), cast:
            result = function().float()
        if result.isfinite().all():
            return result
        if not half:
            raise WeightsError(f"{self.loaded.path} computes values that are not numbers", "use other weights")
        self.shared.precision = "fp32"
        refuse_tf32(self.device)
        self.begin_anew()
        return self.compute(function)

    def encode(self, crops: np.ndarray) -> Encoded:
        """Latents and features of a batch; what the last one had too is not encoded again."""
        return self.sources.get(keys_of(crops), lambda rows: self.networks.encode(to_tensor(crops[rows], self.device)))

    def to_device(self, codes: np.ndarray) -> Tensor:
        """Motion codes as a tensor."""
        return sent(codes, torch.float32, self.device)

    # Batches

    def in_batches(self, function: Callable[..., Iterable[T]], *arrays: np.ndarray | None) -> Iterator[T]:
        """What a function makes of each row of arrays, given slices of them, smaller ones where memory is short."""
        start, count = 0, len(arrays[0])
        while start < count:
            size = min(self.batch_size, count - start)
            batch = [None if array is None else array[start : start + size] for array in arrays]
            result = self.unless_memory_ends(function, batch)
            if result is None:
                self.shrink(size)
            else:
                yield from result
                start += size

    def unless_memory_ends(self, function: Callable[..., T], batch: list) -> T | None:
        """The function's result, or None where the memory was too small: what it held is free once this returns."""
        try:
            return function(*batch)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return None
            raise

    def shrink(self, size: int) -> None:
        """Half the batch from now on. Raises DeviceError when a batch of one was too large."""
        self.begin_anew()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            where, crop = describe_device(self.device), f"{self.size} x {self.size} crop"
            problem = f"the memory of {where} is too small for a single {crop}"
            raise DeviceError(problem, "close other programs that use it, or use --device cpu")
        self.batch_size = size // 2


@dataclass
class Shared:
    """What an engine and its lanes have in common and may change: what overflows in one would in the next."""

    precision: str


class Lane(Engine):
    """An engine's networks with another memory, for a thread of its own."""

    def __init__(self, engine: Engine):
        vars(self).update(vars(engine))
        self.threads = max(1, engine.threads // engine.lane_count)
        self.forget()

    def edit(self, *arguments: Any) -> np.ndarray:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)  # of this thread
        return super().edit(*arguments)


@dataclass(frozen=True, eq=False)
class Told:
    """What was read of a crop: its codes (K,) as they are best known, and its landmarks."""

    code: np.ndarray
    face: FaceShape | None


# What is done once


def keys_of(*arrays: np.ndarray | None) -> list[Key]:
    """The bytes of each row of crops and codes: equal where a result would be equal."""
    count = next(len(array) for array in arrays if array is not None)
    return [tuple(None if array is None else array[row].tobytes() for array in arrays) for row in range(count)]


def taken(encoded: Encoded, rows: list[int]) -> Encoded:
    """The pictures of these numbers; where all are asked for, in order, the same, and copies of one cost no memory."""
    count = len(encoded.latent)
    if rows == list(range(count)):
        return encoded
    if count == 1:
        return Encoded(
            encoded.latent.expand(len(rows), -1), [f.expand(len(rows), -1, -1, -1) for f in encoded.features]
        )
    return Encoded(encoded.latent[rows], [feature[rows] for feature in encoded.features])


class Remembered:
    """Encoded pictures of the last batch: a source that stands still, or is needed twice, is encoded once."""

    def __init__(self) -> None:
        self.keys: list[Key] = []  # all different, in the order of `encoded`
        self.encoded: Encoded | None = None

    def get(self, keys: list[Key], encode: Callable[[list[int]], Encoded]) -> Encoded:
        """Pictures by their keys; `encode` makes those of some rows of the batch, each different one asked once."""
        fresh = {key: row for row, key in enumerate(keys) if key not in self.keys}
        if fresh:
            kept = {key: row for row, key in enumerate(self.keys) if key in keys}
            old = taken(self.encoded, list(kept.values())) if kept else None
            self.keys, self.encoded = [], None  # free before more memory is asked for
            new = encode(list(fresh.values()))
            self.keys, self.encoded = [*kept, *fresh], joined(old, new) if old else new
        return taken(self.encoded, [self.keys.index(key) for key in keys])


def joined(old: Encoded, new: Encoded) -> Encoded:
    """Two batches as one."""
    pairs = zip(old.features, new.features, strict=True)
    return Encoded(torch.cat([old.latent, new.latent]), [torch.cat(pair) for pair in pairs])


# The networks


def build(loaded: Loaded, device: torch.device, precision: str, backend: str) -> InferenceDPE | ExportedDPE:
    """The networks with their weights, in the form and the layout that are fast on the device."""
    if backend in FORMATS:
        return ExportedDPE(kept(loaded, backend, precision))
    with Unfilled():
        trained = DPE(loaded.config)
    trained.load_state_dict(loaded.state)
    networks = InferenceDPE(trained, winograd=device.type == "cpu" and precision == "fp32").to(device)
    if precision == "fp32":
        refuse_tf32(device)
    if backend == "compile":
        for part in (networks.encoder, networks.expression_generator, networks.pose_generator):
            part.compile()
    return networks


# Pictures


def to_tensor(crops: np.ndarray, device: torch.device) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 in [-1, 1], channels last."""
    return sent(crops, torch.uint8, device).permute(0, 3, 1, 2).float() / 255 * 2 - 1


def flow_maps(places: Tensor, size: int) -> np.ndarray:
    """Where each pixel comes from, (B, S, S, 2) in [-1, 1], coarser and in pixels of a `size` crop: (B, R, R, 2)."""
    coarse = F.adaptive_avg_pool2d(places.permute(0, 3, 1, 2), FLOW_SIZE)
    return fetched(((coarse + 1) * (size / 2)).permute(0, 2, 3, 1).contiguous())


def to_pictures(image: Tensor) -> np.ndarray:
    """(B, 3, S, S), clamped to [-1, 1] and rounded -> (B, S, S, 3) uint8"""
    levels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return fetched(levels.permute(0, 2, 3, 1).contiguous())
