"""Settings: YAML first, flags on top, every mistake named with its place."""

from pathlib import Path

import pytest

from train.config import Config, ConfigError, LoRAPart, LossPart, RunPart, SchedulePart, differences, load_yaml, parse

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write(folder, text):
    path = folder / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_ready_made_ones_load(path):
    assert isinstance(load_yaml(path), Config)


def test_no_config_means_the_organism():
    assert parse([]) == load_yaml(Path(__file__).parents[2] / "configs" / "organism.yaml")


def test_the_label_free_one_uses_no_labels_and_no_counterfactuals():
    config = load_yaml(Path(__file__).parents[2] / "configs" / "organism_label_free.yaml")
    assert config.data.train_on == "factual" and config.loss.counterfactual_ce == 0


def test_flags_override_the_file(tmp_path):
    path = write(tmp_path, "schedule: {lr: 1e-3, steps: 7}\nlora: {layers: [1, 2]}\n")
    config = parse(["--config", str(path), "--schedule.lr", "5e-4", "--lora.layers", "0", "3", "--loss.teacher-cut", "video->emitters 1:3"])
    assert (config.schedule.lr, config.schedule.steps, config.lora.layers) == (5e-4, 7, (0, 3))
    assert config.loss.teacher_cut == "video->emitters 1:3"
    assert parse([f"--config={path}"]).schedule.lr == 1e-3  # YAML reads 1e-3 as text


def test_saved_and_loaded_are_equal(tmp_path):
    config = Config(lora=LoRAPart(layers=(1, 2), projections=("q_proj",)), loss=LossPart(mirror_cut="audio->emitters 0:2"))
    config.save(tmp_path / "config.yaml")
    assert load_yaml(tmp_path / "config.yaml") == config
    assert differences(config, load_yaml(tmp_path / "config.yaml")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule: {learning_rate: 1}", r"c\.yaml: unknown key 'schedule\.learning_rate'"),
        ("schedule: {step: 1}", "did you mean 'steps'"),
        ("trainer: {}", "unknown key 'trainer'; known here: model, data, lora"),
        ("schedule: {steps: many}", "schedule.steps should be int, not 'many'"),
        ("schedule: {steps: true}", "schedule.steps should be int, not True"),
        ("schedule: {shape: linear}", "choose one of cosine, one_cycle, constant"),
        ("schedule: 3", "schedule should hold `key: value` lines"),
        ("lora: {layers: 3}", "lora.layers should be a list"),
        ("schedule: {lr: fast}", "schedule.lr should be a number"),
        ("schedule: {grids: 4, accumulate: 3}", "equally large"),
        ("loss: {teacher_cut: video}", "write a cut as"),
        ("loss: {teacher_cut: 'audio->emitters 0:2'}", "video that has to be cut"),
        ("loss: {counterfactual_ce: 0, distillation: 0, mirror: 0}", "nothing would be learnt"),
        ("loss: {retention: -1}", "at least 0"),
        ("lora: {projections: [q]}", "choose from q_proj"),
        ("data: {faint: 2}", "a share"),
        ("run: {keep: 0}", "run.keep is 0"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_name_file_key_and_remedy(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        load_yaml(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        parse(["--config", "nowhere.yaml"])


def test_differences_name_the_keys_but_not_those_free_to_differ():
    one, other = Config(), Config(schedule=SchedulePart(lr=1e-4), run=RunPart(threads=3, tracker="wandb", overwrite=True, keep=9))
    assert differences(one, other) == ["schedule.lr was 0.002 and is now 0.0001"]


def test_help_shows_the_docstrings(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    assert "--schedule.lr" in out and "Peak learning rate" in out and "--config" in out
