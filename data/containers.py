"""Files inside packages, and media inside those files, read without unpacking anything to disk.

    files = read_package(Path("scratch_1.4.deb"), {"usr/share/scratch/Media/Sounds/Animal/Cat.mp3"})   # .deb, .tgz, .whl
    sound = read_member(soundfont, "FluidR3_GS.sf2", "Dog_Bark")

`read_member` knows the four containers that the packages use: Qt resources (.rcc), SoundFonts (.sf2), sound sets of Transport Tycoon (.cat),
colour bitmap fonts (.ttf). There is no well-kept Python library for three of them, and the part needed of each is some twenty lines.
Everything that is not as it should be is a `ContainerError`.
"""

from __future__ import annotations

import io
import lzma
import shutil
import struct
import subprocess
import tarfile
import wave
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from data.clips import DataError


class ContainerError(DataError):
    """A package or container that cannot be read. Says why; the caller says which file, and what to do."""


def read_package(path: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """The wanted files of a .deb, .tgz or .whl, by their paths inside; those that it lacks are left out."""
    names = set(wanted)
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                return {name: archive.read(name) for name in names & set(archive.namelist())}
        with path.open("rb") as file:
            return _from_tar(_tar_of_deb(file, path.stat().st_size) if path.suffix == ".deb" else file, names)
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, struct.error) as error:
        raise ContainerError(f"it is truncated or damaged ({error})") from error


def _from_tar(file: BinaryIO, names: set[str]) -> dict[str, bytes]:
    found = {}
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for entry in archive:
            name = entry.name.removeprefix("./")
            content = archive.extractfile(entry) if name in names else None
            if content is not None:
                found[name] = content.read()
    return found


def _tar_of_deb(file: BinaryIO, size: int) -> BinaryIO:
    """The open .deb (an `ar` archive) placed at its data.tar, or what is in its data.tar.zst."""
    if file.read(8) != b"!<arch>\n":
        raise ContainerError("it is no Debian package")
    while header := file.read(60):
        name, length = header[:16].rstrip(b" /"), int(header[48:58] or b"0") if len(header) == 60 else -1
        if length < 0 or file.tell() + length > size:
            raise ContainerError("it is truncated")
        if name == b"data.tar.zst":
            return io.BytesIO(_unzstd(file.read(length)))
        if name.startswith(b"data.tar"):
            return file
        file.seek(length + length % 2, io.SEEK_CUR)
    raise ContainerError("it has no data.tar")


def _unzstd(blob: bytes) -> bytes:
    """Zstandard came into Python's own library with 3.14; before, its command line is the least to ask for (Ubuntu's packages need it)."""
    if shutil.which("zstd") is None:
        raise ContainerError('it is compressed with Zstandard: install the command "zstd" first')
    done = subprocess.run(["zstd", "-dc"], input=blob, capture_output=True)
    if done.returncode:
        raise ContainerError(f"it is truncated or damaged ({done.stderr.decode(errors='replace').strip()})")
    return done.stdout


def read_member(blob: bytes, file: str, member: str) -> bytes:
    """One picture or recording out of the container `blob`, whose kind the ending of its file name tells."""
    readers = {".rcc": _from_rcc, ".sf2": _from_sf2, ".cat": _from_cat, ".ttf": _from_font}
    try:
        return readers[Path(file).suffix](blob, member)
    except KeyError as error:
        raise ContainerError(f'it holds no "{member}"') from error
    except (struct.error, IndexError, UnicodeDecodeError, zlib.error) as error:
        raise ContainerError(f"it is truncated or damaged ({error})") from error


def _piece(blob: bytes, start: int, length: int) -> bytes:
    """A slice that must be whole: Python's own would be silently shorter."""
    if start < 0 or start + length > len(blob):
        raise IndexError(f"{start + length - len(blob)} bytes are missing")
    return blob[start : start + length]


def _from_rcc(blob: bytes, path: str) -> bytes:
    """Qt's binary resources, as `rcc --binary` writes them: a tree of names, whose leaves point at the data; all numbers big-endian."""
    magic, version, tree, data, names = struct.unpack_from(">4sIIII", blob)
    if magic != b"qres":
        raise ContainerError("it is no Qt resource file")
    node = 14 if version == 1 else 22  # later versions add a date

    def name(at: int) -> str:
        (length,) = struct.unpack_from(">H", blob, names + at)
        return _piece(blob, names + at + 6, 2 * length).decode("utf-16-be")  # 6: the length and a hash

    def entry(i: int) -> tuple[str, int, bytes]:
        at, flags = struct.unpack_from(">IH", blob, tree + node * i)
        return (name(at) if i else ""), flags, _piece(blob, tree + node * i + 6, 8)

    _, flags, rest = entry(0)
    for part in path.split("/"):
        if not flags & 2:  # a file, and more of the path to come
            raise KeyError(path)
        count, first = struct.unpack(">II", rest)
        flags, rest = {name: (flags, rest) for name, flags, rest in map(entry, range(first, first + count))}[part]
    (offset,) = struct.unpack(">4xI", rest)
    (length,) = struct.unpack_from(">I", blob, data + offset)
    content = _piece(blob, data + offset + 4, length)
    if flags & 4:
        return _unzstd(content)
    return zlib.decompress(content[4:]) if flags & 1 else content  # zlib's data come after their length when unpacked


