import hashlib
import io

import pytest
from rich.console import Console

import fetch
from checkpoints.server import serving
from fetch import Package, package_path, read_packages
from tinyvit.checkpoints.download import Patience
from tinyvit.errors import DownloadError

BODY = bytes(range(256)) * 2000
QUICK = Patience(attempts=1, first_wait=0.0, timeout=5.0)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    with serving() as server:
        server.files["a.deb"] = BODY
        yield server


def package(*urls, sha256=SHA256):
    return Package("a", "1:2", "a_2.deb", sha256, len(BODY), urls)


def table(path, *packages):
    entries = (
        f'[[package]]\nname = "{one.name}"\nversion = "{one.version}"\nfile = "{one.file}"\n'
        f'sha256 = "{one.sha256}"\nsize = {one.size}\nurls = {list(one.urls)}\n'
        for one in packages
    )
    path.write_text("\n".join(entries))
    return path


def test_a_package_is_fetched_once(tmp_path, server):
    one = package(server.url("a.deb"))
    for _ in range(2):
        path = fetch.fetch(one, tmp_path / "packages")
        assert path == tmp_path / "packages" / "a_2.deb"
        assert path.read_bytes() == BODY
    assert len(server.requests) == 1
    assert [file.name for file in path.parent.iterdir()] == ["a_2.deb"]


def test_a_broken_transfer_is_continued(tmp_path, server):
    server.faults = ["cut:70000", "500"]
    one = package(server.url("a.deb"))
    with pytest.raises(DownloadError, match="HTTP 500"):
        fetch.fetch(one, tmp_path, patience=QUICK)
    assert (tmp_path / "a_2.deb.part").read_bytes() == BODY[:70000]
    assert not (tmp_path / "a_2.deb").exists()
    assert fetch.fetch(one, tmp_path, patience=QUICK).read_bytes() == BODY
    assert server.requests[-1] == ("/a.deb", "bytes=70000-")


def test_a_wrong_file_is_refused_with_both_hashes(tmp_path, server):
    server.files["a.deb"] = b"another file"
    came = hashlib.sha256(b"another file").hexdigest()
    with pytest.raises(DownloadError, match=rf"gave sha256 {came}, wanted {SHA256}; it was rem"):
        fetch.fetch(package(server.url("a.deb")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_second_address_is_tried_and_a_changed_file_is_replaced(tmp_path, server):
    (tmp_path / "a_2.deb").write_bytes(b"damaged since")
    path = fetch.fetch(package(server.url("gone.deb"), server.url("a.deb")), tmp_path)
    assert path.read_bytes() == BODY
    assert [request[0] for request in server.requests] == ["/gone.deb", "/a.deb"]


def test_every_address_is_in_the_error(tmp_path, server):
    urls = server.url("gone.deb"), server.url("lost.deb")
    with pytest.raises(DownloadError, match=r"a 1:2 could not be fetched: .*gone.*404.*lost.*404"):
        fetch.fetch(package(*urls), tmp_path)


def test_build_fetches_what_is_named_and_shows_it(tmp_path, server):
    packages = table(tmp_path / "p.toml", package(server.url("a.deb")))
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    paths = fetch.build(tmp_path / "work", ["a"], packages, console)
    assert [path.read_bytes() for path in paths] == [BODY]
    assert "512.0/512.0 kB" in shown.getvalue()
    with pytest.raises(ValueError, match=r"there is no package b; p.toml has a"):
        fetch.build(tmp_path / "work", ["b"], packages)


def test_package_path_says_what_to_do(tmp_path, server):
    packages = table(tmp_path / "p.toml", package(server.url("a.deb")))
    with pytest.raises(
        ValueError, match=r"a_2.deb is not there; fetch it with run.py .* --only fetch"
    ):
        package_path(tmp_path, "a", packages)
    with pytest.raises(ValueError, match=r"there is no package 'b'; p.toml has a"):
        package_path(tmp_path, "b", packages)
    fetch.build(tmp_path, (), packages, Console(file=io.StringIO()))
    found, path = package_path(tmp_path, "a", packages)
    assert found.title == "a 1:2"
    assert path == tmp_path / "packages" / "a_2.deb"


def test_a_wrong_table_is_refused(tmp_path):
    path = table(tmp_path / "p.toml", package("http://x"), package("http://x"))
    with pytest.raises(ValueError, match="names the package 'a' twice"):
        read_packages(path)
    path.write_text('[[package]]\nname = "a"\nurls = []\n')
    with pytest.raises(ValueError, match=r"the package 'a' is wrong: .*missing 4 required"):
        read_packages(path)
    path.write_text('[[package]]\nname = "a"\n')
    with pytest.raises(ValueError, match="the package 'a' is wrong: 'urls'"):
        read_packages(path)


def test_the_recipes_table_pins_every_package():
    packages = read_packages()
    assert {"sweethome3d-furniture", "scratch", "openclipart-png"} < set(packages)
    for one in packages.values():
        assert len(one.sha256) == 64
        assert set(one.sha256) <= set("0123456789abcdef")
        assert one.urls
        assert all(url.startswith(("http://", "https://")) for url in one.urls)
        assert one.size > 20_000
        assert "/" not in one.file
