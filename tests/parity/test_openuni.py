"""OpenUni against golden numbers: every case at the tolerance that its README states."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.cases import BUNDLED, Case, load_case
from tests.parity.openuni_fixture import Drawn, Rows, build_model, draw, none_of, real
from unimrg.families.openuni import libraries
from unimrg.families.openuni.config import VARIANTS
from unimrg.families.openuni.generate import sample_latents
from unimrg.families.openuni.keys import to_original, to_transformers
from unimrg.families.openuni.model import OpenUni, to_bytes, vision_input
from unimrg.sample import Task

Load = Callable[[str], Case]
IMAGE_LOSSES = ("pixel", "depth", "segmentation")


@pytest.fixture(scope="module")
def golden(parity_dir: Path) -> Load:
    return lambda name: load_case(parity_dir / "openuni" / name)


def close(got: Tensor, want: Tensor, atol: float = 0.0, rtol: float = 0.0) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol, check_dtype=False)


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


# -- vision and understanding --------------------------------------------------------------------------------


@torch.no_grad()
def test_vision_features_agree(golden: Load) -> None:
    case = golden("vision_features")
    model, given, want = build_model(case), case.inputs, case.outputs
    tower = model.lmm.model.vision_tower
    agree = partial(close, atol=1e-5, rtol=1e-4)
    states = tower(given["pixel_values"], output_hidden_states=True).hidden_states
    agree(tower.embeddings(given["pixel_values"]), want["embeddings"])
    agree(states[1], want["vit_hidden_1"])
    agree(states[-1], want["vit_last_hidden"])
    grid = want["vit_last_hidden"][:, 1:].unflatten(1, (int((states[-1].shape[1] - 1) ** 0.5), -1))
    agree(
        model.lmm.model.pixel_shuffle(grid, case.config["chat"]["downsample_ratio"]), want["pixel_shuffled"]
    )
    for name in ("", "_interp"):
        features = model.lmm.get_image_features(given[f"pixel_values{name}"]).pooler_output
        agree(features, want[f"image_tokens{name}"])
    pixels = (given["pixel_values_src"] + 1) / 2
    agree(vision_input(pixels, model.config.vision_size), want["semantic_pixel_values"])
    agree(model.embed_pixels(pixels), want["semantic_image_tokens"])


def understanding(model: OpenUni, given: dict[str, Tensor], tiles: Tensor) -> tuple[Tensor, Rows]:
    """Loss of a chat batch, and its rows: tiles are consumed in order, dummy ones are dropped."""
    rows = Rows(model)
    pictures = model.lmm.get_image_features(tiles[given["image_flags"].flatten() == 1]).pooler_output
    context = (given["input_ids"] == model.config.lmm.image_token_id).sum(1) // model.config.picture_tokens
    ends = context.cumsum(0).tolist()
    shown = [list(range(end - int(n), end)) for end, n in zip(ends, context, strict=True)]
    rows.add(given, drawn=False, tiles=shown, labels=given["labels"])
    batch = rows.batch()
    hidden = model.states(batch, pictures)
    return model.text_loss(hidden, model.lmm.lm_head, batch).mean, rows


@torch.no_grad()
def test_understanding_agrees(golden: Load) -> None:
    case = golden("understanding")
    model, given, want = build_model(case), case.inputs, case.outputs
    seen: dict[str, Tensor] = {}
    model.lmm.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    model.lmm.model.language_model.register_forward_hook(
        lambda _, args, out: seen.update(hidden=out.last_hidden_state[0])
    )
    loss, rows = understanding(model, given, given["tiles"])
    assert len(rows.batch().label_index) == int(want["num_targets"])
    close(loss, want["loss"].squeeze(), rtol=1e-5)
    mask = given["attention_mask"]
    agree = partial(close, atol=2e-5, rtol=1e-4)
    agree(seen["embeds"], real(want["inputs_embeds"], mask))
    agree(seen["hidden"], real(want["last_hidden_state"], mask))
    agree(model.lmm.lm_head(seen["hidden"]), real(want["logits"], mask))


@torch.no_grad()
def test_greedy_answers_agree(golden: Load) -> None:
    case = golden("understanding")
    model, given, want = build_model(case), case.inputs, case.outputs["generated_ids"]
    tiles = (
        given["generate_input_ids"].eq(model.config.lmm.image_token_id).sum() // model.config.picture_tokens
    )
    pictures = model.lmm.get_image_features(given["tiles"][1 : 1 + tiles]).pooler_output
    embeds = model.lmm.get_input_embeddings()(given["generate_input_ids"])
    embeds[given["generate_input_ids"] == model.config.lmm.image_token_id] = pictures.flatten(0, 1)
    got = model.lmm.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=want.shape[1],
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(got, want)


# -- drawing -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_connector_agrees(golden: Load) -> None:
    case = golden("connector")
    model, queries, want = build_model(case), case.inputs["queries_hidden"], case.outputs
    agree = partial(close, atol=1e-5, rtol=1e-4)
    agree(model.connector.layers[0](queries), want["connector_layer_0"])
    agree(model.connector(queries), want["connector_out"])
    agree(model.projector(model.connector(queries)), want["prompt_embeds"])


def assert_drawn(model: OpenUni, got: Drawn, want: dict[str, Tensor]) -> None:
    """Every intermediate and the loss; rows of the case may be padded, ours aren't."""
    near, conditions = partial(close, atol=5e-5), partial(close, atol=2e-5)
    mask = want["llm_attention_mask"]
    assert torch.equal(got.batch.position_ids, real(want["position_ids"], mask))
    conditions(got.queries, want["queries_hidden"])
    conditions(model.connector(got.queries), want["connector_out"])
    conditions(got.conditions, want["prompt_embeds"])
    assert_flow(got, want)
    near(got.flow.velocity, want["model_pred"])


