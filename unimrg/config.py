"""Every knob of a run as dataclasses with defaults and checks.

YAML in `configs/` only chooses values and `unimrg.compose` only merges them onto these types, so an unknown
key or a wrong type stops at once. `check()` raises `ConfigError` with one sentence: key, value, remedy.
A knob's explanation stands beside its default and is what `--help` of the commands shows.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unimrg.errors import ConfigError
from unimrg.sample import Task

if TYPE_CHECKING:
    from unimrg.storage import S3Config

REDACTED = "(redacted)"

FAMILIES = {
    "harmon": "unimrg.families.harmon",
    "showo": "unimrg.families.showo",
    "openuni": "unimrg.families.openuni",
    "janus": "unimrg.families.janus",
}
"""Name of each model family and the module that is imported when it is chosen."""


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
        bound = f"{'above' if above else 'at least'} {low:g}" + (
            "" if high == float("inf") else f" and at most {high:g}"
        )
        raise ConfigError(f"{key}: {value!r} is out of range; it must be {bound}")


def knob(default: Any, help: str) -> Any:
    """A dataclass field with its default and its explanation, units and range included."""
    return field(default=default, metadata={"help": help})


@dataclass
class S3Options:
    """Object storage; empty fields mean the usual AWS places (environment, profile, instance role)."""

    endpoint: str = knob("", "address of an S3-compatible store, like http://minio:9000")
    region: str = knob("", "region of the bucket")
    access_key: str = knob("", "key id; better left to the environment")
    secret_key: str = knob("", "secret key; better left to the environment; never written anywhere")

    def store(self) -> S3Config:
        """The same as `unimrg.storage` wants it."""
        from unimrg.storage import S3Config

        return S3Config(**dataclasses.asdict(self))


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) in place of training a part in full."""

    rank: int = knob(0, "of the adapters; 0 = none")
    alpha: float = knob(32.0, "adapters are scaled by alpha / rank")
    dropout: float = knob(0.0, "before the adapters, 0..0.99")
    targets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "ends of names, or patterns, of linear layers, like [q_proj]; empty = the family's"
        },
    )
    also_train: list[str] = field(
        default_factory=list,
        metadata={"help": "words in names that stay trained in full inside the adapted parts, like [norm]"},
    )

    def check(self) -> None:
        require("family.lora.rank", self.rank, 0)
        require("family.lora.alpha", self.alpha, 0, above=True)
        require("family.lora.dropout", self.dropout, 0, 0.99)
        for key in ("targets", "also_train"):
            if getattr(self, key) and not self.rank:
                raise ConfigError(f"family.lora.{key} is set but family.lora.rank is 0; give a rank, like 16")


@dataclass
class FamilyConfig:
    """Which model, from which weights: each a local path, an s3:// URL, or a place on the hub (org/name).

    The weights may also be those of a small model that comes with the package (shipped:harmon).
    """

    name: str = knob("harmon", "model family")
    variant: str = knob("tiny", "size: tiny (CPU, seconds per step), or a published one like harmon_1_5b")
    weights: str = knob(
        "",
        "folder of save_pretrained, published weights (.safetensors, .pth, sharded, ZeRO), or the package's "
        "own small model (shipped:harmon, shipped:janus); empty = fresh",
    )
    language_weights: str = knob(
        "", "published language model that a family starts from (openuni: InternVL3)"
    )
    diffusion_weights: str = knob(
        "", "published image model that a family starts from (openuni: SANA, like hf://org/name/transformer)"
    )
    vision_weights: str = knob("", "published picture encoder that a family needs (showo with CLIP)")
    vae_weights: str = knob("", "the published picture autoencoder or tokenizer; goes with published weights")
    tokenizer: str = knob("", "folder with tokenizer.json; empty = beside the weights, or the tiny one")
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "parts of the family that are not trained, like [llm]"}
    )
    dropout: float = knob(-1.0, "dropout inside the image model, 0..0.99; -1 = the variant's own")
    grad_scale: float = knob(
        -1.0,
        "factor on the gradient from pictures that are looked at to what embeds them, 0..1; -1 = the "
        "weights' own (harmon's is 0.1, else 1)",
    )
    lora: LoraConfig = field(default_factory=LoraConfig)

    def check(self) -> None:
        require_choice("family.name", self.name, FAMILIES)
        if self.grad_scale != -1:
            require("family.grad_scale", self.grad_scale, 0, 1)
        if self.dropout != -1:
            require("family.dropout", self.dropout, 0, 0.99)
        self.lora.check()


