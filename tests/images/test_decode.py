import io
import subprocess
import sys
import warnings
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, features

from tinyvit.errors import ImageError
from tinyvit.images.decode import MAX_PIXELS, _tell_depth, decode, read_size

# 3 x 4 pixels, all different
RGB = np.arange(36, dtype=np.uint8).reshape(3, 4, 3) * 7
BIG = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)


def encoded(image, form, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "BMP": {},
    "PPM": {},
}


def lossless(name):
    return encoded(RGB, name.split()[0], **LOSSLESS[name])


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_from_every_source(name, tmp_path):
    data = lossless(name)
    path = tmp_path / "picture.bin"  # the name says nothing: the content decides
    path.write_bytes(data)
    for source in (data, bytearray(data), memoryview(data), path, str(path), io.BytesIO(data)):
        np.testing.assert_array_equal(decode(source), RGB)
        assert read_size(source) == (3, 4)
    with path.open("rb") as file:
        file.read(5)
        np.testing.assert_array_equal(decode(file), RGB)
        np.testing.assert_array_equal(decode(file), RGB)  # read from its start, left open
    np.testing.assert_array_equal(decode(Image.open(path)), RGB)


def test_a_stream_that_cannot_seek():
    class Pipe:
        def __init__(self):
            self.read = io.BytesIO(lossless("PNG")).read

    np.testing.assert_array_equal(decode(Pipe()), RGB)


def test_the_result_is_contiguous_and_writable():
    read_only = np.frombuffer(b"\1" * 12, np.uint8).reshape(2, 2, 3)
    for source in (lossless("PNG"), Image.fromarray(RGB), RGB[::-1], read_only):
        got = decode(source)
        assert got.flags.c_contiguous
        assert got.flags.writeable
        assert got.dtype == np.uint8


