"""Ablations: the numbers by hand, sets as they are read, and real runs that are killed and taken up again."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import analysis.ablate
from analysis.__main__ import main
from analysis.ablate import AblateError, flat, is_done, load_set, nested, plan_jobs, run_jobs
from analysis.ablation import Ablation, Run, compare_arms
from analysis.ablation_report import ablation_tables, charts, markdown, write_page
from analysis.findings import CaptionFidelity, Estimate, Findings, Sources
from analysis.items import ItemStore, Key
from analysis.statistics import Dyads
from data.build import build
from models.tiny import build_tiny
from tests.train.conftest import BUILD
from train.config import Config, load_yaml

SETS = sorted(Path("configs/ablations").glob("*.yaml"))
SMOLOMNI = Path("configs/ablations/smolomni/arms.yaml")  # apart: these need a model that has to be built first
NAMES = ["c0", "c1", "c2", "c3"]
ALL, NONE = "1111", "0000"


def found(hear=ALL, see=ALL, hear_factual=ALL, see_factual=ALL, sound=None, picture=None, captions=None, names=NAMES, nothing=None, **changes):
    """Findings that keep these answers ("1": right) of four conflicts and four factual clips; each clip has sources of its own."""
    store = ItemStore()
    for condition, answers in (("counterfactual", {"hear": hear, "see": see}), ("factual", {"hear": hear_factual, "see": see_factual})):
        ids = [f"{condition} {name}" for name in names]
        for question, right in answers.items():
            group = store.of(ids, ([f"picture of {i}" for i in ids], [f"recording of {i}" for i in ids]))
            group.keep(Key("following", condition, question, "", "correct"), [int(r) for r in right])
    for (condition, question), said in (nothing or {}).items():
        ids = [f"{condition} {name}" for name in names]
        sides = ([f"picture of {i}" for i in ids], [f"recording of {i}" for i in ids])
        sources = {"muted": sides[0], "near_silent": sides[0], "blanked": sides[1], "near_black": sides[1]}.get(condition, sides)
        store.of(ids, sources).keep(Key("following", condition, question, "", "nothing"), [int(s) for s in said])
    if sound:
        grids = store.of(["g0", "g1", "g2"], Dyads(["a", "c", "e"], ["b", "d", "f"]))
        for measure, values in (("effect_audio", sound), ("effect_video", picture)):
            grids.keep(Key("reliance", None, "hear", "", measure), values)
    made = Findings("m", None, None, "test", "clips", 2, {"seed": 0})
    if captions:
        store.of(NAMES, (NAMES, NAMES)).keep(Key("captions", "counterfactual", "both", "labels judge, no cut", "audio"), captions)
        nobody = Estimate(0.0, None, None, 4, 4)
        made.fidelity = [CaptionFidelity("labels", "counterfactual", "both", None, nobody, None, nobody, nobody)]
    made.items = store.saved()
    return dataclasses.replace(made, **changes)


def run(after, seed=0, before=None, minutes=2.0, code=("a",), weights=""):
    return Run(seed, f"runs/x/seed_{seed}", before or found(hear=NONE), after, minutes, 1000, "step_000002", code, weights)


def compared(**runs):
    return compare_arms("t", "", "plan", {name: (f"what {name} does", {"loss.mirror": 0}) for name in runs}, runs)


def test_differences_pair_clips_and_pool_seeds():
    """Per clip, mean over seeds: other 1 ½ 0 1, plan 0 ½ 0 1; so differences 1 0 0 0: mean ¼, standard error ½ / √4, t with 3 degrees 3.18245."""
    result = compared(plan=[run(found("0101"), 0), run(found("0001"), 1)], other=[run(found("1101"), 0), run(found("1001"), 1)])
    plan, other = (row.measures["hear_conflicts"] for row in result.arms)
    assert plan.difference is None and plan.seeds == [0.5, 0.25] and other.seeds == [0.75, 0.5]
    assert other.estimate.value == 0.625 and other.spread == pytest.approx(0.25 / 2**0.5)
    difference = other.difference
    assert (difference.value, difference.n, difference.clusters) == (0.25, 4, 4)
    assert (difference.low, difference.high) == pytest.approx((0.25 - 3.18245 / 4, 0.25 + 3.18245 / 4), abs=1e-4)
    assert other.gain.value == 0.625 and result.before.measures["hear_conflicts"].estimate.value == 0.0
    assert [row.minutes for row in result.arms] == [[2.0, 2.0]] * 2 and result.arms[0].parameters == 1000


def test_pairs_are_the_same_clips_whatever_their_order():
    turned = found("1011", names=NAMES[::-1])  # c0 right, c1 right, c2 wrong, c3 right
    result = compared(plan=[run(found("1101"))], other=[run(turned)])
    assert result.arms[1].measures["hear_conflicts"].difference.value == 0.0
    differ = compared(plan=[run(found("1101"))], other=[run(found("1011"))]).arms[1].measures["hear_conflicts"].difference
    assert differ.value == 0.0 and differ.high > 0.5  # the means agree, the clips do not


def test_worst_of_takes_the_lowest_rate_of_each_run():
    """Seed 0: see-questions on conflicts, ¼; seed 1: factual hear-questions, ½; the mean is 3/8. The plan's: ¾ (hear on conflicts)."""
    other = [run(found("1110", "1000", ALL, ALL), 0), run(found(ALL, ALL, "1100", ALL), 1)]
    result = compared(plan=[run(found("1110"))], other=other)
    worst, factual = result.arms[1].measures["worst"], result.arms[1].measures["factual"]
    assert worst.seeds == [0.25, 0.5] and worst.estimate.value == 0.375 and worst.difference.value == -0.375
    assert factual.seeds == [1.0, 0.5] and factual.gain.value == -0.25
    assert 0.0 <= worst.estimate.low < 0.375 < worst.estimate.high <= 1.0
    # Seed 1 alone: 1 1 0 0 with mean ½, and three blocks that add nothing. Σ e² / n² of four clips is 1/16: standard error a little over ¼.
    alone = compared(plan=[run(found())], other=[other[1]]).arms[1].measures["worst"].difference
    assert alone.value == -0.5 and alone.n == 16
    assert 0.25 * 2.13 < (alone.high - alone.low) / 2 < 0.29 * 3.19  # t of 15 and of 3 degrees