@dataclass
class ScenesConfig:
    """The embedded procedural data set."""

    train: int = knob(800, "pictures to train on")
    test: int = knob(64, "pictures held out")
    size: int = knob(128, "side of a picture in pixels, 32..1024")
    questions: int = knob(4, "questions per picture, 2..8")
    seed: int = knob(0, "another seed draws other pictures")

    def check(self) -> None:
        require("data.scenes.train", self.train, 1)
        require("data.scenes.test", self.test, 1)
        require("data.scenes.size", self.size, 32, 1024)
        require("data.scenes.questions", self.questions, 2, 8)


@dataclass
class DataConfig:
    """LLaVA-format data in a folder or a bucket."""

    manifest: str = knob(
        "",
        "JSON, JSONL, Parquet, tars (a-{000..127}.tar) or a folder, path or URL; empty = data.scenes, made",
    )
    images: str = knob(
        "", "folder or URL that the manifest's paths start from; empty = the manifest's folder"
    )
    manifests: list[str] = field(
        default_factory=list,
        metadata={"help": "several data sets instead of data.manifest, like [a.json,s3://b/c.jsonl]"},
    )
    shares: list[float] = field(
        default_factory=list,
        metadata={"help": "how much of the training each of data.manifests is; empty = all the same"},
    )
    held_out: str = knob("", "a second manifest for evaluation; empty = data.held_out_count of the first")
    held_out_count: int = knob(64, "pictures taken out of the manifest for evaluation")
    held_out_seed: int = knob(-1, "another seed takes out other pictures; -1 = the run's seed")
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    geometry: str = knob(
        "pad", "to the square: pad with grey, squash, or published (questions pad, drawings squash)"
    )
    group_by_image: bool = knob(True, "entries about one picture become one sample")
    max_bytes: int = knob(64 << 20, "larger files are quarantined, bytes")
    max_pixels: int = knob(178_956_970, "larger pictures are quarantined, pixels")
    max_side: int = knob(2048, "larger pictures are shrunk to this side, pixels")
    max_bad_share: float = knob(0.05, "more quarantined samples than this share stop the run, 0..1")
    min_checked: int = knob(100, "samples seen before max_bad_share counts")
    unit: int = knob(16, "rows fetched and labelled together, 1..4096")
    shard_rows: int = knob(
        64, "neighbouring rows that are labelled, stored and read as one; a multiple of unit"
    )
    window: int = knob(
        16, "shards whose rows are mixed; the shards themselves come in a new order every epoch"
    )
    readers: int = knob(1, "actors that read the label store; each keeps the parts of two windows in memory")
    ahead: int = knob(0, "samples made ready before training asks for them; 0 = 16 steps' worth")
    stall_seconds: int = knob(
        1800,
        "a pipeline that yields nothing for so long is ended; more where nodes come later; 0 = never",
    )

    def places(self) -> list[str]:
        """The manifests to train on."""
        return list(self.manifests) or [self.manifest]

    def check(self) -> None:
        self.scenes.check()
        require("data.shard_rows", self.shard_rows, 1)
        require("data.window", self.window, 1)
        require("data.readers", self.readers, 1)
        require("data.ahead", self.ahead, 0)
        require("data.stall_seconds", self.stall_seconds, 0)
        if self.shard_rows % self.unit:
            raise ConfigError(
                f"data.shard_rows: {self.shard_rows} must be a multiple of data.unit = {self.unit}"
            )
        if self.manifest and self.manifests:
            raise ConfigError("data.manifest and data.manifests are both set; name each data set once")
        if self.shares and len(self.shares) != len(self.manifests):
            raise ConfigError(
                f"data.shares: {len(self.shares)} numbers for {len(self.manifests)} manifests; give each one"
            )
        for share in self.shares:
            require("data.shares", share, 0, above=True)
        require_choice("data.geometry", self.geometry, ("pad", "squash", "published"))
        require("data.held_out_count", self.held_out_count, 0)
        require("data.held_out_seed", self.held_out_seed, -1, 2**32 - 1)
        require("data.max_bad_share", self.max_bad_share, 0, 1)
        require("data.unit", self.unit, 1, 4096)
        for key in ("max_bytes", "max_pixels", "max_side", "min_checked"):
            require(f"data.{key}", getattr(self, key), 1)


