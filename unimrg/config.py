"""Every knob of a run as dataclasses with defaults and checks.

YAML in `configs/` only chooses values and `unimrg.compose` only merges them onto these types, so an unknown
key or a wrong type stops at once. `check()` raises `ConfigError` with one sentence: key, value, remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from unimrg.errors import ConfigError
from unimrg.sample import Task
from unimrg.storage import S3Config

REDACTED = "(redacted)"


def suggest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` or the list of choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(choices)}"


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(f"{key}: unknown value {value!r}{suggest(value, choices)}")


def require(key: str, value: float, low: float, high: float = float("inf"), above: bool = False) -> None:
    """Raise ConfigError unless low <= value <= high (low < value when `above`)."""
    if not (low < value if above else low <= value) or value > high:
        bound = f"{'above' if above else 'at least'} {low:g}" + ("" if high == float("inf") else f" and at most {high:g}")
        raise ConfigError(f"{key}: {value!r} is out of range; it must be {bound}")


@dataclass
class S3Options:
    """Object storage; empty fields mean the usual AWS places (environment, profile, instance role)."""

    endpoint: str = ""
    region: str = ""
    access_key: str = ""
    secret_key: str = ""

    def store(self) -> S3Config:
        """The same as `unimrg.storage` wants it."""
        return S3Config(**dataclasses.asdict(self))


@dataclass
class FamilyConfig:
    """Which model, from which weights.

    weights: folder of `save_pretrained`, or published weights (safetensors, or a pickle that loads with
    `weights_only`); empty = fresh weights from the seed. vae_weights: the published autoencoder's file.
    tokenizer: folder with tokenizer.json; empty = beside the weights, or the tiny one of the package.
    freeze: parts of the family that are not trained.
    """

    name: str = "harmon"
    variant: str = "tiny"
    weights: str = ""
    vae_weights: str = ""
    tokenizer: str = ""
    freeze: list[str] = field(default_factory=list)
    dropout: float = -1.0

    def check(self) -> None:
        from unimrg.families import FAMILIES

        require_choice("family.name", self.name, FAMILIES)
        if self.dropout != -1:
            require("family.dropout", self.dropout, 0, 0.99)


@dataclass
class ScenesConfig:
    """The embedded procedural data set. train, test: pictures; size: pixels; questions: per picture."""

    train: int = 1600
    test: int = 64
    size: int = 128
    questions: int = 6
    seed: int = 0

    def check(self) -> None:
        require("data.scenes.train", self.train, 1)
        require("data.scenes.test", self.test, 1)
        require("data.scenes.size", self.size, 32, 1024)
        require("data.scenes.questions", self.questions, 1, 32)


@dataclass
class DataConfig:
    """LLaVA-format data in a folder or a bucket.

    manifest: JSON, JSONL or Parquet, a path or URL; empty = write and use `scenes`. images: folder or URL the
    manifest's paths start from; empty = the manifest's folder. held_out: a second manifest for evaluation;
    empty = `held_out_count` pictures taken out of the first. geometry: `pad` to a grey square, `squash`, or
    `published` (questions padded, drawings squashed). max_*: larger pictures are quarantined (bytes, pixels)
    or shrunk (side). max_bad_share: more quarantined samples than this share stop the run, once
    `min_checked` samples were seen. unit: rows fetched and labelled together.
    """

    manifest: str = ""
    images: str = ""
    held_out: str = ""
    held_out_count: int = 64
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    geometry: str = "pad"
    group_by_image: bool = True
    max_bytes: int = 64 << 20
    max_pixels: int = 178_956_970
    max_side: int = 2048
    max_bad_share: float = 0.05
    min_checked: int = 100
    unit: int = 16

    def check(self) -> None:
        self.scenes.check()
        require_choice("data.geometry", self.geometry, ("pad", "squash", "published"))
        require("data.held_out_count", self.held_out_count, 0)
        require("data.max_bad_share", self.max_bad_share, 0, 1)
        require("data.unit", self.unit, 1, 4096)
        for key in ("max_bytes", "max_pixels", "max_side", "min_checked"):
            require(f"data.{key}", getattr(self, key), 1)


@dataclass
class TeacherConfig:
    """One teacher and the actors that run it.

    name: of the teacher. checkpoint: hub id or local folder. actors: how many run at once (0 = 1 for each
    GPU of the cluster, at least 1). gpus: of one actor, may be a fraction (-1 = 1 on a GPU cluster, else 0).
    """

    name: str = "oracle"
    checkpoint: str = ""
    batch_size: int = 8
    actors: int = 0
    gpus: float = -1.0


@dataclass
class SamConfig:
    """Thresholds of the automatic mask generator (Segment Anything, arXiv 2304.02643); its defaults."""

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7


@dataclass
class TeachersConfig:
    """Who makes the depth maps and the region boundaries.

    stored: folder or URL that `unimrg.label` wrote, for teachers named `stored`.
    """

    depth: TeacherConfig = field(default_factory=TeacherConfig)
    segmentation: TeacherConfig = field(default_factory=TeacherConfig)
    sam: SamConfig = field(default_factory=SamConfig)
    stored: str = ""

    DEPTH = ("oracle", "stored", "depth_anything")
    SEGMENTATION = ("oracle", "stored", "sam")

    def check(self) -> None:
        require_choice("teachers.depth.name", self.depth.name, self.DEPTH)
        require_choice("teachers.segmentation.name", self.segmentation.name, self.SEGMENTATION)
        for key, teacher in (("depth", self.depth), ("segmentation", self.segmentation)):
            require(f"teachers.{key}.batch_size", teacher.batch_size, 1)
            if teacher.name in ("depth_anything", "sam") and not teacher.checkpoint:
                raise ConfigError(f"teachers.{key}.checkpoint is empty; give a hub id or a local folder")
            if teacher.name == "stored" and not self.stored:
                raise ConfigError(f"teachers.{key} is `stored`: set teachers.stored to what unimrg.label wrote")


@dataclass
class WeightsConfig:
    """Weight of each task in the loss; 0 leaves the task out altogether."""

    understanding: float = 1.0
    pixel: float = 1.0
    depth: float = 1.0
    segmentation: float = 1.0

    def check(self) -> None:
        for task, weight in self.by_task().items():
            require(f"weights.{task}", weight, 0)
        if not self.active():
            raise ConfigError("weights: all four are 0, so there is nothing to train; set one above 0")

    def by_task(self) -> dict[Task, float]:
        return {task: getattr(self, task.value) for task in Task}

    def active(self) -> tuple[Task, ...]:
        """The tasks that are trained."""
        return tuple(task for task, weight in self.by_task().items() if weight > 0)


@dataclass
class TrainConfig:
    """The optimisation.

    steps: optimiser steps. batch_size: samples (pictures) per step over all workers. accumulation:
    micro-batches per step and worker. warmup: share of the steps with linearly rising learning rate, then
    cosine to 0. checkpoint_every: steps; 0 = only the last. prompt_dropout: see `tasks`.
    """

    steps: int = 300
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.02
    clip: float = 1.0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    max_text_tokens: int = 1472
    prompt_dropout: float = 0.1
    published_prompts: bool = False

    def check(self) -> None:
        for key in ("steps", "batch_size", "accumulation", "keep_checkpoints", "max_text_tokens"):
            require(f"train.{key}", getattr(self, key), 1)
        require("train.learning_rate", self.learning_rate, 0, above=True)
        require("train.warmup", self.warmup, 0, 1)
        require("train.clip", self.clip, 0, above=True)
        require("train.weight_decay", self.weight_decay, 0)
        require("train.checkpoint_every", self.checkpoint_every, 0)
        require("train.prompt_dropout", self.prompt_dropout, 0, 1)
        if len(self.betas) != 2:
            raise ConfigError(f"train.betas: {self.betas!r} must be two numbers, like [0.9,0.95]")
        for beta in self.betas:
            require("train.betas", beta, 0, 0.99999)


@dataclass
class EngineConfig:
    """What runs the step. precision `auto`: bfloat16 on GPUs, float32 on CPUs. threads: 0 = torch's choice."""

    name: str = "deepspeed"
    zero_stage: int = 2
    precision: str = "auto"
    threads: int = 0

    def check(self) -> None:
        require_choice("engine.name", self.name, ("torch", "deepspeed"))
        require_choice("engine.precision", self.precision, ("auto", "float32", "bfloat16"))
        require("engine.zero_stage", self.zero_stage, 1, 3)
        require("engine.threads", self.threads, 0)


