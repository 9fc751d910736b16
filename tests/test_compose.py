"""What is typed on a command line: understood, or refused in one sentence that says what was meant."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from unimrg import compose as module
from unimrg.compose import compose, config_folder, run_command
from unimrg.config import ExportConfig, GenerateConfig, RunConfig, knob
from unimrg.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def run(
    *words: str, main=lambda config: None, name: str = "train", schema: type = RunConfig
) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run_command(main, name, schema, "Does a thing.", ["python -m unimrg.train seed=1"], words)
    return status, out.getvalue(), err.getvalue()


PRESETS = ", ".join(sorted(path.stem for path in (config_folder() / "family").glob("*.yaml")))
REFUSED = {
    "train.stepz=5": "unknown key 'train.stepz'; did you mean 'train.steps'?",
    "steps=5": "unknown key 'steps'; did you mean 'train.steps'?",
    "trian=5": "unknown key 'trian'; did you mean 'train'?",
    "nonsense=5": "unknown key 'nonsense'; --help lists all keys",
    "hydra.run.dir=x": "unknown key 'hydra.run.dir'; --help lists all keys",
    "family=harmonn": "family=harmonn: unknown; did you mean 'harmon'?",
    "family=x": f"family=x: unknown; choose from {PRESETS}",
    "family={variant: tiny}": f"family={{variant: tiny}}: unknown; choose from {PRESETS}",
    "train.steps=many": "train.steps: 'many' is not an integer",
    "train.steps=1.5": "train.steps: '1.5' is not an integer",
    "train.steps=": "train.steps: '' is not an integer",
    "train.steps=null": "train.steps: 'null' is not an integer",
    "train.steps=[1]": "train.steps: '[1]' is not an integer",
    "train.steps=1,2": "train.steps=1,2: one value is wanted; a list is written [a,b]",
    "train.learning_rate=fast": "train.learning_rate: 'fast' is not a number",
    "data.group_by_image=maybe": "data.group_by_image: 'maybe' is not true or false",
    "train.betas=0.9": "train.betas: '0.9' is not a list of numbers, like [1,2]",
    "train.betas=[a,b]": "train.betas: '[a,b]' is not a list of numbers, like [1,2]",
    "train.betas=[0.9": "train.betas=[0.9: the value can't be read; put quotes around it, or close a bracket",
    "train.betas=[0.9]": "train.betas: [0.9] must be two numbers, like [0.9,0.95]",
    "family.freeze=llm": "family.freeze: 'llm' is not a list, like [a,b]",
    "train={stepz: 5}": "unknown key 'train.stepz'; did you mean 'train.steps'?",
    "train=5": "train=5: train is a section; set its keys, like train.steps=…",
    "+train.steps=5": "'+train.steps=5': the key exists already; write train.steps=5",
    "+train.stepz=5": "unknown key 'train.stepz'; did you mean 'train.steps'?",
    "~train.steps": "'~train.steps': no key can be removed; give train.steps another value",
    "train.steps": "'train.steps' has no value; write train.steps=…",
    "--train.steps=5": "unknown option '--train.steps=5'; write train.steps=5",
    "--verbose": "unknown option '--verbose'; write key=value, or --help",
    "-x": "unknown option '-x'; write key=value, or --help",
    "": "'' is not of the form key=value; --help lists all keys",
    "=5": "'=5' is not of the form key=value; --help lists all keys",
    "weights.depth=-1": "weights.depth: -1.0 is out of range; it must be at least 0",
    "weights.depth=nan": "weights.depth: nan is out of range; it must be at least 0",
    "engine.name=horovod": "engine.name: unknown value 'horovod'; choose from deepspeed, torch",
    "s3.region=${oc.env:NO_SUCH_VARIABLE}": "s3.region: Environment variable 'NO_SUCH_VARIABLE' not found",
    "data=llava": "data.manifest: a value is needed, like data.manifest=s3://bucket/llava_v1_5_mix665k.json",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_refused_and_how(word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose("train", [word], RunConfig)
    assert str(refused.value) == REFUSED[word]


def test_every_kind_of_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIMRG_TEST_KEY", "from-the-environment")
    words = [
        "family=harmon_1_5b",
        "weights=understanding_only",
        "++train.steps=7",
        "train.learning_rate=1e-4",
        "train.betas=[0.8,0.99]",
        "family.freeze=[llm,proj_in]",
        "data.group_by_image=false",
        "data.scenes={train: 4, test: 2}",
        "s3.secret_key=${oc.env:UNIMRG_TEST_KEY}",
        "family.weights=null",
    ]
    config = compose("train", words, RunConfig)
    assert type(config) is RunConfig and type(config.train) is type(RunConfig().train)
    assert (config.train.steps, config.train.learning_rate, config.train.betas) == (7, 1e-4, [0.8, 0.99])
    assert (config.family.variant, config.family.freeze) == ("harmon_1_5b", ["llm", "proj_in"])
    assert (config.data.scenes.train, config.data.scenes.test) == (4, 2)
    assert config.weights.pixel == 0 and config.s3.secret_key == "from-the-environment"
    assert config.family.weights == ""
    assert all(type(value) is list for value in (config.train.betas, config.family.freeze))


def test_the_last_word_counts() -> None:
    words = ["train.steps=1", "engine=zero3", "engine=torch", "train.steps=2"]
    config = compose("train", words, RunConfig)
    assert (config.train.steps, config.engine.name) == (2, "torch")


def test_a_single_value_beats_the_preset_wherever_it_stands() -> None:
    config = compose("train", ["train.learning_rate=0.5", "family=harmon_1_5b"], RunConfig)
    assert config.train.learning_rate == 0.5


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="$"), max_size=30))
def test_text_is_taken_literally(text: str) -> None:
    """Commas, brackets, equals signs, trailing blanks: a question or a path is not a program."""
    special = text in ("null", "???") or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\"")
    words = module._Words("generate", GenerateConfig).read([f"question={text}"])[1]
    assert words == [("question", text)] or special


def test_keys_may_be_called_like_groups_of_others() -> None:
    """`export` has plain keys `weights` and `family`; folders of that name lie in configs/."""
    words = ["layout=pretrained", "weights=a,b.pth", "vae_weights=v.ckpt", "family=harmon", "out=x"]
    assert compose("export", words, ExportConfig).weights == "a,b.pth"


@dataclass
class Inner:
    size: int = knob(1, "of it")


@dataclass
class Run:
    """A run."""

    inner: Inner = field(default_factory=Inner)
    rate: float = 0.5


@dataclass
class Search:
    """A search over runs."""

    run: Run = field(default_factory=Run)
    trials: int = 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configs/ of its own: `search` nests `run`, whose preset `big` sets values outside its group."""
    (tmp_path / "preset").mkdir()
    (tmp_path / "run.yaml").write_text("defaults: [Run, {preset@_here_: small}, _self_]\n")
    (tmp_path / "search.yaml").write_text("defaults: [Search, run@run, _self_]\ntrials: 5\n")
    (tmp_path / "preset" / "small.yaml").write_text("# little\ninner: {size: 1}\n")
    (tmp_path / "preset" / "big.yaml").write_text("# much\ninner: {size: 9}\nrate: 0.1\n")
    monkeypatch.setattr(module, "config_folder", lambda: tmp_path)
    return tmp_path