@dataclass
class PoolConfig:
    """Actors that run a frozen model over pictures."""

    batch_size: int = knob(8, "pictures per call of the model")
    dtype: str = knob("auto", "float32, bfloat16, float16, or auto: bfloat16 on GPUs, float32 on CPUs")
    min_actors: int = knob(1, "how many run at least")
    max_actors: int = knob(
        0, "how many run at most; 0 = one for each GPU that training leaves, on CPUs one (evaluation: two)"
    )
    gpus: float = knob(-1.0, "GPUs of one actor, may be a fraction; -1 = one on a GPU cluster, else none")
    accelerator_type: str = knob("", "run only on this kind of GPU, like A10G or H100, as Ray names them")
    node_labels: list[str] = field(
        default_factory=list,
        metadata={"help": "run only on nodes with these Ray labels, like ['pool=teacher']"},
    )

    def check(self, key: str) -> None:
        require(f"{key}.batch_size", self.batch_size, 1)
        require_choice(f"{key}.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        require(f"{key}.min_actors", self.min_actors, 1)
        require(f"{key}.max_actors", self.max_actors, 0)
        if self.max_actors and self.max_actors < self.min_actors:
            raise ConfigError(f"{key}.max_actors: {self.max_actors} is below min_actors = {self.min_actors}")
        if self.gpus != -1:
            require(f"{key}.gpus", self.gpus, 0)
        _require_labels(f"{key}.node_labels", self.node_labels)


def _require_labels(key: str, labels: list[str]) -> None:
    for label in labels:
        if "=" not in label:
            raise ConfigError(f"{key}: {label!r} is no label; write name=value")


@dataclass
class TeacherConfig(PoolConfig):
    """One teacher and the actors that run it."""

    name: str = knob(
        "oracle", "oracle (the data set's own), stored, none, or a model: depth_anything, sam, sam2"
    )
    checkpoint: str = knob("", "hub id or local folder of the model")

    @property
    def is_model(self) -> bool:
        """Does it need actors?"""
        return self.name not in ("none", "oracle", "stored")


@dataclass
class SamConfig:
    """The automatic mask generator of SAM and SAM 2 (arXiv 2304.02643, 2408.00714); SAM's defaults."""

    points_per_side: int = knob(32, "grid of prompts over the picture")
    points_per_batch: int = knob(64, "prompts decoded at once; memory against speed")
    images_per_batch: int = knob(4, "pictures encoded at once; memory against speed")
    pred_iou_thresh: float = knob(
        0.88, "masks that the model trusts less are dropped, 0..1; SAM 2's own default is 0.8"
    )
    stability_score_thresh: float = knob(0.95, "masks that change more with the cut-off are dropped, 0..1")
    box_nms_thresh: float = knob(0.7, "of masks that overlap more, the better one stays, 0..1")

    def check(self) -> None:
        for key in ("points_per_side", "points_per_batch", "images_per_batch"):
            require(f"teachers.sam.{key}", getattr(self, key), 1)
        for key in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh"):
            require(f"teachers.sam.{key}", getattr(self, key), 0, 1)


@dataclass
class TeachersConfig:
    """Who makes the depth maps and the region boundaries."""

    depth: TeacherConfig = field(default_factory=TeacherConfig)
    segmentation: TeacherConfig = field(default_factory=TeacherConfig)
    sam: SamConfig = field(default_factory=SamConfig)
    stored: str = knob("", "folder or URL that unimrg.label wrote, for teachers named stored")

    DEPTH = ("oracle", "stored", "none", "depth_anything")
    SEGMENTATION = ("oracle", "stored", "none", "sam", "sam2")

    def check(self) -> None:
        self.sam.check()
        require_choice("teachers.depth.name", self.depth.name, self.DEPTH)
        require_choice("teachers.segmentation.name", self.segmentation.name, self.SEGMENTATION)
        for key, teacher in (("depth", self.depth), ("segmentation", self.segmentation)):
            teacher.check(f"teachers.{key}")
            if teacher.is_model and not teacher.checkpoint:
                raise ConfigError(f"teachers.{key}.checkpoint is empty; give a hub id or a local folder")
            if teacher.name == "stored" and not self.stored:
                raise ConfigError(
                    f"teachers.{key} is `stored`: set teachers.stored to what unimrg.label wrote"
                )


@dataclass
class LabelsConfig:
    """The label store: written once, read by every run."""

    mode: str = knob(
        "streaming",
        "streaming: train while teachers label, and store what they make; cached: train on what is stored; "
        "off: store nothing (only for teachers that need no model)",
    )
    store: str = knob("", "folder or URL of the label store; empty = labels/ below storage_path")
    embed: bool = knob(True, "keep the pictures beside their labels; false = read them where they lie")
    codes: bool = knob(
        True, "store what the family's frozen picture encoder says, so that training needn't ask"
    )
    encoder: PoolConfig = field(default_factory=PoolConfig)

    def check(self) -> None:
        require_choice("labels.mode", self.mode, ("streaming", "cached", "off"))
        self.encoder.check("labels.encoder")


@dataclass
class WeightsConfig:
    """Weight of each task in the loss; 0 leaves the task out altogether."""

    understanding: float = knob(1.0, "answer questions about the image")
    pixel: float = knob(1.0, "redraw the image")
    depth: float = knob(1.0, "draw its depth map")
    segmentation: float = knob(1.0, "draw its region boundaries")
    balance: str = knob(
        "none", "weights that follow the losses from these on: none, uncertainty, gradnorm or famo"
    )
    balance_rate: float = knob(0.025, "how fast they do: the learning rate of the balancing, above 0")

    def check(self) -> None:
        for task, weight in self.by_task().items():
            require(f"weights.{task}", weight, 0)
        require_choice("weights.balance", self.balance, ("none", "uncertainty", "gradnorm", "famo"))
        require("weights.balance_rate", self.balance_rate, 0, above=True)
        if self.balance != "none" and len(self.active()) == 1:
            raise ConfigError(
                f"weights.balance={self.balance} needs two tasks; give another weight above 0, or set none"
            )
        if not self.active():
            raise ConfigError("weights: all four are 0, so there is nothing to train; set one above 0")

    def by_task(self) -> dict[Task, float]:
        return {task: getattr(self, task.value) for task in Task}

    def active(self) -> tuple[Task, ...]:
        """The tasks that are trained."""
        return tuple(task for task, weight in self.by_task().items() if weight > 0)


@dataclass
class TrainConfig:
    """The optimisation."""

    steps: int = knob(280, "optimiser steps")
    batch_size: int = knob(4, "pictures per step over all workers")
    accumulation: int = knob(1, "micro-batches per step and worker")
    learning_rate: float = knob(1.5e-3, "peak, after the warm-up")
    warmup: float = knob(
        0.05, "share of the steps with linearly rising learning rate, then cosine to 0; 0..1"
    )
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"help": "of AdamW"})
    eps: float = knob(1e-8, "of AdamW")
    weight_decay: float = knob(0.02, "of AdamW; not for biases, norms and the diffusion head")
    clip: float = knob(1.0, "largest norm of the gradient")
    checkpoint_every: int = knob(100, "steps; 0 = only the last")
    keep_checkpoints: int = knob(2, "the newest ones that stay; others are deleted")
    keep_best: int = knob(0, "of the others, those of least loss that stay too")
    ema: float = knob(
        0.0, "decay of a moving average of the weights, like 0.999; it is what is exported; 0 = none"
    )
    max_skipped: int = knob(
        10, "updates in a row that are skipped because loss or gradient isn't finite; one more stops the run"
    )
    spike: float = knob(
        0.0, "a loss this many times the median of the last 100 steps is a spike, above 1; 0 = never"
    )
    rollback_after: int = knob(
        0, "spikes in a row that bring back the last checkpoint; their samples are left out; 0 = never"
    )
    max_text_tokens: int = knob(1472, "longer conversations are cut, and counted")
    prompt_dropout: float = knob(0.1, "share of redrawing prompts replaced by an unconditional one, 0..1")
    published_prompts: bool = knob(False, "the published recipe's prompts and their order, for comparisons")

    def check(self) -> None:
        for key in ("steps", "batch_size", "accumulation", "keep_checkpoints", "max_text_tokens"):
            require(f"train.{key}", getattr(self, key), 1)
        require("train.learning_rate", self.learning_rate, 0, above=True)
        require("train.warmup", self.warmup, 0, 1)
        require("train.eps", self.eps, 0, above=True)
        require("train.clip", self.clip, 0, above=True)
        require("train.weight_decay", self.weight_decay, 0)
        for key in ("checkpoint_every", "keep_best", "max_skipped", "rollback_after"):
            require(f"train.{key}", getattr(self, key), 0)
        require("train.ema", self.ema, 0, 0.999999)
        if self.spike:
            require("train.spike", self.spike, 1, above=True)
        if self.rollback_after and not self.spike:
            raise ConfigError("train.rollback_after is set but train.spike is 0; give a factor, like 3")
        require("train.prompt_dropout", self.prompt_dropout, 0, 1)
        if len(self.betas) != 2:
            raise ConfigError(f"train.betas: {self.betas!r} must be two numbers, like [0.9,0.95]")
        for beta in self.betas:
            require("train.betas", beta, 0, 0.99999)