def test_shortcut_index_and_captions():
    """Sound 3, picture 1: ¼; sound 1, picture 1: ½."""
    plan = [run(found(sound=[3.0, 3.0, 3.0], picture=[1.0, 0.5, 1.5], captions=[1, 0.5, 0, 0]))]
    other = [run(found(sound=[1.0, 0.5, 1.5], picture=[1.0, 1.5, 0.5], captions=[1, 1, 1, 0]))]
    result = compared(plan=plan, other=other)
    first, second = (row.measures["shortcut"] for row in result.arms)
    assert first.estimate.value == 0.25 and second.estimate.value == 0.5 and second.difference.value == pytest.approx(0.25)
    assert result.arms[1].measures["caption_sound"].difference.value == pytest.approx(0.375)
    assert "abstains" not in result.arms[0].measures and "caption_picture" not in result.arms[0].measures


def test_unseen_sources_are_measures_where_they_were_asked_about():
    """Two of three conflicts of new recordings are right. What the clips share with the train split stands beside the table."""

    def with_new(right, **changes):
        made = found(**changes)
        store = ItemStore()
        group = store.of(["u0", "u1", "u2"], (["p0", "p1", "p2"], ["r0", "r1", "r2"]))
        group.keep(Key("following", "unseen_counterfactual", "hear", "", "correct"), right)
        made.items += store.saved()
        made.sources = [Sources("test", 3, 3, 4, 4, 9), Sources("unseen", 0, 3, 2, 5, 9)]
        return made

    result = compared(plan=[run(with_new([1, 1, 0]), before=with_new([0, 0, 0], hear=NONE))], other=[run(found())])
    assert result.arms[0].measures["hear_new"].estimate.value == pytest.approx(2 / 3) and result.before.measures["hear_new"].estimate.value == 0
    assert "see_new" not in result.arms[0].measures and "hear_new" not in result.arms[1].measures
    assert result.left_out[1] == "Unseen split: 0 of 3 pictures and 2 of 5 recordings are in the train split too, in other renderings."
    assert "| unseen, hear |" in markdown(Ablation([result])) and result.left_out[0] in markdown(Ablation([result]))


