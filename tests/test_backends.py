"""The attention backend is chosen once, proven before it is used, and named with the reason."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention_cases import CPU, varlen_reference
from tests.engine_runs import train_config
from tests.families import SIDE, fresh_model, processor
from tests.tiny_harmon import random_sample
from unimrg import attention, backends
from unimrg.attention import flash_function
from unimrg.backends import HALF, MISSING, PREFERENCE, TRIAL, Choice, choose_attention, obstacle, trial
from unimrg.config import EngineConfig
from unimrg.engine import make_engine
from unimrg.errors import ConfigError, MissingExtraError
from unimrg.layouts import LAYOUTS
from unimrg.loop import train_step
from unimrg.sample import Task

GPU = torch.device("cuda", 0)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with a GPU on which the named backends can't be used, and why."""

    def build(**obstacles: str) -> None:
        monkeypatch.setattr(backends, "obstacle", lambda name, device, dtype: obstacles.get(name, ""))
        monkeypatch.setattr(backends, "_source", lambda device: "flash_attn_interface")

    return build


def fresh(wanted: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The choice, not one of another test."""
    return choose_attention.__wrapped__(wanted, device, dtype)


# -- the order -----------------------------------------------------------------------------------------------


def test_every_backend_has_a_layout_and_a_knob() -> None:
    assert set(PREFERENCE) == set(LAYOUTS)
    for name in ("auto", *PREFERENCE):
        EngineConfig(attention=name).check()
    with pytest.raises(ConfigError, match="did you mean 'flash_attn'"):
        EngineConfig(attention="flash_attention").check()


@pytest.mark.parametrize(
    ("obstacles", "line"),
    [
        ({}, "flash_attn (from flash_attn_interface)"),
        ({"flash_attn": MISSING}, "varlen (flash_attn isn't installed)"),
        ({"flash_attn": MISSING, "varlen": "is off"}, "flex (flash_attn isn't installed; varlen is off)"),
        (
            {"flash_attn": MISSING, "varlen": "is off", "flex": "fails here: gcc"},
            "sdpa (flash_attn isn't installed; varlen is off; flex fails here: gcc)",
        ),
    ],
)
def test_auto_takes_the_first_that_works(
    fleet: Callable[..., None], obstacles: dict[str, str], line: str
) -> None:
    fleet(**obstacles)
    assert [str(fresh("auto", GPU, dtype)) for dtype in HALF] == [line] * 2


def test_auto_without_a_gpu_or_without_half_precision_is_sdpa(fleet: Callable[..., None]) -> None:
    fleet()
    assert str(fresh("auto", CPU, torch.bfloat16)) == "sdpa (the one for the CPU)"
    assert str(fresh("auto", GPU, torch.float32)) == "sdpa (the one for float32)"


def test_the_choice_is_made_once() -> None:
    assert choose_attention("auto", CPU, torch.float32) is choose_attention("auto", CPU, torch.float32)


# -- what is wanted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash_attn", "varlen", "flex"])
def test_wanting_a_gpu_s_backend_on_the_cpu(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_attention(name, CPU, torch.float32)
    assert str(refused.value) == (
        f"engine.attention: {name} trains on CUDA GPUs only, not on the CPU; use auto, which takes what works"
    )


@pytest.mark.parametrize("name", ["flash_attn", "varlen"])
def test_wanting_a_kernel_in_float32(name: str) -> None:
    assert obstacle(name, GPU, torch.float32) == "takes bfloat16 or float16, not float32"


def test_wanting_what_is_not_installed(fleet: Callable[..., None]) -> None:
    fleet(flash_attn=MISSING)
    with pytest.raises(MissingExtraError) as refused:
        fresh("flash_attn", GPU, torch.bfloat16)
    assert str(refused.value) == "engine.attention=flash_attn needs flash-attn: pip install flash-attn"


def test_wanting_what_works(fleet: Callable[..., None]) -> None:
    assert str(choose_attention("sdpa", CPU, torch.float32)) == "sdpa (set by engine.attention)"
    fleet()
    edition = "flash_attn (set by engine.attention, from flash_attn_interface)"
    assert str(fresh("flash_attn", GPU, torch.bfloat16)) == edition


# -- editions of FlashAttention ------------------------------------------------------------------------------


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Modules by path and content, in place of any edition that is installed."""
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def write(files: dict[str, str]) -> None:
        for name in ("flash_attn", "flash_attn_interface"):
            if not any(path.startswith((f"{name}/", f"{name}.")) for path in files):
                monkeypatch.setitem(sys.modules, name, None)  # importing it finds nothing
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content)

    return write


KERNEL = "def flash_attn_varlen_func(): return {!r}\n"


def test_each_gpu_has_its_edition(packages: Callable[..., None]) -> None:
    packages(
        {
            "flash_attn/__init__.py": KERNEL.format("second"),
            "flash_attn_interface.py": KERNEL.format("third"),
            "flash_attn/cute.py": KERNEL.format("fourth"),
        }
    )
    found = {capability: flash_function(capability)() for capability in (8, 9, 10, 12)}
    assert found == {8: "second", 9: "third", 10: "fourth", 12: "second"}


