"""Which codec, pixel format and options an output gets: what containers hold, what codecs hold, what ffmpeg is told."""

import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpe_cli.container import PIPE, is_sequence
from dpe_cli.errors import InputError, OutputError, UsageError
from dpe_cli.planes import Layout

CODECS = ("h264", "hevc", "prores", "ffv1", "png")
HOLDS = {  # the first is the default for what needs no other
    ".mp4": ("h264", "hevc"),
    ".mov": ("h264", "hevc", "prores", "png"),
    ".mkv": ("h264", "hevc", "prores", "ffv1", "png"),
    "sequence": ("png",),
    "nut": ("raw",),
    "y4m": ("raw",),
}
PIPES = ("nut", "y4m")
ALPHA = ("prores", "ffv1", "png", "raw")
CRF = {"h264": 17, "hevc": 18}
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
NVENC_PRESETS = tuple(f"p{number}" for number in range(1, 8))
HDR = {16: "PQ", 18: "HLG"}  # transfers of H.273
NVENC = {"yuv420p": "yuv420p", "yuv444p": "yuv444p", "yuv420p10le": "p010le"}  # what NVENC takes, under its own names


@dataclass(frozen=True)
class Wish:
    """What the user asks of the encoding; None leaves it to us."""

    codec: str | None = None  # of CODECS
    crf: int | None = None
    preset: str | None = None  # of PRESETS or NVENC_PRESETS
    nvenc: bool | None = None
    pipe: str = "nut"  # of PIPES, the format where the output is standard output


@dataclass(frozen=True)
class Mastering:
    """Static HDR metadata: chromaticities in steps of 1/50000, luminances of 1/10000 cd/m2, light levels in cd/m2."""

    display: tuple[int, ...] = ()  # x and y of red, green, blue and white, then the least and the greatest luminance
    light: tuple[int, int] | None = None  # greatest of a pixel, greatest average of a frame

    @property
    def x265(self) -> list[str]:
        """In the words of x265."""
        words = ["hdr10=1"] if self.display or self.light else []
        if self.display:
            rx, ry, gx, gy, bx, by, wx, wy, low, high = self.display
            words.append(f"master-display=G({gx},{gy})B({bx},{by})R({rx},{ry})WP({wx},{wy})L({high},{low})")
        return words + ([f"max-cll={self.light[0]},{self.light[1]}"] if self.light else [])


@dataclass(frozen=True)
class Encoding:
    """How pictures are encoded."""

    codec: str  # of CODECS, or raw
    pix_fmt: str  # ffmpeg's name
    options: dict[str, Any]  # of ffmpeg
    notes: tuple[str, ...] = ()

    @property
    def limited(self) -> bool:
        """Whether the codec knows limited range alone."""
        return self.codec in ("prores", "ffv1")

    @property
    def rgb(self) -> bool:
        """Whether the pictures are written as RGB."""
        return self.pix_fmt.startswith(("rgb", "gbr", "bgr"))


def container_of(output: Path, pipe: str = "nut") -> str:
    """The key of HOLDS for an output. Raises OutputError if nothing of ours can be written there."""
    if output == PIPE:
        return pipe
    suffix = output.suffix.lower()
    if is_sequence(output) and suffix == ".png":
        return "sequence"
    if suffix not in HOLDS:
        raise OutputError(f"{output} cannot hold the video", "name an .mp4, .mov or .mkv, or frames like out_%06d.png")
    return suffix


def check_encoding(
    layout: Layout, own: str, output: Path, wish: Wish, transfer: int = 2, full_range: bool = False
) -> str:
    """The codec for a source of this layout and codec. Raises InputError or OutputError for what cannot be done."""
    container = container_of(output, wish.pipe)
    held = HOLDS[container]
    codec = wish.codec or _default(held, layout, own)
    name = "a pipe" if output == PIPE else f"{output}"
    if output == PIPE and wish.codec:
        raise OutputError(f"{wish.codec} does not go into a pipe", "leave --codec out: a pipe holds raw pictures")
    if codec not in held:
        where = [container for container in (".mp4", ".mov", ".mkv") if codec in HOLDS[container]]
        raise OutputError(f"{name} cannot hold {codec}", f"name one that ends in {' or '.join(where)}")
    if codec not in CRF and (wish.crf is not None or wish.preset or wish.nvenc):
        raise UsageError(f"{codec} has no --crf, --preset or --nvenc", "leave them out or choose h264 or hevc")
    if layout.alpha and (codec not in ALPHA or container == "y4m"):
        raise InputError(
            f"the source has transparency, which {codec if container != 'y4m' else 'y4m'} cannot hold",
            "write .mov with --codec prores, .mkv with --codec ffv1 or frames like out_%06d.png",
        )
    if codec == "ffv1" and full_range and layout.family == "yuv":
        raise InputError(
            "the source's YUV has full range, which FFV1 has no tag for",
            "use --codec h264 --crf 0: it is lossless",
        )
    if transfer in HDR and (output == PIPE or codec == "png"):
        raise InputError(
            f"the source is {HDR[transfer]} HDR, which {'a pipe' if output == PIPE else 'PNG'} has no tag for here",
            "write an .mp4, .mov or .mkv",
        )
    return codec


def _default(held: tuple[str, ...], layout: Layout, own: str) -> str:
    """The source's codec where it is one for post-production; else one that keeps its alpha and its depth."""
    fits = [codec for codec in held if codec in ALPHA] if layout.alpha else list(held)
    if own in ("prores", "ffv1") and own in fits:
        return own
    if layout.bits > 8 and not layout.alpha and "hevc" in fits:
        return "hevc"
    return next(iter(fits), held[0])


