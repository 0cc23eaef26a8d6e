import struct

import numpy as np
import pytest

from archives import read_members, read_named, read_resources

from .packages_made import ar_member, deb, rcc, tgz, wheel

FILES = {"usr/a.txt": b"first", "usr/share/b.bin": b"\0" * 5000, "odd": b"x"}


def read(path, wanted=lambda name: True):
    return dict(read_members(path, wanted))


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2", ""])
def test_a_deb_gives_its_files_under_clean_names(tmp_path, compression):
    assert read(deb(tmp_path / "p.deb", FILES, compression)) == FILES


def test_tgz_and_whl_are_read_too(tmp_path):
    assert read(tgz(tmp_path / "p.tgz", FILES)) == FILES
    assert read(tgz(tmp_path / "p.tar.gz", FILES)) == FILES
    assert read(wheel(tmp_path / "p.whl", FILES)) == FILES


def test_only_what_is_wanted_is_read_and_links_never(tmp_path):
    asked = []

    def wanted(name):
        asked.append(name)
        return name.endswith(".txt")

    assert read(deb(tmp_path / "p.deb", FILES), wanted) == {"usr/a.txt": b"first"}
    assert sorted(asked) == sorted(FILES)  # the link is not even asked for


def test_a_member_after_one_of_odd_length_is_found(tmp_path):
    path = deb(tmp_path / "p.deb", FILES)
    data = path.read_bytes()
    path.write_bytes(data[:8] + ar_member("_gpg", b"abc") + data[8:])
    assert read(path) == FILES


def test_read_named_says_what_is_missing(tmp_path):
    path = deb(tmp_path / "p.deb", FILES)
    assert dict(read_named(path, ["odd"])) == {"odd": b"x"}
    with pytest.raises(ValueError, match=r"lacks 1 of 2 files wanted: usr/c.txt"):
        list(read_named(path, ["odd", "usr/c.txt"]))


def test_other_suffixes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"suffix '.rpm', wanted one of \['.deb', '.tgz'"):
        read(tmp_path / "p.rpm")


def test_zstd_is_refused_in_words(tmp_path):
    path = tmp_path / "p.deb"
    path.write_bytes(b"!<arch>\n" + ar_member("data.tar.zst", b"\x28\xb5\x2f\xfd"))
    with pytest.raises(ValueError, match=r"holds data.tar.zst; only .gz, .bz2, .xz"):
        read(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\3\4 a zip", "is no .deb file"),
        (b"!<arch>\n" + ar_member("debian-binary", b"2.0\n"), "holds no data.tar"),
        (b"!<arch>\n" + b"?" * 60, "no ar header before byte 68"),
    ],
)
def test_what_is_no_deb_is_refused(tmp_path, content, words):
    path = tmp_path / "p.deb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read(path)


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2", ""])
def test_a_deb_that_is_cut_off_is_called_damaged(tmp_path, compression):
    noise = np.random.default_rng(0).bytes(50_000)  # nothing a packer could make smaller
    path = deb(tmp_path / "p.deb", {"a": noise}, compression)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    with pytest.raises(ValueError, match=r"damaged: .*; remove it and fetch it again"):
        read(path)


@pytest.mark.parametrize("make", [tgz, wheel])
def test_other_containers_that_are_cut_off_are_called_damaged(tmp_path, make):
    path = make(tmp_path / f"p.{'tgz' if make is tgz else 'whl'}", FILES)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"damaged: .*; remove it and fetch it again"):
        read(path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_resources_come_with_their_folder(version):
    files = {"ä.txt": b"short", "long.webp": b"0123456789" * 50}
    found = dict(read_resources(rcc("photos", files, version)))
    assert found == {f"photos/{name}": data for name, data in files.items()}


def test_resources_that_are_none_are_refused():
    with pytest.raises(ValueError, match="does not start with 'qres'"):
        list(read_resources(b"RIFF"))
    with pytest.raises(ValueError, match="version 9; wanted 1, 2 or 3"):
        list(read_resources(b"qres" + struct.pack(">4i", 9, 0, 0, 0)))
    with pytest.raises(ValueError, match="f/x is packed with zstd"):
        list(read_resources(rcc("f", {"x": b"abc"}, flags=4)))
    with pytest.raises(ValueError, match="damaged"):
        list(read_resources(rcc("f", {"x": b"abc" * 20})[:60]))