@dataclass
class ClusterConfig:
    """Ray. workers: training processes (0 = one per GPU of the cluster, at least 1). max_failures: restarts.

    cpus_per_worker: logical CPUs held by one worker; small on a laptop, so that the data pipeline finds room.
    """

    workers: int = 0
    cpus_per_worker: float = 0.5
    max_failures: int = 3
    timeout_seconds: int = 600

    def check(self) -> None:
        require("cluster.workers", self.workers, 0)
        require("cluster.cpus_per_worker", self.cpus_per_worker, 0, above=True)
        require("cluster.max_failures", self.max_failures, 0)
        require("cluster.timeout_seconds", self.timeout_seconds, 10)


@dataclass
class ReportConfig:
    """What the closing report shows. images: held-out pictures drawn; questions: asked before and after."""

    enabled: bool = True
    images: int = 4
    questions: int = 200
    draw_iterations: int = 0
    max_new_tokens: int = 32

    def check(self) -> None:
        for key in ("images", "questions", "draw_iterations"):
            require(f"report.{key}", getattr(self, key), 0)
        require("report.max_new_tokens", self.max_new_tokens, 1)


@dataclass
class RunConfig:
    """One post-training run. A run with the same `name` and `storage_path` is continued, not started again."""

    name: str = ""
    seed: int = 0
    storage_path: str = "outputs"
    log_every: int = 10
    s3: S3Options = field(default_factory=S3Options)
    family: FamilyConfig = field(default_factory=FamilyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def check(self) -> None:
        """Raise ConfigError for the first value that can't be used."""
        for part in ("family", "data", "teachers", "weights", "train", "engine", "cluster", "report"):
            getattr(self, part).check()
        require("seed", self.seed, 0)
        require("log_every", self.log_every, 1)
        if any(character in self.name for character in "/\\ ") or self.name.startswith("."):
            raise ConfigError(f"name: {self.name!r} must be one word without slashes, spaces or a leading dot")
        parts = self.train.accumulation * max(self.cluster.workers, 1)
        if self.train.batch_size % parts:
            raise ConfigError(
                f"train.batch_size: {self.train.batch_size} must be divisible by workers x accumulation = {parts}"
            )


def to_plain(config: Any) -> dict[str, Any]:
    """Plain nested values, keys and all."""
    return dataclasses.asdict(config)


def redacted(config: RunConfig) -> dict[str, Any]:
    """`to_plain` without secrets: what is written beside checkpoints."""
    plain = to_plain(config)
    for key in ("access_key", "secret_key"):
        if plain["s3"][key]:
            plain["s3"][key] = REDACTED
    return plain


def from_plain(plain: dict[str, Any]) -> RunConfig:
    """Inverse of `to_plain`; raises ConfigError for unknown keys."""
    return _build(RunConfig, plain, "")


def _build(cls: type, plain: dict[str, Any], path: str) -> Any:
    kinds = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in plain.items():
        if key not in kinds:
            raise ConfigError(f"unknown key {path + key!r}{suggest(key, kinds)}")
        default = kinds[key].default_factory
        nested = default if isinstance(default, type) and dataclasses.is_dataclass(default) else None
        values[key] = _build(nested, value, f"{path}{key}.") if nested else value
    return cls(**values)