EMPTY = (("muted", "hear"), ("near_silent", "hear"), ("blanked", "see"), ("near_black", "see"))


@pytest.mark.parametrize("lowest", EMPTY)
def test_abstention_is_the_lowest_over_kinds_of_emptiness(lowest):
    """Half of one kind, three quarters or all of the others. See-questions about muted clips and hear-questions about blanked ones do not count."""
    said = dict(zip(EMPTY, ("1110", ALL, ALL, "1110"), strict=True)) | {("muted", "see"): NONE, ("blanked", "hear"): NONE, lowest: "1100"}
    after, before = found(nothing=said), found(hear=NONE, nothing=dict.fromkeys(said, NONE))
    row = compared(plan=[run(after, before=before)]).arms[0]
    assert row.measures["abstains"].estimate.value == 0.5 and row.measures["abstains"].gain.value == 0.5
    fewer = compared(plan=[run(after, before=before), run(found(nothing={("muted", "hear"): ALL}), 1)]).arms[0]
    assert "abstains" not in fewer.measures  # one seed has not measured all kinds


def test_a_lowest_of_is_no_surer_than_one_of_its_rates():
    """All right everywhere: as wide as four clips of one kind, not as sixteen; so is the difference of two such arms."""
    full, one = found(nothing=dict.fromkeys(EMPTY, ALL)), found(nothing={EMPTY[0]: ALL})
    many, few = (compared(plan=[run(f)], other=[run(f)]).arms[1].measures["abstains"] for f in (full, one))
    assert many.estimate.n == 4 and many.estimate.low == few.estimate.low < 0.6 and many.estimate.high == 1.0
    assert (many.difference.low, many.difference.high) == (few.difference.low, few.difference.high) and many.difference.low < -0.4


def test_false_abstention_counts_on_conflicts():
    said = {("counterfactual", "hear"): "1000", ("counterfactual", "see"): ALL, ("factual", "hear"): ALL}
    assert compared(plan=[run(found(nothing=said))]).arms[0].measures["false_abstention"].estimate.value == 0.25


def test_what_cannot_be_compared_is_said():
    elsewhere = run(found("1111", data_hash="other clips"))
    result = compared(plan=[run(found("0101"))], other=[elsewhere])
    assert result.arms[1].measures["hear_conflicts"].difference is None and result.arms[1].measures["hear_conflicts"].gain is None
    assert "other was not measured like the first arm (data_hash" in result.left_out[0]
    unlike = compared(plan=[run(found(), 0), run(found(), 1)], other=[run(found(), 0)])
    assert unlike.left_out == ["other has seeds 0, plan 0, 1: they are compared all the same."]
    newer = compared(plan=[run(found(), 0), run(found(), 1, code=("a", "b"))], other=[run(found(), 0), run(found(), 1)])
    assert newer.left_out == ["Not all runs were made by the same code; other than most: plan seed 1. Delete them and they are run again."]
    retrained = compared(plan=[run(found(), weights="old")], other=[run(found(), weights="new")], older=[run(found())])
    assert retrained.left_out == ["other was not measured like the first arm (seed 0 began with other weights), so it is not compared with others."]
    assert [row.measures["hear_conflicts"].difference is None for row in retrained.arms] == [True, True, False]
    mixed = compared(plan=[run(found(), 0, weights="new"), run(found(), 1, weights="old")], other=[run(found(), 0, weights="new")])
    assert mixed.arms[1].measures["hear_conflicts"].difference is None and "plan was not measured like" in mixed.left_out[0]
    result = compare_arms("t", "", "plan", {"plan": ("", {}), "other": ("", {})}, {"other": [run(found())]})
    assert [row.arm for row in result.arms] == ["other"] and "No run of the reference arm plan" in result.left_out[0]


