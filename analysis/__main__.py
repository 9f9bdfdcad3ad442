"""The diagnostics on the command line.

    python -m analysis diagnose --model models/organism/avllm --clips runs/clips --out before.json
    python -m analysis diagnose --model models/organism/avllm --adapter runs/organism/checkpoints/step_000150/adapter \
        --clips runs/clips --out after.json
    python -m analysis compare before.json after.json --out comparison.json
    python -m analysis judge before.json --judge llm --base-url http://localhost:8000/v1 --model my-judge
    python -m analysis report before.json after.json --clips runs/clips --out report.html
    python -m analysis ceiling before.json after.json --model models/organism/avllm --clips runs/clips
    python -m analysis ablate configs/ablations/headline.yaml --out runs/ablations

Input that cannot be used gives one line on stderr and exit code 2; nothing is left half-written. Runs of an ablation that fail give exit code 1.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional, UseAppendAction, arg, subcommand

from analysis.findings import Findings, FindingsError
from analysis.judge_cache import CacheError, ReplyCache
from analysis.judges import MAX_TOKENS, THRESHOLD, EmbeddingJudge, JudgeError, JudgeName, LabelsJudge, LLMJudge
from analysis.settings import DiagnoseSettings, SettingsError
from data.clips import DataError
from data.files import quiet_libraries

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

Split = Literal["train", "plan", "selection", "test", "unseen"]


class UsageError(ValueError):
    """Arguments that do not fit. The message says what to do."""


@dataclass(frozen=True)
class Diagnose:
    """Measure whether a model listens: answers, captions, reliance, attention flow, lenses, probes, knockout, token shift, plain text.

    Killed, the same command goes on where it was. Several processes share the clips: `accelerate launch -m analysis diagnose …` on GPUs,
    `torchrun --nproc_per_node 2 -m analysis diagnose …` on CPU.
    """

    model: str
    """Folder of a checkpoint (or a hub id)."""
    clips: Path
    """Clip folder (`python -m data` builds one)."""
    out: Path
    """The findings file to write."""
    adapter: Path | None = None
    """A PEFT adapter on top of the model."""
    base: str | None = None
    """Vision-language base for token shift; by default the one that the model folder names."""
    split: Split = "test"
    """Which part of the clips."""
    quick: bool = False
    """Only what answers follow, and reliance."""
    device: str = "cpu"
    """Torch device, e.g. cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model. It moves scores, so the findings state it."""
    settings: Annotated[DiagnoseSettings, arg(name="")] = field(default_factory=DiagnoseSettings)

    def run(self, console: Console) -> None:
        """Load, measure, write, show."""
        import torch

        from analysis.diagnose import diagnose
        from analysis.tables import findings_tables
        from data.clips import load_clips
        from models import load_model

        _writable(self.out)
        clips = load_clips(self.clips)
        processes = _processes(self.device)
        device = _device(f"cuda:{processes.local_process_index}" if processes and self.device == "cuda" else self.device)
        model = load_model(self.model, self.adapter, device=device, dtype=getattr(torch, self.dtype), base=self.base)
        work = self.out.with_name(f"{self.out.name}.work")
        if work.is_dir() and (processes is None or processes.is_main_process):
            print(f"Going on with what {work} holds, as far as it fits.", file=sys.stderr)
        findings = diagnose(model, clips, self.settings.answers_only() if self.quick else self.settings, self.split, work=work, processes=processes)
        if processes is not None and not processes.is_main_process:
            return
        findings.save(self.out)
        shutil.rmtree(work, ignore_errors=True)
        console.print(*findings_tables(findings), sep="\n")
        console.print(f"Findings are in {self.out}.")


@dataclass(frozen=True)
class Compare:
    """What changed between two findings of the same clips and settings."""

    before: Positional[Path]
    """Findings before."""
    after: Positional[Path]
    """Findings after."""
    out: Path | None = None
    """Also write the comparison as JSON."""

    def run(self, console: Console) -> None:
        """Load, compare, show, write."""
        from analysis.compare import compare
        from analysis.tables import comparison_tables

        if self.out is not None:
            _writable(self.out)
        before, after = Findings.load(self.before), Findings.load(self.after)
        try:
            comparison = compare(before, after)
        except ValueError as error:
            raise UsageError(f"{self.before} and {self.after}: {error}") from None
        if self.out is not None:
            comparison.save(self.out)
        console.print(*comparison_tables(comparison), sep="\n")


@dataclass(frozen=True)
class Report:
    """One static page from one or more findings, in order of time, with clips to play."""

    findings: Positional[tuple[Path, ...]]
    """Findings files, oldest first."""
    clips: Path
    """The clip folder that they were measured on."""
    out: Path
    """The page to write."""
    names: tuple[str, ...] | None = None
    """What to call each of the findings; by default the file's name, with the folders in which equal names differ."""
    plan: Path | None = None
    """plan.json of a training run."""
    figure: Path | None = None
    """Also write the page's first figure on its own, as SVG."""

    def run(self, console: Console) -> None:
        """Load, draw, write."""
        from analysis.compare import compare, differences
        from analysis.report import headline_figure, write_report

        _writable(self.out)
        if self.figure is not None and self.figure.suffix != ".svg":
            raise UsageError(f"{self.figure}: the figure is an SVG; name a file that ends in .svg.")
        if not self.findings:
            raise UsageError("report needs at least one findings file; `python -m analysis diagnose` writes one.")
        names = self.names or _told_apart(self.findings)
        if len(names) != len(self.findings):
            raise UsageError(f"--names gives {len(names)} names for {len(self.findings)} findings.")
        loaded = [Findings.load(path) for path in self.findings]
        plan = None
        if self.plan is not None:
            try:
                plan = json.loads(self.plan.read_text())
            except ValueError as error:
                raise UsageError(f"{self.plan} is not JSON ({error}).") from None
        ends = (loaded[0], loaded[-1])
        comparison = compare(*ends) if len(loaded) > 1 and not differences(*ends) else None
        write_report(self.out, list(zip(names, loaded, strict=True)), self.clips, plan, comparison)
        console.print(f"The page is in {self.out}.")
        if self.figure is not None:
            _writable(self.figure)
            headline_figure(self.figure, list(zip(names, loaded, strict=True)))
            console.print(f"The figure is in {self.figure}.")


