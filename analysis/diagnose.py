"""Run the diagnostics of docs/definitions.md on a model and one split of a clip folder.

    from analysis.diagnose import DiagnoseSettings, diagnose
    findings = diagnose(load_model("models/organism/avllm"), load_clips("runs/clips"), DiagnoseSettings(), split="test")
    findings.save("findings.json")

    diagnose(model, clips, DiagnoseSettings.quick(120), split="selection")   # following and reliance only: for checkpoints

The clips are visited in batches, each with one media prefix, on top of which every diagnostic asks its questions (analysis/tally.py); visits
are shared between processes and kept on disk (analysis/work.py). Which clips, where fewer than all are asked for, is decided by a hash of the
seed and their ids: the same for every model, and a smaller subset is part of a larger one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from analysis.captions import CaptionTally, asked_about
from analysis.events import require_readable, synonyms_of
from analysis.fidelity import fidelity_rows
from analysis.findings import NEUTRAL, Findings, Sources
from analysis.flow import FlowTally
from analysis.items import ItemStore
from analysis.knockout import CutAnswers, KnockoutSweep
from analysis.language import TextJob, language_rows, measured, text_jobs, text_stated
from analysis.probing import LensTally, ProbeFeatures, probe_rows, random_weights
from analysis.reliance import FollowingTally, ScoreTable, hang_together, reliance_rows, want_grids
from analysis.settings import DiagnoseSettings, SettingsError
from analysis.shift import ShiftTally
from analysis.tally import Record, Tally
from analysis.tuned_lens import TunedLens, TunedLensFit, TunedTally
from analysis.visits import Subject, Visit
from analysis.work import Records, Work, code_hash, weights_hash
from data.check import refusal
from data.clips import Clip, Clips, DataError, Grid, Stream
from data.questions import QUESTIONS, question
from models import AVLLM, SITES, load_model

PACKAGES = ("torch", "transformers", "peft", "numpy", "av", "torchvision")
PROCESSOR_FIELDS = ("size", "patch_size", "temporal_patch_size", "merge_size", "min_frames", "sampling_rate", "hop_length", "feature_size")

NOT_WORDS = ("pairs", "config", "sources", "code", "files", "data_hash")  # of a manifest: all but the classes and what they are called
BARE = {"muted": "muted", "near_silent": "muted", "blanked": "blanked", "near_black": "blanked"}  # condition of findings -> of the clips
NEAR = ("near_silence", "near_black")  # renderings of a stream that is noise too faint to hear, or to see

MANY_CUT_OFF = 0.05  # share of answers that ended at the token limit from which findings warn

T = TypeVar("T")


class Chosen(NamedTuple):
    """The clips and grids of one diagnosis."""

    factual: list[Clip]
    counterfactual: list[Clip]
    grids: list[Grid]
    bare: dict[str, list[Clip]]  # condition -> clips that lack a stream


def choose(clips: Clips, split: str, settings: DiagnoseSettings) -> Chosen:
    """The subset of a split: grids in hash order, then the clips in the order in which these grids name them, then clips of no grid; and clips that
    lack a stream.

    Of the unseen split clips that the train split has no source of come first, and grids and clips that lack a stream are only of those.
    """
    by_id, trained = clips.by_id(), clips.sources("train")
    grids = sorted((g for g in clips.grids if g.split == split), key=lambda g: _hash(settings.seed, g.id))
    if split == "unseen":
        grids = [g for g in grids if all(_is_new(by_id[name], trained) for name in (g.oo, g.ox, g.xo, g.xx))]

    def ordered(condition: str, cells: Callable[[Grid], tuple[str, ...]] = lambda _: ()) -> list[Clip]:
        rest = sorted(clips.select(split, condition), key=lambda c: _hash(settings.seed, c.id))
        named = [by_id[name] for grid in grids for name in cells(grid)]
        found = list({c.id: c for c in [*named, *rest]}.values())
        return sorted(found, key=lambda c: not _is_new(c, trained)) if split == "unseen" else found

    def lacking(condition: str) -> list[Clip]:
        return [c for c in ordered(condition) if split != "unseen" or _is_new(c, trained)]

    return Chosen(
        first(ordered("factual", lambda g: (g.oo, g.xx)), settings.factual),
        first(ordered("counterfactual", lambda g: (g.ox, g.xo)), settings.counterfactual),
        first(grids, settings.grids),
        {name: first([c for c in lacking(of) if _is_near(c) == name.startswith("near")], settings.bare) for name, of in BARE.items()},
    )


def _is_new(clip: Clip, trained: Mapping[Stream, frozenset[str]]) -> bool:
    """Whether neither stream of a clip has a source that is trained on."""
    return clip.video_source not in trained["video"] and clip.audio_source not in trained["audio"]


def _is_near(clip: Clip) -> bool:
    """Whether the missing stream of a muted or blanked clip is noise."""
    return (clip.audio_rendering if clip.condition == "muted" else clip.video_rendering) in NEAR


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def first(items: Sequence[T], count: int | None) -> list[T]:
    """The first `count` items; None is all."""
    return list(items if count is None else items[:count])


def check_sites(settings: DiagnoseSettings) -> None:
    """Raise SettingsError for a site that there is not."""
    for name in ("knockout_sites", "knockout_curves"):
        if unknown := sorted(set(getattr(settings, name) or ()) - set(SITES)):
            raise SettingsError(f"{name} names {', '.join(unknown)}; the sites are {', '.join(SITES)}.")


def choose_unseen(clips: Clips, settings: DiagnoseSettings) -> Chosen:
    """The clips of the split of unseen sources that are asked about beside the test split; none of them loses a stream."""
    return choose(clips, "unseen", replace(settings, factual=settings.unseen, counterfactual=settings.unseen, alone=0))


def used(clips: Clips, split: str, settings: DiagnoseSettings) -> list[Clip]:
    """Every clip that a diagnosis of this split needs, once."""
    chosen, by_id = choose(clips, split, settings), clips.by_id()
    found = [*chosen.factual, *chosen.counterfactual, *(clip for bare in chosen.bare.values() for clip in bare)]
    found += [by_id[name] for grid in chosen.grids for name in (grid.oo, grid.ox, grid.xo, grid.xx)]
    if split == "test":
        unseen = choose_unseen(clips, settings)
        found += [*unseen.factual, *unseen.counterfactual]
    return list({clip.id: clip for clip in found}.values())


def diagnose(
    model: AVLLM,
    clips: Clips,
    settings: DiagnoseSettings | None = None,
    split: str = "test",
    progress: bool = True,
    work: Path | None = None,
    processes: PartialState | None = None,
) -> Findings:
    """Measure everything that `settings` asks for on one split.

    work: folder in which measured visits are kept until the caller has written the findings and deletes it; a diagnosis that was killed goes on
    from there. processes: share the visits with the other processes of a `torchrun` or `accelerate launch`, each of which calls this alike;
    every one returns the same findings.

    All clips that will be needed are read before anything is measured. Raises DataError that names those that cannot be used (also: sound that left
    no tokens), ModelError for logits that are not finite, ModelError for a base that cannot be loaded, CutError where the
    self-check finds that a cut would not do what it says, SettingsError for a site that there is not.
    """
    settings = settings or DiagnoseSettings()
    check_sites(settings)
    require_readable(clips)
    chosen = choose(clips, split, settings)
    if not chosen.factual and not chosen.counterfactual:
        raise DataError(f"{clips.root} has no factual or counterfactual clips of the split {split!r} that were asked for.")
    asked = stated(model, clips, settings, split, chosen)
    findings = Findings(model.path, model.adapter, model.base_path, split, clips.hash_of(split), model.n_layers, asked)
    findings.sources = [_sources(clips, name) for name in (split, "unseen") if name == split or (split == "test" and clips.select(name))]
    base = None
    if settings.shift != 0 and model.base_path is not None:
        base = load_model(model.base_path, device=model.device, dtype=model.dtype)
    key = {}
    if work is not None:
        weights = [weights_hash(m) if m is not None else None for m in (model, base)]
        # A visit is a batch. Which clips there are is said of each visit, so that its record outlives another clip that is taken out.
        scored = {name: value for name, value in asked.items() if name == "batch_size" or name not in NEUTRAL | {"subset"}}
        words = {name: value for name, value in clips.manifest.items() if name not in NOT_WORDS}
        key = {"stated": scored, "words": words, "weights": weights, "code": code_hash()}
    training = model.thinker.training
    model.thinker.eval()
    try:
        with _bar(progress and (processes is None or processes.is_main_process)) as bar:
            _Diagnosis(model, base, clips, settings, split, chosen, findings, bar, Work(work, key, processes)).run()
    finally:
        model.thinker.train(training)
    return findings


def _sources(clips: Clips, split: str) -> Sources:
    """What of a split the train split has too."""
    shared = clips.shared_sources(split)
    return Sources(split, *shared["video"], *shared["audio"], len(clips.select("train")))


def _bar(progress: bool) -> Progress:
    columns = TextColumn("{task.description:<22}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True)


def batches(ids: Sequence[str], most: int) -> Iterable[tuple[int, int]]:
    """Cuts items into batches of at least half of `most` and at most `most`, [start, stop). Each ends where the hash of an id is smallest among the
    places it may end at, so that after an item is taken out the batches soon end where they did before."""
    hashes, start = [_hash(0, name) for name in ids], 0
    while len(ids) - start > most:
        stop = min(range(start + (most + 1) // 2, start + most + 1), key=lambda end: hashes[end - 1])
        yield start, stop
        start = stop
    if start < len(ids):
        yield start, len(ids)


@dataclass(frozen=True)
class Job:
    """One visit that some process makes, and the tallies that look at it."""

    condition: str
    start: int
    clips: list[Clip]
    tallies: tuple[str, ...]
    video: bool = True
    audio: bool = True
    taps: bool = False
    random: bool = False  # with random weights in the decoder's layers
    steps: int = 1  # what a clip counts on the bar


class _Diagnosis:
    """One run of `diagnose`: which visits are made, who looks at each, and what is made of it."""

    def __init__(
        self,
        model: AVLLM,
        base: AVLLM | None,
        clips: Clips,
        settings: DiagnoseSettings,
        split: str,
        chosen: Chosen,
        findings: Findings,
        bar: Progress,
        work: Work,
    ):
        self.model, self.base, self.settings, self.chosen = model, base, settings, chosen
        self.findings, self.bar, self.work = findings, bar, work
        self.subject = Subject(model, clips, settings.max_new_tokens)
        self.by_id = clips.by_id()
        self.conditions = {"factual": chosen.factual, "counterfactual": chosen.counterfactual}
        unseen = choose_unseen(clips, settings) if split == "test" else None
        self.unseen = {"unseen_factual": unseen.factual, "unseen_counterfactual": unseen.counterfactual} if unseen else {}
        trained = clips.sources("train")
        # What is looked into beside answers: of the unseen split only clips that are new in both streams, which come first.
        self.whole = {name: [c for c in found if split != "unseen" or _is_new(c, trained)] for name, found in self.conditions.items()}
        counts = {"factual": settings.knockout_factual, "counterfactual": settings.knockout}
        self.swept = {name: first(found, counts[name]) for name, found in self.whole.items()}
        self.trained = trained
        self.tallies: dict[str, Tally] = {}
        self.task = bar.add_task("starting", total=None)

    def run(self) -> None:
        """All visits, then all numbers."""
        settings, chosen, findings, out = self.settings, self.chosen, self.findings, self.findings.left_out
        conflicts = bool(self.whole["counterfactual"])
        for condition, clips in self.conditions.items():
            if not clips:
                out.append(f"Nothing was measured on {condition} clips: there are none in the split, or none were asked for.")
            if len(self.whole[condition]) < len(clips):
                out.append(
                    f"Of {len(clips)} {condition} clips of the unseen split {len(self.whole[condition])} have no source that the train split has: "
                    "only those have more than their answers looked at, and only those lose a stream."
                )
        if settings.bare != 0 and not any(chosen.bare.values()):
            out.append("Abstention was not measured on muted and blanked clips: there are none in the split.")
        following, scores = FollowingTally(trained=self.trained), ScoreTable()
        want_grids(scores, chosen.grids, self.by_id)
        flow = FlowTally() if settings.flow else None
        lens = LensTally(self.subject, settings.lens_k) if settings.lens and conflicts else None
        fit = TunedLensFit(self.subject, self.whole["counterfactual"], settings.lens_k) if lens else None
        features = ProbeFeatures() if settings.probes and conflicts else None
        silent = ProbeFeatures() if features else None
        random = ProbeFeatures() if features and settings.probe_random else None
        shift = self._shift() if settings.shift != 0 else None
        captions = CaptionTally(self.subject.labels, synonyms=self.subject.synonyms) if settings.captions != 0 else None
        sweep, sites = None, tuple(SITES) if settings.knockout_sites is None else settings.knockout_sites
        if sites and any(self.swept.values()):
            media = settings.knockout_media if settings.knockout_media is not None else len(self.by_id)
            sweep = KnockoutSweep(self.subject, sites, settings.knockout_width, media)
        asked: dict[str, Tally | None] = {
            "following": following, "scores": scores, "flow": flow, "lens": lens, "tuned fit": fit, "probes": features, "without sound": silent,
            "random": random, "shift": shift, "captions": captions, "knockout": sweep,
        }  # fmt: skip
        self.tallies = {name: tally for name, tally in asked.items() if tally is not None}
        visits = self._visits(scores)
        self._read("visits", visits)
        self._make("visits", visits)
        under_cuts = self._under_cuts(sweep) if sweep and captions and settings.caption_cuts else None
        tuned = self._tuned(fit) if fit else None
        if sweep:
            self._make("answers", [*self._cut_answers(sweep), *(self._cut_captions(sweep, under_cuts) if under_cuts else ())])

        plain_text = self._plain_text() if settings.language else []

        self.bar.update(self.task, description="fitting probes")
        items = ItemStore()
        if features:
            findings.probes = probe_rows(features, silent, random, settings.probe_folds, items, settings.seed)
            out.append(
                "Probes: the control without sound exists only for the sound's label where there are rows without sound (question, last prompt row)."
            )
            if random is None:
                out.append("Probes: the control with random weights was not asked for.")
        self.bar.update(self.task, description="intervals")
        findings.following = following.rows(items)
        findings.samples = following.samples
        if chosen.grids:
            findings.reliance = reliance_rows(scores, chosen.grids, self.by_id, items, settings.flips, settings.seed)
            members = [self.by_id[name] for side in ("oo", "xx") for name in (getattr(grid, side) for grid in chosen.grids)]
            if hang_together(members):
                out.append(
                    "Modality reliance: members of one grid are joined by shared pictures or recordings, so intervals count pairs of sources as "
                    "independent and are too narrow."
                )
        elif settings.grids != 0:
            out.append(f"Modality reliance: the split has no grids{' of sources that the train split lacks' if findings.split == 'unseen' else ''}.")
        if flow:
            findings.flow = flow.rows(items)
        if lens:
            findings.lens, findings.latent = lens.rows(items), lens.latent(items)
            findings.tuned = tuned.tuned(items) if tuned else None
        if shift:
            findings.shift = shift.rows(items)
        if sweep:
            findings.knockout = sweep.rows(items)
        if captions:
            findings.labels = {name: list(phrases) for name, phrases in self.subject.labels.items()}
            findings.synonyms = {name: [list(words) for words in sides] for name, sides in self.subject.synonyms.items()}
            findings.captions = captions.captions + (under_cuts.captions if under_cuts else [])
            findings.fidelity = fidelity_rows(findings.captions, items)
        if settings.language:
            findings.language = language_rows(plain_text, items)
        limits: dict[str, int] = {m: asked_about(self.subject, m).max_new_tokens for m in QUESTIONS}
        out += cut_off_sentences(findings, {**limits, "plain": settings.max_new_tokens})
        findings.items = items.saved()
        off = {"flow": flow, "lens": lens, "probes": features, "token shift": shift, "caption fidelity": captions, "knockout": sweep}
        if names := [name for name, tally in off.items() if tally is None]:
            out.append(f"Not measured: {', '.join(names)} (not asked for, or nothing to measure on).")

    # ---------------------------------------------------------------- jobs

    def _told(self, jobs: Sequence[Job]) -> list[Any]:
        """What the record of each job depends on."""
        return [
            {
                "condition": job.condition, "streams": [job.video, job.audio], "taps": job.taps, "random": job.random,
                "tallies": {name: self.tallies[name].depends(job.clips, job.start) for name in job.tallies},
                "clips": [{k: v for k, v in asdict(clip).items() if k != "file"} for clip in job.clips],
            }
            for job in jobs
        ]  # fmt: skip

    def _read(self, stage: str, jobs: list[Job]) -> None:
        """Read all media that this process will need, and name all that cannot be used, whoever reads them."""
        left = self.work.missing(stage, self._told(jobs))
        wanted = [(clip, jobs[i].video, jobs[i].audio) for i in left for clip in jobs[i].clips]
        self.bar.reset(self.task, total=len(wanted), description="reading media")
        found = self.model.unusable(wanted, self.subject.clips.root, lambda: self.bar.advance(self.task))
        bad = {clip.id: (clip, reason) for clip, reason in (gather_object(found) if self.work.world > 1 else found)}
        if bad:
            raise refusal(self.subject.clips.root, list(bad.values()), len({clip.id for job in jobs for clip in job.clips}))

    def _make(self, stage: str, jobs: list[Job]) -> None:
        """Make this process's share of the visits, and take up the records of all."""

        def measure(i: int) -> Records:
            job = jobs[i]
            self.bar.update(self.task, description=job.condition.replace("_", " "))
            with random_weights(self.model, self.settings.seed) if job.random else nullcontext():
                visit = Visit(self.subject, job.clips, job.condition, job.video, job.audio, job.taps, job.start)
                return {name: self.tallies[name].measure(visit) for name in job.tallies}

        self.bar.reset(self.task, total=sum(jobs[i].steps * len(jobs[i].clips) for i in self.work.mine(len(jobs))))
        records = self.work.records(stage, self._told(jobs), measure, lambda i: self.bar.advance(self.task, jobs[i].steps * len(jobs[i].clips)))
        for job, record in zip(jobs, records, strict=True):
            for name in job.tallies:
                self.tallies[name].take(job.clips, job.condition, record[name])

    def _jobs(self, condition: str, clips: Sequence[Clip], named: Mapping[str, int | None], **how: Any) -> Iterable[Job]:
        """Jobs over clips in batches. `named`: tally -> on how many of the clips, the first ones (None: all). No batch goes across one of these ends,
        so that a tally gets whole visits.
        """
        counts = {name: len(first(clips, count)) for name, count in named.items() if name in self.tallies}
        for begin, end in itertools.pairwise(sorted({0, len(clips), *counts.values()})):
            for start, stop in batches([clip.id for clip in clips[begin:end]], self.settings.batch):
                mine = tuple(name for name, count in counts.items() if begin < count)
                steps = 4 if "knockout" in mine else 1
                yield Job(condition, begin + start, list(clips[begin + start : begin + stop]), mine, steps=steps, **how)

    def _visits(self, scores: ScoreTable) -> list[Job]:
        """The clips asked about; with one stream only; with nothing in a stream; of unseen sources; those of grids that are not among them; and
        controls of the probes.
        """
        settings, jobs = self.settings, list[Job]()
        for condition, clips in self.conditions.items():
            whole = len(self.whole[condition])
            conflict = whole if condition == "counterfactual" else 0
            named = {"following": None, "scores": None, "flow": whole, "lens": conflict, "tuned fit": conflict, "probes": conflict}
            named |= {
                name: whole if count is None else min(whole, count) for name, count in (("shift", settings.shift), ("captions", settings.captions))
            }
            taps = any(name in self.tallies and named[name] != 0 for name in ("flow", "lens", "probes"))
            jobs += self._jobs(condition, clips, {**named, "knockout": len(self.swept[condition])}, taps=taps)
        alone = first(self.whole["factual"], settings.alone)
        jobs += self._jobs("audio_only", alone, {"following": None}, video=False)
        jobs += self._jobs("video_only", alone, {"following": None}, audio=False)
        for condition, clips in self.chosen.bare.items():
            jobs += self._jobs(condition, clips, {"following": None, "captions": settings.captions})
        for condition, clips in self.unseen.items():
            jobs += self._jobs(condition, clips, {"following": None})
        there = {clip.id for clips in self.conditions.values() for clip in clips}
        jobs += self._jobs("grid", [self.by_id[name] for name in scores.wanted if name not in there], {"scores": None})
        if "without sound" in self.tallies:
            jobs += self._jobs("without sound", self.whole["counterfactual"], {"without sound": None}, audio=False, taps=True)
        if "random" in self.tallies:
            jobs += self._jobs("random weights", self.whole["counterfactual"], {"random": None}, taps=True, random=True)
        return jobs

    def _cut_answers(self, sweep: KnockoutSweep) -> list[Job]:
        """Greedy answers under cuts: of the curves, on all clips of the sweep; of the best of each site, on factual clips and on conflicts not
        chosen on.
        """
        wanted, out = self.settings.knockout_answers, self.findings.left_out
        curve = sweep.curve([site for site in self.settings.knockout_curves if site in sweep.sites])
        best = [cut for cut in sweep.best(10**6 if wanted < 0 else wanted) if cut not in curve]
        self.tallies["cut answers"] = CutAnswers(sweep, curve, best, None if wanted < 0 else sweep.halves()[1])
        if wanted > 0 and best:
            out.append(
                "Knockout: besides the curves, each site's best cut was chosen on one half of the conflicts and its answers measured on the other; "
                "all other cuts were only scored."
            )
        if curve or wanted < 0:
            out.append("Knockout: whoever picks the best cut from a curve picks on the clips it is reported on; measure it again on another split.")
        return [job for condition, clips in self.swept.items() for job in self._jobs(condition, clips, {"cut answers": None})]

    def _tuned(self, fit: TunedLensFit) -> TunedTally | None:
        """The tuned lens, fitted on one half of the conflicts by one process, read on the other half."""

        def fitted(i: int) -> Records:
            self.bar.update(self.task, description="fitting tuned lens")
            lens = fit.fit()
            return {"lens": lens.record()} if lens else {}

        conflicts = [{k: v for k, v in asdict(clip).items() if k != "file"} for clip in self.whole["counterfactual"]]
        [found] = self.work.records("tuned_fit", [conflicts], fitted)
        if not found:
            self.findings.left_out.append("Tuned lens: too few conflicts for one half to fit it on and another to read.")
            return None
        tally = TunedTally(self.subject, TunedLens.of_record(found["lens"]), self.settings.lens_k)
        self.tallies["tuned lens"] = tally
        self._make("tuned_lens", list(self._jobs("counterfactual", fit.report, {"tuned lens": None}, taps=True)))
        return tally

    def _under_cuts(self, sweep: KnockoutSweep) -> CaptionTally:
        """Captions under the best cuts: of each site the best on the choosing half, of these the first few."""
        cuts = sweep.strongest(self.settings.caption_cuts)
        return CaptionTally(self.subject.labels, cuts=cuts, synonyms=self.subject.synonyms)

    def _cut_captions(self, sweep: KnockoutSweep, tally: CaptionTally) -> Iterable[Job]:
        """On factual clips, and on conflicts that had no part in choosing the cuts."""
        self.tallies["cut captions"] = tally
        report = sweep.halves()[1]
        for condition, clips in self.swept.items():
            yield from self._jobs(condition, [c for c in clips if condition == "factual" or c.id in report], {"cut captions": None})

    def _plain_text(self) -> list[Record]:
        """Passages and questions without media: they need no clips, so jobs of their own."""
        jobs = text_jobs(self.settings.batch)

        def size(job: TextJob) -> int:
            return job.stop - job.start

        def measure(i: int) -> Records:
            return {"plain text": measured(self.model, jobs[i], self.settings.max_new_tokens)}

        self.bar.reset(self.task, total=sum(size(jobs[i]) for i in self.work.mine(len(jobs))), description="plain text")
        records = self.work.records("plain_text", jobs, measure, lambda i: self.bar.advance(self.task, size(jobs[i])))
        return [record["plain text"] for record in records]

    def _shift(self) -> ShiftTally:
        if self.base is None:
            self.findings.left_out.append(
                "Token shift: this model has no vision-language base, so its proxy is the same model without its sound and its adapter."
            )
        return ShiftTally(self.subject, self.base)


