"""What a sample is: clips, grids, and the folder that holds them.

A clip folder looks like this, and anyone can write one for their own media:

    clips.jsonl     one clip a line (the fields of `Clip`)
    grids.jsonl     one 2x2 grid a line (the fields of `Grid`); may be absent
    media/*.mp4     H.264 + AAC
    manifest.json   provenance, settings and hashes; written last, so its presence means that the folder is whole

    from data.clips import load_clips
    clips = load_clips("runs/clips")
    clips.select("test", "counterfactual"), clips.table            # a tuple of Clip; a Hugging Face `datasets` table

A folder of your own: put the files under media/, then

    dog, bell = "media/dog.mp4", "media/bell.mp4"
    rows = [
        Clip("dog", dog, "test", "factual", "dog", "dog", "a dog", "a dog barking", "dog.mov", "dog.mov", "dog", "dog",
             *stream_hashes(folder / dog), seconds=2.0),
        ...
    ]
    save_clips(folder, rows, [], {"labels": [["dog", "a dog", "a dog barking"], ["bell", "a bell", "a bell ringing"]]})

Written by hand, the least manifest.json is {"version": 1, "labels": [[name, seen, heard], ...]}. `data.counterfactual` makes the swaps.
Beside the labels "synonyms" may say what else answers call them, {name: [[words for what is seen], [words for what is heard]]}, as in
{"dog": [["a puppy"], ["barking", "a woof"]]}. A clip's own `seen` and `heard` need not be its label's phrases; answers are read for all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

if TYPE_CHECKING:  # importing it takes a second; only `Clips.table` needs it
    import datasets

Split = Literal["train", "plan", "selection", "test", "unseen"]
Condition = Literal["factual", "counterfactual", "muted", "blanked"]
Stream = Literal["video", "audio"]
MANIFEST_VERSION = 1
MANIFEST_KEYS = ("version", "labels", "pairs", "config", "sources", "code", "files", "data_hash", "synonyms")  # the first two are needed


class DataError(ValueError):
    """Input that cannot be used. The message names the file and what to do."""


@dataclass(frozen=True)
class Clip:
    """One video stream and one audio stream in one mp4, each with its own known label.

    `*_label` is the class, `seen` / `heard` the phrase a person would use, `*_source` the picture or recording it was rendered from,
    `*_rendering` the factual clip that the stream was first made for (equal for both streams of a factual clip),
    `*_sha256` a hash of all that decides what is shown or heard (`data.media.stream_hashes`): equal hashes mean equal
    media, whatever file carries them.
    In the stream that a muted or a blanked clip lacks is nothing: label, phrase and source are "", and the rendering says what it is, "silence" or
    "near_silence" (noise too quiet to hear), "black" or "near_black".
    `id` is a plain word (letters, digits, "_", "-", "."), `file` a path below the clip folder.
    """

    id: str
    file: str
    split: Split
    condition: Condition
    video_label: str
    audio_label: str
    seen: str
    heard: str
    video_source: str
    audio_source: str
    video_rendering: str
    audio_rendering: str
    video_sha256: str
    audio_sha256: str
    seconds: float


@dataclass(frozen=True)
class Grid:
    """Two factual clips i, j and their two swaps. In a cell the first letter is the video, the second the audio; o is from i, x from j."""

    id: str
    split: Split
    oo: str
    ox: str
    xo: str
    xx: str


@dataclass(frozen=True)
class Clips:
    """A loaded clip folder."""

    root: Path
    clips: tuple[Clip, ...]
    grids: tuple[Grid, ...]
    manifest: dict[str, Any]

    @cached_property
    def table(self) -> datasets.Dataset:
        """The clips as a Hugging Face `datasets` table, a column a field; held in memory, nothing is downloaded or cached on disk."""
        import datasets

        features = datasets.Features({f.name: datasets.Value("float64" if f.type == "float" else "string") for f in fields(Clip)})
        return datasets.Dataset.from_list([asdict(c) for c in self.clips], features=features)

    @property
    def data_hash(self) -> str:
        """sha256 over the tables, and so over every stream hash in them: the same for the same data."""
        return _tables_hash(_jsonl(self.clips), _jsonl(self.grids))

    def hash_of(self, split: str) -> str:
        """sha256 over the rows of one split, clips and grids; of the test split also those of unseen sources, which are asked about with it. Of both
        also over the sources that the train split has, which decide what is unseen. What is measured on a split depends on these only.
        """
        parts = (split, "unseen") if split == "test" else (split,)
        clips, grids = ([row for row in rows if row.split in parts] for rows in (self.clips, self.grids))
        trained = {stream: sorted(found) for stream, found in self.sources("train").items()}
        return _tables_hash(_jsonl(clips), _jsonl(grids) + (json.dumps(trained) if "unseen" in parts else ""))

    def select(self, split: str | None = None, condition: str | None = None) -> list[Clip]:
        """The clips of one split and / or condition, in file order."""
        return [c for c in self.clips if (split is None or c.split == split) and (condition is None or c.condition == condition)]

    def sources(self, split: str) -> dict[Stream, frozenset[str]]:
        """The pictures ("video") and recordings ("audio") that the clips of a split carry, swapped ones included."""
        found = self.select(split)
        return {
            "video": frozenset(c.video_source for c in found if c.video_label),
            "audio": frozenset(c.audio_source for c in found if c.audio_label),
        }

    def shared_sources(self, split: str) -> dict[Stream, tuple[int, int]]:
        """Per stream, how many of a split's sources clips of the train split carry too, and how many there are."""
        train, own = self.sources("train"), self.sources(split)
        return {stream: (len(found & train[stream]), len(found)) for stream, found in own.items()}

    def by_id(self) -> dict[str, Clip]:
        """Clips by their id."""
        return {c.id: c for c in self.clips}

    def path(self, clip: Clip) -> Path:
        """Where the clip's mp4 lies."""
        return self.root / clip.file

    def labels(self) -> dict[str, tuple[str, str]]:
        """Every class with its (seen, heard) phrases: the vocabulary that answers are matched against."""
        return {name: (seen, heard) for name, seen, heard in self.manifest["labels"]}

    def synonyms(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Classes whose manifest brings other words: (for what is seen, for what is heard)."""
        return {name: (tuple(seen), tuple(heard)) for name, (seen, heard) in self.manifest.get("synonyms", {}).items()}


Row = TypeVar("Row", Clip, Grid)


def _jsonl(rows: Iterable[Clip | Grid]) -> str:
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def _tables_hash(clips: str, grids: str) -> str:
    return hashlib.sha256(f"{clips}\n{grids}".encode()).hexdigest()


def save_clips(folder: Path | str, clips: Iterable[Clip], grids: Iterable[Grid], manifest: dict[str, Any]) -> None:
    """Write clips.jsonl, grids.jsonl and, last, manifest.json into a folder whose media are already there; tables that it has are replaced
    once all three are on the disk, and stay as they are where that fails.

    `manifest` needs "labels" ([[name, seen, heard], ...]) and may have "synonyms"; version, file sizes and the data hash are filled in. Raises
    DataError if the folder cannot be written, a clip's file is missing or the synonyms are not of the form that `load_clips` reads.
    """
    folder, clips, grids = Path(folder), list(clips), list(grids)
    _check_synonyms(folder / "manifest.json", manifest)
    tables = {"clips.jsonl": _jsonl(clips), "grids.jsonl": _jsonl(grids)}
    try:
        sizes = {c.file: (folder / c.file).stat().st_size for c in clips}
        filled = {**manifest, "version": MANIFEST_VERSION, "files": sizes, "data_hash": _tables_hash(*tables.values())}
        # What is there stays whole until all that is new is on the disk. The manifest comes last: its hash shows tables that are not its own.
        texts = {**tables, "manifest.json": json.dumps(filled, indent=1, ensure_ascii=False) + "\n"}
        try:
            for name, text in texts.items():
                (folder / f"{name}.partial").write_text(text, encoding="utf-8")
            for name in texts:
                os.replace(folder / f"{name}.partial", folder / name)
        finally:
            for name in texts:
                if (folder / f"{name}.partial").is_file():
                    (folder / f"{name}.partial").unlink()
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be written or found ({error.strerror}). Mend that, then save again.") from error


def _allowed_values(cls: type[Clip] | type[Grid]) -> dict[str, tuple[type, tuple[str, ...]]]:
    """Each field's type, and the words it may be if it is a Literal."""
    hints = typing.get_type_hints(cls)
    return {name: (str, get_args(hint)) if get_args(hint) else (hint, ()) for name, hint in hints.items()}


def _read_rows(path: Path, cls: type[Row]) -> list[Row]:
    """The rows of a .jsonl table; a DataError that names the line for anything that is not exactly the fields of `cls`."""
    kinds = _allowed_values(cls)
    rows: list[Row] = []
    ids: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Build or copy the folder again.") from error
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error}). Mend the line or build the folder again.") from error
        if not isinstance(values, dict):
            raise DataError(f"{where} is not a JSON object with the fields {', '.join(kinds)}.")
        for key in values.keys() - kinds.keys():
            raise DataError(f'{where} has an unknown field "{key}". Remove it; the fields are {", ".join(kinds)}.')
        for key in [k for k in kinds if k not in values]:
            raise DataError(f'{where} has no field "{key}". Add it; the fields are {", ".join(kinds)}.')
        for key, (kind, words) in kinds.items():
            value = values[key]
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                values[key] = value = float(value) if abs(value) < 1 << 53 else float("inf")  # which no field may be
            if not isinstance(value, kind):
                raise DataError(f'{where}: "{key}" is {value!r}, but must be a {"number" if kind is float else "string"}. Correct it.')
            if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise DataError(f'{where}: "{key}" is {value!r}, half of a character. Correct it.')
            if words and value not in words:
                raise DataError(f'{where}: unknown {key} "{value}". Use one of {", ".join(words)}.')
        row = cls(**values)
        if row.id in ids:
            raise DataError(f'{where} repeats the id "{row.id}". Give each line its own id.')
        ids.add(row.id)
        rows.append(row)
    return rows