def assert_flow(got: Drawn, want: dict[str, Tensor]) -> None:
    assert torch.equal(got.timesteps, want["timesteps"])
    close(got.timesteps / 1000, want["sigmas"], rtol=1e-6)
    close(got.flow.noisy, want["noisy_latents"], atol=1e-5)
    close(got.flow.velocity, want["model_pred"], atol=5e-5)
    close(got.flow.error.mean(1), want["per_sample_loss"], rtol=1e-5)
    close(got.loss, want["loss"].squeeze(), rtol=1e-5)


@torch.no_grad()
def test_text_to_image_loss_agrees(golden: Load) -> None:
    case = golden("text_to_image_loss")
    model = build_model(case)
    got = draw(model, case.inputs, none_of(model), case.inputs["image_latents"])
    assert_drawn(model, got, case.outputs)


@torch.no_grad()
def test_flow_loss_with_query_and_key_norms_agrees(golden: Load) -> None:
    case = golden("flow_loss_qknorm")
    model, given, want = build_model(case), case.inputs, case.outputs
    timesteps = want["timesteps"]
    flow = model.flow(given["image_latents"], given["given_prompt_embeds"], timesteps, given["noise"])
    close(flow.noisy, want["noisy_latents"], atol=1e-5)
    close(flow.velocity, want["model_pred"], atol=5e-5)
    close(flow.error.mean(1), want["per_sample_loss"], rtol=1e-5)
    close(flow.error.mean(), want["loss"].squeeze(), rtol=1e-5)


def draw_about(model: OpenUni, given: dict[str, Tensor], task: str, pictures: Tensor) -> Drawn:
    mine = part(given, task)
    return draw(model, mine, pictures, model.encode_pixels(mine["pixel_values"]))


@torch.no_grad()
def test_image_to_image_losses_agree(golden: Load) -> None:
    case = golden("image_to_image_loss")
    model, given = build_model(case), case.inputs
    pictures = model.embed_pixels((given["pixel_values_src"] + 1) / 2)
    for task in IMAGE_LOSSES:
        want = part(case.outputs, task)
        got = draw_about(model, given, task, pictures)
        close(got.latents, want["target_latents"], atol=2e-5)
        assert_drawn(model, got, want)


@torch.no_grad()
def test_autoencoder_agrees(golden: Load) -> None:
    case = golden("vae")
    model = build_model(case)
    latents = model.encode_pixels(case.inputs["vae_pixel_values"])
    close(latents, case.outputs["latents_scaled"], atol=2e-5)
    close(model.decode_pixels(case.outputs["latents_scaled"]), case.outputs["reconstruction"], atol=2e-5)


# -- gradients -----------------------------------------------------------------------------------------------


def four_losses(model: OpenUni, given: dict[str, Tensor], drawings_see_gradients: bool) -> dict[str, Tensor]:
    """Understanding and the three drawings; the latter may look at the picture without a gradient."""
    asked = part(given, "und")
    losses = {"und": understanding(model, asked, asked["pixel_values"])[0]}
    pictures = model.embed_pixels((given["pixel_values_src"] + 1) / 2)
    if not drawings_see_gradients:
        pictures = pictures.detach()
    return losses | {task: draw_about(model, given, task, pictures).loss for task in IMAGE_LOSSES}


def assert_gradients(model: OpenUni, case: Case, norms: str, prefix: str) -> None:
    """Norms of all gradients and whole gradients of some, by their published names."""
    # Without a gradient are frozen parts, and biases that a softmax cancels.
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    want = case.config[norms]
    got = published(model, found)
    assert {name for name in got if got[name].norm() > 1e-6} <= set(want)
    for name, norm in want.items():
        assert float(got[name].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6), name
    total = torch.stack([g.norm() for g in found.values()]).norm()
    close(total, case.outputs[f"{prefix}grad_norm"].squeeze(), rtol=1e-4)
    for name, gradient in part(case.outputs, f"{prefix}grad").items():
        close(got[name], gradient, atol=1e-5, rtol=1e-3)


