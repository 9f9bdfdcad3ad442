"""The one interface to an audio-visual LLM. Nothing outside `models/` asks which family it talks to.

    model = load_model("models/organism/avllm")
    media = model.media(clip, clips.root)                       # frozen towers, once per stream
    prefix = model.prefill([media])                             # system + media rows, once
    out = model.extend(prefix, [0, 0], [hear, see], cuts=…)     # any number of questions and cuts on top
    text = model.generate(prefix, [0], ["What do you hear?"])   # greedy

A prompt is [system][media][question][answer]; media come first, so everything asked about a clip shares its prefix, and attention being
causal, a cut into question or answer rows leaves the prefix as it was. `prefill` + `extend` equals one full forward pass (tests/models).
A family file supplies the five hooks at the end of the class. Everything is padded on the right; padding has kind PAD and is never attended to.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data.check import refusal
from data.clips import Clip, DataError
from data.media import OTHER_HASH, MediaError, read_audio, read_video, stream_hashes
from data.questions import question
from models.attention import Cut, CutError, Cuts, FlowTap, Instruments, Kind
from models.reuse import Decoding, Reuse, block_rows
from models.sequences import Batch, Decoder, Example, Layout, Media, Output, Prefix, StreamFeatures, Suffix, answer_logprobs

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AUDIO_RATE = 16_000
JOB_BLOCKS = 16  # blocks of rows that are worked on together under prefix reuse: more share more, fewer need less memory


class ModelError(ValueError):
    """A model, adapter or input that does not fit. The message says what and what to do."""


class AVLLM(ABC):
    """A loaded model with its processor. Built by `models.load_model`."""

    family: str
    fps: float = 2.0
    system_prompt = "You are a helpful assistant."

    def __init__(self, path: str, thinker: Any, processor: Any, device: str | torch.device, base_path: str | None):
        self.path = path
        self.thinker = thinker
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.device = torch.device(device)
        self.base_path = base_path
        self.adapter: str | None = None
        self.written_over: list[tuple[nn.Parameter, torch.Tensor]] = []
        """Weights of the model's own that the adapter changed, each with what was there before."""
        self.text_model.config.tie_last_hidden_states = False  # so that the last hidden state is the one before the final norm
        self.decoder = Decoder(self.text_model, self.head)
        self.n_layers = len(self.text_model.layers)
        self.hidden_size = self.text_model.config.hidden_size
        self.dtype = next(self.text_model.parameters()).dtype
        self.passed: tuple[Any, ...] | None = None  # `instrument()` at the last self-check that passed
        self._streams: dict[tuple[str, str], StreamFeatures] = {}
        self._quiet: set[str] = set()  # audio streams that only muted clips have: nobody asked whether they hold a sound
        self._layouts: dict[tuple, Layout] = {}
        self._opened: set[tuple[Path, str, str]] = set()  # files, each with a stream and its hash, that were found to hold it

    # ---------------------------------------------------------------- media

    def media(self, clip: Clip, root: Path, video: bool = True, audio: bool = True) -> Media:
        """Features of the clip's streams; a stream (by its hash, of all that decides it) passes through its tower once in the life of this object.

        Raises data.media.MediaError for media that cannot be used, or that are not those of the clip's hashes, and ModelError where audio or
        video left no tokens. A file is opened only for streams that have not passed through their tower: `unusable` opens all.
        """
        kinds = {kind for kind, _ in self._missing(clip, video, audio)}
        if kinds:
            self._run_towers(clip, *self._read(clip, root, "video" in kinds, "audio" in kinds))
        return Media(
            self._streams[("video", clip.video_sha256)] if video else None,
            self._streams[("audio", clip.audio_sha256)] if audio else None,
        )

    def precompute(self, clips: Sequence[Clip], root: Path, progress: bool = True) -> None:
        """Open every file of `clips`, and run the towers for every stream that has not been seen yet; threads read files ahead.

        Raises DataError that names every clip that cannot be used.
        """
        bar = tqdm(total=len(clips), desc="reading media", unit="clip", disable=not progress, leave=False)
        bad = self.unusable([(clip, True, True) for clip in clips], root, bar.update)
        bar.close()
        if bad:
            raise refusal(root, bad, len(clips))

    def unusable(self, wanted: Sequence[tuple[Clip, bool, bool]], root: Path, done: Callable[[], object] = lambda: None) -> list[tuple[Clip, str]]:
        """`precompute` for (clip, whether its video is wanted, whether its audio is): the clips that cannot be used, each with the reason. Every
        file is opened once and compared with its hashes, also where its streams are known from other clips. `done()` once for each of `wanted`.

        Raises what the device reports (out of memory, CUDA errors): that is no fault of a clip.
        """
        bad: dict[str, tuple[Clip, str]] = {}
        left, count, again = list(wanted), min(8, os.cpu_count() or 1), False
        with ThreadPoolExecutor(count) as pool:
            while left:
                jobs, asked, ahead = iter(left), set[tuple[str, str]](), deque[tuple[Clip, Future]]()
                while True:
                    while len(ahead) <= count and (job := next(jobs, None)) is not None:
                        clip, video, audio = job
                        new = [key for key in self._missing(clip, video, audio) if key not in asked]
                        asked.update(new)
                        kinds = {kind for kind, _ in new}
                        ahead.append((clip, pool.submit(self._checked, clip, root, video, audio, "video" in kinds, "audio" in kinds)))
                    if not ahead:
                        break
                    clip, future = ahead.popleft()
                    try:
                        self._run_towers(clip, *future.result())
                    except (DataError, ModelError, OSError, ValueError, RuntimeError, IndexError) as error:
                        if device_fault(error):
                            raise
                        bad[clip.id] = clip, str(error)
                    if not again:
                        done()
                # Where a stream could not be read from one clip, the other clips that have it are read too.
                left, again = [job for job in left if job[0].id not in bad and self._missing(*job)], True
        return [bad[clip.id] for clip in {clip.id: clip for clip, *_ in wanted}.values() if clip.id in bad]

    def _missing(self, clip: Clip, video: bool, audio: bool) -> list[tuple[str, str]]:
        """Which of the clip's streams have not passed through their tower."""
        out = [("video", clip.video_sha256)] if video and ("video", clip.video_sha256) not in self._streams else []
        unheard = ("audio", clip.audio_sha256) not in self._streams or (clip.audio_sha256 in self._quiet and clip.condition != "muted")
        return out + ([("audio", clip.audio_sha256)] if audio and unheard else [])

    def _checked(self, clip: Clip, root: Path, video: bool, audio: bool, *read: bool) -> tuple[np.ndarray | None, np.ndarray | None]:
        """`_read` of streams that are wanted, `read` telling which are not known; the file is opened all the same, once."""
        self._check_file(clip, root, video, audio)
        return self._read(clip, root, *read)

    def _check_file(self, clip: Clip, root: Path, video: bool, audio: bool) -> None:
        """Raises MediaError where the clip's file cannot be opened, or is not that of its hashes in the streams that are wanted."""
        path = root / clip.file
        said = {"video": clip.video_sha256} if video else {}
        said |= {"audio": clip.audio_sha256} if audio else {}
        if all((path, *stream) in self._opened for stream in said.items()):
            return
        found = dict(zip(("video", "audio"), stream_hashes(path), strict=True))
        if any(found[kind] != said[kind] for kind in said):
            raise MediaError(f"{path} is not the file of the hashes in clips.jsonl: {OTHER_HASH}.")
        self._opened.update((path, *stream) for stream in said.items())

    def _read(self, clip: Clip, root: Path, video: bool, audio: bool) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Frames, in the size that the tower takes, and wave of a clip, of the streams that are wanted."""
        path = root / clip.file
        self._check_file(clip, root, video, audio)
        failed: list[Exception] = []

        def resized(frames: np.ndarray) -> np.ndarray:
            try:
                return self.resize(frames)
            except Exception as error:
                failed.append(error)  # reading would say that the file is broken
                raise

        try:
            frames = read_video(path, self.fps, resized) if video else None
        except Exception:
            if not failed:
                raise
            cause = failed[0]
            if device_fault(cause):
                raise cause from None
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise ModelError(f"{clip.file}: this model cannot take pictures of its size ({reason}). Scale it, or leave this one out.") from cause
        wave = read_audio(path, AUDIO_RATE, muted=clip.condition == "muted") if audio else None
        return frames, wave

    @torch.no_grad()
    def _run_towers(self, clip: Clip, frames: np.ndarray | None, wave: np.ndarray | None) -> None:
        """One by one: in a batch the last digits depend on the others, and what is measured must not depend on what was before."""
        if frames is not None:
            self._keep(clip, "video", partial(self.encode_video, resized=True), frames)
        if wave is not None:
            self._keep(clip, "audio", self.encode_audio, wave)
            (self._quiet.add if clip.condition == "muted" else self._quiet.discard)(clip.audio_sha256)

    def _keep(self, clip: Clip, kind: str, run: Callable[[list[np.ndarray]], list[StreamFeatures]], stream: np.ndarray) -> None:
        length = f"{len(stream) / AUDIO_RATE:.2f} s" if kind == "audio" else f"{len(stream)} frames"
        reason = "leaves no tokens, so it is too short for this model"
        try:
            features = run([stream])[0] if len(stream) else None
        except (IndexError, ValueError, RuntimeError) as error:
            if device_fault(error):
                raise
            reason = f"the {kind} tower cannot take it ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
        else:
            if features is not None and features.features.shape[0]:
                self._streams[(kind, clip.video_sha256 if kind == "video" else clip.audio_sha256)] = features
                return
        raise ModelError(f"{clip.file}: its {kind} lasts {length} and {reason}. Use a longer clip, or leave this one out.")

    # ---------------------------------------------------------------- prompts

    def suffix(self, question: str, answer: str = "", span: str | None = None) -> Suffix:
        """Rows for a question and its answer. `span` is the label phrase inside the answer. The end token counts as an answer token, never as span.

        Raises ModelError if the span is not in the answer.
        """
        prompt = self.tokenizer(self.question_text(question), add_special_tokens=False)["input_ids"]
        ids, kinds = list(prompt), [Kind.QUESTION] * (len(prompt) - 1) + [Kind.EMITTER]
        targets: list[int] = []
        marked: list[bool] = []
        if answer:
            encoded = self.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
            at = answer.find(span) if span else 0
            if at < 0:
                raise ModelError(f"The label {span!r} is not in the answer {answer!r}.")
            stop = at + len(span or "")
            targets = [*encoded["input_ids"], self.end_id]
            marked = [a < stop and b > at for a, b in encoded["offset_mapping"]] + [False]
            ids += targets
            kinds += [Kind.EMITTER] * (len(targets) - 1) + [Kind.QUESTION]
        return Suffix(
            torch.tensor(ids),
            torch.tensor([int(k) for k in kinds]),
            len(prompt) - 1,
            torch.tensor(targets, dtype=torch.long),
            torch.tensor(marked, dtype=torch.bool),
        )

    def passage(self, text: str) -> Suffix:
        """Rows for plain text, of which every token but the first is a target; it begins as a question does, since text has no other place in the
        prompt. Raises ModelError for text of fewer than two tokens.
        """
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) < 2:
            raise ModelError(f"the plain text {text!r} has fewer than two tokens, so there is nothing to predict. Give longer passages.")
        kinds = torch.full_like(ids, int(Kind.EMITTER))
        kinds[-1] = int(Kind.QUESTION)
        return Suffix(ids, kinds, 0, ids[1:], torch.zeros(len(ids) - 1, dtype=torch.bool))

    def sequence(self, media: Media, question: str, answer: str, span: str | None = None) -> Example:
        """One training example."""
        return Example(media, self.suffix(question, answer, span))

    def layout(self, media: Media) -> Layout:
        """System and media rows of a prompt; cached by the sizes of the streams."""
        key = (media.video.size if media.video else None, media.audio.size if media.audio else None)
        if key not in self._layouts:
            self._layouts[key] = self.media_layout(*key)
        return self._layouts[key]

    def _features(self, media: Media, layout: Layout) -> torch.Tensor:
        """Tower features in the order of the prompt's media rows, (media rows, H)."""
        out = torch.empty(int(self.is_media(layout.ids).sum()), self.hidden_size, dtype=self.dtype)
        video_rows = (layout.ids == self.video_id)[self.is_media(layout.ids)]
        if media.video is not None:
            out[video_rows] = media.video.features.to(self.dtype)
        if media.audio is not None:
            out[~video_rows] = media.audio.features.to(self.dtype)
        return out

    def is_media(self, ids: torch.Tensor) -> torch.Tensor:
        """Where tower features replace the embedding."""
        return (ids == self.video_id) | (ids == self.audio_id)

    def batch(self, examples: Sequence[Example], share: bool = True) -> Batch:
        """Right-padded batch. `share`: examples about the same streams share the media rows; the questions do not see each other and each one's
        positions follow the media's, so logits and gradients are those of separate sequences, at less cost.
        """
        groups: dict[tuple, list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault((id(example.media.video), id(example.media.audio), 0 if share else i), []).append(i)
        ids, kinds, positions, segments, features, places = [], [], [], [], [], []
        first: list[tuple[int, int]] = [(0, 0)] * len(examples)
        for sequence, members in enumerate(groups.values()):
            media = examples[members[0]].media
            layout = self.layout(media)
            features.append(self._features(media, layout))
            after, length = layout.next_position, len(layout.ids)
            parts = [examples[i].suffix for i in members]
            for i in members:
                first[i] = (sequence, length + examples[i].suffix.first)
                length += len(examples[i].suffix.ids)
            ids.append(torch.cat([layout.ids, *(s.ids for s in parts)]))
            # Only here: a media token that the model itself once said has no features.
            places.append(torch.cat([self.is_media(layout.ids), *(torch.zeros_like(s.ids, dtype=torch.bool) for s in parts)]))
            kinds.append(torch.cat([layout.kinds, *(s.kinds for s in parts)]))
            positions.append(torch.cat([layout.positions, *(_text_positions(after, len(s.ids)) for s in parts)], 1).T)
            segments.append(torch.cat([torch.zeros_like(layout.ids), *(torch.full_like(s.ids, n + 1) for n, s in enumerate(parts))]))
        padded, padded_kinds = _pad(ids, self.pad_id), _pad(kinds, Kind.PAD)
        own = [torch.nonzero(e.suffix.kinds[: e.suffix.first] == Kind.QUESTION)[:, 0] for e in examples]
        targets = _pad([e.suffix.targets for e in examples], -100)
        start = torch.tensor([sequence * padded.shape[1] + row for sequence, row in first])
        rows = torch.where(targets == -100, start[:, None], start[:, None] + torch.arange(targets.shape[1]))
        inputs = {
            "input_ids": padded,
            "features": torch.cat(features),
            "media_mask": _pad(places, False),
            "position_ids": _pad(positions, 0).permute(2, 0, 1),
            "attention_mask": (padded_kinds != Kind.PAD).long(),
            "kinds": padded_kinds,
            "segments": _pad(segments, 0),
            "rows": rows,
        }
        asked = _pad([at - e.suffix.first + begin for at, e, begin in zip(own, examples, start, strict=True)], -1)
        span = _pad([e.suffix.span for e in examples], False)
        return Batch(inputs, targets, span, padded_kinds, asked, tuple(e.media for e in examples)).to(self.device)

    def forward(self, batch: Batch, cuts: Cuts = ()) -> torch.Tensor:
        """Logits (N, A, V) at the emitters, with gradients: those of `decoder(**batch.inputs, cuts=cuts)`, padded. `cuts`: one tuple a sequence."""
        self._require_check(batch.media, cuts)
        return batch.answers(self.decoder(**batch.inputs, cuts=cuts).logits)[0]

    # ---------------------------------------------------------------- two-phase inference

    @torch.no_grad()
    def prefill(self, media: Sequence[Media], cuts: Cuts | None = None, hidden: bool = False, clean: Prefix | None = None) -> Prefix:
        """Run the system and media rows of N clips. `cuts`: one tuple a clip, needed where a cut's target lies in the media.

        clean: an uncut prefix whose first N clips are these, made with `hidden=True`: layers below the first one cut are taken from it, not computed.
        """
        self._require_check(media, cuts)
        start = min((c.start for cut in cuts or () for c in cut), default=0)
        if clean is not None and cuts is not None and start > 0:
            return self._resume(clean, list(media), cuts, start, hidden)
        layouts = [self.layout(m) for m in media]
        ids = _pad([p.ids for p in layouts], self.pad_id).to(self.device)
        kinds = _pad([p.kinds for p in layouts], Kind.PAD).to(self.device)
        features = torch.cat([self._features(m, p) for m, p in zip(media, layouts, strict=True)]).to(self.device)
        embeds = self.text_model.embed_tokens(ids)
        if len(features):
            embeds = embeds.masked_scatter(self.is_media(ids)[..., None], features.to(embeds.dtype))
        positions = _pad([p.positions.T for p in layouts], 0).permute(2, 0, 1).to(self.device)
        cache: Any = DynamicCache(config=self.text_model.config)
        states = []
        n, length = kinds.shape
        # Some rows after the others, so that what is made on the way stays small.
        step = -(-length // -(-n * length // block_rows(self.text_model, length)))
        for at in range(0, length, step):
            now = kinds[:, : at + step]
            out = self.text_model(
                inputs_embeds=embeds[:, at : at + step],
                position_ids=positions[:, :, at : at + step],
                attention_mask=(now != Kind.PAD).long(),
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=hidden,
                instruments=Instruments(now, cuts) if cuts is not None else None,
                **self.deeper(media, ids, at, at + step),
            )
            states.append(out.hidden_states)
        return Prefix(
            kinds,
            torch.tensor([p.next_position for p in layouts], device=self.device),
            [layer.keys for layer in cache.layers],
            [layer.values for layer in cache.layers],
            cuts or (),
            tuple(media),
            tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True)) if hidden else None,
        )

    def _resume(self, clean: Prefix, media: list[Media], cuts: Cuts, start: int, hidden: bool) -> Prefix:
        """`prefill` from layer `start` on."""
        n, text = len(media), self.text_model
        if (
            clean.hidden is None
            or any(clean.cuts)
            or [id(s) for m in clean.media[:n] for s in (m.video, m.audio)] != [id(s) for m in media for s in (m.video, m.audio)]
        ):
            raise CutError("`clean` must be an uncut prefix made with hidden=True whose first clips are the ones given.")
        if len(cuts) != n:
            raise CutError(f"One tuple of cuts a clip is needed: {len(cuts)} for {n}.")
        kinds, states = clean.kinds[:n], [h[:n] for h in clean.hidden[: start + 1]]
        positions = _pad([self.layout(m).positions.T for m in media], 0).permute(2, 0, 1).to(self.device)
        positions = nn.functional.pad(positions, (0, kinds.shape[1] - positions.shape[2]))
        rotary = text.rotary_emb(states[0], positions)
        seen = torch.ones(kinds.shape[1], kinds.shape[1], dtype=torch.bool, device=self.device).tril() & (kinds != Kind.PAD)[:, None, None]
        cache: Any = DynamicCache(config=text.config)
        instruments, state = Instruments(kinds, cuts), states[-1]
        for layer in text.layers[start:]:
            state = layer(state, attention_mask=seen, position_embeddings=rotary, past_key_values=cache, use_cache=True, instruments=instruments)
            states.append(state)
        keys, values = ([k[:n] for k in part[:start]] for part in (clean.keys, clean.values))
        return Prefix(
            kinds,
            clean.next_position[:n],
            keys + [layer.keys for layer in cache.layers[start:]],
            values + [layer.values for layer in cache.layers[start:]],
            cuts,
            tuple(media),
            tuple(states) if hidden else None,
        )

    @torch.no_grad()
    def extend(
        self, prefix: Prefix, which: Sequence[int], suffixes: Sequence[Suffix], cuts: Cuts | None = None, hidden: bool = False, flow: bool = False
    ) -> Output:
        """Run N question + answer suffixes on top of prefix rows `which`, each under its own cuts.

        hidden: also return L + 1 tensors (N, S, H), index 0 the embeddings, l the output of layer l before the final norm.
        flow: also return attention mass (3, L, N, 2, kinds); see FlowTap. Raises CutError where a cut should have been given to `prefill`.
        """
        self._check_prefix_cuts(prefix, which, cuts)
        kinds = _pad([s.kinds for s in suffixes], Kind.PAD).to(self.device)
        targets = _pad([s.targets for s in suffixes], -100).to(self.device)
        steps = torch.arange(max(1, targets.shape[1]))
        tap, hidden_states = FlowTap() if flow else None, None
        if hidden or flow:
            state, hidden_states = self._whole(prefix, which, suffixes, kinds, cuts, hidden, tap)
            rows = torch.tensor([s.first for s in suffixes])[:, None] + steps
            emitters = torch.gather(state, 1, rows.clamp_max(kinds.shape[1] - 1).to(self.device)[..., None].expand(-1, -1, state.shape[-1]))
        else:
            emitters = torch.empty(len(which), len(steps), self.hidden_size, dtype=self.dtype, device=self.device)
            for jobs, some in self._emitters(prefix, which, suffixes, cuts, len(steps)):
                emitters[jobs] = self.text_model.norm(some)
        logits = self.head(emitters)
        self.require_finite(logits[targets != -100] if targets.shape[1] else logits)
        return Output(
            logits,
            targets,
            _pad([s.span for s in suffixes], False).to(self.device),
            kinds,
            hidden_states,
            torch.stack([tap.mass[layer] for layer in range(self.n_layers)], dim=1) if tap else None,
        )

    @torch.no_grad()
    def logprobs(self, prefix: Prefix, which: Sequence[int], suffixes: Sequence[Suffix], cuts: Cuts | None = None) -> torch.Tensor:
        """(N, A) log-probability of each answer token, in nats; 0 where padded. As `extend(...).logprobs()`, for any number of jobs: logits are made
        some at a time."""
        self._check_prefix_cuts(prefix, which, cuts)
        targets = _pad([s.targets for s in suffixes], -100).to(self.device)
        out = torch.zeros(targets.shape, device=self.device)
        size = max(1, (1 << 18) // (self.head.weight.shape[0] * max(1, targets.shape[1])))
        for jobs, states in self._emitters(prefix, which, suffixes, cuts, max(1, targets.shape[1])):
            for some, part in zip(jobs.split(size), states.split(size), strict=True):
                out[some] = answer_logprobs(self.lens(part), targets[some])
        self.require_finite(out)
        return out

    @torch.no_grad()
    def span_scores(self, prefix: Prefix, which: Sequence[int], suffixes: Sequence[Suffix], cuts: Cuts | None = None) -> torch.Tensor:
        """(N,) s of docs/definitions.md: as `extend(...).span_score()`, for any number of jobs."""
        span = _pad([s.span for s in suffixes], False).to(self.device)
        return (self.logprobs(prefix, which, suffixes, cuts) * span).sum(1) / span.sum(1)

    def _emitters(self, prefix: Prefix, which, suffixes, cuts: Cuts | None, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Some jobs at a time, their numbers (n,) and states (n, steps, H) before the final norm at their emitters, padded with the last."""
        given: Cuts = cuts if cuts is not None else [()] * len(which)
        # A clip's jobs stay together, since they share work; a few blocks of rows at a time.
        order = np.argsort(np.array(list(which)), kind="stable")
        rows = np.cumsum([len(suffixes[i].ids) for i in order])
        part = (rows - 1) // (JOB_BLOCKS * block_rows(self.text_model, prefix.kinds.shape[1]))
        for jobs in np.split(order, np.flatnonzero(np.diff(part)) + 1):
            job = Reuse(self.text_model, prefix, [which[i] for i in jobs], [suffixes[i] for i in jobs], [given[i] for i in jobs])
            final, states, _ = job.run()
            length = job.answer.length[job.answer.of]
            at = final.start[final.of][:, None] + np.minimum(np.arange(steps), length[:, None] - 1)
            yield job.tensor(jobs), states[job.tensor(at)]

    @torch.no_grad()
    def generate(
        self, prefix: Prefix, which: Sequence[int], questions: Sequence[str], cuts: Cuts | None = None, max_new_tokens: int = 24
    ) -> list[str]:
        """Greedy answers to questions on top of prefix rows `which`, each under its own cuts."""
        return [
            self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in self.generate_ids(prefix, which, questions, cuts, max_new_tokens)
        ]

    @torch.no_grad()
    def generate_ids(
        self, prefix: Prefix, which: Sequence[int], questions: Sequence[str], cuts: Cuts | None = None, max_new_tokens: int = 24
    ) -> list[list[int]]:
        """Greedy answer tokens, without the end token."""
        self._check_prefix_cuts(prefix, which, cuts)
        known = {q: self.suffix(q) for q in dict.fromkeys(questions)}
        given: Cuts = cuts if cuts is not None else [()] * len(which)
        order = np.argsort(np.array(list(which)), kind="stable")  # a clip's jobs stay together
        # Keys and values of what is said are each job's own; so many jobs at a time that they stay small.
        config = self.text_model.config
        said = self.n_layers * 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * max_new_tokens
        size = max(16, (1 << (21 if self.device.type == "cpu" else 27)) // max(said, 1))
        out: list[list[int]] = [[] for _ in which]
        for at in range(0, len(order), size):
            jobs = order[at : at + size].tolist()
            job = Reuse(
                self.text_model, prefix, [which[i] for i in jobs], [known[questions[i]] for i in jobs], [given[i] for i in jobs], max_new_tokens
            )
            for i, ids in zip(jobs, self._greedy(job, max_new_tokens), strict=True):
                out[i] = ids
        return out

    def _greedy(self, job: Reuse, max_new_tokens: int) -> list[list[int]]:
        decoding = Decoding(job, max_new_tokens)
        said: list[list[int]] = [[] for _ in decoding.jobs]
        alive = list(range(len(said)))  # what each row of `decoding` is
        done = [False] * len(said)
        for step in range(max_new_tokens):
            logits = self.head(self.text_model.norm(decoding.states))
            self.require_finite(logits)
            token = logits.argmax(-1)
            for i, t in zip(alive, token.tolist(), strict=True):
                done[i] = done[i] or t == self.end_id
                if not done[i]:
                    said[i].append(t)
            left = [row for row, i in enumerate(alive) if not done[i]]
            if not left or step + 1 == max_new_tokens:
                break
            if len(left) <= 0.75 * len(alive):
                decoding.keep(left)
                alive, token = [alive[row] for row in left], token[left]
            decoding.feed(token)
        return [list(said[i]) for i in decoding.of]

    def _whole(self, prefix: Prefix, which: Sequence[int], suffixes: Sequence[Suffix], kinds: torch.Tensor, cuts: Cuts | None, hidden: bool, tap):
        """Every suffix row in every layer, for taps: normed states (N, S, H), and L + 1 hidden states or None."""
        index = torch.tensor(list(which), device=self.device)
        cache = DynamicCache([(k[index], v[index]) for k, v in zip(prefix.keys, prefix.values, strict=True)])
        ids = _pad([s.ids for s in suffixes], self.pad_id).to(self.device)
        all_kinds = torch.cat([prefix.kinds[index], kinds], 1)
        out = self.text_model(
            inputs_embeds=self.text_model.embed_tokens(ids),
            position_ids=(prefix.next_position[index][:, None] + torch.arange(ids.shape[1], device=self.device)).expand(3, -1, -1),
            attention_mask=(all_kinds != Kind.PAD).long(),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=hidden,
            instruments=Instruments(all_kinds, cuts or (), tap) if cuts is not None or tap is not None else None,
        )
        return out.last_hidden_state, out.hidden_states if hidden else None

    def _check_prefix_cuts(self, prefix: Prefix, which: Sequence[int], cuts: Cuts | None) -> None:
        given: Sequence[tuple[Cut, ...]] = cuts if cuts is not None else [()] * len(which)
        if len(given) != len(which):
            raise CutError(f"One tuple of cuts a suffix is needed: {len(given)} for {len(which)}.")
        for row, wanted in zip(which, given, strict=True):
            had = {c for c in (prefix.cuts[row] if len(prefix.cuts) else ()) if c.cuts_media}
            if {c for c in wanted if c.cuts_media} != had:
                raise CutError("A cut into media rows changes the prefix: give the same cuts to prefill and to extend.")
            for cut in wanted:
                if cut.stop > self.n_layers:
                    raise CutError(f"A cut of layers [{cut.start}, {cut.stop}) does not fit a model of {self.n_layers} layers.")
        self._require_check(prefix.media, cuts)

    def instrument(self) -> tuple[Any, ...]:
        """What a self-check holds for: the modules (LoRA exchanges them), the attention they are told to use, and what transformers has for it."""
        name = self.text_model.config._attn_implementation
        return (
            self.thinker,
            self.adapter,
            name,
            dict(ALL_ATTENTION_FUNCTIONS.items()).get(name),
            dict(ALL_MASK_ATTENTION_FUNCTIONS.items()).get(name),
        )

    def _require_check(self, media: Sequence[Media], cuts: Cuts | None) -> None:
        """Run the self-check where these are the first cuts on the model as it is now. Raises CutError if it fails or no clip here can serve."""
        if not any(cuts or ()) or self.passed == self.instrument():
            return
        from models.selfcheck import self_check

        usable = next((m for m in media if m.video is not None and m.audio is not None), None)
        if usable is None:
            raise CutError(
                "Cuts have not been checked on this model yet, and no clip given has both sound and picture: "
                "call models.self_check(model, media, question) with one that has."
            )
        self_check(self, usable, question("hear"))

    def require_finite(self, numbers: torch.Tensor) -> None:
        """Raise ModelError, with a remedy, where logits or states are NaN or infinite: an argmax of such numbers looks like an answer."""
        if bool(torch.isfinite(numbers).all()):
            return
        remedy = {
            torch.float16: "float16 ends at 65504, so use --dtype bfloat16 or --dtype float32",
            torch.bfloat16: "--dtype float32 shows whether that is because its numbers are coarse or because of the weights",
        }.get(self.dtype, "get the checkpoint again, or take the one before a merge or a training of your own")
        which = f"{self.path} with the adapter {self.adapter}" if self.adapter else self.path
        raise ModelError(f"{which}: in {str(self.dtype).removeprefix('torch.')} the model's logits are not numbers (NaN or infinite); {remedy}.")

    def lens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logit lens: logits (..., V) of states (..., H) through the final norm and the head."""
        return self.head(self.text_model.norm(hidden))

    # ---------------------------------------------------------------- LoRA

    def lora_targets(self, layers: Sequence[int], projections: Sequence[str]) -> list[str]:
        """Full module names inside the decoder's layers; the towers are never among them. Raises ModelError for an unknown name or layer."""
        if unknown := sorted(set(projections) - set(PROJECTIONS)):
            raise ModelError(f"Unknown projections {unknown}; there are {', '.join(PROJECTIONS)}.")
        if wrong := [layer for layer in layers if not 0 <= layer < self.n_layers]:
            raise ModelError(f"This model has layers 0 to {self.n_layers - 1}, not {wrong}.")
        ids = {id(m): name for name, m in self.thinker.named_modules()}
        modules = [
            m for layer in sorted(set(layers)) for name, m in self.text_model.layers[layer].named_modules() if name.split(".")[-1] in projections
        ]
        return [ids[id(m)] for m in modules]

    def add_lora(self, targets: Sequence[str], r: int, alpha: int, dropout: float = 0.0, ranks: Mapping[str, int] | None = None) -> None:
        """Attach a fresh LoRA adapter to exactly these modules; everything else is frozen. The update is multiplied by alpha / r.

        ranks: rank of a module, `r` where it is not named; its update is multiplied by alpha / r all the same. See `spread_ranks`.
        Raises ModelError for ranks of modules that are not among the targets.
        """
        from peft import LoraConfig, get_peft_model

        ranks = dict(ranks or {})
        if odd := sorted(set(ranks) - set(targets)) or sorted(name for name, rank in ranks.items() if rank < 1):
            raise ModelError(f"Ranks are given for {odd[:3]}: each has to be one of the modules that get an adapter, with a rank of at least 1.")
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(targets),
            rank_pattern=ranks,
            alpha_pattern={name: alpha * rank / r for name, rank in ranks.items()},
            bias="none",
            base_model_name_or_path=self.path,
        )
        self.thinker = get_peft_model(self.thinker, config)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Context in which the model is the one before LoRA. Does nothing where there is no adapter."""
        with self.thinker.disable_adapter() if hasattr(self.thinker, "disable_adapter") else nullcontext():
            adapted = [weight.data for weight, _ in self.written_over]
            for weight, before in self.written_over:
                weight.data = before.to(weight.device)
            try:
                yield
            finally:
                for (weight, _), data in zip(self.written_over, adapted, strict=True):
                    weight.data = data

    def save_adapter(self, folder: str | Path) -> None:
        """PEFT format: adapter_config.json and adapter_model.safetensors."""
        self.thinker.save_pretrained(str(folder))
        (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's model card, a form that nobody has filled in

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that training will change."""
        return [(name, p) for name, p in self.thinker.named_parameters() if p.requires_grad]

    # ---------------------------------------------------------------- the family's part

    video_id: int
    audio_id: int
    end_id: int
    pad_id: int

    @property
    @abstractmethod
    def text_model(self) -> Any:
        """The decoder stack with .embed_tokens, .layers, .norm, .config."""

    @property
    @abstractmethod
    def head(self) -> Any:
        """The unembedding."""

    @abstractmethod
    def resize(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (n, 3, h, w) in the size that the processor gives frames of theirs, by the processor's own means: for frames as they are read."""

    @abstractmethod
    def encode_video(self, videos: list[np.ndarray], resized: bool = False) -> list[StreamFeatures]:
        """Towers on frames uint8 (n, 3, h, w) sampled at `self.fps`; `resized`: by `resize`, which is not to be done again."""

    @abstractmethod
    def encode_audio(self, waves: list[np.ndarray]) -> list[StreamFeatures]:
        """Towers on mono float32 waves at 16 kHz."""

    def deeper(self, media: Sequence[Media], ids: torch.Tensor, start: int, stop: int) -> dict[str, Any]:
        """What the decoder is given besides embeddings for columns [start, stop) of these prompts, ids (N, P): see StreamFeatures.deep."""
        return {}

    @abstractmethod
    def media_layout(self, video: tuple[int, ...] | None, audio: tuple[int, ...] | None) -> Layout:
        """Token ids, kinds and positions of system + media for streams of these sizes, exactly as the family's processor and model make them."""

    @abstractmethod
    def stock_positions(self, ids: torch.Tensor, video: tuple[int, ...] | None, audio: tuple[int, ...] | None) -> torch.Tensor:
        """(3, T) positions that the stock model gives to a whole prompt, ids (T,), with streams of these sizes. `media_layout` takes its own from
        here, and the self-check compares those of whole sequences."""

    @abstractmethod
    def question_text(self, question: str) -> str:
        """The prompt's text after the media, up to where the answer starts."""


def device_fault(error: BaseException) -> bool:
    """Whether the machine failed, whatever it was given: memory that ran out, or an error of the accelerator's libraries."""
    said = str(error).lstrip()
    return isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and (said.startswith(("CUDA", "cuDNN", "NCCL", "HIP", "MPS")) or "DefaultCPUAllocator" in said)
    )


def spread_ranks(layers: Sequence[int], like: int, r: int) -> dict[int, int]:
    """Rank of each of `layers`, so that they have as many trained parameters as `like` layers of rank `r`: ranks differ by at most 1, the larger ones
    spread over the depth. A layer whose share is 0 is left out.

        ranks = spread_ranks(range(model.n_layers), like=3, r=8)                    # all layers instead of three
        names = {name: rank for layer, rank in ranks.items() for name in model.lora_targets([layer], projections)}
        model.add_lora(list(names), r, alpha, ranks=names)
    """
    chosen, units = sorted(set(layers)), like * r
    ranks = {layer: (i + 1) * units // len(chosen) - i * units // len(chosen) for i, layer in enumerate(chosen)}
    return {layer: rank for layer, rank in ranks.items() if rank}


def _pad(rows: Sequence[torch.Tensor], value) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _text_positions(start: int, n: int) -> torch.Tensor:
    return (torch.arange(n) + start).expand(3, -1)