@dataclass(frozen=True)
class Judge:
    """Have a judge read the captions of findings, without the model: its scores go beside those of other judges.

    An `llm` judge sends question, caption and the clip's labels to --base-url, with the key of OPENAI_API_KEY. Its replies are kept in --cache as
    they come: stopped, the same command goes on where it was.
    """

    findings: Positional[Path]
    """Findings with captions (`python -m analysis diagnose` writes them)."""
    judge: JudgeName = "labels"
    """labels: words and synonyms. embedding: a sentence-embedding model. llm: any OpenAI-compatible endpoint."""
    model: str | None = None
    """embedding: folder or hub id, weights in safetensors. llm: the model's name at the endpoint."""
    out: Path | None = None
    """Where to write; by default the findings file itself is replaced."""
    threshold: float = THRESHOLD
    """embedding: cosine from which a clause names a label. The default is for all-MiniLM-L6-v2."""
    base_url: str | None = None
    """llm: the endpoint, e.g. http://localhost:8000/v1."""
    cache: Path | None = None
    """llm: file of replies; by default beside the findings, with the ending .replies.jsonl."""
    in_flight: int = 8
    """llm: requests at a time."""
    timeout: float = 60.0
    """llm: seconds to wait for a reply."""
    retries: int = 6
    """llm: further attempts after time-outs, rate limits and errors of the server, with growing pauses."""
    max_tokens: int = MAX_TOKENS
    """llm: longest reply, thinking included."""

    def run(self, console: Console) -> None:
        """Load, judge, write, show."""
        from analysis.fidelity import add_scores, agreement
        from analysis.tables import agreement_table, fidelity_table

        out = self.out or self.findings
        _writable(out)
        unread, at_zero = None, True
        given = ((self.in_flight, "in-flight"), (self.timeout, "timeout"), (self.retries + 1, "retries"), (self.max_tokens, "max-tokens"))
        for value, name in given:
            if value <= 0:
                raise UsageError(f"--{name} is too small: it has to be {'0 or more' if name == 'retries' else 'above 0'}.")
        findings = Findings.load(self.findings)
        try:
            if self.judge == "labels":
                add_scores(findings, LabelsJudge(findings.labels, findings.synonyms or None))
            elif self.judge == "embedding":
                if self.model is None:
                    raise UsageError("--judge embedding needs --model: the folder or hub id of a sentence-embedding model.")
                add_scores(findings, EmbeddingJudge(self.model, findings.labels, self.threshold))
            else:
                if self.model is None or self.base_url is None:
                    raise UsageError("--judge llm needs --base-url and --model: an OpenAI-compatible endpoint and a model that it serves.")
                with ReplyCache(self.cache or self.findings.with_suffix(".replies.jsonl")) as cache:
                    judge = LLMJudge(self.base_url, self.model, cache, self.in_flight, self.timeout, self.retries, self.max_tokens)
                    add_scores(findings, judge)
                    unread, at_zero = judge.unread(), judge.at_zero
        except JudgeError as error:
            raise UsageError(f"{self.findings}: {error}") from None
        findings.save(out)
        console.print(fidelity_table(findings.fidelity), agreement_table(agreement(findings.captions)), sep="\n")
        if not at_zero:
            console.print(f"{self.base_url} refuses temperature 0 and was asked at its own: another run may score differently.")
        if unread is not None:
            console.print(f"Some replies could not be read: {unread}")
        console.print(f"Findings are in {out}.")


