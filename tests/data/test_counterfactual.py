"""The builder of counterfactuals, against assignments found by hand."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from data.clips import Clip, Clips
from data.counterfactual import assign, choose_swaps, make_grid, similarities
from data.media import MediaError, mux, read_audio, read_video, stream_hashes, write_mp4


def clip(name: str, seen: str, heard: str, label: str | None = None) -> Clip:
    label = label or name
    return Clip(name, f"media/{name}.mp4", "test", "factual", label, label, seen, heard, name, name, name, name, "", "", 2.0)


def names(swaps: list[tuple[Clip, Clip]]) -> set[tuple[str, str]]:
    return {(i.id, j.id) for i, j in swaps}


def test_similarities_by_hand() -> None:
    # "a", "the" are stop words. idf = ln((1 + n) / (1 + df)) + 1 with n = 3: red (df 2) ln(4/3) + 1, the others (df 1) ln 2 + 1.
    red, rest = math.log(4 / 3) + 1, math.log(2) + 1
    expected = red**2 / (red**2 + rest**2)
    found = similarities(["a red car", "the red bus", "rain"])
    assert found[0, 1] == pytest.approx(expected) == pytest.approx(found[1, 0])
    assert np.diag(found) == pytest.approx(1.0) and found[0, 2] == found[1, 2] == 0
    assert not similarities(["", ""]).any()


def test_assignment_by_hand() -> None:
    # Greedy would take (0, 1) at 0.0 and then be left with (2, 0) or (1, 0) at 0.9: 0.0 + 0.9 + ...; the least sum is a cycle.
    similarity = np.array([[1.0, 0.0, 0.1], [0.2, 1.0, 0.9], [0.9, 0.1, 1.0]])
    off = ~np.eye(3, dtype=bool)
    # The two derangements: 0>1>2>0 costs 0.0 + 0.9 + 0.9, 0>2>1>0 costs 0.1 + 0.1 + 0.2.
    assert assign(similarity, off) == [(0, 2), (1, 0), (2, 1)]


def test_assignment_is_least_among_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        similarity = rng.random((6, 6))
        allowed = ~np.eye(6, dtype=bool) & (rng.random((6, 6)) > 0.2)
        found = assign(similarity, allowed)
        totals = []
        for columns in itertools.permutations(range(6)):
            cells = [(i, j) for i, j in enumerate(columns) if allowed[i, j]]
            totals.append((-len(cells), sum(similarity[c] for c in cells)))
        assert (-len(found), sum(similarity[c] for c in found)) == pytest.approx(min(totals))


def test_row_without_partner_is_left_out() -> None:
    allowed = np.array([[False, True, False], [True, False, False], [False, False, False]])
    assert assign(np.zeros((3, 3)), allowed) == [(0, 1), (1, 0)]
    assert assign(np.zeros((2, 2)), np.zeros((2, 2), dtype=bool)) == []


def test_ties_are_broken_by_seed() -> None:
    off = ~np.eye(12, dtype=bool)
    results = [assign(np.zeros((12, 12)), off, seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


HORSE = clip("horse", "a horse", "a horse neighing")
GALLOP = clip("gallop", "a horse", "a horse galloping")
BELL = clip("bell", "a bell", "a bell ringing")
RAIN = clip("rain", "a cloud", "rain falling")


def test_similar_captions_are_never_swapped() -> None:
    four = [HORSE, GALLOP, BELL, RAIN]
    for rounds in (1, 3):
        swaps = choose_swaps(four, rounds=rounds)
        assert not {("horse", "gallop"), ("gallop", "horse")} & names(swaps)
    # All five pairs that remain, each once.
    assert len({frozenset(p) for p in names(choose_swaps(four, rounds=9))}) == len(choose_swaps(four, rounds=9)) == 5
    assert len(choose_swaps(four, rounds=9, max_similarity=1.0)) == 6


def test_only_allowed_class_pairs_and_no_repeats() -> None:
    clips = [clip(f"{label}{k}", f"a {label}", f"{label} sounding", label) for label in ("bell", "dog", "rain", "saw") for k in range(3)]
    allowed = {("bell", "dog"), ("rain", "saw")}
    swaps = choose_swaps(clips, allowed, rounds=2, seed=4)
    assert {frozenset((i.video_label, j.video_label)) for i, j in swaps} == {frozenset(p) for p in allowed}
    assert len({frozenset((i.id, j.id)) for i, j in swaps}) == len(swaps)
    # 9 bell-dog and 9 rain-saw pairs exist; enough rounds find each once and then no more.
    assert len(choose_swaps(clips, allowed, rounds=20)) == 18
    assert swaps == choose_swaps(clips, allowed, rounds=2, seed=4) != choose_swaps(clips, allowed, rounds=2, seed=5)


def test_one_round_is_one_to_one() -> None:
    clips = [clip(f"c{k}", f"thing{k}", f"noise{k}") for k in range(15)]
    swaps = choose_swaps(clips)
    assert len({i.id for i, _ in swaps}) == len({j.id for _, j in swaps}) == len(swaps)
    assert choose_swaps(clips[:1]) == [] == choose_swaps([])


def test_clips_whose_streams_differ_in_class_need_both_swaps_allowed() -> None:
    # Picture of a man, sound of speech; swapped with a bell it makes man-bell and bell-speech.
    man = Clip("m", "m.mp4", "test", "factual", "man", "speech", "a man", "speech", "m", "m", "m", "m", "", "", 2.0)
    assert choose_swaps([man, BELL], {("bell", "man")}) == []
    assert len(choose_swaps([man, BELL], {("bell", "man"), ("bell", "speech")})) == 1


def test_grid_of_real_clips(small: Clips, tmp_path: Path) -> None:
    i, j = [c for c in small.select("test", "factual") if c.id in ("test_dog_00", "test_bell_00")]
    (ox, xo), grid = make_grid(small.root, i, j, tmp_path)
    assert (grid.oo, grid.ox, grid.xo, grid.xx) == (i.id, ox.id, xo.id, j.id)
    for swap, seen, heard in ((ox, i, j), (xo, j, i)):
        assert swap.condition == "counterfactual" and swap.split == "test"
        assert (swap.video_label, swap.seen, swap.video_source, swap.video_rendering) == (seen.video_label, seen.seen, seen.video_source, seen.id)
        assert (swap.audio_label, swap.heard, swap.audio_source, swap.audio_rendering) == (
            heard.audio_label,
            heard.heard,
            heard.audio_source,
            heard.id,
        )
        assert (swap.video_sha256, swap.audio_sha256) == stream_hashes(tmp_path / swap.file) == (seen.video_sha256, heard.audio_sha256)
        assert np.array_equal(read_video(tmp_path / swap.file, 4), read_video(small.path(seen), 4))
        assert np.array_equal(read_audio(tmp_path / swap.file), read_audio(small.path(heard)))


def test_grid_of_clips_of_unequal_length(tmp_path: Path) -> None:
    """9.8 and 10 s: each stream is the same, whole, in both cells that hold it."""
    (tmp_path / "media").mkdir()
    rows = []
    for name, frames, seconds in (("i", 39, 9.8), ("j", 40, 10.0)):
        file = tmp_path / f"media/{name}.mp4"
        shades = np.linspace(20, 220, frames).astype(np.uint8)[:, None, None, None]
        write_mp4(
            file, np.broadcast_to(shades, (frames, 64, 64, 3)), 4, np.sin(np.arange(round(seconds * 16_000)) / len(name) / seconds).astype(np.float32)
        )
        rows.append(replace(clip(name, name, name), **dict(zip(("video_sha256", "audio_sha256"), stream_hashes(file), strict=True))))
    i, j = rows
    (ox, xo), _ = make_grid(tmp_path, i, j)
    for swap, seen, heard in ((ox, i, j), (xo, j, i)):
        assert (swap.video_sha256, swap.audio_sha256) == (seen.video_sha256, heard.audio_sha256) == stream_hashes(tmp_path / swap.file)
        assert np.array_equal(read_video(tmp_path / swap.file, 4), read_video(tmp_path / seen.file, 4))
        assert np.array_equal(read_audio(tmp_path / swap.file), read_audio(tmp_path / heard.file))
    with pytest.raises(MediaError, match=r"i\.mp4: its picture is not the one of its hash in clips\.jsonl .* build the folder again"):
        make_grid(tmp_path, replace(i, video_sha256="0" * 64), j)
    assert not (tmp_path / "media/i__j.mp4").exists()
    (tmp_path / "media/j__i.mp4").unlink()
    with pytest.raises(MediaError, match=r"j\.mp4: its picture is not"):
        make_grid(tmp_path, i, replace(j, video_sha256="0" * 64))
    assert sorted(path.name for path in (tmp_path / "media").iterdir()) == ["i.mp4", "j.mp4"]


@pytest.mark.parametrize(("late_picture", "late_sound"), [(0.1, 0.2), (0.5, 0.3), (2.0, 3.0)])
def test_swaps_of_a_late_picture_and_a_late_sound(late_picture: float, late_sound: float, tmp_path: Path) -> None:
    """In picture-of-b with sound-of-c neither stream begins at 0, and still each is where it was in its own clip."""
    (tmp_path / "media").mkdir()
    frames = np.broadcast_to(np.linspace(40, 220, 16).astype(np.uint8)[:, None, None, None], (16, 64, 64, 3))
    rows = []
    for name, later in (("b", {"video": late_picture}), ("c", {"audio": late_sound})):
        write_mp4(tmp_path / "plain.mp4", frames, 4, np.sin(np.arange(64_000) / (3 + len(rows))).astype(np.float32))
        shifted(tmp_path / "plain.mp4", tmp_path / f"media/{name}.mp4", later)
        hashes = dict(zip(("video_sha256", "audio_sha256"), stream_hashes(tmp_path / f"media/{name}.mp4"), strict=True))
        rows.append(replace(clip(name, name, name), **hashes))
    b, c = rows
    (bc, cb), _ = make_grid(tmp_path, b, c)
    for swap, seen, heard in ((bc, b, c), (cb, c, b)):
        assert (swap.video_sha256, swap.audio_sha256) == (seen.video_sha256, heard.audio_sha256) == stream_hashes(tmp_path / swap.file)
        assert np.array_equal(read_video(tmp_path / swap.file, 4), read_video(tmp_path / seen.file, 4))
        assert np.array_equal(read_audio(tmp_path / swap.file), read_audio(tmp_path / heard.file))
    # A copy of the swap is the swap, and swapping the swaps gives the clips back.
    assert mux(tmp_path / bc.file, tmp_path / bc.file, tmp_path / "copy.mp4") == (bc.video_sha256, bc.audio_sha256)
    assert mux(tmp_path / bc.file, tmp_path / cb.file, tmp_path / "back.mp4") == (b.video_sha256, b.audio_sha256)


def shifted(source: Path, path: Path, later: dict[str, float]) -> None:
    """The same packets; those of a kind come so many seconds later."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        targets = {s.index: new.add_stream_from_template(s) for s in old.streams}
        for packet in old.demux():
            if packet.size and packet.pts is not None and packet.dts is not None:
                by = round(later.get(packet.stream.type, 0.0) / float(packet.time_base))
                packet.pts, packet.dts = packet.pts + by, packet.dts + by
                packet.stream = targets[packet.stream.index]
                new.mux(packet)


