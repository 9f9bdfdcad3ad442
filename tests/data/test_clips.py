"""Clip folders: read back as written, and refused with one clear sentence when anything is wrong."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from data.check import leave_out
from data.clips import Clip, Clips, DataError, Grid, load_clips, save_clips
from data.media import stream_hashes


def rows(folder: Path, table: str = "clips") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{table}.jsonl").read_text().splitlines()]


def write(folder: Path, changed: list[dict[str, Any]], table: str = "clips") -> None:
    (folder / f"{table}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))


def edit(folder: Path, table: str, number: int, **changes: Any) -> None:
    """Change fields of one row; None removes the field."""
    changed = rows(folder, table)
    changed[number] = {k: v for k, v in (changed[number] | changes).items() if v is not None}
    write(folder, changed, table)


def edit_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def edit_raw(folder: Path, key: str, value: Any) -> None:
    """Set one key of the manifest, to null too."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {key: value}))


def number_of(folder: Path, split: str, condition: str) -> int:
    return next(i for i, row in enumerate(rows(folder)) if row["split"] == split and row["condition"] == condition)


def test_read_back(small: Clips, folder: Path) -> None:
    loaded = load_clips(folder)
    assert loaded.clips == small.clips and loaded.grids == small.grids and loaded.root == folder
    assert loaded.labels()["fire_truck"] == ("a fire truck", "a siren wailing")
    clip = loaded.select("test", "counterfactual")[0]
    assert loaded.by_id()[clip.id] is clip and loaded.path(clip).is_file()
    assert {c.split for c in loaded.select("plan")} == {"plan"} and {c.condition for c in loaded.select(condition="muted")} == {"muted"}
    assert loaded.data_hash == loaded.manifest["data_hash"]


def test_table(small: Clips) -> None:
    table = small.table
    assert table.column_names == [f.name for f in fields(Clip)] and len(table) == len(small.clips)
    assert table[3] == asdict(small.clips[3])
    assert str(table.features["seconds"].dtype) == "float64" and str(table.features["id"].dtype) == "string"
    assert table is small.table


def test_save_and_load_own_folder(small: Clips, tmp_path: Path) -> None:
    """The recipe of the module's docstring."""
    (tmp_path / "media").mkdir()
    own = []
    for clip in (small.by_id()["test_dog_00"], small.by_id()["test_cow_00"]):
        file = f"media/{clip.video_label}.mp4"
        (tmp_path / file).write_bytes(small.path(clip).read_bytes())
        name = clip.video_label
        hashes = stream_hashes(tmp_path / file)
        own.append(Clip(name, file, "test", "factual", name, name, "été", "a\u2028line", "x", "x", name, name, *hashes, seconds=1.0))
    save_clips(tmp_path, own, [], {"labels": [["dog", "a dog", "a dog barking"], ["cow", "a cow", "a cow mooing"]]})
    assert load_clips(tmp_path).clips == tuple(own)
    # The least folder by hand: no grids.jsonl, two fields in the manifest.
    (tmp_path / "grids.jsonl").unlink()
    (tmp_path / "manifest.json").write_text('{"version": 1, "labels": [["dog", "a dog", "a dog barking"], ["cow", "a cow", "a cow mooing"]]}')
    assert load_clips(tmp_path).clips == tuple(own) and load_clips(tmp_path).grids == ()
    with pytest.raises(DataError, match=r"nowhere\.mp4 cannot be written or found"):
        save_clips(tmp_path, [replace(own[0], file="media/nowhere.mp4")], [], {"labels": [["dog", "a", "b"]]})
    assert load_clips(tmp_path).clips == tuple(own)


def test_a_folder_stays_whole_where_its_tables_cannot_be_written(folder: Path) -> None:
    """Every table in turn cannot be written: its draft's name is taken by a folder. What somebody wrote by hand is not lost."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({key: manifest[key] for key in ("version", "labels")}))
    before, texts = load_clips(folder), {path: path.read_bytes() for path in folder.glob("*.json*")}
    for name in ("clips.jsonl", "grids.jsonl", "manifest.json"):
        (folder / f"{name}.partial").mkdir()
        (folder / f"{name}.partial/x").touch()
        with pytest.raises(DataError, match=rf"{name}\.partial cannot be written"):
            leave_out(before, [before.clips[-1].id])
        assert {path: path.read_bytes() for path in folder.glob("*.json*") if path.is_file()} == texts
        shutil.rmtree(folder / f"{name}.partial")
    assert len(leave_out(before, [before.clips[-1].id]).clips) == len(before.clips) - 1
    assert not list(folder.glob("*.partial"))
    with pytest.raises(DataError, match=r"nowhere\.mp4 cannot be written or found"):
        save_clips(folder, [replace(before.clips[0], file="nowhere.mp4")], [], before.manifest)
    assert len(load_clips(folder).clips) == len(before.clips) - 1


def swap_grid(folder: Path) -> None:
    grid = rows(folder, "grids")[0]
    edit(folder, "grids", 0, ox=grid["xo"], xo=grid["ox"])


def leak_rendering(folder: Path) -> None:
    """A plan clip that claims a train rendering, its own streams notwithstanding."""
    train = rows(folder)[number_of(folder, "train", "factual")]
    edit(folder, "clips", number_of(folder, "plan", "factual"), video_rendering=train["video_rendering"])
    write(folder, [], "grids")


def leak_stream(folder: Path) -> None:
    """A test clip whose sound is, byte for byte, one of train's under another name."""
    train = rows(folder)[number_of(folder, "train", "factual")]
    edit(folder, "clips", number_of(folder, "test", "factual"), audio_sha256=train["audio_sha256"])