def test_files_nest(folder: Path) -> None:
    config = compose("search", ["preset=big", "run.rate=0.2"], Search)
    assert config == Search(Run(Inner(9), 0.2), 5)
    assert compose("run", ["preset=big"], Run) == Run(Inner(9), 0.1)
    with pytest.raises(ConfigError, match=r"unknown key 'rate'; did you mean 'run\.rate'"):
        compose("search", ["rate=1"], Search)


def test_broken_files_are_named(folder: Path) -> None:
    (folder / "preset" / "big.yaml").write_text("inner: {sise: 9}\n")
    with pytest.raises(
        ConfigError, match=r"preset/big\.yaml: unknown key 'inner\.sise'; did you mean 'inner\.size'"
    ):
        compose("run", ["preset=big"], Run)
    (folder / "preset" / "big.yaml").write_text("inner: {size: nine}\n")
    with pytest.raises(ConfigError, match=r"preset/big\.yaml: inner\.size: 'nine' is not an integer"):
        compose("run", ["preset=big"], Run)
    (folder / "run.yaml").write_text("defaults: [Run\n")
    with pytest.raises(ConfigError, match=r"run\.yaml is no YAML"):
        compose("run", [], Run)
    (folder / "run.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no run\.yaml"):
        compose("run", [], Run)