@dataclass
class EngineConfig:
    """What runs the step."""

    name: str = knob("deepspeed", "deepspeed, or torch (plain, no sharding)")
    zero_stage: int = knob(2, "of deepspeed: 1 shards optimiser state, 2 gradients too, 3 parameters too")
    offload: bool = knob(
        False, "of deepspeed: AdamW's state and update in the host's memory: less on the GPU, slower"
    )
    precision: str = knob("auto", "float32, bfloat16, or auto: bfloat16 on GPUs, float32 on CPUs")
    activation_checkpointing: str = knob(
        "auto",
        "blocks computed again in the backward pass to save memory: none, selective (every second one: half "
        "the memory, a sixth more time), full (all: a third more time), or auto: the first that fits",
    )
    attention: str = knob(
        "auto",
        "flash_attn (the package), varlen (torch's own FlashAttention), flex, sdpa, or auto: on GPUs the "
        "first of these that works there in bfloat16, elsewhere sdpa",
    )
    compile: str = knob(
        "auto",
        "by torch.compile: blocks, none, or auto: blocks on GPUs, but for zero_stage 3; begins with minutes",
    )
    threads: int = knob(0, "of torch, per worker; 0 = torch's choice")
    peak_tflops: float = knob(
        0.0, "of a worker's device at best, dense, of which MFU is a share; 0 = by the device's name"
    )

    @property
    def cuts_weights(self) -> bool:
        """Whether every worker holds only its piece of each weight: ZeRO-3."""
        return self.name == "deepspeed" and self.zero_stage == 3

    def check(self) -> None:
        require_choice("engine.name", self.name, ("torch", "deepspeed"))
        require_choice("engine.precision", self.precision, ("auto", "float32", "bfloat16"))
        require_choice("engine.attention", self.attention, ("auto", "flash_attn", "varlen", "flex", "sdpa"))
        # YAML's true and false were the values once.
        require_choice(
            "engine.activation_checkpointing",
            str(self.activation_checkpointing),
            ("auto", "none", "selective", "full"),
        )
        require("engine.zero_stage", self.zero_stage, 1, 3)
        if self.offload and self.name != "deepspeed":
            raise ConfigError("engine.offload is true, but only engine.name=deepspeed can; set it to false")
        require_choice("engine.compile", self.compile, ("auto", "blocks", "none"))
        if self.compile == "blocks" and self.cuts_weights:
            raise ConfigError(
                "engine.compile is `blocks`, but engine.zero_stage 3 acts inside of them; set it to none"
            )
        require("engine.threads", self.threads, 0)
        require("engine.peak_tflops", self.peak_tflops, 0)