@dataclass(frozen=True)
class Ceiling:
    """What a linear probe reads of sound and picture before the decoder, on the test split and on new sources, and how near to that the answers come.

    The probe is fitted on the factual clips of the train split. Adapters leave towers alone, so one ceiling serves for before and after.
    """

    findings: Positional[tuple[Path, ...]]
    """Findings of this model, with or without an adapter, on the test split of these clips; may be left out."""
    model: str
    """Folder of a checkpoint (or a hub id)."""
    clips: Path
    """Clip folder."""
    out: Path | None = None
    """Also write it as JSON."""
    device: str = "cpu"
    """Torch device, e.g. cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""

    def run(self, console: Console) -> None:
        """Probe, show, write."""
        import torch

        from analysis.ceiling import ceiling_table, ceilings, save
        from data.clips import load_clips
        from models import load_model

        if self.out is not None:
            _writable(self.out)
        clips = load_clips(self.clips)
        loaded = []
        for path in self.findings:
            found = Findings.load(path)
            if found.data_hash != clips.hash_of("test") or found.split != "test":
                raise UsageError(f"{path} was measured on other clips than the test split of {self.clips}.")
            if Path(found.model).resolve() != Path(self.model).resolve():
                raise UsageError(f"{path} is of {found.model}, not of {self.model}, whose towers may let other things through.")
            loaded.append(found)
        named = list(zip(_told_apart(self.findings), loaded, strict=True))
        rows = ceilings(load_model(self.model, device=_device(self.device), dtype=getattr(torch, self.dtype)), clips)
        if self.out is not None:
            save(self.out, rows, named, clips)
        console.print(ceiling_table(rows, named, clips))


@dataclass(frozen=True)
class Ablate:
    """Train every arm of a set with every seed, each as its own `accelerate launch`, and compare the arms clip by clip.

    What is done is not run again and what was stopped goes on, so the same command can be given as often as needed. analysis/ablate.py says
    what a set looks like.
    """

    sets: Positional[tuple[Path, ...]]
    """YAML files; the ready-made ones are in configs/ablations/."""
    out: Path = Path("runs/ablations")
    """Folder of the runs and of ablation.json, ablation.md and ablation.html."""
    jobs: int = 1
    """Runs at a time; the cores are shared out among them."""
    seeds: tuple[int, ...] | None = None
    """Instead of the seeds that the sets name."""
    arms: tuple[str, ...] | None = None
    """Only these arms."""
    overrides: UseAppendAction[Annotated[tuple[tuple[str, ...], ...], arg(name="set")]] = ()
    """key=value settings of training for all arms, e.g. schedule.steps=200; can be given several times. What an arm sets itself stays."""
    accelerate_config: Path | None = None
    """Config file for `accelerate launch`, e.g. accelerate_config.yaml. By default one process a run."""
    publish: Path | None = None
    """Copy settings, losses and findings of the runs that are done to this folder, small enough for git: no weights, no media, relative paths."""

    def run(self, console: Console) -> None:
        """Read the sets, run what is missing, compare, write, show."""
        from analysis.ablate import check_settings, is_done, load_set, plan_jobs, run_jobs
        from analysis.ablation import Ablation, compare_arms, read_run
        from analysis.ablation_report import ablation_tables, markdown, write_page
        from analysis.publish import publish
        from data.files import write_text

        if not self.sets:
            raise UsageError("ablate needs at least one set; the ready-made ones are in configs/ablations/.")
        if self.jobs < 1:
            raise UsageError(f"--jobs {self.jobs}: at least 1 run at a time.")
        if self.accelerate_config is not None and not self.accelerate_config.is_file():
            raise UsageError(f"--accelerate-config {self.accelerate_config} is no file.")
        if self.publish is not None and self.publish.resolve() == self.out.resolve():
            raise UsageError(f"--publish {self.publish} is --out itself. Give another folder.")
        sets = [load_set(path, [text for given in self.overrides for text in given], self.seeds, self.arms) for path in self.sets]
        if missing := sorted(set(self.arms or ()) - {arm.name for one in sets for arm in one.arms}):
            raise UsageError(f"--arms {missing[0]}: none of the sets has such an arm.")
        for one in sets:
            check_settings(one)
        _writable(self.out / "ablation.json")
        jobs = plan_jobs(sets, self.out)
        run_jobs(list(jobs.values()), self.out, self.jobs, self.accelerate_config)
        ablation = Ablation()
        for one in sets:
            runs, left_out = {}, []
            for recipe in one.arms:
                of_arm = [jobs[recipe.key, seed] for seed in one.seeds]
                runs[recipe.name] = [read_run(job.folder, job.seed) for job in of_arm if not job.problem]
                if failed := [str(job.seed) for job in of_arm if job.problem]:
                    left_out.append(f"{recipe.name} failed with seed {', '.join(failed)}: no result of it is in these numbers.")
            described = {recipe.name: (recipe.description, recipe.changes) for recipe in one.arms}
            ablation.sets.append(compare_arms(one.title, one.notes, one.reference, described, runs, left_out))
        ablation.save(self.out / "ablation.json")
        write_text(self.out / "ablation.md", markdown(ablation))
        write_page(self.out / "ablation.html", ablation)
        console.print(*ablation_tables(ablation), sep="\n")
        console.print(f"The page is in {self.out / 'ablation.html'}.")
        if self.publish is not None:
            publish([job.folder for job in jobs.values() if is_done(job)], self.out, self.publish)
        if problems := [f"{job.name}: {job.problem}" for job in jobs.values() if job.problem]:
            raise FailedRuns(f"{len(problems)} of {len(jobs)} runs failed. The same command tries them again.\n" + "\n".join(problems))


class FailedRuns(RuntimeError):
    """Some runs of an ablation failed; the others are done and compared."""


Command = (
    Annotated[Diagnose, subcommand("diagnose")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Judge, subcommand("judge")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Ceiling, subcommand("ceiling")]
    | Annotated[Ablate, subcommand("ablate")]
)


def _processes(device: str) -> PartialState | None:
    """The processes that `torchrun` or `accelerate launch` started, or None for this one alone. Raises UsageError where they cannot talk."""
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted == 1:
        return None
    from accelerate import PartialState

    processes = PartialState(cpu=not device.startswith("cuda"))
    if processes.num_processes != wanted:
        raise UsageError(
            f"{wanted} processes were started, but accelerate counts {processes.num_processes}, so each would measure everything. "
            f"On CPU start them with `torchrun --nproc_per_node {wanted} -m analysis diagnose …`."
        )
    return processes


def _device(name: str) -> torch.device:
    """The torch device of this name. Raises UsageError where it cannot be used."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _told_apart(paths: Sequence[Path]) -> tuple[str, ...]:
    """Names of files: without ending and, where these are equal, with the parts of their folders in which they differ."""
    parts = [path.with_suffix("").parts for path in paths]
    places = [at for at in range(min(map(len, parts), default=0), 0, -1) if at == 1 or len({part[-at] for part in parts}) > 1]
    short = tuple("/".join(part[-at] for at in places) for part in parts)
    stems = tuple(path.stem for path in paths)
    return stems if len(set(stems)) == len(paths) else short if len(set(short)) == len(paths) else tuple(map(str, paths))


def _writable(path: Path) -> None:
    """Refuse an output path before minutes are spent on what would go there."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; --out is the file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path.parent} cannot be written to. Choose another place with --out.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 2 for input that cannot be used, 1 for runs of an ablation that failed, 130 where it was interrupted."""
    quiet_libraries()
    try:
        command = tyro.cli(Command, args=arguments, prog="python -m analysis", description=__doc__)  # type: ignore[arg-type]
        command.run(Console())
    except FailedRuns as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where it was.", file=sys.stderr)
        return 130
    except (DataError, FindingsError, SettingsError, CacheError, UsageError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (ValueError, RuntimeError) as error:
        from models import CutError, ModelError  # not above: it takes seconds, and judge, compare and report need no model

        if not isinstance(error, CutError | ModelError):
            raise
        message = str(error)
    else:
        return 0
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