def test_files(tmp_path):
    """The JSON comes back as it was; the chart is well-formed and has both arms; texts are escaped."""
    result = compared(plan=[run(found("0101"), 0), run(found("0001"), 1)], **{"<b>other</b>": [run(found("1101"), 0)]})
    ablation = Ablation([result])
    ablation.save(tmp_path / "ablation.json")
    assert Ablation.load(tmp_path / "ablation.json") == ablation
    for caption, drawing in charts(result):
        svg = ElementTree.fromstring(str(drawing.svg()).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
        big = [c for c in svg.iter("{http://www.w3.org/2000/svg}circle") if c.get("r") == "4.5"]
        assert caption and len(big) == 2 and len([c for c in svg.iter("{http://www.w3.org/2000/svg}circle") if c.get("r") == "2"]) == 2
    write_page(tmp_path / "page.html", ablation)
    page = (tmp_path / "page.html").read_text()
    assert "<b>other" not in page and "75.0 %" in page and "://" not in page
    text = markdown(ablation)
    assert "| before | 0.0 % | – | 0.0 % | – |" in text and "| plan | 37.5 % ± 17.7 | – | 37.5 % ± 17.7 | – |" in text
    assert len(ablation_tables(ablation)) == 1


# ---------------------------------------------------------------- sets


def test_ready_made_sets_fit_the_training_configuration(tmp_path):
    """Every arm of every set is a configuration that training takes, and the default arm is one run, whatever set it is in."""
    assert [path.stem for path in SETS] == ["data", "dose", "headline", "layers", "rank", "regularisers", "teachers"]
    sets = [load_set(path) for path in [*SETS, SMOLOMNI]]
    for one in sets:
        assert one.seeds == (0, 1, 2) and len({arm.key for arm in one.arms}) == len(one.arms)
        for arm in one.arms:
            path = tmp_path / "arm.yaml"
            path.write_text(yaml.safe_dump(nested(arm.settings)))
            load_yaml(path)
    keys = {(one.path.stem, arm.name): arm.key for one in sets for arm in one.arms}
    same = [("headline", "plan"), ("layers", "plan"), ("regularisers", "plan"), ("data", "grids"), ("rank", "r16"), ("dose", "all")]
    assert len({keys[at] for at in same}) == 1
    assert keys["headline", "label_free"] == keys["teachers", "cut"] == keys["data", "factual_no_labels"]
    assert len(plan_jobs(sets, tmp_path)) == 3 * len(set(keys.values()))


def test_a_baseline_has_no_term_that_the_plan_would_add():
    """None means that the plan decides: a term that an arm is without has to be 0."""
    arm = next(arm for arm in load_set(Path("configs/ablations/headline.yaml")).arms if arm.name == "matched_sft")
    terms = {key for key, value in flat(dataclasses.asdict(Config())["loss"]).items() if value is None and not key.endswith("_cut")}
    assert {key for key in terms if arm.settings[f"loss.{key}"] == 0} == terms - {"counterfactual_ce"}
    arms = {arm.name: arm.settings for arm in load_set(SMOLOMNI).arms}
    published = [settings for name, settings in arms.items() if name not in ("plan", "label_free", "sft_regularised")]
    assert len(published) == 5 and all(settings["data.bare"] == 0 for settings in published)  # the base sets it
    plain, kept = arms["counterfactual_sft"], arms["sft_regularised"]
    given = {"data.bare": 2, "loss.abstention": 0.4, "loss.text_retention": 2}  # what the plan's runs have (their plan.json)
    assert {key: kept[key] for key in kept if kept[key] != plain[key]} == given


def a_set(tmp_path, **changes):
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"lora": {"r": 4}, "run": {"folder": "elsewhere"}}))
    said = {"base": str(base), "reference": "a", "arms": {"a": None, "b": {"set": {"lora.r": 8}}}} | changes
    path = tmp_path / "set.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def test_settings_come_one_on_top_of_the_other(tmp_path):
    path = a_set(tmp_path, common={"lora": {"alpha": 8}, "schedule.steps": 5})
    one = load_set(path, ["schedule.steps=2", "lora.r=6"], seeds=[7])
    assert [arm.settings for arm in one.arms] == [{"lora.r": r, "lora.alpha": 8, "schedule.steps": 2} for r in (6, 8)]
    assert one.seeds == (7,) and nested(one.arms[1].settings)["lora"] == {"r": 8, "alpha": 8}
    assert [arm.name for arm in load_set(path, only=["b"]).arms] == ["b"]
    assert load_set(path, ["loss={mirror: 0}"]).arms[0].settings["loss.mirror"] == 0
    with pytest.raises(AblateError, match="cannot be read as YAML"):
        load_set(path, ["a=[1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "c"}, "reference 'c' is none of its arms"),
        ({"armz": {}}, "unknown key 'armz'"),
        ({"base": "no/such.yaml"}, "base no/such.yaml is no file"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"arms": {"a": {"sets": {}}}}, "unknown key 'sets'"),
        ({"arms": {"a": {"set": {"run.folder": "x"}}}}, "sets run.folder"),
        ({"arms": {"a": {"set": [1]}}}, "arms.a.set should hold"),
        ({"common": [1]}, "common should hold"),
        ({"base": ["x"]}, "base is .* but should be text"),
        ({"seeds": 3}, "different whole numbers"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(AblateError, match=message):
        load_set(a_set(tmp_path, **changes))


def test_the_command_line_refuses(tmp_path, capsys):
    path = str(a_set(tmp_path))
    for flags, message in (
        (["--set", "lora.r"], "write key=value"),
        (["--set", "lora.r", "--set", "lora.alpha=8"], "write key=value"),  # a second --set adds to the first
        (["--set", "nonsense=1"], "arm a: unknown key 'nonsense'"),
        (["--set", "lora.rr=1"], "arm a: unknown key 'lora.rr'; did you mean 'r'?"),
        (["--set", "schedule.steps=many"], "arm a: schedule.steps should be int"),
        (["--set", "diagnosis.plan.factual=-3"], "arm a: diagnosis.plan: factual is -3"),
        (["--seeds", "-1"], "run.seed is -1"),
        (["--jobs", "0"], "--jobs 0"),
        (["--arms", "z"], "--arms z"),
        (["--publish", str(tmp_path / "out")], "--out itself"),
    ):
        assert main(["ablate", path, "--out", str(tmp_path / "out"), *flags]) == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------- processes


def two_jobs(tmp_path):
    return list(plan_jobs([load_set(a_set(tmp_path))], tmp_path / "out").values())


def started_by(code):
    """What stands in for training: a process that does `code`, started by another as `accelerate launch` does."""
    outer = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]]).returncode)"
    return lambda config, accelerate_config: [sys.executable, "-c", outer, code, str(config)]