@dataclass
class ClusterConfig:
    """Ray."""

    workers: int = knob(0, "training processes; 0 = one per GPU of the cluster, at least one")
    min_workers: int = knob(
        0,
        "go on with so few when nodes are lost, grow back to cluster.workers; 0 = with all or not at all",
    )
    resize_seconds: float = knob(60.0, "between two looks whether more workers fit, seconds")
    gpus_per_worker: float = knob(
        1.0, "GPUs of a worker where there are any; a part of one, like 0.5, only for a single worker"
    )
    cpus_per_worker: float = knob(
        0.5, "logical CPUs of a worker; small, so that a laptop has room for the data"
    )
    node_labels: list[str] = field(
        default_factory=list,
        metadata={"help": "train only on nodes with these Ray labels, like ['pool=trainer']"},
    )
    max_failures: int = knob(3, "restarts after a crash")
    timeout_seconds: int = knob(600, "without a word from a worker, seconds, at least 10")
    hang_seconds: int = knob(
        1800,
        "a step that takes longer is told with its stack and its worker replaced, seconds; waiting for data "
        "doesn't count; 0 = never",
    )

    environment: list[str] = field(
        default_factory=list,
        metadata={"help": "variables of the training workers from their start: ['NCCL_SOCKET_IFNAME=eth0']"},
    )

    def check(self) -> None:
        require("cluster.workers", self.workers, 0)
        require("cluster.cpus_per_worker", self.cpus_per_worker, 0, above=True)
        require("cluster.gpus_per_worker", self.gpus_per_worker, 0, 1, above=True)
        if self.gpus_per_worker < 1 and self.workers > 1:
            raise ConfigError(
                f"cluster.gpus_per_worker: {self.gpus_per_worker:g} of a GPU for each of {self.workers} "
                "workers; NCCL wants whole ones, so set it to 1, or cluster.workers to 1"
            )
        _require_labels("cluster.node_labels", self.node_labels)
        require("cluster.max_failures", self.max_failures, 0)
        require("cluster.timeout_seconds", self.timeout_seconds, 10)
        require("cluster.hang_seconds", self.hang_seconds, 0)
        require("cluster.min_workers", self.min_workers, 0)
        require("cluster.resize_seconds", self.resize_seconds, 1)
        for word in self.environment:
            name, equals, _ = word.partition("=")
            if not (name.isidentifier() and equals):
                raise ConfigError(f"cluster.environment: {word!r} is no variable; write NAME=value")
        if self.workers and self.min_workers > self.workers:
            raise ConfigError(
                f"cluster.min_workers: {self.min_workers} is above cluster.workers = {self.workers}"
            )