def published(model: OpenUni, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of all parameters by published name."""
    lmm = {n.removeprefix("lmm."): g for n, g in found.items() if n.startswith("lmm.")}
    rest = {name: gradient for name, gradient in found.items() if not name.startswith("lmm.")}
    return rest | {f"lmm.{name}": gradient for name, gradient in to_original(lmm).items()}


def test_gradients_agree_with_a_frozen_vision_tower(golden: Load) -> None:
    """Variant A: what the four tasks train."""
    case = golden("gradients")
    model = build_model(case)
    model.freeze(["vision", "mlp1"], list(Task))
    losses = four_losses(model, case.inputs, drawings_see_gradients=True)
    for name, loss in losses.items():
        close(loss, case.outputs[f"loss.{name}"].squeeze(), rtol=1e-5)
    total = torch.stack(list(losses.values())).sum()
    close(total, case.outputs["total_loss"].squeeze(), rtol=1e-5)
    total.backward()
    assert_gradients(model, case, "grad_norms", "")


def test_gradients_agree_in_the_published_first_stage(golden: Load) -> None:
    """Variant B: text to image, only queries, connector and projector are trained."""
    case = golden("gradients")
    model = build_model(case)
    model.freeze(["vision", "mlp1", "llm", "sana"], list(Task))
    given = part(case.inputs, "t2i")
    loss = draw(model, given, none_of(model), given["image_latents"]).loss
    close(loss, case.outputs["frozen.total_loss"].squeeze(), rtol=1e-5)
    loss.backward()
    assert_gradients(model, case, "grad_norms_frozen", "frozen.")


def test_gradients_agree_where_drawings_do_not_train_the_vision_tower(golden: Load) -> None:
    """Variant C: only questions reach it; ours may do otherwise, since one prefix serves all tasks."""
    case = golden("gradients")
    model = build_model(case)
    torch.stack(list(four_losses(model, case.inputs, False).values())).sum().backward()
    assert_gradients(model, case, "grad_norms_full", "full.")


# -- sampling ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["dpm", "edit_dpm", "euler"])
def test_sampling_agrees(golden: Load, name: str) -> None:
    case = golden("sampling")
    model, given, want = build_model(case), case.inputs, part(case.outputs, name)
    conditions = sampling_conditions(model, given, "edit_" if name == "edit_dpm" else "")
    close(conditions, want["prompt_embeds"], atol=2e-5)
    scheduler = scheduler_of(name, case.config["num_steps"])
    close(scheduler.sigmas, want["sigmas"], atol=1e-6)
    close(scheduler.timesteps, want["timesteps"])
    calls: list[tuple[Tensor, Tensor]] = []
    model.transformer.register_forward_hook(
        lambda _, args, out: calls.append((args[0], out[0])), with_kwargs=False
    )
    latents = sample_latents(
        model, conditions, given["initial_noise"], scheduler, guidance=case.config["cfg_scale"]
    )
    for step, (latents_in, velocity) in enumerate(calls):
        without, conditional = velocity.chunk(2)
        close(latents_in.chunk(2)[0], want["latents_in"][step], atol=5e-4)
        close(without, want["velocity_uncond"][step], atol=2e-4)
        close(conditional, want["velocity_cond"][step], atol=2e-4)
    assert len(calls) == case.config["num_steps"]
    close(latents, want["latents"], atol=5e-4)
    pixels = model.decode_pixels(latents)
    close(pixels, want["image"], atol=1e-3)
    assert (to_bytes(pixels).permute(0, 3, 1, 2).int() - want["image_uint8"].int()).abs().max() <= 1


def sampling_conditions(model: OpenUni, given: dict[str, Tensor], prefix: str) -> Tensor:
    """Of the case's prompts, the unconditional half first; all show the one source picture, if any."""
    rows = Rows(model)
    mine = {name: given[f"{prefix}{name}"] for name in ("input_ids", "attention_mask")}
    pictures = none_of(model)
    if prefix:
        pictures = model.embed_pixels((given[f"{prefix}pixel_values_src"] + 1) / 2)
    tiles = [[0]] * len(mine["input_ids"]) if prefix else None
    rows.add(mine, drawn=True, tiles=tiles)
    batch = rows.batch()
    conditions = model.conditions(model.states(batch, pictures), batch)
    conditional, without = conditions.chunk(2)
    return torch.cat([without, conditional])


def scheduler_of(name: str, steps: int) -> object:
    if name == "euler":
        scheduler = libraries.diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        scheduler = libraries.dpm_solver(3.0)
    scheduler.set_timesteps(steps)
    return scheduler


# -- keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["b_512", "l_512", "l_1024"])
def test_full_size_has_exactly_the_published_keys(size: str) -> None:
    with torch.device("meta"):
        model = OpenUni(VARIANTS[f"openuni_{size}"]())
    folder = BUNDLED / "openuni" / "keys"
    want = json.loads((folder / f"{size.replace('1024', '512')}.json").read_text())
    if size == "l_1024":
        want |= json.loads((folder / "l_1024_extra.json").read_text())
    got = published(model, model.state_dict())
    assert {name: list(tensor.shape) for name, tensor in got.items()} == want
    assert model.lmm.lm_head.weight is not model.lmm.get_input_embeddings().weight


def test_names_of_the_language_model_go_both_ways(golden: Load) -> None:
    state = {n.removeprefix("lmm."): t for n, t in golden("understanding").weights.items() if n[:4] == "lmm."}
    there = to_transformers(state)
    back = to_original(there)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert to_transformers(there).keys() == there.keys()
