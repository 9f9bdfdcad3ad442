"""Reading and writing mp4 files with PyAV: frames, sound, and packet-exact muxing.

    write_mp4("a.mp4", frames, fps=4, wave=wave)      # H.264 + AAC, the same bytes for the same input
    frames = read_video("a.mp4", fps=2)               # uint8 (n, 3, h, w)
    wave = read_audio("a.mp4")                        # float32 (samples,), 16 kHz
    mux("a.mp4", "b.mp4", "ab.mp4")                   # the picture of a with the sound of b, nothing re-encoded
    video_sha256, audio_sha256 = stream_hashes("ab.mp4")

Every failure is a `MediaError` with one sentence that names the file and what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from data.clips import DataError

RATE = 16_000
SILENT_PEAK = 1e-3  # -60 dB of full scale: below this nothing can be heard
AUDIO_BIT_RATE = 64_000
# One thread: x264 gives the same bytes only for the same number of threads. No B-frames: decoding order is display order.
# cpu-independent: x264 otherwise takes code by the processor, which rounds differently, and its AVX-512 code (macroblock-tree) reads
# memory that nobody wrote at most frame widths, so that bytes depended on what the process had done before.
X264 = {"crf": "20", "preset": "veryfast", "x264-params": "threads=1:bframes=0:scenecut=0:cpu-independent=1", "threads": "1"}
MP4 = {"fflags": "+bitexact"}


class MediaError(DataError):
    """A media file that cannot be used. The message names the file and the remedy."""


def _check_boxes(path: Path | str) -> None:
    """Raise if an mp4 (or mov) ends inside one of its top-level boxes: FFmpeg opens some such files and only loses a stream."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            file.seek(at)
            head = file.read(16)
            if at == 0 and head[4:8] != b"ftyp":
                return  # another container
            length = int.from_bytes(head[:4], "big")
            if length == 1:  # a 64-bit length follows
                length = int.from_bytes(head[8:16], "big")
            if length == 0:  # the last box, up to the end of the file
                return
            at += max(length, 8)
        if at > size or size == 0:
            raise MediaError(f"{path} is truncated: at least {max(1, at - size)} bytes are missing. Copy or build it again.")


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    """A container open for reading; every failure of FFmpeg inside the block becomes a MediaError that names the file."""
    try:
        _check_boxes(path)
        with av.open(str(path), metadata_errors="ignore") as container:
            yield container
    except FileNotFoundError as error:
        raise MediaError(f"{path} does not exist. Put the file there, or take its line out of clips.jsonl.") from error
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{path} cannot be read as media ({error.strerror}): it is truncated or of another kind. Copy or build it again.") from error


def _video_stream(container: Any, path: Path | str) -> Any:
    if not container.streams.video:
        raise MediaError(f"{path} has no video stream. Every clip needs one: mux a picture.")
    return container.streams.video[0]


def _audio_stream(container: Any, path: Path | str) -> Any:
    if not container.streams.audio:
        raise MediaError(f'{path} has no sound track. Mux one, or call the clip "muted" in clips.jsonl.')
    return container.streams.audio[0]


def _seconds(stream: Any) -> float | None:
    """What the file says the stream's length is; None where it does not say."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return None


def _write(path: Path | str, buffer: io.BytesIO) -> None:
    """Files are coded in memory and written at once, so that a full disk shows here and leaves no half a file."""
    try:
        Path(path).write_bytes(buffer.getvalue())
    except OSError as error:
        if Path(path).is_file():
            Path(path).unlink()
        raise MediaError(f"{path} cannot be written ({error.strerror}). Free some space or choose another folder, then run again.") from error


def write_mp4(path: Path | str, frames: np.ndarray, fps: float, wave: np.ndarray | None, rate: int = RATE) -> None:
    """Write frames, uint8 (n, h, w, 3), and a mono wave, float32 in [-1, 1], as H.264 (yuv420p) and AAC.

    The same input gives the same bytes (one encoder thread, no dates, no encoder tags). `wave=None` writes no sound track.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 1:
        raise MediaError(f"{path}: frames must be uint8 (n, h, w, 3), not {frames.dtype} {frames.shape}.")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise MediaError(f"{path}: H.264 with yuv420p needs an even height and width, not {frames.shape[1]} x {frames.shape[2]}.")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options=MP4) as container:
        ratio = Fraction(fps).limit_denominator(1000)
        video: Any = container.add_stream("libx264", rate=ratio, options=X264)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.gop_size = max(1, round(fps * 2))
        audio: Any = None
        if wave is not None:
            audio = container.add_stream("aac", rate=rate, layout="mono", options={"aac_coder": "fast"})  # as good here, half the time
            audio.bit_rate = AUDIO_BIT_RATE
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, 1 / ratio
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if wave is not None:
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave, dtype=np.float32)[None], format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
            container.mux(audio.encode(sound))
            container.mux(audio.encode(None))
    _write(path, buffer)