@dataclass
class ReportConfig:
    """What the closing report shows."""

    enabled: bool = knob(True, "write report.html at the end")
    images: int = knob(4, "held-out pictures drawn before and after")
    questions: int = knob(200, "held-out questions asked before and after")
    draw_iterations: int = knob(0, "decoding steps of a drawing; 0 = the family's default")
    max_new_tokens: int = knob(32, "longest answer, tokens")

    def check(self) -> None:
        for key in ("images", "questions", "draw_iterations"):
            require(f"report.{key}", getattr(self, key), 0)
        require("report.max_new_tokens", self.max_new_tokens, 1)


@dataclass
class MetricsConfig:
    """What Prometheus is shown of a run (docs/metrics.md)."""

    port: int = knob(
        0,
        "of http://<address>:<port>/metrics on the cluster's head, or on this machine; k8s/monitoring and "
        "cluster.monitoring look at 9464; 0 = shown nowhere",
    )
    address: str = knob(
        "127.0.0.1", "where that port listens: 127.0.0.1 = only this machine can ask, 0.0.0.0 = any can"
    )

    def check(self) -> None:
        require("metrics.port", self.port, 0, 65535)
        try:
            ipaddress.ip_address(self.address)
        except ValueError as error:
            raise ConfigError(
                f"metrics.address: {self.address!r} is no IP address; write 127.0.0.1, or 0.0.0.0 for all"
            ) from error


