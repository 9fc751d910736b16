"""Every file of configs/ composes, and every knob is checked and explained."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import yaml

from tune.config import SearchConfig
from unimrg import config as knobs
from unimrg.compose import _files, _groups, _keys, compose, config_folder
from unimrg.config import (
    DataConfig,
    ExportConfig,
    GenerateConfig,
    LabelConfig,
    LabelsConfig,
    RunConfig,
    from_plain,
    redacted,
    to_plain,
)
from unimrg.errors import ConfigError
from unimrg.reproduce.config import ReproduceConfig

# What the command line must give for the file to be complete.
NEEDED = {
    "generate": ["checkpoint=model", "image=a.jpg", "task=depth"],
    "export": ["checkpoint=model", "out=published"],
}
ALSO = {
    "data=llava": ["data.manifest=a.json"],
    "teachers=stored": ["teachers.stored=labels"],
}
OF_A_SEARCH = {
    "weights=understanding_only": [
        *(f"search.space.{task}=[]" for task in ("pixel", "depth", "segmentation")),
        "search.space.learning_rate=[1e-3,2e-3]",
    ],
}
SCHEMAS = {
    "train": RunConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "label": LabelConfig,
    "search": SearchConfig,
    "reproduce": ReproduceConfig,
}
YAMLS = sorted(path.relative_to(config_folder()) for path in config_folder().rglob("*.yaml"))
CASES = [
    (name, f"{group}={option}") for name in SCHEMAS for group in _groups(name) for option in _files(group)
]


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_command_composes(name: str) -> None:
    assert type(compose(name, NEEDED.get(name, []), SCHEMAS[name])) is SCHEMAS[name]


@pytest.mark.parametrize(("name", "choice"), CASES)
def test_each_option_composes(name: str, choice: str) -> None:
    also = [*ALSO.get(choice, []), *OF_A_SEARCH.get(choice, [])] if name == "search" else ALSO.get(choice, [])
    compose(name, [*NEEDED.get(name, []), choice, *also], SCHEMAS[name])


def test_no_file_is_left_out() -> None:
    """Each YAML is a command's or an option of a group that some command has."""
    used = {Path(f"{name}.yaml") for name in SCHEMAS}
    used |= {
        Path(group, f"{option}.yaml")
        for name in SCHEMAS
        for group in _groups(name)
        for option in _files(group)
    }
    elsewhere = {path for path in YAMLS if path not in used}
    for path in elsewhere:  # another command's: at least it is YAML and names its dataclass
        values = yaml.safe_load((config_folder() / path).read_text())
        assert isinstance(values, dict), path


def test_options_say_what_they_are() -> None:
    for path in YAMLS:
        first = (config_folder() / path).read_text().partition("\n")[0]
        assert first.startswith("# ") and len(first) < 120, f"{path} opens with one line that says what it is"


def test_the_default_run_is_that_of_the_dataclasses() -> None:
    """But for the scenes' own values and the teachers that know them."""
    assert compose("train", ["teachers=oracle"], RunConfig) == RunConfig(data=DataConfig(window=4))
    assert compose("label", ["teachers=oracle"], LabelConfig) == LabelConfig(
        data=DataConfig(window=4), labels=LabelsConfig(codes=False)
    )
    teachers = compose("train", [], RunConfig).teachers
    assert teachers.depth.checkpoint == teachers.segmentation.checkpoint == "tiny"
    values = compose("generate", NEEDED["generate"], GenerateConfig)
    assert values == GenerateConfig(checkpoint="model", image="a.jpg", task="depth")


@pytest.mark.parametrize("variant", ["harmon_0_5b", "harmon_1_5b"])
def test_published_settings(variant: str) -> None:
    """Harmon's published training, as described with the paper's code."""
    config = compose("train", [f"family={variant}"], RunConfig)
    train = config.train
    assert (train.learning_rate, train.betas, train.eps) == (1e-5, [0.9, 0.95], 1e-8)
    assert (train.weight_decay, train.clip, train.warmup) == (0.02, 1.0, 0.01)
    assert (config.family.variant, config.family.dropout) == (variant, 0.1)
    assert (config.engine.name, config.engine.zero_stage) == ("deepspeed", 2)
    from unimrg.families import load_family

    assert load_family("harmon").image_size(config.family) == 512


def test_teachers_of_the_preset_are_real_ones() -> None:
    teachers = compose("train", ["teachers=depth_anything_sam"], RunConfig).teachers
    assert teachers.depth.checkpoint == "depth-anything/Depth-Anything-V2-Large-hf"
    assert teachers.segmentation.checkpoint == "facebook/sam-vit-huge"
    teachers = compose("train", ["teachers=depth_anything_sam2"], RunConfig).teachers
    assert (teachers.segmentation.name, teachers.segmentation.checkpoint) == (
        "sam2",
        "facebook/sam2.1-hiera-large",
    )
    assert teachers.sam.pred_iou_thresh == 0.8