def test_jpeg_is_what_pillow_gives():
    data = encoded(BIG, "JPEG", quality=80)
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data) == [255, 0, 0]).all()
    assert read_size(data) == (4, 5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF lzw"])
def test_orientation(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = LOSSLESS.get(form, {"quality": 95})
    data = encoded(BIG, form.split()[0], exif=exif.tobytes(), **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((60, 50) if orientation < 5 else (50, 60))[::-1]
    np.testing.assert_array_equal(decode(data), np.asarray(upright.convert("RGB")))
    np.testing.assert_array_equal(decode(Image.open(io.BytesIO(data))), decode(data))
    assert read_size(data) == upright.size[::-1]
    assert decode(data).flags.c_contiguous


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0"]
)
def test_a_broken_exif_block_does_not_matter(exif):
    data = encoded(BIG, "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode(data).shape == BIG.shape
    assert read_size(encoded(BIG, "PNG", exif=exif)) == (60, 50)


def test_an_orientation_that_does_not_exist():
    exif = Image.Exif()
    exif[0x0112] = 9
    assert read_size(encoded(BIG, "PNG", exif=exif.tobytes())) == (60, 50)


def test_torch_is_not_imported():
    code = "import sys, tinyvit.images.decode; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_any_size_comes_back(height, width):
    image = np.resize(BIG, (height, width, 3))
    data = encoded(image, "PNG")
    np.testing.assert_array_equal(decode(data), image)
    assert read_size(data) == (height, width)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ImageError, match=r"there is no file '.*none\.png'; check the path"):
        decode(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder; give the path of one image"):
        read_size(tmp_path)
    with pytest.raises(ImageError, match=r"cannot be opened: .*too long"):
        decode("x" * 5000)
    with pytest.raises(ImageError, match="cannot be opened: embedded null"):
        decode("a\0b")


def test_empty_files(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    for source in (path, b"", io.BytesIO()):
        with pytest.raises(ImageError, match=r"is empty \(0 bytes\)"):
            decode(source)


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html>", b"hello", b"%PDF-1.7\n", b"\0" * 99])
def test_files_that_are_no_images(data):
    with pytest.raises(ImageError, match=r"is not an image that can be read: it is [a-zX ]"):
        decode(data)


CUT = {
    **{name: encoded(BIG, name.split()[0], **LOSSLESS[name]) for name in LOSSLESS},
    "JPEG": encoded(BIG, "JPEG"),
    "GIF": encoded(BIG, "GIF"),
}


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("name", sorted(set(CUT) - {"TIFF lzw"}))
def test_truncated_files(name, allow, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", allow)
    data = CUT[name] if name != "TIFF" else CUT[name][:-1]
    assert decode(CUT[name]).shape == (60, 50, 3)
    with pytest.raises(ImageError, match=r"cut short \(truncated\)"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("name", sorted(CUT))
@pytest.mark.filterwarnings("ignore")
def test_a_file_cut_anywhere_is_an_image_error(name):
    data = CUT[name]
    for keep in range(1, min(len(data), 400), 7):
        with pytest.raises(ImageError):
            decode(data[:keep])


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None)
@given(st.sampled_from(sorted(CUT)), st.integers(0, 10**6), st.binary(min_size=1, max_size=9))
def test_damage_gives_an_image_or_an_image_error(name, at, junk):
    data = bytearray(CUT[name])
    at %= len(data)
    data[at : at + len(junk)] = junk
    try:
        assert decode(bytes(data), max_pixels=10**6).dtype == np.uint8
    except ImageError as err:
        assert str(err)


def test_damaged_data_is_named():
    data = bytearray(encoded(BIG, "PNG"))
    data[60:80] = b"\xff" * 20
    with pytest.raises(ImageError, match="is damaged or of a kind that cannot be decoded: "):
        decode(bytes(data))


def test_the_limit_is_read_from_the_header(monkeypatch):
    header = encoded(Image.new("L", (20000, 1)), "PNG")[:60]  # the pixels are not even there
    with pytest.raises(ImageError, match=r"20000 x 1 = 20000 pixels, above the limit of 19999"):
        decode(header, max_pixels=19999)
    with pytest.raises(ImageError, match="raise the limit with max_pixels=12"):
        decode(Image.fromarray(RGB), max_pixels=11)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    for form in ("PNG", "JPEG", "TIFF", "BMP", "GIF"):
        assert decode(encoded(BIG, form), max_pixels=3000).shape == (60, 50, 3)
        assert read_size(encoded(BIG, form)) == (60, 50)
    assert Image.MAX_IMAGE_PIXELS == 1


def test_pillows_own_limit_is_named_where_it_cannot_be_avoided(monkeypatch):
    def refuse(*_):
        raise Image.DecompressionBombError("too many")

    monkeypatch.setitem(Image.OPEN, "WEBP", (refuse, lambda prefix: True))
    with pytest.raises(ImageError, match=r"Pillow's own limit, PIL.Image.MAX_IMAGE_PIXELS: too m"):
        decode(CUT["WEBP"])


def test_a_bomb_is_refused_without_a_warning():
    png = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    side = 14000  # 196 million pixels
    png[16:24] = side.to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(bytes(png[12:29])).to_bytes(4, "big")
    assert side**2 > MAX_PIXELS
    with pytest.raises(ImageError, match="14000 x 14000 = 196000000 pixels, above the limit"):
        decode(bytes(png))
    assert read_size(bytes(png)) == (side, side)
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        decode(bytes(png[:40]), max_pixels=None)


@pytest.mark.parametrize("source", [5, None, ["a.png"], io.StringIO("text")])
def test_things_that_hold_no_image(source):
    with pytest.raises(TypeError, match="wanted a"):
        decode(source)


def test_files_that_fail_to_be_read():
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ImageError, match=r"cannot be read: .*closed"):
        decode(closed)

    class Bad(io.BytesIO):
        def read(self, size=-1):
            raise OSError("device gone")

    with pytest.raises(ImageError, match="cannot be read: device gone"):
        decode(Bad(b"x"))


def test_a_disk_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(lossless("PNG"))

    def fail(*_):
        raise OSError("input/output error")

    monkeypatch.setattr("tinyvit.images.decode._Stream.read", fail)
    with pytest.raises(ImageError, match=r"a\.png' cannot be read: input/output error"):
        decode(path)


def test_no_memory_is_not_the_images_fault(monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr("tinyvit.images.decode.from_pil", refuse)
    with pytest.raises(MemoryError):
        decode(lossless("PNG"))
    monkeypatch.setitem(Image.OPEN, "PNG", (refuse, lambda prefix: True))
    with pytest.raises(MemoryError):
        decode(lossless("PNG"))


# --- formats that not every installation reads ---------------------------------------------------


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
@pytest.mark.parametrize("bare", [True, False])
def test_jpeg_2000(bare):
    data = encoded(BIG, "JPEG2000", no_jp2=bare)  # lossless by default
    np.testing.assert_array_equal(decode(data), BIG)
    assert read_size(data) == (60, 50)
    with pytest.raises(ImageError, match=r"cut short|damaged"):
        decode(data[: len(data) // 3])


@pytest.mark.skipif(not find_spec("PIL._avif"), reason="this Pillow has no AVIF")
def test_avif():
    data = encoded(BIG, "AVIF", quality=100, subsampling="4:4:4")
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))
    assert np.abs(decode(data).astype(int) - BIG).max() < 12
    assert read_size(data) == (60, 50)
    with pytest.raises(ImageError, match=r"cut short|damaged"):
        decode(data[: len(data) // 2])


def test_avif_where_pillow_has_none(monkeypatch):
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    data = b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + b"\0" * 50
    with pytest.raises(ImageError, match=r"is an AVIF image, .*pip install -U 'pillow>=11.3'"):
        decode(data)


def heic(image, **options):
    heif = pytest.importorskip("pillow_heif")
    found = heif.from_pillow(image if isinstance(image, Image.Image) else Image.fromarray(image))
    buffer = io.BytesIO()
    found.save(buffer, quality=-1, chroma=444, **options)
    return buffer.getvalue()


def test_heic():
    smooth = np.linspace(0, 255, 64 * 48 * 3).reshape(64, 48, 3).astype(np.uint8)
    data = heic(smooth)
    assert np.abs(decode(data).astype(int) - smooth).max() < 6
    assert read_size(data) == (64, 48)
    with pytest.raises(ImageError, match=r"cut short|damaged"):
        decode(data[: len(data) // 2])
    assert "HEIF" not in Image.OPEN  # nothing is registered for other programs


def test_heic_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 50
    with pytest.raises(ImageError, match=r"is a HEIC image, .*pip install 'tinyvit\[heif\]'"):
        decode(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\x0a" + b"\1" * 20, "a JPEG XL image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"\x93NUMPY\1\0", "a numpy array"),
        (b"\x01\x02\xfe", "no known format"),
    ],
)
def test_what_is_no_image_is_named_in_words(data, words):
    with pytest.raises(ImageError, match=f"it is {words}") as caught:
        decode(data)
    assert "\\x" not in str(caught.value)


def test_bands_that_are_no_colours_are_said(tmp_path):
    """Satellites' five bands: Pillow knows no mode for them and says only that."""
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((8, 9, 5), np.uint8),
        photometric="minisblack",
        planarconfig="contig",
    )
    with pytest.raises(ImageError, match=r"neither grey nor RGB; choose one band or three"):
        decode(tmp_path / "a.tif")


# --- 10 to 14 bits in 16 -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["array", "colour array", "TIFF", "PNG"])
def test_fewer_bits_in_sixteen_are_spread_to_eight(bits, kind):
    """Microscopes write 4095 for white: with the lower byte dropped, it came out black."""
    ramp = np.linspace(0, (1 << bits) - 1, 60).astype(np.uint16)[None].repeat(4, 0)
    wanted = (ramp >> (bits - 8)).astype(np.uint8)
    if kind == "colour array":
        got = decode(ramp[:, :, None].repeat(3, 2))
    else:
        got = decode(ramp if kind == "array" else encoded(ramp, kind))
    np.testing.assert_array_equal(got, wanted[:, :, None].repeat(3, 2))
    assert (got.min(), got.max()) == (0, 255)


def test_a_depth_is_told_once(caplog):
    _tell_depth.cache_clear()
    for _ in range(3):
        decode(np.full((2, 2), 4000, np.uint16))
        decode(np.full((2, 2), 40000, np.uint16))
        decode(np.zeros((2, 2), np.uint16))
    (told,) = caplog.messages
    assert "no pixel above 4095: taken for one of 12 bits" in told
