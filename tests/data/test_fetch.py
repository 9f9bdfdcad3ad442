"""The fetched set: containers read as they are written, packages refused as they should be, and no maker on both sides of a class."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import wave
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import fetch as fetching
from data.build import DataConfig, PerSplit, _classes, _provenance, build
from data.clips import DataError
from data.containers import ContainerError, read_member, read_package
from data.fetch import Listing, fetch, held_out_style, read_list
from data.media import read_audio
from data.render import RenderSettings
from data.sources import LICENSES, REAL_AV, held_out_package, load_sources
from data.splits import split_pairs

ROOT = Path(__file__).parents[2]


def tone(hertz: float, seconds: float = 1.0, rate: int = 22_050) -> bytes:
    """A WAV file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((3000 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype("<i2").tobytes())
    return out.getvalue()


def drawing(seed: int, side: int = 300) -> bytes:
    """A PNG with a transparent margin."""
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[side // 4 : -side // 4, side // 4 : -side // 4] = [*np.random.default_rng(seed).integers(0, 256, 3), 255]
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(out, "PNG")
    return out.getvalue()


def tar(files: dict[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def deb(files: dict[str, bytes], data: bytes | None = None, ending: str = "xz") -> bytes:
    """An ar archive with the three parts of a Debian package; the second is of odd length, which `ar` pads."""
    data = tar({f"./{name}": content for name, content in files.items()}, "w:xz") if data is None else data
    parts = (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (f"data.tar.{ending}", data))
    return b"!<arch>\n" + b"".join(
        f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2) for name, part in parts
    )


def rcc(files: dict[str, tuple[bytes, int]], version: int = 3) -> bytes:
    """Qt's binary resources with files of the folder /a, each of (its data as they lie there, flags)."""
    names, data, nodes = b"", b"", []

    def name(text: str) -> int:
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return at

    late = b"" if version == 1 else bytes(8)  # the date
    nodes.append(struct.pack(">IHII", 0, 2, 1, 1) + late)
    nodes.append(struct.pack(">IHII", name("a"), 2, len(files), 2) + late)
    for path, (content, flags) in files.items():
        nodes.append(struct.pack(">IHHHI", name(path), flags, 0, 1, len(data)) + late)
        data += struct.pack(">I", len(content)) + content
    start = 20 if version < 3 else 24
    head = struct.pack(">4sIIII", b"qres", version, start + len(data) + len(names), start, start + len(data)) + bytes(start - 20)
    return head + data + names + b"".join(nodes)


def chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def soundfont(samples: dict[str, np.ndarray], rate: int) -> bytes:
    headers, pcm = b"", b""
    for name, wave_ in samples.items():
        start = len(pcm) // 2
        headers += struct.pack("<20sIIIIIBbHH", name.encode(), start, start + len(wave_), start, start, rate, 60, 0, 0, 1)
        pcm += wave_.astype("<i2").tobytes() + bytes(92)
    headers += struct.pack("<20sIIIIIBbHH", b"EOS", 0, 0, 0, 0, 0, 0, 0, 0, 0)
    body = chunk(b"LIST", b"INFO" + chunk(b"INAM", b"odd")) + chunk(b"LIST", b"sdta" + chunk(b"smpl", pcm))
    return chunk(b"RIFF", b"sfbk" + body + chunk(b"LIST", b"pdta" + chunk(b"shdr", headers)))


def sound_set(sounds: list[tuple[str, bytes]]) -> bytes:
    """A .cat file in the newer format."""
    table, body = b"", b""
    for title, sound in sounds:
        table += struct.pack("<II", (8 * len(sounds) + len(body)) | 0x80000000, len(sound))
        body += bytes([len(title) + 1]) + title.encode() + b"\0" + sound + bytes(3)
    return table + body


def font(pictures: dict[int, bytes]) -> bytes:
    """A font with nothing but colour bitmaps of consecutive characters, glyphs 5, 6, ..."""
    first, count = min(pictures), len(pictures)
    cmap = struct.pack(">HHHHIHHIIIIII", 0, 1, 3, 10, 12, 12, 0, 28, 0, 1, first, first + count - 1, 5)
    data, offsets = b"\0\3\0\0", [0]
    for code in sorted(pictures):
        data += bytes(5) + struct.pack(">I", len(pictures[code])) + pictures[code]
        offsets.append(len(data) - 4)
    index = struct.pack(">HHI", 5, 5 + count - 1, 8) + struct.pack(">HHI", 1, 17, 4) + struct.pack(f">{count + 1}I", *offsets)
    cblc = struct.pack(">HHIIIII", 3, 0, 1, 56, len(index), 1, 0) + bytes(32) + index
    tables, head, body = {b"CBDT": data, b"CBLC": cblc, b"cmap": cmap}, struct.pack(">IHHHH", 0x10000, 3, 0, 0, 0), b""
    for tag, content in tables.items():
        head += struct.pack(">4sIII", tag, 0, 12 + 16 * len(tables) + len(body), len(content))
        body += content
    return head + body


def test_qt_resources() -> None:
    text = b"plain " * 50
    packed = struct.pack(">I", len(text)) + zlib.compress(text)
    for version in (1, 2, 3):
        resources = rcc({"plain.ogg": (b"OggS", 0), "packed.txt": (packed, 1)}, version)
        assert read_member(resources, "x.rcc", "a/plain.ogg") == b"OggS"
        assert read_member(resources, "x.rcc", "a/packed.txt") == text
        for missing in ("a/other", "plain.ogg", "a/plain.ogg/more"):
            with pytest.raises(ContainerError, match="holds no"):
                read_member(resources, "x.rcc", missing)
        for cut in (10, 40, len(resources) - 12):
            with pytest.raises(ContainerError, match="truncated or damaged"):
                read_member(resources[:cut], "x.rcc", "a/packed.txt")
    with pytest.raises(ContainerError, match="no Qt resource"):
        read_member(bytes(100), "x.rcc", "a")


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the command zstd")
def test_zstandard(tmp_path: Path) -> None:
    packed = subprocess.run(["zstd", "-c"], input=b"text", capture_output=True, check=True).stdout
    assert read_member(rcc({"z": (packed, 4)}), "x.rcc", "a/z") == b"text"
    with pytest.raises(ContainerError, match="truncated or damaged"):
        read_member(rcc({"z": (packed[:-3], 4)}), "x.rcc", "a/z")
    data = subprocess.run(["zstd", "-c"], input=tar({"./usr/f": b"text"}, "w"), capture_output=True, check=True).stdout
    (tmp_path / "p.deb").write_bytes(deb({}, data, "zst"))
    assert read_package(tmp_path / "p.deb", ["usr/f"]) == {"usr/f": b"text"}


def test_zstandard_without_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ContainerError, match='install the command "zstd"'):
        read_member(rcc({"z": (b"", 4)}), "x.rcc", "a/z")


def test_soundfont() -> None:
    one, two = np.arange(100), np.arange(-50, 0)
    bank = soundfont({"Dog Bark": one, "Bird(L)": two}, 22_050)
    for name, expected in (("Dog Bark", one), ("Bird(L)", two)):
        with wave.open(io.BytesIO(read_member(bank, "x.sf2", name))) as file:
            assert (file.getframerate(), file.getnchannels()) == (22_050, 1)
            assert np.array_equal(np.frombuffer(file.readframes(1000), "<i2"), expected)
    for name in ("Dog", "EOS"):
        with pytest.raises(ContainerError, match="holds no"):
            read_member(bank, "x.sf2", name)
    with pytest.raises(ContainerError, match="truncated"):
        read_member(bank[:150], "x.sf2", "Dog Bark")


def test_sound_set() -> None:
    sounds = sound_set([("Cow", b"RIFF1"), ("Lion roar", b"RIFF22")])
    assert [read_member(sounds, "x.cat", str(i)) for i in range(2)] == [b"RIFF1", b"RIFF22"]
    with pytest.raises(ContainerError, match="holds no"):
        read_member(sounds, "x.cat", "2")
    with pytest.raises(ContainerError, match="truncated"):
        read_member(sounds[:-4], "x.cat", "1")


def test_font() -> None:
    glyphs = font({0x1F415: b"png of a dog", 0x1F416: b"png of a pig"})
    assert read_member(glyphs, "x.ttf", "1f415") == b"png of a dog" and read_member(glyphs, "x.ttf", "1f416") == b"png of a pig"
    with pytest.raises(ContainerError, match="holds no"):
        read_member(glyphs, "x.ttf", "1f417")
    with pytest.raises(ContainerError, match="truncated"):
        read_member(glyphs[:-5], "x.ttf", "1f416")


def test_glyphs_are_known_by_their_pixels() -> None:
    """Another compression of the same picture is the same glyph."""
    picture, again = drawing(1), io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        image.save(again, "PNG", compress_level=0)
    assert again.getvalue() != picture
    assert fetching.digest("x.ttf!1f415", picture) == fetching.digest("x.ttf!1f415", again.getvalue())
    assert fetching.digest("x.png", picture) != fetching.digest("x.png", again.getvalue())
    assert fetching.digest("x.ttf!1f415", picture) != fetching.digest("x.ttf!1f415", drawing(2))


def test_packages(tmp_path: Path) -> None:
    files = {"usr/share/a.png": b"a" * 5000, "usr/share/b.ogg": os.urandom(5000)}
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    for name, package in (("p_1.deb", deb(files)), ("p-1.tgz", tar(files, "w:gz")), ("p-1.whl", wheel.getvalue())):
        path = tmp_path / name
        path.write_bytes(package)
        assert read_package(path, ["usr/share/b.ogg", "not/there"]) == {"usr/share/b.ogg": files["usr/share/b.ogg"]}
        for cut in (40, len(package) // 2, len(package) - 60):
            path.write_bytes(package[:cut])
            with pytest.raises(ContainerError, match=r"truncated|damaged|no data"):
                read_package(path, files)
    (tmp_path / "p_1.deb").write_bytes(b"<html>not found</html>")
    with pytest.raises(ContainerError, match="no Debian package"):
        read_package(tmp_path / "p_1.deb", files)


NAMES = ("red dog", "cow", "bell", "car")
MAKERS = ("noto", "tuxpaint", "opensfx")  # a font in a .deb, a .deb, a .tgz with a sound set


@pytest.fixture
def offer(tmp_path: Path) -> tuple[Path, Listing]:
    """A folder with three packages, and the list of what is in them: four classes, drawn by noto and tuxpaint, sounding in tuxpaint and opensfx."""
    glyphs = {0x1F400 + i: drawing(i, 100) for i in range(len(NAMES))}
    stamps = {f"usr/{name}.png": drawing(10 + i) for i, name in enumerate(NAMES)}
    stamps |= {f"usr/{name} {n}.wav": tone(300 + 100 * i + n, 1.0 + 6 * n) for i, name in enumerate(NAMES) for n in range(2)}
    sounds = sound_set([(name, tone(2000 + 200 * i)) for i, name in enumerate(NAMES)])
    folder = tmp_path / "offer"
    folder.mkdir()
    (folder / "fonts-noto_2.0-1_all.deb").write_bytes(deb({"usr/noto.ttf": font(glyphs)}))
    (folder / "stamps_1.5_all.deb").write_bytes(deb(stamps))
    (folder / "sfx-0.9.tgz").write_bytes(tar({"package/sfx.cat": sounds}, "w:gz"))

    def file(package: str, path: str, blob: bytes) -> dict[str, str]:
        return {"package": package, "path": path, "sha256": fetching.digest(path, blob), "license": "MIT", "attribution": f"the maker of {package}"}

    classes = []
    for i, name in enumerate(NAMES):
        pictures = [
            file("noto", f"usr/noto.ttf!{0x1F400 + i:x}", glyphs[0x1F400 + i]),
            file("tuxpaint", f"usr/{name}.png", stamps[f"usr/{name}.png"]),
        ]
        recordings = [file("tuxpaint", p, stamps[p]) for p in (f"usr/{name} 0.wav", f"usr/{name} 1.wav")]
        recordings.append(file("opensfx", f"package/sfx.cat!{i}", tone(2000 + 200 * i)))
        classes.append({"name": name, "seen": f"a {name}", "heard": f"a {name} sounding", "pictures": pictures, "recordings": recordings})
    facts = {
        "noto": ("apt", "fonts-noto", "2.0-1", "fonts-noto_2.0-1_all.deb"),
        "tuxpaint": ("apt", "stamps", "1.5", "stamps_1.5_all.deb"),
        "opensfx": ("npm", "@x/sfx", "0.9", "sfx-0.9.tgz"),
    }
    packages = {k: dict(zip(("manager", "name", "version", "file", "megabytes"), (*v, 0.1), strict=True)) for k, v in facts.items()}
    (tmp_path / "list.json").write_text(json.dumps({"packages": packages, "classes": classes}))
    return folder, read_list(tmp_path / "list.json")


def managers(folder: Path, offer: Path, slow: str = "") -> Path:
    """An apt-get and an npm that copy from a folder and keep a log; for the package `slow` they leave half a file and hang."""
    folder.mkdir(exist_ok=True)
    for name, last in (("apt-get", '"$2"'), ("npm", "sfx")):
        (folder / name).write_text(
            f'#!/bin/sh\necho {last} >> {folder}/log\nif [ {last} = "{slow}" ]; then echo half > {slow}_1.5_all.deb; exec sleep 60; fi\n'
            f"cp {offer}/{last}[_-]* . || {{ echo 'E: Unable to locate package' >&2; exit 100; }}\n"
        )
        (folder / name).chmod(0o755)
    return folder


def nothing_else(out: Path) -> bool:
    """Neither packages nor unfinished files are left beside the set, nor notes in it."""
    return {p.name for p in out.parent.glob(f"{out.name}*")} == {out.name} and {p.name for p in out.iterdir()} == {
        *("images", "sounds", "manifest.json", "ATTRIBUTION.md"),
    }


def test_fetch(offer: tuple[Path, Listing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, listing = offer
    out = tmp_path / "deep" / "set"
    monkeypatch.setenv("PATH", "")  # nothing may be asked of a package manager
    classes = fetch(out, folder, listing, progress=False)
    assert (classes[0].name, classes[0].title, classes[0].seen, classes[0].heard) == ("red_dog", "red dog", "a red dog", "a red dog sounding")
    assert nothing_else(out) and len(list(folder.iterdir())) == 3
    for c in classes:
        assert [(p.package, p.held_out) for p in c.pictures] == [("noto", True), ("tuxpaint", False)]
        assert [(s.package, s.held_out) for s in c.sounds] == [("tuxpaint", False), ("tuxpaint", False), ("opensfx", True)]
        for picture, side in zip(c.pictures, (100, 256), strict=True):
            with Image.open(picture.path) as image:
                assert image.format == "WEBP" and image.size == (side, side)
                assert image.convert("RGBA").getchannel("A").getextrema() == (0, 255)
        for sound, seconds in zip(c.sounds, (1, 6, 1), strict=True):
            wave_ = read_audio(sound.path)
            assert abs(len(wave_) - seconds * 16_000) < 20 and abs(np.abs(wave_).max() - 0.8) < 0.01
    assert len({s.id for c in classes for s in (*c.pictures, *c.sounds)}) == 4 * 5
    text = (out / "ATTRIBUTION.md").read_text()
    assert all(f"sounds/{s.path.name} | MIT | the maker of {s.package} | " in text for c in classes for s in c.sounds)
    assert "sfx-0.9.tgz: package/sfx.cat!0" in text and "python -m data.fetch" in text
    # A second call needs nothing at all; another list is told apart.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    shutil.rmtree(folder)
    assert fetch(out, None, listing, progress=False) == classes
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(DataError, match="made from another list"):
        fetch(out, None, replace(listing, sha256="another"), progress=False)


def test_downloads_with_the_package_managers(offer: tuple[Path, Listing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, listing = offer
    tools = managers(tmp_path / "bin", folder)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    fetch(tmp_path / "set", None, listing, progress=False)
    assert (tools / "log").read_text().split() == ["fonts-noto", "stamps", "sfx"] and nothing_else(tmp_path / "set")
    # What the user has is not asked for; another version will do.
    (tools / "log").unlink()
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.move(folder / "stamps_1.5_all.deb", mine / "stamps_1.7_all.deb")
    fetch(tmp_path / "again", mine, listing, progress=False)
    assert (tools / "log").read_text().split() == ["fonts-noto", "sfx"]
    with pytest.raises(DataError, match=r"stamps cannot be fetched\. apt-get said: E: Unable to locate package\. .*stamps_1\.5_all\.deb.*--packages"):
        fetch(tmp_path / "third", None, listing, progress=False)
    assert not (tmp_path / "third").exists()


def test_missing_package_managers(offer: tuple[Path, Listing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, listing = offer
    monkeypatch.setenv("PATH", "")
    (folder / "sfx-0.9.tgz").unlink()
    with pytest.raises(DataError, match=r"no npm here\. Download sfx-0\.9\.tgz .*--packages"):
        fetch(tmp_path / "set", folder, listing, progress=False)
    message = r"no apt-get and no npm here\. Download fonts-noto_2\.0-1_all\.deb, stamps_1\.5_all\.deb, sfx-0\.9\.tgz"
    with pytest.raises(DataError, match=message):
        fetch(tmp_path / "set", None, listing, progress=False)
    with pytest.raises(DataError, match="nowhere is no folder"):
        fetch(tmp_path / "set", tmp_path / "nowhere", listing, progress=False)


def test_killed_and_resumed(offer: tuple[Path, Listing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, listing = offer
    out, tools = tmp_path / "set", managers(tmp_path / "bin", folder, slow="stamps")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    script = f"from data.fetch import *; fetch({str(out)!r}, None, read_list(Path({str(tmp_path / 'list.json')!r})), progress=False)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "set.packages" / "partial").glob("stamps*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() and (tmp_path / "set.partial" / "records" / "noto.json").is_file()
    managers(tools, folder)
    (tools / "log").unlink()
    read: list[str] = []
    monkeypatch.setattr(fetching, "read_package", lambda path, wanted: read.append(path.name) or read_package(path, wanted))
    classes = fetch(out, None, listing, progress=False)
    assert (tools / "log").read_text().split() == ["stamps", "sfx"] and read == ["stamps_1.5_all.deb", "sfx-0.9.tgz"]
    assert nothing_else(out) and [c.name for c in classes] == ["red_dog", "cow", "bell", "car"]


def test_full_disk(offer: tuple[Path, Listing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package in work is done afresh; with another list, everything is."""
    folder, listing = offer
    convert, converted = fetching._convert, list[str]()

    def until_full(w: fetching.Wanted, blob: bytes, origin: str, root: Path) -> dict:
        converted.append(w.file)
        if len(converted) == 7:
            raise OSError(errno.ENOSPC, "No space left on device", w.file)
        return convert(w, blob, origin, root)

    monkeypatch.setattr(fetching, "_convert", until_full)
    for version, left in ((listing, 4 * 4), (replace(listing, sha256="another"), 4 * 5)):
        out = tmp_path / "set"
        converted.clear()
        with pytest.raises(DataError, match=r"sounds/red_dog__tuxpaint_s2\.wav cannot be read or written \(No space left on device\)"):
            fetch(out, folder, listing, progress=False)
        assert len(converted) == 7 and not out.exists()
        fetch(out, folder, version, progress=False)
        assert len(converted) == 7 + left and nothing_else(out)
        shutil.rmtree(out)


def test_wrong_packages(offer: tuple[Path, Listing], tmp_path: Path) -> None:
    folder, listing = offer
    stamps = folder / "stamps_1.5_all.deb"
    original = stamps.read_bytes()
    stamps.write_bytes(original[: len(original) // 2])
    with pytest.raises(DataError, match=r"stamps_1\.5_all\.deb cannot be read: it is truncated"):
        fetch(tmp_path / "set", folder, listing, progress=False)
    files = {w.path: b"something else" for w in listing.of(listing.packages[1])}
    stamps.write_bytes(deb(files))
    with pytest.raises(
        DataError, match=r"usr/red dog\.png in .*stamps_1\.5_all\.deb is not the file that was listed .*Download stamps_1\.5_all\.deb"
    ):
        fetch(tmp_path / "set", folder, listing, progress=False)
    stamps.write_bytes(deb({"usr/other": b""}))
    with pytest.raises(DataError, match=r"stamps_1\.5_all\.deb has no usr/red dog\.png: it is another version"):
        fetch(tmp_path / "set", folder, listing, progress=False)
    assert not (tmp_path / "set").exists()
    stamps.write_bytes(original)
    assert fetch(tmp_path / "set", folder, listing, progress=False)


def test_something_else_is_never_overwritten(offer: tuple[Path, Listing], tmp_path: Path) -> None:
    folder, listing = offer
    out = tmp_path / "set"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"no set made by python -m data\.fetch"):
        fetch(out, folder, listing, progress=False)
    assert (out / "thesis.txt").read_text() == "precious"


def test_manifest_says_what_is_held_out(offer: tuple[Path, Listing], tmp_path: Path) -> None:
    folder, listing = offer
    out = tmp_path / "set"
    fetch(out, folder, listing, progress=False)
    manifest = json.loads((out / "manifest.json").read_text())
    for entry in (*manifest["classes"][0]["images"], *manifest["classes"][0]["sounds"]):
        entry["held_out"] = not entry["held_out"]
    for entry in (*manifest["classes"][1]["images"], *manifest["classes"][1]["sounds"]):
        del entry["held_out"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    load_sources.cache_clear()
    flipped, by_rule = load_sources(out)[:2]
    assert [s.package for s in flipped.held_sounds] == ["tuxpaint", "tuxpaint"] and [p.package for p in flipped.held_pictures] == ["tuxpaint"]
    assert [s.package for s in by_rule.held_sounds] == ["opensfx"] and [p.package for p in by_rule.held_pictures] == ["noto"]
    (out / "sounds" / "cow__opensfx_s1.wav").unlink()
    load_sources.cache_clear()
    with pytest.raises(DataError, match=r"make it again: python -m data\.fetch --out"):
        load_sources(out)


def test_held_out_style() -> None:
    assert held_out_style(["fluent", "noto", "tuxpaint"]) == "noto"
    assert held_out_style(["fluent", "tuxpaint", "tuxpaint"]) == "fluent"
    assert held_out_style(["noto", "noto"]) is None


def test_the_list() -> None:
    """What the real list promises: every class on both sides, no package on both, everything with a licence, nothing twice."""
    listing = read_list()
    assert len(listing.classes) >= 40 and len({p.key for p in listing.packages}) == len(listing.packages)
    for c in listing.classes:
        for rule, files in ((held_out_style, c.pictures), (held_out_package, c.recordings)):
            packages = [w.package for w in files]
            held = rule(packages)
            assert held is not None and 0 < packages.count(held) < len(packages), c.name
            assert held == "noto" or "noto" not in packages, c.name
    files = [w for p in listing.packages for w in listing.of(p)]
    assert len(files) == sum(len(c.pictures) + len(c.recordings) for c in listing.classes) and all(listing.of(p) for p in listing.packages)
    assert len({w.sha256 for w in files}) == len({w.file for w in files}) == len({Path(w.file).stem for w in files}) == len(files)
    assert all(w.license in LICENSES and w.attribution and len(w.sha256) == 64 and not w.path.endswith(".svg") for w in files)
    for phrase in ("seen", "heard"):
        assert len({getattr(c, phrase) for c in listing.classes}) == len(listing.classes)
    embedded = {c.title: c for c in load_sources()}
    both = [c for c in listing.classes if c.name in embedded]
    assert len(both) > 30 and all((c.seen, c.heard) == (embedded[c.name].seen, embedded[c.name].heard) for c in both)


def test_no_media_in_the_repository() -> None:
    """Share-alike files must not slip in beside the list."""
    assert [p.name for p in fetching.LIST.parent.iterdir()] == ["sources.json"]


def test_build_from_a_fetched_set(offer: tuple[Path, Listing], tmp_path: Path) -> None:
    folder, listing = offer
    once = PerSplit(1, 1, 1, 1, 1)
    config = DataConfig(renderings=once, rounds=once, bare=once, render=RenderSettings(size=64, seconds=1.0), sources=str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"no source set in .*set\. Make it: python -m data\.fetch --out .*set"):
        build(config, tmp_path / "clips", progress=False)
    classes = fetch(tmp_path / "set", folder, listing, progress=False)
    clips = build(config, tmp_path / "clips", progress=False)
    held = {s.id for c in classes for s in (*c.held_pictures, *c.held_sounds)}
    assert {c.video_label for c in clips.select(condition="factual")} == {"red_dog", "cow", "bell", "car"}
    for clip in clips.select(condition="factual"):
        assert {clip.video_source in held, clip.audio_source in held} == {clip.split == "unseen"}
    with pytest.raises(DataError, match="built with another config, other sources"):
        build(replace(config, sources=None, classes=("dog", "cow", "bell", "car")), tmp_path / "clips", progress=False)


def test_default_build_is_not_stale(tmp_path: Path) -> None:
    """The embedded set, named or not, wherever it lies: the same provenance, and as clip folders made before `sources` have it."""
    copy = Path(shutil.copytree(REAL_AV, tmp_path / "copy"))

    def provenance(config: DataConfig) -> dict:
        classes = _classes(config)
        return _provenance(config, classes, split_pairs([c.name for c in classes], config.seed))

    default = provenance(DataConfig())
    assert default == provenance(DataConfig(sources=str(copy)))
    assert set(default["config"]) == {"renderings", "rounds", "bare", "seed", "render", "classes", "max_similarity"}
    del default["code"]  # changes with the renderer
    assert hashlib.sha256(json.dumps(default).encode()).hexdigest() == "8778f03401065d408e97513a00a5c5452adcde392859152359c8e3b4bfd49e9c"