def test_the_baseline_trains_on_questions_alone() -> None:
    assert compose("train", ["weights=understanding_only"], RunConfig).weights.active() == ("understanding",)


def test_every_knob_is_explained() -> None:
    for schema in SCHEMAS.values():
        for kind in {schema, *(k for _, k in _keys(schema) if dataclasses.is_dataclass(k))}:
            assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("), kind
            for item in dataclasses.fields(kind):
                nested = dataclasses.is_dataclass(item.default_factory)
                assert nested or item.metadata.get("help"), f"{kind.__name__}.{item.name}"


def test_plain_and_back() -> None:
    config = compose("train", ["family=harmon_1_5b", "s3.secret_key=hush"], RunConfig)
    assert from_plain(to_plain(config)) == config
    assert redacted(config)["s3"]["secret_key"] == knobs.REDACTED
    with pytest.raises(ConfigError, match=r"unknown key 'train\.stepz'; did you mean 'steps'"):
        from_plain({"train": {"stepz": 1}})


REFUSED = {
    ("train", "data.scenes.questions=9"): "data.scenes.questions: 9 is out of range",
    ("train", "train.batch_size=2 train.accumulation=3"): "2 is less than workers x accumulation = 3",
    ("train", "weights=understanding_only weights.understanding=0"): "all four are 0",
    ("train", "name=a/b"): "must be one word",
    ("train", "teachers.depth.name=sam"): "teachers.depth.name: unknown value 'sam'",
    ("train", "teachers=oracle teachers.depth.name=depth_anything"): "teachers.depth.checkpoint is empty",
    ("train", "teachers.depth.name=stored"): "set teachers.stored",
    ("train", "family.dropout=1.5"): "family.dropout: 1.5 is out of range",
    ("train", "seed=-1"): "seed: -1 is out of range",
    ("train", "teachers.depth.name=none"): "teachers.depth is `none`, so nobody draws it",
    ("train", "teachers=depth_anything_sam labels.mode=off"): "teachers.depth is a model; use labels.mode",
    ("train", "teachers=depth_anything_sam data.group_by_image=false"): "are stored by picture",
    ("train", "labels.mode=cache"): "labels.mode: unknown value 'cache'; did you mean 'cached'",
    ("train", "data.unit=24"): "data.shard_rows: 64 must be a multiple of data.unit = 24",
    ("train", "data.manifest=a.json data.manifests=[b.json]"): "both set; name each data set once",
    ("train", "data.manifests=[a.json,b.json] data.shares=[1]"): "1 numbers for 2 manifests",
    ("train", "teachers.depth.min_actors=3 teachers.depth.max_actors=2"): "2 is below min_actors = 3",
    ("train", "teachers.depth.node_labels=[teacher]"): "'teacher' is no label; write name=value",
    ("train", "cluster.node_labels=[trainer]"): "'trainer' is no label; write name=value",
    ("train", "cluster.environment=[eth0]"): "'eth0' is no variable; write NAME=value",
    ("train", "data.stall_seconds=-1"): "data.stall_seconds: -1 is out of range",
    ("train", "family.grad_scale=2"): "family.grad_scale: 2.0 is out of range",
    ("label", "labels.mode=cached"): "'cached' labels nothing; leave it out",
    ("generate", "task=draw"): "task: unknown value 'draw'",
    ("generate", "question=why"): "task, question: both are given",
    ("generate", "task="): "task, question: neither is given",
    ("generate", "checkpoint="): "checkpoint is empty",
    ("generate", "image="): "image is empty",
    ("generate", "out=a.jpg"): "must end in .png",
    ("generate", "guidance=-1"): "guidance: -1.0 is out of range",
    ("export", "layout=onnx"): "layout: unknown value 'onnx'",
    ("export", "layout=pretrained"): "weights is empty; layout=pretrained needs weights, out",
    ("export", "out="): "out is empty",
}


@pytest.mark.parametrize(("name", "words"), REFUSED)
def test_checks(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(name, [*NEEDED.get(name, []), *words.split(" ")], SCHEMAS[name])
    assert REFUSED[name, words] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_presets_do_not_interfere() -> None:
    """Any choice of options together is as good as each alone."""
    names = list(_groups("train"))
    for choice in itertools.islice(itertools.product(*(_files(group) for group in names)), 0, None, 29):
        words = [f"{group}={option}" for group, option in zip(names, choice, strict=True)]
        also = [extra for word in words for extra in ALSO.get(word, [])]
        compose("train", [*words, *also], RunConfig)
