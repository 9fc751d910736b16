"""Adapters: training begins at the model itself, moves them alone, and ends in a plain model again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import families
from tests.engine_runs import Group, samples
from tests.tiny_harmon import micro, random_model, random_sample, tokenizer
from unimrg.config import FamilyConfig, LoraConfig
from unimrg.errors import ConfigError, MissingExtraError
from unimrg.families.base import Family
from unimrg.families.harmon.checkpoint import WEIGHTS, from_folder, save_published
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.processor import HarmonProcessor
from unimrg.lora import adapt, merged, save_adapter
from unimrg.sample import Task

TASKS = tuple(Task)
LLM = "llm.model.layers.{}.{}"
PROJECTIONS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


VALUES = [LLM.format(number, "self_attn.v_proj") for number in range(2)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def adapted(config: LoraConfig, tasks: tuple[Task, ...] = TASKS, freeze: tuple[str, ...] = ()) -> Harmon:
    model = random_model(micro())
    model.freeze(freeze, tasks)
    adapt(model, config, tasks, seed=0)
    return model.train()


def moved(config: LoraConfig) -> Harmon:
    """As after some training: adapters that change what the model does."""
    model = adapted(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def losses(model: Harmon) -> dict[Task, float]:
    processor = HarmonProcessor(micro(), tokenizer(), TASKS)
    with torch.no_grad():
        return {task: loss.sum.item() for task, loss in model(processor(samples(0))).items()}


def trained(model: Harmon) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# -- what is trained -----------------------------------------------------------------------------------------


def test_training_begins_at_the_model_itself() -> None:
    plain = losses(random_model(micro()).train())
    assert losses(adapted(LoraConfig(rank=3))) == plain
    assert losses(moved(LoraConfig(rank=3))) != plain


def test_adapters_are_a_function_of_the_seed_and_disturb_no_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = random_model(micro())
    torch.manual_seed(5)
    adapt(model, LoraConfig(rank=2), TASKS, seed=0)
    assert torch.equal(torch.rand(1), expected)
    same = adapted(LoraConfig(rank=2)).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())


def test_only_adapters_of_the_language_model_and_the_other_parts_train() -> None:
    before = random_model(micro())
    before.freeze((), TASKS)
    outside = {name for name in trained(before) if not name.startswith("llm.")}
    layers = [LLM.format(number, name) for number in range(2) for name in PROJECTIONS]
    adapters = {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    assert trained(adapted(LoraConfig(rank=2))) == outside | adapters
    frozen = trained(adapted(LoraConfig(rank=2), freeze=("llm", "mar_encoder", "mar_decoder")))
    assert adapters <= frozen and all(name.startswith(("llm.", "proj_", "mar.fake")) for name in frozen)
    norms = {"llm.model.norm.weight", *(LLM.format(n, "input_layernorm.weight") for n in range(2))}
    also = trained(adapted(LoraConfig(rank=2, also_train=["model.norm", "input_layernorm"])))
    assert also == outside | adapters | norms
    assert trained(adapted(LoraConfig())) == trained(before)


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (["q_proj"], {LLM.format(n, "self_attn.q_proj") for n in range(2)}),
        (["llm.model.layers.1.*_proj"], {LLM.format(1, name) for name in PROJECTIONS}),
        (["llm.model.layers.0.mlp.up_proj", "v_proj"], {LLM.format(0, "mlp.up_proj"), *VALUES}),
        (
            ["attn.proj"],
            {
                "mar.encoder_blocks.0.attn.proj",
                "mar.encoder_blocks.1.attn.proj",
                "mar.decoder_blocks.0.attn.proj",
            },
        ),
    ],
)
def test_targets(targets: list[str], chosen: set[str]) -> None:
    model = adapted(LoraConfig(rank=2, targets=targets))
    assert {
        name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)
    } == chosen
    state = merged(model, model.state_dict())
    assert state.keys() == random_model(micro()).state_dict().keys()


def test_parts_that_no_task_uses_get_no_adapters() -> None:
    model = adapted(LoraConfig(rank=2, targets=["attn.proj"]), (Task.UNDERSTANDING,))
    names = {name for name in trained(model) if "lora_" in name}
    assert names and not any("decoder" in name for name in names)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(rank=2, targets=["q_prj"]), r"family\.lora\.targets: .* 'q_prj'; did you mean 'q_proj'"),
        (LoraConfig(rank=2, targets=["q_proj", "zebra"]), r"family\.lora\.targets: .* 'zebra'; choose from"),
        (LoraConfig(rank=2, targets=["vae.*"]), r"family\.lora\.targets: no linear layer is named 'vae"),
        (LoraConfig(rank=2, targets=["lm_head"]), r"family\.lora\.targets: llm\.lm_head shares its weight"),
        (LoraConfig(rank=2, also_train=["nrm"]), r"family\.lora\.also_train: 'nrm' is in no name of llm"),
    ],
)
def test_unknown_names_stop_and_change_nothing(config: LoraConfig, said: str) -> None:
    model = random_model(micro())
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match=said) as refused:
        adapt(model, config, TASKS, seed=0)
    assert "\n" not in str(refused.value) and list(model.state_dict()) == keys


def test_without_targets_of_its_own_a_family_wants_them_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Harmon, "LORA_TARGETS", ())
    with pytest.raises(ConfigError, match=r"family\.lora\.targets is empty"):
        adapted(LoraConfig(rank=2))


def test_peft_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"^family\.lora\.rank=2 needs peft: pip install"):
        adapted(LoraConfig(rank=2))
    adapted(LoraConfig())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(rank=-1), r"family\.lora\.rank: -1 is out of range"),
        (LoraConfig(rank=2, alpha=0), r"family\.lora\.alpha"),
        (LoraConfig(rank=2, dropout=1.0), r"family\.lora\.dropout"),
        (LoraConfig(targets=["q_proj"]), r"family\.lora\.targets is set but family\.lora\.rank is 0"),
    ],
)
def test_the_config_is_checked(config: LoraConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FamilyConfig(lora=config).check()


# -- a plain model again -------------------------------------------------------------------------------------


def test_the_merged_model_does_what_the_adapted_one_does(tmp_path: Path) -> None:
    model = moved(LoraConfig(rank=2, alpha=3.0))
    expected = losses(model)
    state = merged(model, model.state_dict())
    assert list(state) == list(random_model(micro()).state_dict())
    model.save_pretrained(tmp_path / "model", state_dict=state)
    plain = from_folder(tmp_path / "model")
    assert losses(plain.train()) == pytest.approx(expected, rel=1e-5)
    save_published(plain, tmp_path)
    published = load_file(tmp_path / WEIGHTS)
    untouched = random_model(micro()).state_dict()
    assert published.keys() == {k for k in untouched if not k.startswith(("vae.", "llm.lm_head"))}
    changed = {name for name, tensor in published.items() if not torch.equal(tensor, untouched[name])}
    assert changed == {f"{LLM.format(n, name)}.weight" for n in range(2) for name in PROJECTIONS}


def test_half_precision_is_rounded_once() -> None:
    model = moved(LoraConfig(rank=2))
    exact = merged(model, model.state_dict())
    rounded = merged(
        model, {k: v.bfloat16() if "lora_" not in k else v for k, v in model.state_dict().items()}
    )
    name = LLM.format(0, "mlp.up_proj.weight")
    assert rounded[name].dtype == torch.bfloat16
    assert (rounded[name].float() - exact[name]).abs().max() < 0.02


def test_the_adapter_alone_is_one_of_peft(tmp_path: Path) -> None:
    model = moved(LoraConfig(rank=2))
    assert save_adapter(model, model.state_dict(), tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = random_model(micro())
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    base.train()
    assert losses(base) == losses(model)
    loaded.merge_and_unload()
    assert losses(base) == pytest.approx(losses(model), rel=1e-5)


def test_a_plain_model_has_no_adapter(tmp_path: Path) -> None:
    model = random_model(micro())
    state = model.state_dict()
    same = merged(model, state)
    assert same.keys() == state.keys() and all(same[name] is state[name] for name in state)
    assert not save_adapter(model, state, tmp_path / "adapter") and not (tmp_path / "adapter").exists()


# -- the engines ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Group]:
    """Four steps in one process; in two, also those behind a checkpoint of the second."""
    folder = tmp_path_factory.mktemp("lora")
    saved = str(folder / "saved")
    two: dict[str, Any] = {
        "zero2": ("train_adapters", {"engine": "zero2", "save": saved}),
        "zero2-resumed": ("train_adapters", {"engine": "zero2", "begin": saved}),
        "zero3": ("train_adapters", {"engine": "zero3"}),
    }
    started = {
        1: Group(folder / "one", 1, {"torch": ("train_adapters", {"engine": "torch"})}),
        2: Group(folder / "two", 2, two),
    }
    return {ranks: group.wait() for ranks, group in started.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs().max().item()
        assert error <= 1e-6 + 1e-5 * tensor.abs().max().item(), f"{name} is off by {error}"


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_workers_train_what_one_does(groups: dict[int, Group], name: str) -> None:
    expected, found = groups[1].result("torch"), groups[2].result(name)
    for key in ("weights", "merged"):
        assert_close(found[key], expected[key])
    for mine, reference in zip(found["steps"], expected["steps"], strict=True):
        assert mine["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)


def test_the_base_stays_and_every_adapter_moves(groups: dict[int, Group]) -> None:
    initial = adapted(LoraConfig(rank=2, alpha=4.0)).state_dict()
    weights = groups[2].result("zero2")["weights"]
    still = {name for name, tensor in weights.items() if torch.equal(tensor, initial[name])}
    assert still == {
        n for n in initial if n.startswith(("vae.", "mar.class_emb.", "llm.")) and "lora_" not in n
    }
    assert groups[2].result("zero2")["merged"].keys() == random_model(micro()).state_dict().keys()


def test_a_resumed_run_is_the_undisturbed_run(groups: dict[int, Group]) -> None:
    whole, resumed = groups[2].result("zero2"), groups[2].result("zero2-resumed")
    assert_close(resumed["weights"], whole["weights"])
    assert [step["total"] for step in resumed["steps"]] == pytest.approx(
        [step["total"] for step in whole["steps"][2:]], rel=1e-5
    )


# -- every family --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_can_be_adapted_and_merged(name: str, tmp_path: Path) -> None:
    """It begins at the model itself, its language model alone is adapted, and merged it does the same."""
    rng = np.random.default_rng(0)
    batch = families.processor(name)([random_sample(rng, families.SIDE, i) for i in range(2)])

    def sums(model: Family) -> dict[Task, float]:
        with torch.no_grad():
            return {task: loss.sum.item() for task, loss in model.train()(batch).items()}

    plain = families.shared_model(name)
    model = families.fresh_model(name)
    model.freeze((), TASKS)
    adapt(model, LoraConfig(rank=2), TASKS, seed=0)
    assert sums(model) == sums(plain)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1)
    expected = sums(model)
    assert expected != sums(plain)
    state = merged(model, model.state_dict())
    other = families.fresh_model(name)
    other.load_state_dict(state)
    assert sums(other) == pytest.approx(expected, rel=1e-4)
    assert save_adapter(model, model.state_dict(), tmp_path)
    again = families.fresh_model(name)
    peft.PeftModel.from_pretrained(again, str(tmp_path))
    assert sums(again) == expected