def those_that_name(text):
    """Processes with this text in their command line, this one aside."""
    pids = [p.parent.name for p in Path("/proc").glob("[0-9]*/cmdline") if p.parent.name != str(os.getpid())]
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            found += [int(pid)] if str(text).encode() in Path(f"/proc/{pid}/cmdline").read_bytes() else []
    return found


def when(there, then):
    """Do `then` in a thread as soon as `there()` is true."""

    def wait():
        deadline = time.monotonic() + 120
        while not there() and time.monotonic() < deadline:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_failed_run_is_reported_and_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analysis.ablate, "command", started_by("import sys; print('step 1'); print('error: no such model'); sys.exit(3)"))
    jobs = two_jobs(tmp_path)
    run_jobs(jobs, tmp_path / "out")
    assert all("exit code 3" in job.problem and "error: no such model" in job.problem and str(job.output) in job.problem for job in jobs)
    settings = [flat(yaml.safe_load(job.config.read_text())) for job in jobs]
    assert [s["lora.r"] for s in settings] == [4, 8] and settings[0]["run.diagnoses"] == str(tmp_path / "out" / "diagnoses")
    assert [s["run.folder"] for s in settings] == [str(job.folder) for job in jobs]


def test_sigterm_ends_all_that_was_started(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis.ablate, "command", started_by("import time; time.sleep(600)"))
    monkeypatch.setattr(analysis.ablate, "_may_start", lambda *_: True)
    jobs = two_jobs(tmp_path)
    thread = when(lambda: len(those_that_name(tmp_path / "out")) == 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, tmp_path / "out", at_once=2)
    thread.join()
    assert not those_that_name(tmp_path / "out")


