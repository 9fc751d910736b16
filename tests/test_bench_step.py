"""The step bench: what it compares gives the same losses and gradients, and costs what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import families
from tests.bench import step as bench
from tests.bench.presets import MIDDLE, MIDDLES, build
from tests.bench.recipes import REFERENCES, Padded, Pass, ours, reference
from tests.counting import counted
from tests.tiny_harmon import random_sample
from tests.tiny_showo import micro
from tests.tiny_showo import random_model as random_showo
from unimrg.families.base import Family
from unimrg.flops import Flops
from unimrg.sample import Sample

NAMES = tuple(REFERENCES)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def samples(turns: Sequence[int] = (1, 3, 2)) -> list[Sample]:
    """Rows of different lengths, so that there is padding."""
    rng = np.random.default_rng(0)
    return [random_sample(rng, families.SIDE, n, turns=number) for n, number in enumerate(turns)]


def tokenizer(name: str) -> Any:
    return families.tiny(name).tokenizer()


def outcome(model: Family, passes: Sequence[Pass]) -> tuple[float, dict[str, Tensor]]:
    """Sum of the passes' losses, and the gradients they leave."""
    model.zero_grad()
    total = 0.0
    for one in passes:
        loss = one.loss()
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(model: Family, one: Sequence[Pass], other: Sequence[Pass]) -> None:
    """Losses to 1e-5 and every gradient to 1e-5 of its largest number."""
    (loss, gradients), (wanted_loss, wanted) = outcome(model, one), outcome(model, other)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys() and len(wanted) > 20
    for name, gradient in gradients.items():
        close = (gradient - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max() + 1e-7
        assert close, f"{name}: {(gradient - wanted[name]).abs().max()} of {wanted[name].abs().max()}"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_both_recipes_do_the_same(name: str, recompute: bool) -> None:
    model = families.fresh_model(name).train()
    published = reference(name, model, tokenizer(name), samples())
    packed = ours(name, model, tokenizer(name), samples())
    assert len(published) == 4 and len(packed) == 1
    assert sum(one.tokens for one in published) > packed[0].tokens
    with bench.recomputing(model, recompute):
        assert_alike(model, published, packed)


def test_both_recipes_of_show_o_with_clip() -> None:
    model = random_showo(micro(clip=True)).train()
    made = tokenizer("showo")
    assert_alike(model, reference("showo", model, made, samples()), ours("showo", model, made, samples()))


@pytest.mark.parametrize("name", families.NAMES)
def test_our_ways_do_the_same(name: str) -> None:
    model = families.fresh_model(name).train()
    rng = np.random.default_rng(0)
    given = [random_sample(rng, families.SIDE, n, conversations=2) for n in range(2)]
    ways = bench.our_ways(name, model, tokenizer(name), given)
    for other in ("separate", "separate_rows", "from_codes"):
        assert_alike(model, ways[other].passes, ways["packed"].passes)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_costs_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2 % of torch's counter, which takes causal attention for whole rectangles."""
    square = property(lambda padded: padded.rows * padded.length**2)
    monkeypatch.setattr(Padded, "causal_pairs", square)
    model = families.fresh_model(name).train()
    way = bench.Way(reference(name, model, tokenizer(name), samples()), recompute=True)
    plain = sum((counted(one.loss) for one in way.passes), Flops())
    assert way.flops.forward == pytest.approx(plain.forward, rel=0.02)
    assert way.flops.backward == pytest.approx(plain.backward, rel=0.02)
    with bench.recomputing(model, True):
        twice = sum((counted(one.loss) for one in way.passes), Flops())
    # What stands outside the blocks isn't recomputed; of so small a head that is a good part.
    within = 0.15 if name == "harmon" else 0.04
    assert way.recomputed == pytest.approx(twice.total - plain.total, rel=within)


@pytest.mark.parametrize("name", MIDDLES)
def test_middle_presets_are_of_their_size(name: str) -> None:
    model, _ = build(name, MIDDLE, torch.device("meta"))
    assert 95e6 < sum(parameter.numel() for parameter in model.parameters()) < 105e6


# -- the command ---------------------------------------------------------------------------------------------


def told(words: str) -> dict[str, Any]:
    return bench.run(bench.parse(words.split()))


def test_it_times_both_recipes() -> None:
    found = told("--family harmon --batch-size 2 --repetitions 2 --peak-tflops 0.1")
    for name in ("reference", "ours"):
        way = found[name]
        assert way["seconds"] > 0 and way["peak_memory_bytes"] > 2**26
        assert way["tflops"] == pytest.approx(way["tflop"] / way["seconds"], rel=0.01)
        assert way["mfu"] == pytest.approx(way["tflops"] / 0.1, rel=0.01)
        assert sum(way["tflop_by_part"].values()) == pytest.approx(way["tflop"], rel=0.01)
    assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]
    assert found["reference"]["tflop_recomputed"] > 0 == found["ours"]["tflop_recomputed"]
    assert told("--recipe ours --batch-size 1 --repetitions 1")["ours"]["mfu"] is None


def test_it_counts_without_weights() -> None:
    """Harmon-1.5B at 512 pixels: about the 107.5 TFLOP a picture that the published recipe was counted at."""
    found = told("--preset harmon_1_5b --device meta --batch-size 16")
    whole = found["reference"]["tflop"] + found["reference"]["tflop_recomputed"]
    assert whole == pytest.approx(107.5, rel=0.03)
    assert found["flop_ratio"] == pytest.approx(whole / found["ours"]["tflop"], rel=0.001)
    assert found["flop_ratio"] > 2.6
    assert "seconds" not in found["ours"] and "ratio" not in found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--family janus", "use --recipe passes"),
        ("--preset 7b", "harmon has harmon_1_5b"),
        ("--recipe passes --device meta", "choose one"),
    ],
)
def test_what_it_refuses(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        told(words)
    assert said in capsys.readouterr().err