MEDIA_FILES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".flv",
    ".wmv",
    ".ts",
    ".mpg",
    ".mpeg",
    ".3gp",
    ".wav",
    ".mp3",
    ".flac",
    ".ogg",
    ".m4a",
)


def _check_is_folder(root: Path) -> None:
    """Say what it is where somebody names a table, a video or a folder of videos instead of a clip folder."""
    wanted = (
        "What is wanted is a clip folder: media/, clips.jsonl (one clip a line, with what is seen and heard in it) and manifest.json; the top of "
        'data/clips.py and "Your own clips" in README.md show how to make one.'
    )
    if root.is_file():
        kind = "a media file" if root.suffix.lower() in MEDIA_FILES else "a table" if root.suffix.lower() in (".csv", ".tsv", ".jsonl") else "a file"
        raise DataError(f"{root} is {kind}, no clip folder. {wanted}")
    if root.is_dir() and not any((root / name).is_file() for name in ("manifest.json", "clips.jsonl")):
        files = [path for pattern in ("*", "*/*") for path in root.glob(pattern) if path.suffix.lower() in MEDIA_FILES]
        tables = sorted(path.name for path in root.glob("*") if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl"))
        if files:
            beside = f" beside the table {tables[0]}" if tables else ""
            raise DataError(f"{root} is a folder of {len(files)} media files{beside}, no clip folder. {wanted}")
        if any(root.iterdir()):
            raise DataError(f"{root} is no clip folder: it has neither manifest.json nor clips.jsonl. {wanted}")


def _read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json, checked for its keys, its version and the form of its labels."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise DataError(f"{path.parent} does not exist. Build it with `python -m data --out {path.parent}`.") from error
        raise DataError(f"{path.parent} is not whole: it has no manifest.json, which is written last. Build it again.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}). Build the folder again.") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path} is not a JSON object. Build the folder again.")
    for key in manifest.keys() - set(MANIFEST_KEYS):
        raise DataError(f'{path} has an unknown field "{key}". Remove it; the fields are {", ".join(MANIFEST_KEYS)}.')
    if manifest.get("version") != MANIFEST_VERSION:
        raise DataError(f"{path} has version {manifest.get('version')}, this code reads version {MANIFEST_VERSION}. Build the folder again.")
    labels = manifest.get("labels")
    good = isinstance(labels, list) and all(isinstance(row, list) and len(row) == 3 and all(isinstance(w, str) and w for w in row) for row in labels)
    if not good or not labels:
        raise DataError(f'{path} needs "labels": a list of [name, seen, heard], each a non-empty string. Add it.')
    if len({row[0] for row in labels}) < len(labels):
        raise DataError(f'{path} names a label twice in "labels". Give each class one line.')
    _check_synonyms(path, manifest)
    sizes, pairs = manifest.get("files", {}), manifest.get("pairs", {})
    if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
        raise DataError(f'{path}: "files" has to be an object, {{file: its size in bytes}}. Correct it or leave it out.')
    if not isinstance(pairs, dict) or not all(isinstance(part, list) and all(_is_pair(p) for p in part) for part in pairs.values()):
        raise DataError(f'{path}: "pairs" has to be an object, {{split: [[label, label], ...]}}. Correct it or leave it out.')
    return manifest


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)


