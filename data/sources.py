"""Source sets: real pictures and real recordings of classes, with their licences. The embedded set has 43; `data.fetch` makes a larger set.

    from data.sources import load_sources
    for c in load_sources():
        print(c.name, c.seen, c.heard, [p.id for p in c.train_pictures], [s.id for s in c.held_sounds])

`python -m data.sources` writes real_av/ATTRIBUTION.md from the manifest.

Some sources are *held out*: nothing is ever trained on them, and the `unseen` split is made from them, and from others where a class has none.

- pictures: the style `noto` of every class (the other styles are `fluent` and, for some animals, `photo`);
- recordings: where a class has recordings from more than one package, those of the package with the fewest (so that training keeps
  the most); of equally many, the alphabetically last package. A class whose recordings come from one package has none held out (34 of the 43
  embedded ones): its sounds in the `unseen` split are new renderings of recordings that are trained on, and in no rate of new sources.

A manifest may say otherwise, file by file, with "held_out": true or false.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.clips import DataError

LICENSES = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-SA-3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
    "GPL-2.0-only": "https://www.gnu.org/licenses/old-licenses/gpl-2.0.html",
    "GPL-2.0-or-later": "https://www.gnu.org/licenses/old-licenses/gpl-2.0.html",
    "GPL-3.0-only": "https://www.gnu.org/licenses/gpl-3.0.html",
    "GPL-3.0-or-later": "https://www.gnu.org/licenses/gpl-3.0.html",
    "LAL-1.2": "https://artlibre.org/licence/lal/en/",
    "MIT": "https://opensource.org/license/mit",
    "OFL-1.1": "https://openfontlicense.org/open-font-license-official-text/",
    "Public-Domain": "https://creativecommons.org/publicdomain/mark/1.0/",
}
REAL_AV = Path(__file__).parent / "real_av"
HELD_OUT_STYLE = "noto"


@dataclass(frozen=True)
class Source:
    """One picture or recording. `package` is where it comes from (a style or a sound library), `id` the file's name without its ending."""

    id: str
    path: Path
    package: str
    license: str
    origin: str
    attribution: str
    sha256: str
    held_out: bool


@dataclass(frozen=True)
class SourceClass:
    """One class: what it looks like, what it sounds like. `name` has underscores, `title` is the same with spaces."""

    name: str
    title: str
    seen: str
    heard: str
    pictures: tuple[Source, ...]
    sounds: tuple[Source, ...]

    @property
    def train_pictures(self) -> tuple[Source, ...]:
        """Pictures that may be trained on."""
        return tuple(p for p in self.pictures if not p.held_out)

    @property
    def train_sounds(self) -> tuple[Source, ...]:
        """Recordings that may be trained on."""
        return tuple(s for s in self.sounds if not s.held_out)

    @property
    def held_pictures(self) -> tuple[Source, ...]:
        """Pictures kept for the `unseen` split."""
        return tuple(p for p in self.pictures if p.held_out)

    @property
    def held_sounds(self) -> tuple[Source, ...]:
        """Recordings kept for the `unseen` split; empty for classes with recordings from one package only."""
        return tuple(s for s in self.sounds if s.held_out)


def held_out_package(packages: Sequence[str]) -> str | None:
    """The package whose recordings are held out, from the package of each recording of a class; None if there is one package only."""
    counts = Counter(packages)
    if len(counts) < 2:
        return None
    fewest = min(counts.values())
    return max(package for package, n in counts.items() if n == fewest)


def _source(root: Path, entry: dict[str, Any], held_out: bool) -> Source:
    """`held_out`: for a manifest that does not say."""
    path = root / entry["file"]
    remedy = "Restore it with git." if root == REAL_AV else f"Remove {root} and make it again: python -m data.fetch --out {root}"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} is listed in {root / 'manifest.json'} but cannot be read ({error.strerror}). {remedy}") from error
    if found != entry["sha256"]:
        raise DataError(f"{path} has changed: its sha256 is not the one in {root / 'manifest.json'}. {remedy}")
    held_out = entry.get("held_out", held_out)
    return Source(path.stem, path, entry["source"], entry["license"], entry["origin"], entry["attribution"], entry["sha256"], held_out)


@lru_cache(maxsize=4)
def load_sources(root: Path = REAL_AV) -> list[SourceClass]:
    """Every class of the set, in manifest order, each file checked against its sha256. Raises DataError for a missing or changed file."""
    manifest_path = root / "manifest.json"
    try:
        entries = json.loads(manifest_path.read_text(encoding="utf-8"))["classes"]
    except OSError as error:
        raise DataError(f"{manifest_path} cannot be read ({error.strerror}). Is {root} the folder of a source set?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{manifest_path} is no source manifest: it must be JSON with a list "classes". Restore or make it again.') from error
    classes = []
    for entry in entries:
        held = held_out_package([s["source"] for s in entry["sounds"]])
        classes.append(
            SourceClass(
                name=entry["name"].replace(" ", "_"),
                title=entry["name"],
                seen=entry["seen"],
                heard=entry["heard"],
                pictures=tuple(_source(root, p, p["source"] == HELD_OUT_STYLE) for p in entry["images"]),
                sounds=tuple(_source(root, s, s["source"] == held) for s in entry["sounds"]),
            )
        )
    return classes


def attribution(root: Path = REAL_AV, by: str = "python -m data.sources") -> str:
    """ATTRIBUTION.md: every file with its licence, author and origin, generated from the manifest by the command `by`."""
    files = [(f"{s.path.parent.name}/{s.path.name}", s) for c in load_sources(root) for s in (*c.pictures, *c.sounds)]
    used = sorted({s.license for _, s in files})
    lines = [
        "# Attribution",
        "",
        f"Every picture and recording of this folder. Generated from manifest.json by `{by}`; do not edit by hand.",
        "Pictures were scaled to at most 256 px and stored as WebP; recordings made 16 kHz mono, normalised, cut at 6 s, stored as "
        f"{'Ogg Vorbis' if root == REAL_AV else 'WAV'}.",
        "",
        "| licence | files | text |",
        "|---|---|---|",
        *(f"| {name} | {sum(s.license == name for _, s in files)} | {LICENSES[name]} |" for name in used),
        "",
        "| file | licence | author | taken from |",
        "|---|---|---|---|",
        *(f"| {file} | {s.license} | {s.attribution} | {s.origin} |" for file, s in sorted(files, key=lambda row: row[0])),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (REAL_AV / "ATTRIBUTION.md").write_text(attribution(), encoding="utf-8")