def _from_sf2(blob: bytes, name: str) -> bytes:
    """A sample of a SoundFont, as a WAV file. RIFF: chunk smpl has the 16 bit samples of all, shdr where each begins and ends."""
    chunks = _riff(blob, 12, len(blob))
    headers, samples = chunks["shdr"], chunks["smpl"]
    table = {headers[at : at + 20].split(b"\0")[0].decode("latin-1"): at for at in range(0, len(headers) - 46, 46)}  # the last ends the list
    start, end, _, _, rate = struct.unpack_from("<IIIII", headers, table[name] + 20)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(_piece(samples, 2 * start, 2 * (end - start)))
    return out.getvalue()


def _riff(blob: bytes, at: int, end: int) -> dict[str, bytes]:
    """The chunks of a RIFF file, those inside lists too."""
    chunks: dict[str, bytes] = {}
    while at + 8 <= end:
        kind, size = struct.unpack_from("<4sI", blob, at)
        if kind == b"LIST":
            chunks |= _riff(blob, at + 12, at + 8 + size)
        else:
            chunks[kind.decode("latin-1")] = _piece(blob, at + 8, size)
        at += 8 + size + size % 2
    return chunks


def _from_cat(blob: bytes, number: str) -> bytes:
    """A WAV file out of the sounds of a Transport Tycoon set: a table of (offset, length), each sound after its title as a Pascal string."""
    table, _ = struct.unpack_from("<II", blob)
    if 8 * int(number) >= table & 0x7FFFFFFF:  # the highest bit tells the newer format
        raise KeyError(number)
    offset, length = struct.unpack_from("<II", blob, 8 * int(number))
    offset &= 0x7FFFFFFF
    return _piece(blob, offset + 1 + blob[offset], length)


def _from_font(blob: bytes, code: str) -> bytes:
    """The PNG of a character (its number, hexadecimal) in a colour bitmap font: tables cmap, CBLC and CBDT of OpenType.

    PIL could draw it, but what it draws is darkened along soft edges, and the same only for the same FreeType.
    """
    (count,) = struct.unpack_from(">4xH", blob)
    tables = {}
    for i in range(count):
        tag, start, length = struct.unpack_from(">4s4xII", blob, 12 + 16 * i)
        tables[tag.decode("latin-1")] = _piece(blob, start, length)
    return _bitmap(tables["CBLC"], tables["CBDT"], _glyph(tables["cmap"], int(code, 16)))


def _glyph(cmap: bytes, code: int) -> int:
    """The glyph of a character, by the subtable for all of Unicode (format 12)."""
    (count,) = struct.unpack_from(">2xH", cmap)
    for at in (struct.unpack_from(">4xI", cmap, 4 + 8 * i)[0] for i in range(count)):
        if struct.unpack_from(">H", cmap, at) == (12,):
            for group in range(struct.unpack_from(">I", cmap, at + 12)[0]):
                first, last, glyph = struct.unpack_from(">III", cmap, at + 16 + 12 * group)
                if first <= code <= last:
                    return glyph + code - first
    raise KeyError(code)


def _bitmap(cblc: bytes, cbdt: bytes, glyph: int) -> bytes:
    """The PNG of a glyph in the first set of sizes; index format 1 (an offset for each glyph), image formats 17 and 18 (PNG after its metrics)."""
    lists, count = struct.unpack_from(">I4xI", cblc, 8)
    for i in range(count):
        first, last, more = struct.unpack_from(">HHI", cblc, lists + 8 * i)
        if first <= glyph <= last:
            index, image, data = struct.unpack_from(">HHI", cblc, lists + more)
            if index != 1 or image not in (17, 18):
                raise ContainerError(f"its bitmaps are in formats {index} and {image}, not 1 and 17")
            start = data + struct.unpack_from(">I", cblc, lists + more + 8 + 4 * (glyph - first))[0]
            metrics = 5 if image == 17 else 8
            (length,) = struct.unpack_from(">I", cbdt, start + metrics)
            return _piece(cbdt, start + metrics + 4, length)
    raise KeyError(glyph)