@dataclass
class RunConfig:
    """One post-training run.

    A run with the same `name` and `storage_path` is continued, not started again.
    """

    name: str = knob("", "folder of the run below storage_path; empty = one made of the date")
    seed: int = knob(0, "of weights, order and noise")
    storage_path: str = knob("outputs", "folder or bucket of all runs, like s3://bucket/runs")
    log_every: int = knob(10, "steps between two lines of numbers")
    s3: S3Options = field(default_factory=S3Options)
    family: FamilyConfig = field(default_factory=FamilyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def check(self) -> None:
        """Raise ConfigError for the first value that can't be used."""
        for part in (
            *("family", "data", "teachers", "labels", "weights", "train", "engine", "cluster", "metrics"),
            "report",
        ):
            getattr(self, part).check()
        self._check_labels()
        if self.weights.balance == "gradnorm" and self.engine.name != "torch":
            raise ConfigError(
                "weights.balance=gradnorm takes gradients of single tasks, which DeepSpeed takes for the end "
                "of a step; set engine=torch, or weights.balance to uncertainty or famo"
            )
        if self.data.geometry == "published" and not self.train.published_prompts:
            raise ConfigError(
                "data.geometry is `published`, where drawings start from another picture than questions; "
                "set train.published_prompts=true too"
            )
        require("seed", self.seed, 0, 2**32 - 1)
        require("log_every", self.log_every, 1)
        if any(character in self.name for character in "/\\ ") or self.name.startswith("."):
            raise ConfigError(
                f"name: {self.name!r} must be one word without slashes, spaces or a leading dot"
            )
        shares = self.train.accumulation * max(self.cluster.workers, 1)
        if self.train.batch_size < shares:
            raise ConfigError(
                f"train.batch_size: {self.train.batch_size} is less than workers x accumulation = {shares}"
            )

    @property
    def split_seed(self) -> int:
        """What chooses the pictures that are held out."""
        return self.seed if self.data.held_out_seed == -1 else self.data.held_out_seed

    def _check_labels(self) -> None:
        """Do the teachers, the way of labelling and the tasks go together?"""
        for task in (Task.DEPTH, Task.SEGMENTATION):
            teacher = getattr(self.teachers, task.value)
            if teacher.name == "none" and task in self.weights.active():
                raise ConfigError(
                    f"teachers.{task.value} is `none`, so nobody draws it; choose a teacher or set "
                    f"weights.{task.value}=0"
                )
            if teacher.is_model and self.labels.mode == "off" and task in self.weights.active():
                raise ConfigError(
                    f"labels.mode is `off`, but teachers.{task.value} is a model; use labels.mode=streaming"
                )
            if teacher.is_model and not self.data.group_by_image and task in self.weights.active():
                raise ConfigError(
                    f"data.group_by_image is false, but the labels of teachers.{task.value} are stored by "
                    "picture; set it to true"
                )


@dataclass
class GenerateConfig:
    """One picture, answered or drawn by a trained model. Either `task` or `question`."""

    checkpoint: str = knob("", "folder of a model (model/ of a run), local or s3://")
    image: str = knob("", "the picture, local or s3://; may be left out for a question")
    task: str = knob("", "what to draw: pixel, depth or segmentation")
    question: str = knob("", "what to ask; the answer is printed")
    out: str = knob("", "where the drawing goes, .png; empty = <task>.png")
    iterations: int = knob(0, "decoding steps; 0 = the family's default")
    guidance: float = knob(0.0, "classifier-free guidance scale; 1 = off, 0 = the family's default")
    temperature: float = knob(1.0, "of the sampler's noise")
    seed: int = knob(0, "another seed draws another picture")
    max_new_tokens: int = knob(128, "longest answer, tokens")
    device: str = knob("auto", "cpu, cuda, cuda:1, …; auto = a GPU where there is one")
    s3: S3Options = field(default_factory=S3Options)

    TASKS = (Task.PIXEL.value, Task.DEPTH.value, Task.SEGMENTATION.value)

    def check(self) -> None:
        if bool(self.task) == bool(self.question):
            both = "both are given" if self.task else "neither is given"
            raise ConfigError(
                f'task, question: {both}; write task=depth to draw, or question="What is it?" to ask'
            )
        if self.task:
            require_choice("task", self.task, self.TASKS)
        if not self.checkpoint:
            raise ConfigError(
                "checkpoint is empty; give the folder of a model, like checkpoint=outputs/first/model"
            )
        if self.task and not self.image:
            raise ConfigError("image is empty; give the picture to draw from, like image=photo.jpg")
        if self.out and not self.out.endswith(".png"):
            raise ConfigError(f"out: {self.out!r} must end in .png")
        require("iterations", self.iterations, 0)
        require("guidance", self.guidance, 0)
        require("temperature", self.temperature, 0)
        require("seed", self.seed, 0, 2**32 - 1)
        require("max_new_tokens", self.max_new_tokens, 1)


@dataclass
class EvaluateConfig:
    """Benchmarks on a checkpoint, or on answers that are there already; or stored results side by side."""

    benchmarks: list[str] = field(
        default_factory=list,
        metadata={"help": "names, like [MMVP,VSR-zeroshot]; empty = all whose files are there"},
    )
    checkpoint: str = knob(
        "", "folder of a model (model/ of a run), local or s3://; it answers `data`, draws `drawings`"
    )
    data: str = knob("", "folder or URL of the benchmarks' files, NAME.tsv as VLMEvalKit has them")
    drawings: str = knob(
        "",
        "data set whose pictures a checkpoint draws again, with depth and boundaries; none of its training",
    )
    pictures: int = knob(64, "of `drawings`: its first ones")
    draw_iterations: int = knob(0, "decoding steps of a drawing; 0 = the family's own")
    predictions: str = knob(
        "", "instead of a checkpoint: answers to score, a file or folder of NAME.tsv, .json or .xlsx"
    )
    page: list[str] = field(
        default_factory=list,
        metadata={"help": "instead of both: earlier `out` folders to put side by side, like [base,trained]"},
    )
    out: str = knob("outputs/evaluation", "folder or URL for answers, results and results.html")
    name: str = knob("", "of the row on the page; empty = where the checkpoint or the answers lie")
    matcher: str = knob(
        "paper_era_2025_08",
        "version of the official rules for reading answers: legacy_2024, paper_era_2025_08 or head_2026_06",
    )
    instruction: str = knob(
        "", "put behind multiple-choice questions; changes scores, and is named on the page"
    )
    max_new_tokens: int = knob(
        0, "longest answer; 0 = the benchmark's own, 32 to 128; 1024 in the published evaluation"
    )
    strict: bool = knob(
        False, "read tables as they stand; else like the official tool, where options such as None vanish"
    )
    part_rows: int = knob(64, "questions stored together: what a crash may cost each actor")
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    pool: PoolConfig = field(default_factory=lambda: PoolConfig(batch_size=32))
    s3: S3Options = field(default_factory=S3Options)

    MATCHERS = ("legacy_2024", "paper_era_2025_08", "head_2026_06")

    def check(self) -> None:
        given = [key for key in ("checkpoint", "predictions", "page") if getattr(self, key)]
        if len(given) != 1:
            raise ConfigError(
                f"checkpoint, predictions, page: {' and '.join(given) or 'none'} given; name a model to ask, "
                "answers to score, or folders of results to show"
            )
        if self.checkpoint and not (self.data or self.drawings):
            raise ConfigError(
                "data is empty; give the folder with the benchmarks' files, like data=benchmarks, or drawings"
            )
        if self.drawings and not self.checkpoint:
            raise ConfigError("drawings needs a model that draws; give checkpoint=outputs/latest/model")
        if not self.out:
            raise ConfigError("out is empty; give the folder for results, like out=outputs/evaluation")
        require_choice("matcher", self.matcher, self.MATCHERS)
        require("max_new_tokens", self.max_new_tokens, 0)
        require("part_rows", self.part_rows, 1)
        require("pictures", self.pictures, 2)
        require("draw_iterations", self.draw_iterations, 0)
        self.teachers.check()
        self.pool.check("pool")


@dataclass
class ExportConfig:
    """A model from one layout on disk to another."""

    layout: str = knob("published", "what to write: published (flat files) or pretrained (our folder)")
    out: str = knob("", "folder to write, local or s3://")
    checkpoint: str = knob("", "for published: folder of a model (model/ of a run), local or s3://")
    weights: str = knob("", "for pretrained: the published weights; these five may lie on the hub (org/name)")
    language_weights: str = knob("", "for pretrained: as in family.language_weights of a run")
    diffusion_weights: str = knob("", "for pretrained: as in family.diffusion_weights of a run")
    vision_weights: str = knob("", "for pretrained: as in family.vision_weights of a run")
    vae_weights: str = knob("", "for pretrained: the published picture autoencoder or tokenizer")
    tokenizer: str = knob("", "for pretrained: folder with tokenizer.json; empty = beside the weights")
    family: str = knob("harmon", "for pretrained: model family of the weights")
    variant: str = knob("harmon_1_5b", "for pretrained: size of the weights")
    overwrite: bool = knob(False, "replace a folder that isn't empty")
    s3: S3Options = field(default_factory=S3Options)

    def check(self) -> None:
        require_choice("layout", self.layout, ("published", "pretrained"))
        require_choice("family", self.family, FAMILIES)
        source = "checkpoint" if self.layout == "published" else "weights"
        given = getattr(self, source) or (source == "weights" and self.language_weights)
        for key, value in ((source, given), ("out", self.out)):
            if not value:
                raise ConfigError(f"{key} is empty; layout={self.layout} needs {source}, out")


@dataclass
class LabelConfig:
    """Run the teachers over a data set once and store what they say."""

    storage_path: str = knob("outputs", "folder or bucket of all runs; labels/ in it is the default store")
    s3: S3Options = field(default_factory=S3Options)
    data: DataConfig = field(default_factory=DataConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    family: FamilyConfig = field(default_factory=FamilyConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def check(self) -> None:
        for part in ("data", "teachers", "labels", "family", "cluster", "metrics"):
            getattr(self, part).check()
        if self.labels.mode != "streaming":
            raise ConfigError(f"labels.mode: {self.labels.mode!r} labels nothing; leave it out")
        if not self.data.group_by_image:
            raise ConfigError("data.group_by_image is false, but labels are stored by picture; leave it true")


def to_plain(config: Any) -> dict[str, Any]:
    """Plain nested values, keys and all."""
    return dataclasses.asdict(config)


def redacted(config: Any) -> dict[str, Any]:
    """`to_plain` without secrets: what is written beside checkpoints."""
    return _redact(to_plain(config))


def _redact(plain: dict[str, Any]) -> dict[str, Any]:
    hidden = ("access_key", "secret_key")
    return {
        key: _redact(value) if isinstance(value, dict) else REDACTED if value and key in hidden else value
        for key, value in plain.items()
    }


def from_plain(plain: dict[str, Any]) -> RunConfig:
    """Inverse of `to_plain`; raises ConfigError for unknown keys."""
    return _build(RunConfig, plain, "")


def _build(cls: type, plain: dict[str, Any], path: str) -> Any:
    kinds = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in plain.items():
        if key not in kinds:
            raise ConfigError(f"unknown key {path + key!r}{suggest(key, kinds)}")
        default: Any = kinds[key].default_factory
        nested = default if isinstance(default, type) and dataclasses.is_dataclass(default) else None
        values[key] = _build(nested, value, f"{path}{key}.") if nested else value
    return cls(**values)
