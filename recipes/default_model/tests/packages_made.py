"""Tiny packages made by hand: .deb, .tgz, .whl and .rcc, and images to put into them."""

import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image


def ar_member(name, data):
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}".encode() + b"`\n"
    return head + data + b"\n" * (len(data) % 2)


def tar(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("./link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


def deb(path, files, compression="xz"):
    data = tar({f"./{name}": content for name, content in files.items()}, f"w:{compression}")
    members = ar_member("debian-binary", b"2.0\n") + ar_member("control.tar.gz", b"odd")
    suffix = f".{compression}" if compression else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"!<arch>\n" + members + ar_member(f"data.tar{suffix}", data))
    return path


def tgz(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(files, "w:gz"))
    return path


def wheel(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def rcc(folder, files, version=3, flags=0):
    """A resource file with one folder; files of more than 20 bytes are compressed."""
    names, contents, nodes = b"", b"", []
    size = 14 if version == 1 else 22

    def named(text):
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return at

    def node(text, kind, *rest):
        head = struct.pack(">iH", named(text), kind)
        nodes.append((head + struct.pack(*rest)).ljust(size, b"\0"))

    node("", 2, ">ii", 1, 1)
    node(folder, 2, ">ii", len(files), 2)
    for name, data in files.items():
        packed = struct.pack(">I", len(data)) + zlib.compress(data) if len(data) > 20 else data
        node(name, flags or int(len(data) > 20), ">hhi", 0, 0, len(contents))
        contents += struct.pack(">i", len(packed)) + packed
    start = 20
    tree = b"".join(nodes)
    places = start, start + len(tree), start + len(tree) + len(contents)
    head = b"qres" + struct.pack(">4i", version, *places)
    return head + tree + contents + names


def disc(height=40, width=30, colour=(200, 40, 40), border=6):
    """RGBA uint8 [height + 2 border, width + 2 border, 4]: an ellipse, nothing around it."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    pixels = np.zeros((height + 2 * border, width + 2 * border, 4), np.uint8)
    inner = pixels[border : border + height, border : border + width]
    inner[..., :3] = colour
    inner[..., 3] = 255 * (np.hypot(x, y) <= 1.01)  # so that it reaches its box
    return pixels


def encoded(pixels, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format)
    return buffer.getvalue()
