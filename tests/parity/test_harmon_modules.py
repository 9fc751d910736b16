"""Harmon's modules against golden numbers, and their names and shapes against the published checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.parity.cases import BUNDLED, REACHED, REQUIRED, Case, assert_agrees
from tests.parity.harmon_config import mar_config, vae_config
from unimrg.families.harmon.config import VARIANTS
from unimrg.families.harmon.diffusion import DiffusionHead
from unimrg.families.harmon.mar import MAR
from unimrg.families.harmon.process import reverse_moments, tables, timestep_map
from unimrg.families.harmon.sampling import mask_schedule, tokens_to_predict
from unimrg.families.harmon.vae import KLVAE

Load = Callable[[str], Case]
CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", ["square", "rect"])
@torch.no_grad()
def test_vae_agrees(harmon_case: Load, shape: str) -> None:
    case = harmon_case("vae_encode_decode")
    vae = KLVAE(vae_config(case.config["vae"], case.config["vae_scale"]))
    case.load_into(vae)
    moments = vae.encode(case.inputs[f"pixel_{shape}"])
    got = {f"{shape}.moments": moments}
    for patch in case.config["patch_sizes"]:
        tokens = vae.tokenize(moments, patch)
        got[f"{shape}.tokens_p{patch}"] = tokens
        got[f"{shape}.decoded_p{patch}"] = vae.decode_tokens(tokens, patch)
    assert_agrees(got, case.outputs)


def mar_of(case: Case) -> MAR:
    mar = MAR(mar_config(case.config["mar"]))
    case.load_into(mar, "mar.")
    return mar


@pytest.mark.parametrize("at", ["native", "other"])
@torch.no_grad()
def test_mar_agrees(harmon_case: Load, at: str) -> None:
    case = harmon_case("mar_encoder")
    mar, grid = mar_of(case), tuple(case.config["grids"][at])
    tokens = case.inputs[f"{at}.tokens"].flatten(1, 2)
    nothing = torch.zeros(tokens.shape[:2])
    masks = {
        "clean": nothing,
        "masked": case.inputs[f"{at}.mask"],
        "all_masked": case.inputs[f"{at}.mask_all"],
    }
    got = {}
    for name, mask in masks.items():
        x_enc = mar.encode(tokens, grid, None if name == "clean" else mask)
        got[f"{at}.{name}.x_enc"] = x_enc
        got[f"{at}.{name}.dec_z"] = mar.decode(x_enc, mask, grid)
    assert_agrees(got, case.outputs)


@pytest.mark.parametrize("at", ["native", "other"])
@torch.no_grad()
def test_ragged_mar_agrees(harmon_case: Load, at: str) -> None:
    """Clean, masked and all masked pictures in one call give each its own golden numbers."""
    case = harmon_case("mar_encoder")
    mar, grid = mar_of(case), tuple(case.config["grids"][at])
    tokens = case.inputs[f"{at}.tokens"].flatten(1, 2)
    masks = [torch.zeros(tokens.shape[:2]), case.inputs[f"{at}.mask"], case.inputs[f"{at}.mask_all"]]
    cells = [row.logical_not().nonzero().flatten() for mask in masks for row in mask]
    rows = [tokens[i % len(tokens)][cell] for i, cell in enumerate(cells)]
    lengths = [len(cell) for cell in cells]
    x = mar.encode_ragged(torch.cat(rows), torch.cat(cells), lengths, grid)
    z = mar.decode_ragged(x, torch.cat(cells), lengths, grid)
    whole = x.split([mar.config.buffer_size + length for length in lengths])
    got = {}
    for i, name in enumerate(["clean", "masked", "all_masked"]):
        got[f"{at}.{name}.x_enc"] = torch.stack(whole[2 * i : 2 * i + 2])
        got[f"{at}.{name}.dec_z"] = z[2 * i : 2 * i + 2]
    assert_agrees(got, case.outputs)


def head_of(case: Case) -> DiffusionHead:
    head = DiffusionHead(mar_config(case.config["mar"]))
    case.load_into(head, case.config["weights_prefix"])
    return head


@torch.no_grad()
def test_training_loss_agrees(harmon_case: Load) -> None:
    case = harmon_case("diffloss")
    given = case.inputs
    mse, bits = head_of(case).row_losses(given["target"], given["z"], given["t"], given["noise"])
    rows, mask = mse + bits, given["mask"]
    got = {"mse_rows": mse, "vb_rows": bits, "loss_rows": rows}
    got |= {"loss_masked": (rows * mask).sum() / mask.sum(), "loss_unmasked": rows.mean()}
    assert_agrees(got, case.outputs)
    # Rows at t = 0 are a thousand times larger than the rest: hold every row to account on its own.
    torch.testing.assert_close(bits, case.outputs["vb_rows"], rtol=REQUIRED, atol=REACHED)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_reverse_step_agrees(harmon_case: Load, guidance: float) -> None:
    """One step of the shortened process; under guidance the conditional half is what counts."""
    case = harmon_case("diffloss")
    head, given = head_of(case), case.inputs
    rows, steps = len(given["gen.x"]) // (1 if guidance == 1.0 else 2), head.sampling_steps
    x, step, noise = given["gen.x"][:rows], given["gen.step"][:rows], given["gen.noise"][:rows]
    y = head.net.cond_embed(given["gen.z"]) + head.net.embed_times(
        timestep_map(steps, CPU)[given["gen.step"]]
    )
    output = head._guided(x, y, guidance)
    mean, log_variance, x0 = reverse_moments(x, *output.chunk(2, dim=-1), tables(steps, CPU).at(step))
    sample = head.reverse_step(x, output, step, noise, case.config["temperature"], steps)
    got = {"mean": mean, "log_variance": log_variance, "pred_xstart": x0, "sample": sample}
    prefix = f"gen.cfg{guidance:.0f}."
    assert_agrees(
        {prefix + name: tensor for name, tensor in got.items()},
        {name: tensor[:rows] for name, tensor in case.outputs.items() if name.startswith(prefix)},
    )


@torch.no_grad()
def test_sampler_agrees(harmon_case: Load) -> None:
    case = harmon_case("diffloss")
    given, config = case.inputs, case.config
    got = head_of(case).sample(
        given["gen.z"], config["cfg"], config["temperature"], given["loop.init_noise"], given["loop.noise"]
    )
    assert_agrees({"sample": got}, {"sample": case.outputs["loop.sample"][: len(got)]})


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_tables_agree(harmon_case: Load, steps: int) -> None:
    outputs, ours = harmon_case("diffloss").outputs, tables(steps, CPU)
    assert torch.equal(timestep_map(steps, CPU), outputs[f"table.{steps}.timestep_map"])
    got: dict[str, Tensor] = {
        "betas": ours.betas,
        "alphas_cumprod": ours.alphas_cumprod,
        "posterior_variance": ours.posterior_variance,
        "posterior_log_variance_clipped": ours.posterior_log_variance,
        "posterior_mean_coef1": ours.posterior_mean_x0,
        "posterior_mean_coef2": ours.posterior_mean_xt,
    }
    assert_agrees({f"table.{steps}.{name}": tensor for name, tensor in got.items()}, outputs, 1e-6)


def test_mask_schedule_agrees(harmon_case: Load) -> None:
    outputs = harmon_case("mask_schedule").outputs
    assert outputs
    for name, want in outputs.items():
        _, grid, iterations = name.split(".")
        rows, columns = (int(side) for side in grid.split("x"))
        length, count = rows * columns, int(iterations.removeprefix("iters"))
        assert mask_schedule(length, count) == want.tolist(), name
        assert sum(tokens_to_predict(length, count)) == length


@pytest.mark.parametrize("size", ["1_5b", "0_5b"])
def test_mar_has_the_published_keys(size: str) -> None:
    with torch.device("meta"):
        mar = MAR(VARIANTS[f"harmon_{size}"]().mar)
    published = json.loads((BUNDLED / "harmon" / "keys" / f"{size}.json").read_text())
    want = {name: shape for name, shape in published.items() if name.startswith("mar.")}
    assert {f"mar.{name}": list(tensor.shape) for name, tensor in mar.state_dict().items()} == want


def test_vae_has_the_published_keys() -> None:
    with torch.device("meta"):
        vae = KLVAE(VARIANTS["harmon_1_5b"]().vae)
    want = json.loads((BUNDLED / "harmon" / "keys" / "vae.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in vae.state_dict().items()} == want