def stated(model: AVLLM, clips: Clips, settings: DiagnoseSettings, split: str, chosen: Chosen) -> dict[str, Any]:
    """Everything that moves scores, and what does not (NEUTRAL), which `compare` ignores."""
    asked = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items() if k != "batch"}
    there = {c: len(clips.select(split, c)) for c in ("factual", "counterfactual")}
    return {
        **asked,
        "subset": (
            f"{len(chosen.factual)} of {there['factual']} factual and {len(chosen.counterfactual)} of {there['counterfactual']} counterfactual clips "
            f"and {len(chosen.grids)} of {sum(g.split == split for g in clips.grids)} grids of the {split} split"
            + "".join(f", {len(found)} {name.replace('_', '-')}" for name, found in chosen.bare.items() if found)
            + ", the first by sha256 of seed and id"
        ),
        "questions": {modality: question(modality) for modality in QUESTIONS},
        **({"plain_text": text_stated()} if settings.language else {}),
        "system_prompt": model.system_prompt,
        "decoding": "greedy",
        "longest_answer": {modality: settings.max_new_tokens * (2 if modality == "both" else 1) for modality in QUESTIONS},
        "wordings": wordings_hash(clips),
        "dtype": str(model.dtype).removeprefix("torch."),
        "processor": _processor(model),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "threads": torch.get_num_threads(),
        "batch_size": settings.batch,
        "clips_folder": str(clips.root),
    }