def test_the_printed_remedy_works(tmp_path: Path) -> None:
    """Matroska writes milliseconds; copied once, as the message says, the clip can be swapped."""
    (tmp_path / "media").mkdir()
    frames = np.broadcast_to(np.linspace(40, 220, 16).astype(np.uint8)[:, None, None, None], (16, 64, 64, 3))
    rows = []
    for name, ending in (("b", "mkv"), ("c", "mp4")):
        write_mp4(tmp_path / "plain.mp4", frames, 7, np.sin(np.arange(36_571) / (3 + len(rows))).astype(np.float32))
        file = f"media/{name}.{ending}"
        shifted(tmp_path / "plain.mp4", tmp_path / file, {"video": 0.1} if name == "b" else {"audio": 0.2})
        hashes = dict(zip(("video_sha256", "audio_sha256"), stream_hashes(tmp_path / file), strict=True))
        rows.append(replace(clip(name, name, name), file=file, **hashes))
    b, c = rows
    with pytest.raises(MediaError, match=r'Copy it once, mux\("') as stopped:
        make_grid(tmp_path, b, c)
    assert "b.mkv" in str(stopped.value)
    copied = mux(tmp_path / b.file, tmp_path / b.file, tmp_path / "media/new.mp4")
    b = replace(b, file="media/new.mp4", video_sha256=copied[0], audio_sha256=copied[1])
    (bc, cb), _ = make_grid(tmp_path, b, c)
    assert (bc.video_sha256, bc.audio_sha256) == (b.video_sha256, c.audio_sha256)
    assert (cb.video_sha256, cb.audio_sha256) == (c.video_sha256, b.audio_sha256)
