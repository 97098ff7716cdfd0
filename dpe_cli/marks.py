"""The mark that an output carries: that a machine's work is in it, in the words of the IPTC, and by which program.

MP4, MOV, PNG and JPEG hold it as XMP, where readers of metadata look for it; MP4 and MOV in a `uuid` box at the end,
which leaves the source's own tags alone. Matroska has it as a tag. Videos also have a `comment`, unless the source's
is there. A pipe of raw Y4M has no place for it.
"""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import dpe_cli

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
PROGRAM = f"dpe {dpe_cli.__version__}"
WORDS = f"AI-edited by {PROGRAM}"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' xmp:CreatorTool="{PROGRAM}" Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
).encode()
XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")  # the uuid of XMP in ISO base media files
PNG_HEAD = 8 + 25  # signature and IHDR, which comes first
JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"


def marked_tags(own: Mapping[str, str]) -> dict[str, str]:
    """The tags of a video with the mark among them; what a container has no place for it leaves out."""
    tags = {key: value for key, value in own.items() if key.lower() != "digital_source_type"}
    if "comment" not in {key.lower() for key in tags}:
        tags["comment"] = WORDS
    return {**tags, "DIGITAL_SOURCE_TYPE": SOURCE_TYPE}


def mark_file(path: Path) -> None:
    """Puts the XMP into a whole file that is not yet under its name. Raises OSError."""
    suffix = path.suffix.lower()
    if suffix in (".mp4", ".mov"):
        with path.open("ab") as file:
            file.write(struct.pack(">I4s16s", 24 + len(XMP), b"uuid", XMP_BOX) + XMP)
    elif suffix in (".png", ".jpg", ".jpeg"):
        path.write_bytes(marked_picture(path.read_bytes()))


def marked_picture(data: bytes) -> bytes:
    """The bytes of a PNG or JPEG file with the XMP in them."""
    if data[:4] == b"\x89PNG":
        chunks = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + png_chunk(
            b"tEXt", b"Comment\0" + WORDS.encode()
        )
        return data[:PNG_HEAD] + chunks + data[PNG_HEAD:]
    at = 2  # after SOI; JFIF wants to be the first segment
    if data[2:4] == b"\xff\xe0":
        at += 2 + int.from_bytes(data[4:6], "big")
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(JPEG_XMP) + len(XMP)) + JPEG_XMP + XMP
    return data[:at] + segment + data[at:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