def test_exit_statuses() -> None:
    def interrupted(config: RunConfig) -> None:
        raise KeyboardInterrupt

    def refusing(config: RunConfig) -> None:
        raise ConfigError("two\n  lines")

    def broken(config: RunConfig) -> None:
        raise RuntimeError("a mistake")

    assert run() == (0, "", "")
    assert run(main=lambda config: 3)[0] == 3
    assert run(main=interrupted)[0] == 130
    assert run(main=refusing) == (2, "", "error: two lines\n")
    assert run("train.stepz=1") == (
        2,
        "",
        "error: unknown key 'train.stepz'; did you mean 'train.steps'?\n",
    )
    with pytest.raises(RuntimeError, match="a mistake"):
        run(main=broken)


def test_help_shows_every_key_with_the_values_of_this_line() -> None:
    status, text, _ = run("family=harmon_1_5b", "--help", "s3.secret_key=hush", "train.steps=77")
    assert status == 0
    keys = [key for key, kind in module._keys(RunConfig) if not hasattr(kind, "__dataclass_fields__")]
    for key in keys:
        assert f"\n  {key}=" in text, key
    assert "family.variant=harmon_1_5b" in text and "train.steps=77" in text and "hush" not in text
    for option in ("family=harmon_0_5b", "data=llava", "teachers=depth_anything_sam", "engine=zero3"):
        assert f"\n  {option} " in text
    assert "python -m unimrg.train seed=1" in text and text.startswith("Does a thing.")
    assert max(len(line) for line in text.splitlines()) <= 125


def test_help_works_where_values_are_still_to_be_given() -> None:
    status, text, _ = run("-h", "data=llava")
    assert status == 0 and "data.manifest=???" in text


def test_cfg_prints_yaml_without_secrets() -> None:
    status, text, _ = run("--cfg", "s3.secret_key=hush", "s3.access_key=me", "family=harmon_0_5b")
    assert status == 0 and "hush" not in text
    plain = yaml.safe_load(text)
    assert plain["s3"] == {
        "endpoint": "",
        "region": "",
        "access_key": "(redacted)",
        "secret_key": "(redacted)",
    }
    assert plain["family"]["variant"] == "harmon_0_5b"
    assert run("--cfg", "train.steps=0")[0] == 2


def test_nothing_is_written_and_logging_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handlers, level = list(logging.root.handlers), logging.root.level
    compose("train", ["seed=1"], RunConfig)
    assert list(tmp_path.iterdir()) == []
    assert (logging.root.handlers, logging.root.level) == (handlers, level)


@pytest.mark.parametrize("flag", ["--help", "--cfg"])
def test_a_reader_may_stop_early(flag: str) -> None:
    """As `head` does: the other end of the pipe is closed before anything is written."""
    kept, written = os.pipe()
    os.close(kept)
    command = [sys.executable, "-m", "unimrg.train", flag]
    with os.fdopen(written, "w") as closed:
        done = subprocess.run(
            command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_quick() -> None:
    """It loads neither torch nor Ray, from any folder; the time has room for a busy machine."""
    script = """
import sys
from unimrg.generate import main, GenerateConfig, run_command
status = run_command(main, "generate", GenerateConfig, "", [], ["--help"])
loaded = {"torch", "transformers", "ray", "deepspeed", "pyarrow"} & set(sys.modules)
sys.exit(f"loaded {loaded}" if loaded else status)
"""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 20