def test_the_fourth_edition_alone(packages: Callable[..., None]) -> None:
    """It leaves the package without a kernel of its own."""
    packages({"flash_attn/cute.py": KERNEL.format("fourth")})
    assert flash_function(9)() == "fourth"
    with pytest.raises(ModuleNotFoundError):
        flash_function(8)


def test_no_edition_at_all(packages: Callable[..., None]) -> None:
    packages({})
    with pytest.raises(ModuleNotFoundError):
        flash_function(9)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("import flash_attn_2_kernels", "flash_attn_interface lacks flash_attn_2_kernels"),
        ("raise ImportError('undefined symbol: _ZN')", "undefined symbol: _ZN"),
    ],
)
def test_an_edition_that_does_not_load(packages: Callable[..., None], content: str, said: str) -> None:
    """Installed for another torch, say: that is no missing package."""
    packages({"flash_attn_interface.py": content})
    with pytest.raises(ImportError, match=said) as failed:
        flash_function(9)
    assert not isinstance(failed.value, ModuleNotFoundError)


# -- the trial -----------------------------------------------------------------------------------------------


def test_the_trial_holds_every_kind_of_segment() -> None:
    segments = TRIAL.segments
    assert any(one.causal and one.query_length < one.key_length for one in segments)
    assert any(one.causal and one.query_length == one.key_length for one in segments)
    assert any(not one.causal and len(one.keys) > 1 for one in segments)
    assert any(one.query_length == 1 for one in segments)


def ungrouped(query: Tensor, key: Tensor, value: Tensor, group: Any, scale: float) -> Tensor:
    """Deals the key heads out one by one, as some do."""
    repeats = query.shape[1] // key.shape[1]
    return varlen_reference()(query, key.repeat(1, repeats, 1), value.repeat(1, repeats, 1), group, scale)


def without_a_number(*arguments: Any) -> Tensor:
    return varlen_reference()(*arguments) * torch.nan


def without_value_gradients(query: Tensor, key: Tensor, value: Tensor, group: Any, scale: float) -> Tensor:
    return varlen_reference()(query, key, value.detach() + 0 * value, group, scale)


def without_a_backward_pass(*arguments: Any) -> Tensor:
    return varlen_reference()(*arguments).detach()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_kernel_that_works_passes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", varlen_reference)
    assert trial("varlen", CPU, dtype) == ""
    assert trial("sdpa", CPU, dtype) == ""


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (varlen_reference("top left"), "is off by"),
        (ungrouped, "is off by"),
        (without_value_gradients, "is off by"),
        (without_a_number, "is off by nan"),
        (without_a_backward_pass, "fails here: "),
    ],
    ids=["top left", "ungrouped", "value gradients", "nan", "no backward"],
)
def test_a_kernel_that_is_wrong_fails(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor], said: str
) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", lambda: kernel)
    assert trial("varlen", CPU, torch.float32).startswith(said)


def test_this_torch_has_no_flash_attention_for_the_cpu() -> None:
    """The real one, where it can't run: a reason instead of an error."""
    assert trial("varlen", CPU, torch.bfloat16).startswith("fails here: ")


# -- from the choice to the step -----------------------------------------------------------------------------


def test_an_engine_refuses_what_does_not_work_here() -> None:
    config = EngineConfig(name="torch", attention="varlen")
    with pytest.raises(ConfigError, match=r"engine\.attention: varlen"):
        make_engine(fresh_model("harmon"), train_config(1), config, CPU)


def test_the_step_runs_on_the_engine_s_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches reach the model with their plans laid out for it; the losses are those of SDPA."""
    monkeypatch.setattr(attention, "varlen_kernel", varlen_reference)
    batch = processor("harmon")([random_sample(np.random.default_rng(0), SIDE)])
    sums = {}
    for name in ("sdpa", "varlen"):
        engine = make_engine(fresh_model("harmon"), train_config(1), EngineConfig(name="torch"), CPU)
        assert engine.attention == "sdpa"
        engine.attention = name
        ran: list[str] = []
        layouts = {key: _counted(ran, key, layout) for key, layout in LAYOUTS.items()}
        with monkeypatch.context() as patch:
            patch.setattr("unimrg.plan.LAYOUTS", layouts)
            step = dataclasses.replace(batch, plan=dataclasses.replace(batch.plan))
            sums[name], _, _ = train_step(engine, [step], dict.fromkeys(Task, 1.0))
        assert ran == [name]
    for task, want in sums["sdpa"].items():
        torch.testing.assert_close(sums["varlen"][task], want, rtol=1e-5, atol=1e-5)


def _counted(ran: list[str], name: str, layout: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        ran.append(name)
        return layout(*arguments)

    return counted
