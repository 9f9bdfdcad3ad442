"""The self-check: before a cut is used on a model, it is measured on real input that cuts do what they say (docs/definitions.md).

`AVLLM` runs it by itself the first time that cuts are used, and again whenever the model's modules or its attention were exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from models.attention import IMPLEMENTATION, SITES, Cut, CutError, Cuts, FlowTap, Instruments, Kind
from models.avllm import AVLLM
from models.reuse import Decoding, Reuse
from models.sequences import Batch, Example, Media, Prefix, StreamFeatures, Suffix

# Two ways of computing the same logits may differ by so many times what two stock ways do on the same input. Measured on random models
# of bfloat16: up to 1.6 times.
TIMES = 4
LEAST = 16 * torch.finfo(torch.float32).eps  # of the largest logit, where stock ways differ by less: attention is float32 in all of them
MOST = 0.2  # of the largest logit: beyond it, what is right cannot be told from what is wrong
ANSWERS = ("I see and hear this.", "Both.", "I hear this and I see that.", "This.")


@torch.no_grad()
def self_check(model: AVLLM, media: Media, question: str) -> None:
    """Raise CutError unless all of this holds, in a ragged, padded batch of 8 made of the clip's beginnings and single streams and (1 and 5) for the
    whole clip in a batch of 1:

    0. every row of a sequence has the position that the stock model's own function gives it, also where the sound is shorter than the video;
    1. with nothing blocked, the instrumented path is exactly the same path without instruments, and within the tolerance the stock model under
       `sdpa` and under `eager`;
    2. blocked pairs get exactly zero weight: the result of a cut is the same, bit for bit, whatever the keys and values it blocks are, in one pass,
       with prefix reuse, and in decoding;
    3. rows before the first cut query row are untouched, exactly;
    4. each cut changes the output (a cut that does nothing is the fault this exists for);
    5. prefix reuse equals the whole masked forward pass, in scoring and in decoding.

    The tolerance is measured: how far apart two ways of the stock model are on the same input, in its precision, `TIMES` over (`_Check.rounding`).
    """
    if media.video is None or media.audio is None:
        missing = "video" if media.video is None else "audio"
        raise CutError(f"The self-check needs a clip with sound and picture; this one has no {missing} rows.")
    given = model.text_model.config._attn_implementation
    if given != IMPLEMENTATION:
        raise CutError(f"The decoder's attention is {given!r}, which ignores cuts, not {IMPLEMENTATION!r}: load the model through models.load_model.")
    was_training = model.decoder.training
    model.decoder.eval()
    try:
        model.passed = model.instrument()  # so that what follows does not check again
        _Check(model, media, question).run()
    except BaseException:
        model.passed = None
        raise
    finally:
        model.decoder.train(was_training)


class _Check:
    def __init__(self, model: AVLLM, media: Media, question: str):
        self.model, self.layers, self.media = model, model.n_layers, media
        self.sites = list(SITES)
        questions = (question, f"Listen. {question}", f"And now: {question}")
        # Beginnings of the clip, of two lengths, and single streams: ragged prefixes, with padding before their suffixes, and little work.
        some, less = shortened(model, media, 72), shortened(model, media, 48)
        self.short = self.sites.index("video->question")  # the row used alone
        self.clips = [some, less] * (len(self.sites) // 2)
        self.clips[self.sites.index("video->emitters")] = Media(some.video, None)
        self.clips[self.sites.index("audio->question+emitters")] = Media(None, some.audio)
        self.examples = [model.sequence(m, questions[i % 3], ANSWERS[i % 4]) for i, m in enumerate(self.clips)]
        self.suffixes = [e.suffix for e in self.examples]
        self.batch = model.batch(self.examples, share=False)
        self.wanted = self.batch.targets != -100

    def run(self) -> None:
        self.positions()
        self.most = self.rounding()
        plain = self.nothing_blocked(self.batch)
        self.whole_clip()
        for start, stop in ((0, self.layers), (self.layers // 2, self.layers // 2 + 1)):
            cuts = [(Cut.at(site, start, stop),) for site in self.sites]
            states = self.states(self.batch, Instruments(self.batch.kinds, cuts))
            self.rows(cuts, plain, states)
            self.reuse(cuts, self.logits(self.batch, states))
        self.blocked_media()
        self.resumed()
        self.blocked_keys()

    # ---------------------------------------------------------------- the parts

    def positions(self) -> None:
        """0. Positions need no pass, so a sound of any length is tried: one that ends early moves the text after it."""
        model, sound = self.model, self.media.audio
        assert sound is not None
        lengths = [sound.size[0] - 25 * n for n in range(9)]  # up to 2 s less
        sounds = [replace(sound, size=(n,)) for n in lengths if n >= min(16, sound.size[0])]
        clips = [Media(self.media.video, s) for s in sounds]
        heard = [int((model.layout(m).ids == model.audio_id).sum()) for m in clips]
        clips = [Media(m.video, replace(s, features=s.features[:n])) for m, s, n in zip(clips, sounds, heard, strict=True)]
        shorter = [Example(m, self.suffixes[i % len(self.suffixes)]) for i, m in enumerate(clips)]
        for examples, batch in ((self.examples, self.batch), (shorter, model.batch(shorter, share=False))):
            for row, example in enumerate(examples):
                sizes = [stream.size if stream is not None else None for stream in (example.media.video, example.media.audio)]
                real = batch.kinds[row] != Kind.PAD
                ours = batch.inputs["position_ids"][:, row, real].cpu()
                if not torch.equal(ours, model.stock_positions(batch.inputs["input_ids"][row, real].cpu(), *sizes)):
                    raise CutError(f"Rows of a prompt with streams of sizes {sizes} do not have the stock model's positions.")

    def states(self, batch: Batch, instruments: Instruments | None) -> torch.Tensor:
        inputs, text = batch.inputs, self.model.text_model
        embeds = text.embed_tokens(inputs["input_ids"])
        embeds = embeds.masked_scatter(inputs["media_mask"][..., None], inputs["features"].to(embeds.dtype))
        states = text(
            inputs_embeds=embeds,
            position_ids=inputs["position_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            instruments=instruments,
        ).last_hidden_state
        self.model.require_finite(states[batch.kinds != Kind.PAD])  # or attention would be blamed for what the weights did
        return states

    def logits(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        logits = self.model.head(states.flatten(0, 1)[batch.inputs["rows"]])
        self.model.require_finite(logits)
        return logits

    def stock(self, batch: Batch, name: str) -> torch.Tensor:
        """Logits of the stock model under one of its own attentions."""
        text = self.model.text_model
        text.set_attn_implementation(name)
        try:
            return self.logits(batch, self.states(batch, None))
        finally:
            text.set_attn_implementation(IMPLEMENTATION)

    def rounding(self) -> float:
        """What exact computations may differ by, relative to the largest logit: nothing of ours runs here. The stock model under `sdpa` against
        `eager`, whose softmax is always float32, and padded beside others against alone, which is another size for every product."""
        batch, alone = self.batch, self.model.batch([self.examples[self.short]])
        sdpa, eager, single = self.stock(batch, "sdpa"), self.stock(batch, "eager"), self.stock(alone, "sdpa")
        answer = self.wanted[self.short]
        apart = max(distance(sdpa[self.wanted], eager[self.wanted]), distance(sdpa[self.short, answer], single[0, : int(answer.sum())]))
        most = max(TIMES * apart, LEAST)
        if not most <= MOST:
            raise CutError(
                f"Rounding alone moves this model's logits by {apart:.1%} in {self.model.dtype}, so that cuts cannot be checked. Load it in float32."
            )
        return most

    def nothing_blocked(self, batch: Batch, stocks: Sequence[str] = ("sdpa", "eager")) -> torch.Tensor:
        """1. Returns the states."""
        n = len(batch.kinds)
        plain, real = self.states(batch, Instruments(batch.kinds, [()] * n)), batch.kinds != Kind.PAD
        if not torch.equal(plain[real], self.states(batch, None)[real]):
            raise CutError("With nothing blocked the instrumented attention changes the output.")
        ours = self.logits(batch, plain)
        for stock in stocks:
            self.same(
                ours,
                self.stock(batch, stock),
                batch.targets != -100,
                f"With nothing blocked, the instrumented attention in a batch of {n} is not the stock {stock}",
            )
        return plain

    def whole_clip(self) -> None:
        """1 and 5 on all of the clip, in a batch of 1."""
        suffix = self.suffixes[self.short]
        self.nothing_blocked(self.model.batch([self.examples[self.short]]))
        batch = self.model.batch([Example(self.media, suffix)])
        self.nothing_blocked(batch, ["sdpa"])
        cuts = [(Cut.at("video->question", 0, self.layers),)]
        whole = self.logits(batch, self.states(batch, Instruments(batch.kinds, cuts)))
        got = self.model.extend(self.model.prefill([self.media]), [0], [suffix], cuts).logits
        self.same(got, whole, batch.targets != -100, "Scoring the whole clip is not the whole pass")

    def rows(self, cuts: Cuts, plain: torch.Tensor, states: torch.Tensor) -> None:
        """3 and 4, in one pass."""
        kinds = self.batch.kinds
        for row, (cut,) in enumerate(cuts):
            targets = torch.isin(kinds[row], torch.tensor(cut.target, device=kinds.device)).nonzero()[:, 0]
            if not torch.equal(states[row, : targets[0]], plain[row, : targets[0]]):
                raise CutError(f"{cut.site}: rows before the first cut row changed.")
            if torch.equal(states[row, targets], plain[row, targets]):
                raise CutError(f"{cut.site}: the cut does nothing.")

    def reuse(self, cuts: Cuts, whole: torch.Tensor) -> None:
        """5, in the batch of 8 and in a batch of 1; 4 for the paths that sweeps take; 2 as far as the tap's weights tell it."""
        model, n = self.model, len(cuts)
        media = [tuple(c for c in cut if c.cuts_media) for cut in cuts]
        prefix = model.prefill(self.clips, media)
        after = torch.tensor([model.layout(m).next_position for m in self.clips])
        if not torch.equal(prefix.next_position.cpu(), after):
            raise CutError("On a prefix, text does not begin where the stock model has it.")
        out = model.extend(prefix, [*range(n), *range(n)], self.suffixes * 2, [*cuts, *media]).logits
        self.same(out[:n], whole, self.wanted, "Scoring with prefix reuse is not the whole pass")
        for row, (cut,) in enumerate(cuts):
            # In the last layer, what only the question sees no longer reaches an answer.
            if not cut.cuts_media and (cut.start == 0 or Kind.EMITTER in cut.target) and torch.equal(out[row], out[n + row]):
                raise CutError(f"{cut.site}: the cut does nothing with prefix reuse.")
        tap = FlowTap()
        tapped, _ = model._whole(prefix, range(n), self.suffixes, _padded_kinds(self.suffixes, whole.device), cuts, False, tap)
        rows = torch.tensor([s.first for s in self.suffixes])[:, None] + torch.arange(whole.shape[1])
        rows = rows.clamp_max(tapped.shape[1] - 1).to(whole.device)[..., None].expand(-1, -1, tapped.shape[-1])
        self.same(model.head(tapped.gather(1, rows)), whole, self.wanted, "A pass with taps on a prefix is not the whole pass")
        if sorted(tap.mass) != list(range(self.layers)):
            raise CutError(f"The instrumented attention ran in layers {sorted(tap.mass)} only; something replaced it in the others.")
        if tap.blocked_weight != 0.0:
            raise CutError(f"Blocked pairs still get weight {tap.blocked_weight:.2e}.")
        decoding, steps = self.decoding(prefix, range(n), cuts), min(3, int(self.wanted.sum(1).min()))
        for step in range(steps):
            said = model.head(model.text_model.norm(decoding.states))[torch.as_tensor(decoding.of, device=whole.device)]
            self.same(said, whole[:, step], self.wanted[:, step], f"Decoding under cuts is not the whole pass at token {step + 1}")
            if step + 1 < steps:
                decoding.feed(self.batch.targets[:, step][torch.as_tensor(decoding.jobs, device=whole.device)])
        alone = self.decoding(prefix, [0], cuts[:1], self.suffixes[:1])
        for step in range(steps):
            said = model.head(model.text_model.norm(alone.states))
            self.same(said, whole[:1, step], self.wanted[:1, step], f"Decoding one clip alone under a cut is not the whole pass at token {step + 1}")
            if step + 1 < steps:
                alone.feed(self.batch.targets[:1, step])

    def resumed(self) -> None:
        """5 for cuts into media rows that begin above the first layer: resuming the clean prefix is running the prefix under the cut."""
        if self.layers < 2:
            return
        clip, model = self.clips[self.short], self.model
        cuts: Cuts = [(Cut.at(site, 1, self.layers),) for site in ("video->audio", "audio->video")]
        whole, clean = model.prefill([clip, clip], cuts), model.prefill([clip, clip], hidden=True)
        resumed = model.prefill([clip, clip], cuts, clean=clean)
        wanted = torch.ones(whole.keys[-1].shape[:-1], dtype=torch.bool, device=whole.kinds.device)
        self.same(resumed.keys[-1], whole.keys[-1], wanted, "A prefix under a media cut that resumes the clean one is not the whole pass")

    def blocked_media(self) -> None:
        """2 for cuts between the streams: what the target's rows become does not depend on the source at all."""
        clip, model = self.clips[self.short], self.model
        assert clip.video is not None and clip.audio is not None
        others = [Media(_noise(clip.video), clip.audio), Media(clip.video, _noise(clip.audio))]
        cuts: Cuts = [(Cut.at(site, 0, self.layers),) for site in ("video->audio", "audio->video")]
        cut, changed, plain = model.prefill([clip, clip], cuts), model.prefill(others, cuts), model.prefill([clip, clip])
        for row, (c,) in enumerate(cuts):
            ours, theirs, uncut = (_keys_of(prefix, row, c.target[0]) for prefix in (cut, changed, plain))
            if not torch.equal(ours, theirs):
                raise CutError(f"{c.site}: what is blocked still reaches the target's rows.")
            if torch.equal(ours, uncut):
                raise CutError(f"{c.site}: the cut does nothing to the prefix.")

    def blocked_keys(self) -> None:
        """2 for cuts into the suffix: keys and values that they block may be anything."""
        model = self.model
        cuts: Cuts = [(Cut.at(f"{source}->question+emitters", 0, self.layers),) for source in ("video", "audio")] + [(), ()]
        clips, suffixes = [0, 1, 0, 1], self.suffixes[1:5]
        shortest = min(len(s.targets) for s in suffixes)
        same = model.prefill([self.clips[self.short]] * 2)
        blocked = torch.stack([same.kinds[0] == Kind.VIDEO, same.kinds[1] == Kind.AUDIO])
        other = replace(same, keys=[_scrambled(k, blocked) for k in same.keys], values=[_scrambled(v, blocked) for v in same.values])
        results = []
        for prefix in (same, other):
            decoding = self.decoding(prefix, clips, cuts, suffixes)
            first = decoding.states
            decoding.feed(torch.stack([s.targets[0] for s in suffixes]).to(first.device)[torch.as_tensor(decoding.jobs, device=first.device)])
            of = torch.as_tensor(decoding.of, device=first.device)
            scored, tapped = (model.extend(prefix, clips, suffixes, cuts, hidden=hidden).logits[:, :shortest] for hidden in (False, True))
            results.append({"scoring": scored, "the first token": first[of], "decoding": decoding.states[of], "a pass with taps": tapped})
        for way, before in results[0].items():
            for row, source in enumerate(("video", "audio")):
                if not torch.equal(before[row], results[1][way][row]):
                    raise CutError(f"{source}->question+emitters: what is blocked still reaches the answer in {way}.")
                if torch.equal(before[row + 2], results[1][way][row + 2]):
                    raise CutError(f"In {way} the model does not read the {source} rows of its prefix at all, so nothing can be cut there.")

    # ---------------------------------------------------------------- helpers

    def decoding(self, prefix: Prefix, which: Sequence[int], cuts: Cuts, suffixes: Sequence[Suffix] | None = None) -> Decoding:
        prompts = [_prompt(s) for s in (suffixes or self.suffixes)]
        return Decoding(Reuse(self.model.text_model, prefix, which, prompts, cuts, 3), 3)

    def same(self, ours: torch.Tensor, theirs: torch.Tensor, wanted: torch.Tensor, complaint: str) -> None:
        error = distance(ours[wanted], theirs[wanted])
        if not error <= self.most:
            raise CutError(f"{complaint}: logits differ by {error:.1e} of the largest, more than the {self.most:.1e} that rounding explains.")


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far rows (n, V) are from those they should be: the root mean square over V of the worst row, relative to the largest of all."""
    a, b = ours.double(), theirs.double()
    off = float((a - b).pow(2).mean(-1).sqrt().max())
    return off / float(b.abs().max()) if off else 0.0  # also where both are nothing but zeros


def shortened(model: AVLLM, media: Media, tokens: int) -> Media:
    """The beginning of a clip with both streams, about `tokens` prompt rows long; the clip itself if it is no longer."""
    assert media.video is not None and media.audio is not None
    share = tokens / len(model.layout(media).ids)
    if share >= 1:
        return media
    (t, h, w), (frames,) = media.video.size, media.audio.size
    grids, frames = max(1, int(t * share)), max(min(frames, 16), int(frames * share))
    sizes = Media(replace(media.video, size=(grids, h, w)), replace(media.audio, size=(frames,)))
    ids = model.layout(sizes).ids
    assert sizes.video is not None and sizes.audio is not None
    return Media(
        replace(sizes.video, features=media.video.features[: int((ids == model.video_id).sum())]),
        replace(sizes.audio, features=media.audio.features[: int((ids == model.audio_id).sum())]),
    )


def _prompt(suffix: Suffix) -> Suffix:
    """The suffix up to the row that emits the first token."""
    stop = suffix.first + 1
    return replace(suffix, ids=suffix.ids[:stop], kinds=suffix.kinds[:stop], targets=suffix.targets[:0], span=suffix.span[:0])


def _padded_kinds(suffixes: Sequence[Suffix], device: torch.device) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([s.kinds for s in suffixes], True, int(Kind.PAD)).to(device)


def _noise(stream: StreamFeatures) -> StreamFeatures:
    generator = torch.Generator().manual_seed(0)
    return replace(stream, features=torch.randn(stream.features.shape, generator=generator) * stream.features.std().clamp_min(1e-3))


def _scrambled(keys: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Keys or values (N, heads, P, head size), those at `rows` (N, P) turned into others."""
    return torch.where(rows[:, None, :, None], keys.flip(3) * 2 + 1, keys)


def _keys_of(prefix: Prefix, row: int, kind: Kind) -> torch.Tensor:
    """Keys and values of one kind of one prefix row, all layers, in one tensor."""
    at = prefix.kinds[row] == kind
    return torch.stack([torch.stack([k[row][:, at], v[row][:, at]]) for k, v in zip(prefix.keys, prefix.values, strict=True)])