def plan_encoding(
    codec: str, layout: Layout, size: tuple[int, int], container: str, wish: Wish, program: str, mastering: Mastering
) -> Encoding:
    """How pictures of this layout and `size` (width, height) are encoded by `program`, an ffmpeg."""
    target = _held_layout(codec, layout, size, container)
    name, options, notes = target.name, {}, []
    if codec in CRF:
        shares = layout.family != "yuv" or layout.across > 1 or layout.down > 1  # chroma of several pixels
        if shares and target.across == 1 and (size[0] % 2 or size[1] % 2):
            notes.append(f"{size[0]}x{size[1]} is odd: the output is {codec} 4:4:4, which some players cannot show")
        options, extra = _nvenc_or_software(codec, name, size, wish, program, mastering)
        name = NVENC[name] if "nvenc" in options["c:v"] else name
        notes += extra
        if codec == "hevc" and container in (".mp4", ".mov"):
            options["tag:v"] = "hvc1"  # Apple's players want this one of the two names
    elif codec == "prores":
        options = {"c:v": "prores_ks", "profile:v": 4 if target.across == 1 else 3, "vendor": "apl0"}
    elif codec == "ffv1":
        options = {"c:v": "ffv1", "level": 3, "g": 1, "slicecrc": 1}
        name = name if target.family != "gbr" or target.bits > 8 else "bgra" if target.alpha else "bgr0"
    elif codec == "png":
        options = {"c:v": "png", "pred": "mixed"}
        name = ("rgba" if target.alpha else "rgb") + {8: "24", 16: "48be"}[target.bits]
        name = {"rgba24": "rgba", "rgba48be": "rgba64be"}.get(name, name)
    else:
        options = {"c:v": "rawvideo" if container == "nut" else "wrapped_avframe"}
        if container == "y4m":
            options["strict"] = -1  # more than 8 bits are an extension, that all programs read
    if target.bits < layout.bits:
        notes.append(f"the source has {layout.bits} bits a channel, {codec} holds {target.bits}; ffv1 would keep them")
    if (mastering.display or mastering.light) and "x265-params" not in options:
        notes.append("the mastering display and light levels are not written; --codec hevc would keep them")
    return Encoding(codec, name, options, tuple(notes))


def _held_layout(codec: str, layout: Layout, size: tuple[int, int], container: str) -> Layout:
    """The layout nearest to the source's that a codec holds: the same if it can."""
    across, down = (layout.across, layout.down) if layout.family == "yuv" else (2, 2)
    if codec in CRF:
        across, down = {(4, 1): (2, 1), (4, 4): (2, 2), (1, 2): (1, 1)}.get((across, down), (across, down))
        if size[0] % across or size[1] % down:
            across = down = 1
        deep = 8 if layout.bits == 8 else 10 if layout.bits <= 10 or codec == "h264" else 12
        return Layout("yuv", deep, False, across, down)
    if codec == "prores":
        full = layout.alpha or layout.family == "gbr" or (layout.across == 1 and layout.family == "yuv")
        return Layout("yuv", 10, layout.alpha, 1 if full else 2, 1)
    if codec == "png":
        return Layout("gbr", 8 if layout.bits == 8 else 16, layout.alpha)
    if container == "y4m" and layout.family != "gray":
        whole = layout.family == "gbr" or (layout.down == 2 and layout.across == 1)
        return Layout("yuv", layout.bits, False, *((1, 1) if whole else (across, min(down, 2))))
    return layout


def _nvenc_or_software(
    codec: str, name: str, size: tuple[int, int], wish: Wish, program: str, mastering: Mastering
) -> tuple[dict[str, Any], list[str]]:
    """Options of the graphics card's encoder where it is there and takes these pictures, else of x264 or x265."""
    crf = CRF[codec] if wish.crf is None else wish.crf
    preset = wish.preset or "medium"
    static = bool(mastering.display or mastering.light)  # NVENC would not write it
    possible = wish.nvenc is not False and name in NVENC and not static
    if possible and nvenc_works(program, f"{codec}_nvenc", NVENC[name], size):
        level = f"p{min(7, 1 + PRESETS.index(preset))}" if preset in PRESETS else preset
        options = {"c:v": f"{codec}_nvenc", "rc": "vbr", "cq": crf, "b:v": 0, "preset": level}
        return options, [f"encoded by {codec}_nvenc"]
    if wish.nvenc:
        raise OutputError(
            f"there is no NVENC here that takes {size[0]}x{size[1]} {name} as {codec}", "leave --nvenc out"
        )
    if preset in NVENC_PRESETS:
        raise OutputError(f"{preset} is a preset of NVENC, which does not encode here", "choose one from fast to slow")
    options = {"c:v": {"h264": "libx264", "hevc": "libx265"}[codec], "crf": crf, "preset": preset}
    if codec == "hevc":
        # no info: it names the CPU and its threads in the headers, and segments of other machines could not be joined
        options["x265-params"] = ":".join(["log-level=error:info=0", *mastering.x265])
    return options, []


@functools.cache
def nvenc_works(program: str, encoder: str, pix_fmt: str, size: tuple[int, int]) -> bool:
    """Whether a graphics card encodes one such picture: what ffmpeg lists says nothing of the card and its driver."""
    picture = f"color=s={size[0]}x{size[1]}:d=0.04,format={pix_fmt}"
    command = [program, "-v", "quiet", "-f", "lavfi", "-i", picture, "-c:v", encoder, "-f", "null", "-"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