def leak_pair(folder: Path) -> None:
    """A train conflict of a pair of test, the other way round."""
    changed = rows(folder)
    a, b = json.loads((folder / "manifest.json").read_text())["pairs"]["test"][0]
    number = number_of(folder, "train", "counterfactual")
    changed[number] |= {"video_label": b, "audio_label": a}
    write(folder, changed)


def leak_pair_by_hand(folder: Path) -> None:
    """The same where no manifest says which pairs are held out: test's own conflicts do."""
    edit_manifest(folder, pairs=None)
    tested = rows(folder)[number_of(folder, "test", "counterfactual")]
    edit(folder, "clips", number_of(folder, "train", "counterfactual"), video_label=tested["audio_label"], audio_label=tested["video_label"])


def remove_media(folder: Path) -> None:
    (folder / rows(folder)[2]["file"]).unlink()


def truncate_media(folder: Path) -> None:
    os.truncate(folder / rows(folder)[2]["file"], 500)


def append(folder: Path, name: str, text: str) -> None:
    with open(folder / name, "a") as file:
        file.write(text)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"clips is not whole: it has no manifest\.json.*Build it again"),
    "manifest no JSON": (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json cannot be read as JSON"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json is not a JSON object"),
    "manifest unknown field": (lambda f: edit_manifest(f, labells=[]), r'manifest\.json has an unknown field "labells"\. Remove it'),
    "manifest version": (lambda f: edit_manifest(f, version=0), "has version 0, this code reads version 1"),
    "manifest without labels": (lambda f: edit_manifest(f, labels=None), r'manifest\.json needs "labels"'),
    "manifest short label": (lambda f: edit_manifest(f, labels=[["dog", "a dog"]]), r'manifest\.json needs "labels"'),
    "manifest label twice": (lambda f: edit_manifest(f, labels=[["dog", "a", "b"], ["dog", "c", "d"]]), "names a label twice"),
    "files a list": (lambda f: edit_raw(f, "files", [1]), r'manifest\.json: "files" has to be an object'),
    "files null": (lambda f: edit_raw(f, "files", None), r'manifest\.json: "files" has to be an object'),
    "files of words": (lambda f: edit_raw(f, "files", {"media/a.mp4": "10"}), r'manifest\.json: "files" has to be an object'),
    "pairs a list": (lambda f: edit_raw(f, "pairs", [["a", "b"]]), r'manifest\.json: "pairs" has to be an object'),
    "pairs null": (lambda f: edit_raw(f, "pairs", None), r'manifest\.json: "pairs" has to be an object'),
    "pairs of numbers": (lambda f: edit_raw(f, "pairs", {"test": [1]}), r'manifest\.json: "pairs" has to be an object'),
    "pairs of null": (lambda f: edit_raw(f, "pairs", {"test": None}), r'manifest\.json: "pairs" has to be an object'),
    "pairs of mixed": (lambda f: edit_raw(f, "pairs", {"test": [[1, "a"]]}), r'manifest\.json: "pairs" has to be an object'),
    "manifest too deep": (lambda f: (f / "manifest.json").write_text("[" * 200_000), r"manifest\.json cannot be read as JSON"),
    "no table": (lambda f: (f / "clips.jsonl").unlink(), r"clips\.jsonl cannot be read"),
    "empty table": (lambda f: (f / "clips.jsonl").write_text(""), r"clips\.jsonl has no clips"),
    "line no JSON": (lambda f: append(f, "clips.jsonl", "{no\n"), r"clips\.jsonl line \d+ is not JSON"),
    "line a list": (lambda f: append(f, "clips.jsonl", "[1]\n"), r"clips\.jsonl line \d+ is not a JSON object"),
    "line too deep": (lambda f: append(f, "clips.jsonl", "[" * 200_000 + "\n"), r"clips\.jsonl line \d+ is not JSON"),
    "half a character": (lambda f: edit(f, "clips", 1, seen="\ud800"), r"clips\.jsonl line 2: \"seen\" is '.ud800', half of a character"),
    "too long": (lambda f: edit(f, "clips", 1, seconds=10**400), "lasts inf seconds"),
    "file with NUL": (lambda f: edit(f, "clips", 1, file="media/a\0.mp4"), r"the file of clip .* does not exist"),
    "file elsewhere": (lambda f: edit(f, "clips", 1, file="/etc/passwd"), r'the file "/etc/passwd" of clip .* is not a path below the clip folder'),
    "file outside": (lambda f: edit(f, "clips", 1, file="media/../../x.mp4"), r"is not a path below the clip folder"),
    "no file": (lambda f: edit(f, "clips", 1, file=""), r"is not a path below the clip folder"),
    "unknown field": (lambda f: edit(f, "clips", 1, colour="red"), r'clips\.jsonl line 2 has an unknown field "colour"\. Remove it'),
    "missing field": (lambda f: edit(f, "clips", 1, heard=None), r'clips\.jsonl line 2 has no field "heard"\. Add it'),
    "wrong type": (lambda f: edit(f, "clips", 1, seconds="two"), r"clips\.jsonl line 2: \"seconds\" is 'two', but must be a number"),
    "a number for a word": (lambda f: edit(f, "clips", 1, seen=3), r'clips\.jsonl line 2: "seen" is 3, but must be a string'),
    "no length": (lambda f: edit(f, "clips", 1, seconds=0), r"lasts 0\.0 seconds"),
    "unknown split": (lambda f: edit(f, "clips", 1, split="dev"), r'line 2: unknown split "dev"\. Use one of train, plan'),
    "unknown condition": (lambda f: edit(f, "clips", 1, condition="mixed"), r'line 2: unknown condition "mixed"'),
    "unknown label": (lambda f: edit(f, "clips", 1, audio_label="dodo"), r'has the unknown label "dodo"\. Add it to "labels" in .*manifest\.json'),
    "label missing": (lambda f: edit(f, "clips", 1, audio_label=""), r'is factual but has the label ""'),
    "muted with label": (lambda f: edit(f, "clips", number_of(f, "test", "muted"), audio_label="dog"), 'is muted but has the label "dog"'),
    "id twice": (lambda f: edit(f, "clips", 1, id=rows(f)[0]["id"]), r"clips\.jsonl line 2 repeats the id"),
    "id a path": (lambda f: edit(f, "clips", 1, id="a/b"), 'the id "a/b" cannot be a file name'),
    "media missing": (remove_media, r"mp4, the file of clip .* does not exist"),
    "media truncated": (truncate_media, r"mp4 has 500 bytes, not the \d+ it was written with"),
    "grid of nothing": (lambda f: edit(f, "grids", 0, xx="nobody"), r'grids\.jsonl: grid .* names the clip "nobody"'),
    "grid across splits": (lambda f: edit(f, "grids", 0, split="test"), r"is of split test, but its clip"),
    "grid the wrong way": (swap_grid, "is not a pair of clips and their two swaps"),
    "grid unknown field": (lambda f: edit(f, "grids", 0, yy="x"), r'grids\.jsonl line 1 has an unknown field "yy"'),
    "rendering leaks": (leak_rendering, r"the rendering train_\S+ is in two splits, (train|plan)"),
    "stream leaks": (leak_stream, "the audio stream [0-9a-f]+ is in two splits"),
    "pair leaks": (leak_pair, "a pair that is held out for testing"),
    "pair leaks by hand": (leak_pair_by_hand, "a pair that is held out for testing"),
    "changed afterwards": (lambda f: edit(f, "clips", 1, seen="a thing"), "was changed after its manifest.json was written"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(folder: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_clips(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist\. Build it with"):
        load_clips(tmp_path / "nowhere")


def test_grid_round_trip(small: Clips, folder: Path) -> None:
    grid = small.grids[0]
    assert Grid(**rows(folder, "grids")[0]) == grid
    clips = small.by_id()
    assert clips[grid.oo].condition == clips[grid.xx].condition == "factual"
    assert clips[grid.ox].video_sha256 == clips[grid.oo].video_sha256 and clips[grid.ox].audio_sha256 == clips[grid.xx].audio_sha256
    assert clips[grid.xo].video_sha256 == clips[grid.xx].video_sha256 and clips[grid.xo].audio_sha256 == clips[grid.oo].audio_sha256


def test_sources_that_the_train_split_has_too(small: Clips) -> None:
    """Of these six classes cow and car have a held-out recording: all pictures and two recordings of the unseen split are new. One swapped training
    clip with the cow's leaves one.
    """
    assert small.shared_sources("unseen") == {"video": (0, 6), "audio": (4, 6)}
    assert "" not in small.sources("test")["video"] | small.sources("test")["audio"]  # of muted and blanked clips
    [cow] = {c.audio_source for c in small.select("unseen") if c.audio_label == "cow"}
    swapped = small.select("train", "counterfactual")[0]
    changed = replace(small, clips=tuple(replace(c, audio_source=cow) if c is swapped else c for c in small.clips))
    assert changed.shared_sources("unseen") == {"video": (0, 6), "audio": (5, 6)}
    alone = replace(small, clips=tuple(c for c in small.clips if c.split == "unseen"))
    assert alone.shared_sources("unseen") == {"video": (0, 6), "audio": (0, 6)} and alone.sources("train")["audio"] == frozenset()