def test_runs_wait_while_another_makes_the_diagnoses_they_share(tmp_path):
    first, second, third = jobs = [*two_jobs(tmp_path), dataclasses.replace(two_jobs(tmp_path)[0], folder=tmp_path / "third")]
    assert analysis.ablate._may_start(second, [], jobs)
    for name in ("plan", "before", "selection"):
        assert not analysis.ablate._may_start(second, [first], jobs)
        (first.folder / "findings").mkdir(parents=True, exist_ok=True)
        (first.folder / "findings" / f"{name}.json").write_text("{}")
    assert analysis.ablate._may_start(second, [first], jobs)
    assert analysis.ablate._may_start(third, [second], jobs)  # made by the first, so nobody waits while the second reads its clips
    other = dataclasses.replace(third, arm=dataclasses.replace(third.arm, settings=third.arm.settings | {"model.path": "another"}))
    assert not analysis.ablate._may_start(other, [more := dataclasses.replace(other, seed=9)], [*jobs, more])


def test_a_run_that_a_killed_call_left_behind_is_not_started_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis.ablate, "command", started_by("import time; time.sleep(600)"))
    job, again = two_jobs(tmp_path)[0], two_jobs(tmp_path)[0]
    assert analysis.ablate._start(job, tmp_path / "out", 1, None)
    assert not analysis.ablate._start(again, tmp_path / "out", 1, None) and again.process is None
    deadline = time.monotonic() + 60
    while len(those_that_name(job.config)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(job.process.pid, signal.SIGKILL)  # what it started lives on, and holds the log
    job.process.wait()
    assert not analysis.ablate._start(again, tmp_path / "out", 1, None)
    os.killpg(job.process.pid, signal.SIGKILL)
    while not analysis.ablate._start(again, tmp_path / "out", 1, None):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    analysis.ablate._end([again])


# ---------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory):
    """Two arms of two steps with a tiny random model."""
    folder = tmp_path_factory.mktemp("ablation")
    clips = build(BUILD, folder / "clips", progress=False)
    model = build_tiny(folder / "tiny", seed=0, layers=2, hidden=64)
    few = {"counterfactual": 4, "factual": 4, "grids": 2, "max_new_tokens": 4, "flips": 10, "knockout": 0, "knockout_factual": 0}
    settings = {
        "model": {"path": str(model)},
        "data": {"clips": str(clips.root), "build": json.loads(json.dumps(dataclasses.asdict(BUILD)))},
        "lora": {"r": 2, "alpha": 4, "layers": [0, 1], "projections": ["q_proj"]},
        "loss": {"require_bias": False, "distillation": 0, "mirror": 0, "states": 0, "retention": 0},
        "schedule": {"steps": 2, "grids": 1, "checkpoint_every": 1},
        "diagnosis": {
            "plan": few,
            "selection": few,
            "test": few | {"alone": 0, "unseen": 0, "flow": False, "lens": False, "probes": False, "shift": 0, "captions": 0},
        },
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    arms = {"plan": None, "fast lane": {"set": {"schedule.lr": "1e-2"}}}
    (folder / "set.yaml").write_text(
        yaml.safe_dump({"title": "T", "base": str(folder / "base.yaml"), "reference": "plan", "arms": arms}, sort_keys=False)
    )
    return folder


def test_killed_and_started_again(tiny_set, capsys, monkeypatch):
    """A run is hit by SIGKILL after its first step. The same command with both arms ends it too, and once more it starts nothing."""
    out = tiny_set / "out"
    line = ["ablate", str(tiny_set / "set.yaml"), "--out", str(out), "--jobs", "2", "--set", "run.threads=1"]

    def kill():
        trains = [pid for pid in those_that_name(out) if b"launch" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(min(trains), signal.SIGKILL)

    thread = when(lambda: (m := list(out.glob("runs/plan_*/seed_0/metrics.jsonl"))) and m[0].stat().st_size, kill)
    assert main([*line, "--arms", "plan"]) == 1
    thread.join()
    shown = capsys.readouterr()
    assert "1 of 1 runs failed" in shown.err and "plan failed with seed 0" in " ".join(shown.out.split())
    (one,) = Ablation.load(out / "ablation.json").sets
    assert one.arms == [] and one.before is None and "No run is done yet" in (out / "ablation.html").read_text()

    assert main(line) == 0
    assert "fast lane" in capsys.readouterr().out
    (one,) = Ablation.load(out / "ablation.json").sets
    assert [row.arm for row in one.arms] == ["plan", "fast lane"] and one.before is not None and all("train split too" in s for s in one.left_out)
    plan, fast = one.arms
    assert plan.seeds == fast.seeds == [0] and plan.parameters == fast.parameters and plan.checkpoints[0].startswith("step_00000")
    assert fast.measures["hear_conflicts"].difference.n == 4 and len(plan.minutes) == 1
    assert (out / "ablation.md").is_file() and (out / "ablation.html").is_file()
    jobs = plan_jobs([load_set(tiny_set / "set.yaml", ["run.threads=1"])], out)
    assert all(is_done(job) for job in jobs.values())
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("runs/**/*") if p.is_file()}
    assert main(line) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/**/*") if p.is_file()} == stamps

    published, copy = tiny_set / "published", tiny_set / "copy"
    assert main([*line, "--publish", str(published)]) == 0
    assert not list(published.rglob("*.safetensors")) and not list(published.rglob("*.html"))
    (before,) = {p.resolve() for p in published.glob("runs/*/*/findings/before.json")}  # once, though there are two runs
    assert before.parent == published.resolve() / "diagnoses" and "\n" not in before.read_text().strip()
    shutil.copytree(published, copy)  # follows links
    monkeypatch.setattr(analysis.ablate, "command", lambda *a: [sys.executable, "-c", "raise SystemExit(9)"])  # a run that starts fails
    assert main([argument.replace(str(out), str(copy)) for argument in line]) == 0
    (again,) = Ablation.load(copy / "ablation.json").sets
    assert [row.measures for row in again.arms] == [row.measures for row in one.arms]

    job = next(iter(jobs.values()))  # a run folder whose settings are others is not taken for this arm's
    saved = job.folder / "config.yaml"
    text = saved.read_text()
    saved.write_text(text.replace("  grids: 1\n", "  grids: 3\n"))
    assert text != saved.read_text() and not is_done(job)