def read_video(path: Path | str, fps: float) -> np.ndarray:
    """Frames at times 0, 1/fps, 2/fps, ...: uint8 (n, 3, h, w), n = round(length x fps) and at least 2.

    Each is the last picture shown at or before its time. A video shorter than 2 / fps repeats its last picture.
    """
    chosen: list[np.ndarray] = []
    with _opened(path) as container:
        stream = _video_stream(container, path)
        stream.codec_context.thread_count = 1
        step = float(1 / stream.average_rate) if stream.average_rate else 0.0
        first = last = 0.0
        shown: Any = None
        for frame in container.decode(stream):
            last = float(frame.time or 0.0)
            if shown is None:
                first = last
            while shown is not None and first + len(chosen) / fps < last - 1e-4:
                chosen.append(shown.to_ndarray(format="rgb24"))
            shown = frame
        if shown is None:
            raise MediaError(f"{path} is truncated: no picture can be decoded. Copy or build it again.")
        length = max(last - first + step, _seconds(stream) or 0.0)  # the last picture may stay longer than the others
        n = max(2, round(length * fps))
        while len(chosen) < n:
            chosen.append(shown.to_ndarray(format="rgb24"))
    return np.stack(chosen[:n]).transpose(0, 3, 1, 2).copy()


def read_audio(path: Path | str, rate: int = RATE, muted: bool = False) -> np.ndarray:
    """The sound track as float32 (samples,) in [-1, 1], mixed to mono and resampled to `rate`; the encoder's priming is taken off.

    A track that is missing, or silent (peak below -60 dB), raises MediaError unless `muted=True`: then it is returned as it is,
    a missing one as zeros of the video's length.
    """
    parts: list[np.ndarray] = []
    start = 0.0
    with _opened(path) as container:
        if muted and not container.streams.audio:
            return np.zeros(round((_seconds(_video_stream(container, path)) or 0.0) * rate), dtype=np.float32)
        stream = _audio_stream(container, path)
        stream.codec_context.thread_count = 1
        resampler = av.AudioResampler(format="fltp", rate=rate)
        for frame in container.decode(stream):
            start = start if parts else float(frame.time or 0.0)
            # The mean of the channels: FFmpeg's own mix to mono makes equal channels 3 dB louder, over full scale.
            parts += [f.to_ndarray().mean(axis=0) for f in resampler.resample(frame)]
        parts += [f.to_ndarray().mean(axis=0) for f in resampler.resample(None)]
        stated = _seconds(stream)
    wave = np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, dtype=np.float32)
    if stated is not None:  # the last AAC frame is padded: cut at the length the file states
        wave = wave[: round(stated * rate)]
    if start > 0.05:  # a sound that begins late, not an encoder's priming
        wave = np.concatenate([np.zeros(round(start * rate), dtype=np.float32), wave])
    if not muted and (wave.size == 0 or float(np.abs(wave).max()) < SILENT_PEAK):
        raise MediaError(f'{path} has a silent sound track. Mux a sound, or call the clip "muted" in clips.jsonl.')
    return wave


def _packets(path: Path | str, stream: Any) -> tuple[list[Any], float]:
    """A stream's packets in decoding order and when its last one ends, in seconds."""
    packets = [p for p in stream.container.demux(stream) if p.size]  # the flushing packet at the end is empty
    if not packets or any(p.is_corrupt or p.pts is None for p in packets):
        raise MediaError(f"{path} is truncated: its {stream.type} stream is damaged. Copy or build it again.")
    end = max(float((p.pts + (p.duration or 0)) * p.time_base) for p in packets)
    return packets, end


def mux(video_from: Path | str, audio_from: Path | str, out: Path | str) -> tuple[str, str]:
    """Write the video stream of one file with the audio stream of another, packet by packet, nothing re-encoded.

    Sound that begins after the picture's end is left out (whole packets); shorter sound stays shorter. Returns the two stream
    hashes of the new file, as `stream_hashes` would: the video's is always that of `video_from`, the audio's that of `audio_from`
    unless sound was left out.
    """
    hashes = {"video": hashlib.sha256(), "audio": hashlib.sha256()}
    buffer = io.BytesIO()
    with _opened(video_from) as pictures:
        video = _video_stream(pictures, video_from)
        video_packets, end = _packets(video_from, video)
        with _opened(audio_from) as sounds, av.open(buffer, "w", format="mp4", options=MP4) as container:
            audio = _audio_stream(sounds, audio_from)
            audio_packets, _ = _packets(audio_from, audio)
            targets = container.add_stream_from_template(video), container.add_stream_from_template(audio)
            kept = [p for p in audio_packets if float(p.pts * p.time_base) < end - 1e-6]
            for packets, target in zip((video_packets, kept), targets, strict=True):
                for packet in packets:
                    hashes[target.type].update(bytes(packet))
                    packet.stream = target
                    container.mux(packet)
    _write(out, buffer)
    return hashes["video"].hexdigest(), hashes["audio"].hexdigest()


def stream_hashes(path: Path | str) -> tuple[str, str]:
    """(sha256 of the video packets, sha256 of the audio packets): the same for the same coded media, whatever file carries it.

    A file without a sound track has the hash of no bytes as its second.
    """
    hashes = {"video": hashlib.sha256(), "audio": hashlib.sha256()}
    with _opened(path) as container:
        streams = [_video_stream(container, path), *container.streams.audio[:1]]
        for packet in container.demux(streams):
            if packet.size:
                hashes[packet.stream.type].update(bytes(packet))
    return hashes["video"].hexdigest(), hashes["audio"].hexdigest()