def wordings_hash(clips: Clips) -> str:
    """sha256 of all that answers are read by: findings that were read by other words are not compared."""
    return hashlib.sha256(json.dumps([clips.labels(), synonyms_of(clips)], sort_keys=True).encode()).hexdigest()


def cut_off_sentences(findings: Findings, limits: Mapping[str, int]) -> list[str]:
    """A warning for each question of whose answers more than MANY_CUT_OFF ended at the token limit. `limits`: question -> tokens."""
    ended: dict[str, list[bool]] = {}
    answers = [(s.modality, s.cut_off) for s in findings.samples] + [(c.modality, c.cut_off) for c in findings.captions if c.modality == "both"]
    for modality, cut_off in answers:
        ended.setdefault(modality, []).append(cut_off)
    told: dict[str, str] = {modality: f"“{question(modality)}”" for modality in QUESTIONS}
    if findings.language:
        ended["plain"], told["plain"] = [a.cut_off for a in findings.language.answers], "the simple questions of plain text"
    return [
        f"{100 * sum(cut) / len(cut):.0f} % of the answers to {told[modality]} ended at the limit of {limits[modality]} tokens "
        "before the model was done, so what it would have named after that counts as not named: raise max_new_tokens "
        "(--max-new-tokens; for training diagnosis.plan, .selection and .test)."
        for modality, cut in ended.items()
        if sum(cut) > MANY_CUT_OFF * len(cut)
    ]


def _processor(model: AVLLM) -> dict[str, Any]:
    """Frame rate, sizes and sampling of the model's own processor."""
    out: dict[str, Any] = {"class": type(model.processor).__name__, "frames_per_second": model.fps}
    for part in ("video_processor", "feature_extractor"):
        values = getattr(model.processor, part).to_dict()
        out[part] = {name: values[name] for name in PROCESSOR_FIELDS if name in values}
    return out
