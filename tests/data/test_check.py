"""`python -m data check`: every clip that cannot be used is named, in one go."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from data.__main__ import main
from data.check import refusal
from data.clips import DataError, load_clips, save_clips
from data.media import read_audio, read_video, stream_hashes, write_mp4


def spoilt(folder):
    """Four clips of a folder are made bad, each in its own way; their ids with what has to be said."""
    clips = load_clips(folder)
    silent, without, cut, other = clips.select("test", "factual")[:2] + clips.select("train", "factual")[:2]
    frames = read_video(clips.path(silent), 4).transpose(0, 2, 3, 1)
    write_mp4(clips.path(silent), frames, 4, np.zeros(16000, np.float32))
    write_mp4(clips.path(without), frames, 4, None)
    new = {}
    for clip in (silent, without):
        video, audio = stream_hashes(clips.path(clip))
        new[clip.id] = replace(clip, video_sha256=video, audio_sha256=audio)
    clips.path(cut).write_bytes(clips.path(cut).read_bytes()[:-3000])
    write_mp4(clips.path(other), frames, 4, read_audio(clips.path(clips.clips[-1]), muted=True) + 0.1)
    save_clips(folder, [new.get(c.id, c) for c in clips.clips], clips.grids, clips.manifest)
    return {silent.id: "silent sound track", without.id: "no sound track", cut.id: "truncated", other.id: "another"}


def test_all_bad_clips_are_named_at_once(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    bad = spoilt(folder)
    assert main(["check", str(folder)]) == 2
    said = capsys.readouterr()
    lines = said.out.splitlines()
    for clip, reason in bad.items():
        [line] = [line for line in lines if f" {clip} " in line]
        assert reason in line
    assert len([line for line in lines if ".mp4" in line]) == 4
    assert f"error: {folder}: 4 of {len(load_clips(folder).clips)} clips cannot be used" in said.err


def test_leaving_the_bad_ones_out_takes_their_grids_with_them(folder, capsys):
    bad = spoilt(folder)
    before = load_clips(folder)
    assert main(["check", str(folder)]) == 2
    command = capsys.readouterr().err.splitlines()[-1]
    assert command.startswith("python -m data check ")
    assert main(command.split()[3:]) == 0
    after = load_clips(folder)
    assert {c.id for c in before.clips} - {c.id for c in after.clips} == set(bad)
    assert [g for g in before.grids if not {g.oo, g.ox, g.xo, g.xx} & set(bad)] == list(after.grids)
    assert 0 < len(after.grids) < len(before.grids)
    with pytest.raises(DataError, match="has no clip"):
        from data.check import leave_out

        leave_out(after, ["nobody"])


def test_a_whole_folder_passes_and_a_muted_clip_may_be_silent(folder, capsys):
    assert main(["check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "clips can be used" in said
    for split in ("test", "unseen"):
        (pictures, of), (recordings, heard) = load_clips(folder).shared_sources(split).values()
        assert f"{split}: the train split has {pictures} of {of} pictures and {recordings} of {heard} recordings too" in said
    assert load_clips(folder).select(condition="muted")


def test_bad_input_of_any_kind_is_exit_code_2(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "x").write_text("x")
    assert main(["--out", str(tmp_path)]) == 2
    assert "is no clip folder" in capsys.readouterr().err


def test_what_is_no_clip_folder_is_said_to_be_what_it_is(small, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for clip in small.clips[:3]:
        shutil.copy(small.path(clip), videos / f"{clip.id}.mp4")
    (tmp_path / "captions.csv").write_text("file,caption\n")
    for what, said in (
        (videos, "is a folder of 3 media files, no clip folder"),
        (tmp_path / "captions.csv", "is a table, no clip folder"),
        (videos / f"{small.clips[0].id}.mp4", "is a media file, no clip folder"),
        (tmp_path, "is a folder of 3 media files beside the table captions.csv, no clip folder"),
    ):
        with pytest.raises(DataError, match=said) as stopped:
            load_clips(what)
        assert "Your own clips" in str(stopped.value) and "\n" not in str(stopped.value)


def test_the_hash_of_a_split_is_of_its_own_rows(folder):
    """Leaving a training clip out keeps what was measured on the test split, unless a source goes with it, which then is unseen; its own clips, and
    those of unseen sources, do not."""
    clips = load_clips(folder)
    parts = {split: clips.hash_of(split) for split in ("train", "plan", "selection", "test")}
    assert len(set(parts.values())) == 4

    def without(name, ids):
        from data.check import leave_out

        return leave_out(load_clips(shutil.copytree(folder, folder.parent / name)), ids)

    def one_of(split):
        return clips.select(split, "counterfactual")[0].id

    train, unseen = without("train", [one_of("train")]), without("unseen", [one_of("unseen")])
    assert train.sources("train") == clips.sources("train")
    assert [split for split in parts if train.hash_of(split) != parts[split]] == ["train"]
    assert [split for split in parts if unseen.hash_of(split) != parts[split]] == ["test"]
    assert json.loads((train.root / "manifest.json").read_text())["data_hash"] == train.data_hash
    recording = clips.select("train", "factual")[0].audio_source
    less = without("recording", [c.id for c in clips.select("train") if c.audio_source == recording])
    gone = {stream: clips.sources("train")[stream] - less.sources("train")[stream] for stream in ("video", "audio")}
    assert gone == {"video": set(), "audio": {recording}}
    assert [split for split in parts if less.hash_of(split) != parts[split]] == ["train", "test"]
    assert less.hash_of("unseen") != clips.hash_of("unseen")


def test_where_all_clips_are_bad_the_reason_is_said_once(folder, capsys):
    """Rows of another version: not one command with every id, which would leave nothing."""
    clips = load_clips(folder)
    kept = [c for c in clips.clips if c.condition == "factual"][:3]
    save_clips(folder, [replace(c, video_sha256=c.video_sha256[::-1]) for c in kept], [], clips.manifest)
    assert main(["check", str(folder)]) == 2
    said = capsys.readouterr()
    assert "--leave-out" not in said.err and said.err.count("data.media.stream_hashes") == 1 and kept[0].id not in said.out
    for clip in kept:
        clips.path(clip).write_bytes(b"x" * clips.path(clip).stat().st_size)
    assert main(["check", str(folder)]) == 2
    said = capsys.readouterr()
    assert "--leave-out" not in said.err and "build the folder again" in said.err and kept[0].id in said.out


def test_a_refusal_names_no_more_than_can_be_read(small):
    said = str(refusal(small.root, [(clip, f"{clip.file} is bad.") for clip in small.clips[:45]], 50))
    assert small.clips[19].file in said and small.clips[20].file not in said and "and 25 more" in said and "--leave-out" not in said
    assert "\n" not in said and f"python -m data check {small.root}" in said