def _check_synonyms(path: Path, manifest: dict[str, Any]) -> None:
    """Synonyms, where there are any, are of known labels, two lists of words each."""
    synonyms, labels = manifest.get("synonyms", {}), {row[0] for row in manifest["labels"]}
    form = "{name: [[words for what is seen], [words for what is heard]]}"
    if not isinstance(synonyms, dict):
        raise DataError(f'{path}: "synonyms" has to be an object, {form}. Correct it or leave it out.')
    for name, sides in synonyms.items():
        if name not in labels:
            raise DataError(f'{path}: "synonyms" names "{name}", which is not among "labels". Correct the name or remove it.')
        lists = isinstance(sides, list | tuple) and len(sides) == 2 and all(isinstance(side, list | tuple) for side in sides)
        if not lists or not all(isinstance(word, str) and word.strip() for side in sides for word in side):
            raise DataError(f'{path}: the synonyms of "{name}" have to be two lists of words, {form}; a list may be empty. Correct them.')


def _check_clips(root: Path, clips: list[Clip], manifest: dict[str, Any]) -> None:
    """Labels are known, files are there and have the size they had when the folder was written."""
    table = root / "clips.jsonl"
    labels = {row[0] for row in manifest["labels"]}
    sizes = manifest.get("files", {})
    for clip in clips:
        if not clip.id or set(clip.id) & set("/\\ \n\t") or clip.id.startswith("."):
            raise DataError(f'{table}: the id "{clip.id}" cannot be a file name. Use letters, digits, "_", "-" and ".".')
        if not 0 < clip.seconds < float("inf"):
            raise DataError(f'{table}: clip "{clip.id}" lasts {clip.seconds} seconds. Give its length.')
        for label, absent in ((clip.video_label, clip.condition == "blanked"), (clip.audio_label, clip.condition == "muted")):
            if absent != (label == ""):
                raise DataError(
                    f'{table}: clip "{clip.id}" is {clip.condition} but has the label "{label}". '
                    'A muted clip has audio_label "", a blanked one video_label "", no other clip has an empty label.'
                )
            if label and label not in labels:
                raise DataError(f'{table}: clip "{clip.id}" has the unknown label "{label}". Add it to "labels" in {root / "manifest.json"}.')
        if not clip.file or Path(clip.file).is_absolute() or ".." in Path(clip.file).parts:
            raise DataError(f'{table}: the file "{clip.file}" of clip "{clip.id}" is not a path below the clip folder. Put it under media/.')
        try:
            size = (root / clip.file).stat().st_size
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise DataError(f'{root / clip.file}, the file of clip "{clip.id}", does not exist. Restore it or build the folder again.') from error
        if sizes.get(clip.file, size) != size:
            raise DataError(f"{root / clip.file} has {size} bytes, not the {sizes[clip.file]} it was written with. Build the folder again.")


def _check_grids(root: Path, clips: list[Clip], grids: list[Grid]) -> None:
    """A grid's four clips exist, belong to its split, and are the two factual clips and their two swaps."""
    by_id = {c.id: c for c in clips}
    for grid in grids:
        where = f'{root / "grids.jsonl"}: grid "{grid.id}"'
        for name in (grid.oo, grid.ox, grid.xo, grid.xx):
            if name not in by_id:
                raise DataError(f'{where} names the clip "{name}", which clips.jsonl does not have. Add the clip or remove the grid.')
            if by_id[name].split != grid.split:
                raise DataError(f'{where} is of split {grid.split}, but its clip "{name}" of {by_id[name].split}. Keep a grid within one split.')
        oo, ox, xo, xx = (by_id[name] for name in (grid.oo, grid.ox, grid.xo, grid.xx))
        streams = [(c.video_rendering, c.audio_rendering) for c in (ox, xo)]
        if streams != [(oo.video_rendering, xx.audio_rendering), (xx.video_rendering, oo.audio_rendering)]:
            raise DataError(f"{where} is not a pair of clips and their two swaps: compare the renderings of its four clips.")


def _check_leaks(root: Path, clips: list[Clip], manifest: dict[str, Any]) -> None:
    """No rendering and no coded stream is in two splits; no conflict of train or plan is of a class pair that is tested on."""
    table = root / "clips.jsonl"
    splits: dict[str, Clip] = {}
    for clip in clips:
        # The streams with nothing in them, of muted and blanked clips, carry nothing that could leak.
        video = (f"the rendering {clip.video_rendering}", f"the video stream {clip.video_sha256}") if clip.video_label else ()
        audio = (f"the rendering {clip.audio_rendering}", f"the audio stream {clip.audio_sha256}") if clip.audio_label else ()
        for stream in video + audio:
            first = splits.setdefault(stream, clip)
            if first.split != clip.split:
                raise DataError(
                    f'{table}: {stream} is in two splits, {first.split} (clip "{first.id}") and {clip.split} (clip "{clip.id}"). '
                    "Keep each in one, or nothing measured on the second can be trusted."
                )
    held = {tuple(sorted(p)) for part in ("selection", "test") for p in manifest.get("pairs", {}).get(part, [])}
    conflicts = [
        (c, tuple(sorted((c.video_label, c.audio_label)))) for c in clips if c.video_label and c.audio_label and c.video_label != c.audio_label
    ]
    held |= {p for c, p in conflicts if c.split in ("selection", "test", "unseen")}
    for clip, classes in conflicts:
        if clip.split in ("train", "plan") and classes in held:
            raise DataError(
                f'{table}: {clip.split} clip "{clip.id}" pairs {classes[0]} with {classes[1]}, a pair that is held out for testing. '
                "Take it out of train and plan, in both directions."
            )


def load_clips(folder: Path | str) -> Clips:
    """A clip folder, fully checked (not decoded). Raises DataError with one sentence that names the file, and the line, and what to do."""
    root = Path(folder)
    _check_is_folder(root)
    manifest = _read_manifest(root / "manifest.json")
    clips = _read_rows(root / "clips.jsonl", Clip)
    grids = _read_rows(root / "grids.jsonl", Grid) if (root / "grids.jsonl").exists() else []
    if not clips:
        raise DataError(f"{root / 'clips.jsonl'} has no clips. Build the folder again.")
    _check_clips(root, clips, manifest)
    _check_grids(root, clips, grids)
    _check_leaks(root, clips, manifest)
    loaded = Clips(root, tuple(clips), tuple(grids), manifest)
    if "data_hash" in manifest and loaded.data_hash != manifest["data_hash"]:
        raise DataError(f"{root} was changed after its manifest.json was written. Write it with data.clips.save_clips, or build it again.")
    return loaded
