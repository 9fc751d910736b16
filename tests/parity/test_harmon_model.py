"""The whole Harmon, packed, against golden numbers made by running the published implementation."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.parity.cases import BUNDLED, Case, assert_agrees
from tests.parity.harmon_fixture import Rows, Watch, build_model, cells_of, draws_of, latents_of, task_of
from tests.parity.qwen_tokenizer import QwenTokenizer
from unimrg.families.harmon.config import VARIANTS, tiny
from unimrg.families.harmon.generate import Prompt, sample_latents
from unimrg.families.harmon.model import Harmon
from unimrg.families.harmon.processor import CLOSE, OPEN, HarmonBatch, HarmonProcessor
from unimrg.families.harmon.sampling import guidance_at, mask_schedule
from unimrg.losses import combine
from unimrg.sample import IMAGE_TASKS, Task, Turn
from unimrg.schedule import cosine_with_warmup
from unimrg.tasks import UNCONDITIONAL, picture_prompt

Load = Callable[[str], Case]
TASKS = ("understanding", "depth", "recon", "mask")


def images_first(x: Tensor, buffers: int) -> Tensor:
    """[..., BUF + n, H] with the buffers moved from the front to the back."""
    return x.roll(-buffers, -2)


# -- losses --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_understanding_agrees(harmon_case: Load) -> None:
    case = harmon_case("understanding")
    model = build_model(case)
    rows = Rows.of(model)
    rows.answer(case.inputs, rows.condition(case.inputs["pixel_values"]))
    batch, latents = rows.batch()
    with Watch(model) as watch:
        states = model.states(batch, latents)
    valid = case.outputs["llm_attention_mask"].bool()
    loss = model.text_loss(states.hidden, model.llm.lm_head, batch)
    got = {
        "latents": latents.unflatten(1, model.grid),
        "z_enc": images_first(states.condition, model.config.mar.buffer_size),
        "llm_inputs_embeds": watch.embeds,
        "llm_hidden": states.hidden,
        "answer_logits": model.llm.lm_head(states.hidden[batch.label_index]),
        "loss": loss.mean,
    }
    want = case.outputs | {name: case.outputs[name][valid] for name in ("llm_inputs_embeds", "llm_hidden")}
    assert torch.equal(batch.label_ids, want["answer_labels"])
    assert loss.count == len(want["answer_labels"])
    assert_agrees(got, want)


@pytest.mark.parametrize("name", ["recon_loss", "image_to_image_loss", "text_to_image_loss"])
@torch.no_grad()
def test_drawing_agrees(harmon_case: Load, name: str) -> None:
    case = harmon_case(name)
    model = build_model(case)
    rows, given = Rows.of(model), case.inputs
    if name == "recon_loss":
        images = sources = rows.condition(given["pixel_values"])
    elif name == "image_to_image_loss":
        images, sources = rows.condition(given["source_pixel_values"]), rows.extra(given["pixel_values"])
    else:
        images, sources = None, rows.extra(given["pixel_values"])
    rows.draw(given, Task.PIXEL, images, sources)
    batch, latents = rows.batch()
    assert_drawing_agrees(case, model, batch, latents)


def assert_drawing_agrees(case: Case, model: Harmon, batch: HarmonBatch, latents: Tensor) -> None:
    buffers, pictures = model.config.mar.buffer_size, len(batch.visible_lengths)
    with Watch(model) as watch:
        states = model.states(batch, latents)
    rows = model.image_rows(states, batch, *draws_of(case.inputs, batch, cells_of(model)))
    assert states.target_encoded is not None
    x_enc = states.target_encoded.unflatten(0, (pictures, -1))
    hidden = states.hidden[batch.hidden_index].unflatten(0, (pictures, -1))
    names = ["source_latents", "target_latents"] if "source_latents" in case.outputs else ["latents"]
    got = dict(zip(names, latents.unflatten(1, model.grid).split(pictures), strict=True)) | {
        "target_x_enc": x_enc,
        "target_z_enc": images_first(model.proj_in(x_enc), buffers),
        "llm_inputs_embeds": watch.embeds,
        "llm_hidden_target": images_first(hidden, buffers),
        "x_enc_residual": rows.decoder_in.unflatten(0, (pictures, -1)),
        "dec_z": rows.decoded,
        "mse_rows": rows.mse,
        "vb_rows": rows.vb,
        "loss": (rows.mse + rows.vb).mean(),
    }
    if len(batch.images):
        got["cond_z_enc"] = images_first(states.condition, buffers)
    assert_agrees(got, packed_outputs(case, batch, cells_of(model)))


def packed_outputs(case: Case, batch: HarmonBatch, cells: int) -> dict[str, Tensor]:
    """The golden outputs with padding and rows of weight zero left away; positions are compared here."""
    want, valid = dict(case.outputs), case.outputs["llm_attention_mask"].bool()
    want["llm_inputs_embeds"] = want["llm_inputs_embeds"][valid]
    assert torch.equal(batch.position_ids, want["llm_position_ids"][valid])
    assert torch.equal(batch.loss_rows, case.inputs["mask"].flatten().nonzero().flatten())
    rows = len(batch.visible_lengths) * cells
    for name in ("mse_rows", "vb_rows"):
        want[name] = want[name].unflatten(0, (-1, rows))[:, batch.loss_rows]
    return want


# -- gradients -----------------------------------------------------------------------------------------------


def four_tasks(case: Case, model: Harmon) -> tuple[HarmonBatch, Tensor, dict[str, dict[str, Tensor]]]:
    """All four tasks of the case as one packed batch; the drawing tasks share their source pictures."""
    given = {task: part(case.inputs, task) for task in TASKS}
    rows = Rows.of(model)
    rows.answer(given["understanding"], rows.condition(given["understanding"]["pixel_values"]))
    source = rows.condition(given["recon"]["pixel_values"])
    for name in TASKS[1:]:
        sources = source if name == "recon" else rows.extra(given[name]["pixel_values"])
        rows.draw(given[name], task_of(name), source, sources)
    batch, latents = rows.batch()
    return batch, latents, given


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    dotted = f"{prefix}."
    return {k.removeprefix(dotted): v for k, v in tensors.items() if k.startswith(dotted)}


def packed_draws(
    model: Harmon, batch: HarmonBatch, given: dict[str, dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Each task's own timesteps and noise, in the packed order: row by row, tasks in the order of `TASKS`."""
    names, cells = TASKS[1:], cells_of(model)
    pictures = len(batch.visible_lengths) // len(names)

    def packed(name: str) -> Tensor:
        per_task = [given[task][name].unflatten(0, (-1, pictures, cells)) for task in names]
        return torch.stack(per_task, 2).flatten(1, 3)[:, batch.loss_rows]

    return packed("t"), packed("noise")


def golden_losses(model: Harmon, case: Case) -> dict[str, Tensor]:
    """Mean loss of each task from one packed pass."""
    batch, latents, given = four_tasks(case, model)
    states = model.states(batch, latents)
    rows = model.image_rows(states, batch, *packed_draws(model, batch, given))
    losses = {"understanding": model.text_loss(states.hidden, model.llm.lm_head, batch).mean}
    for name in TASKS[1:]:
        of_task = batch.row_task == IMAGE_TASKS.index(task_of(name))
        losses[name] = (rows.mse + rows.vb)[:, of_task].mean()
    return losses


@pytest.mark.parametrize("grad_scale", [True, False])
def test_gradients_agree(harmon_case: Load, grad_scale: bool) -> None:
    """One packed pass gives every gradient of the four separate golden passes."""
    case = harmon_case("gradients")
    model = build_model(case)
    if not grad_scale:
        model.config.grad_scale = 1.0
    prefix = "" if grad_scale else "no_grad_scale."
    losses = golden_losses(model, case)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    got: dict[str, Tensor] = {f"{name}.loss": loss for name, loss in losses.items()} if grad_scale else {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
        got[f"{name}.grad_norm"] = total_norm([g for g in gradients if g is not None])
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    got |= {"total_loss": total, "total_grad_norm": total_norm(list(gradients.values()))}
    assert_agrees({prefix + name: tensor for name, tensor in got.items()}, case.outputs)
    if grad_scale:
        assert_gradients_agree(gradients, case)


def total_norm(gradients: list[Tensor]) -> Tensor:
    return torch.stack([g.norm() for g in gradients]).norm()


def assert_gradients_agree(gradients: dict[str, Tensor], case: Case) -> None:
    frozen = case.config["parameters_without_gradient"]
    norms = {
        name: value for name, value in part_slash(case.outputs, "grad_norm").items() if name not in frozen
    }
    assert gradients.keys() == norms.keys()
    assert_agrees({name: gradients[name].norm() for name in norms}, norms)
    full = part_slash(case.outputs, "grad")
    assert len(full) == 12
    assert_agrees({name: gradients[name] for name in full}, full)


def part_slash(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{prefix}/")}


def test_combined_loss_is_the_mean_of_the_golden_losses(harmon_case: Load) -> None:
    """Through `forward`'s own sums and counts: equal weights give the published mean over micro-steps."""
    case = harmon_case("gradients")
    model = build_model(case)
    batch, latents, given = four_tasks(case, model)
    model.encode_pictures = lambda pictures: latents
    model.draw_noise = lambda batch: packed_draws(model, batch, given)
    with torch.no_grad():
        losses = model(batch)
        total = combine(losses, dict.fromkeys(Task, 1.0), batch.counts)
    assert_agrees({"total_loss": total * len(Task)}, case.outputs)


def test_optimiser_groups_agree(harmon_case: Load) -> None:
    """Frozen parameters are left out: the reference hands the unused table over, and never changes it."""
    case = harmon_case("gradients")
    model = build_model(case)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = model.parameter_groups(0.02)
    want, unused = case.config["optimizer_groups"], set(case.config["parameters_without_gradient"])
    assert {names[id(p)] for p in decay["params"]} == set(want["decay"]) - unused
    assert {names[id(p)] for p in rest["params"]} == set(want["no_decay"])
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.02, 0.0)


# -- sampling ------------------------------------------------------------------------------------------------


def golden_prompt(case: Case, model: Harmon) -> Prompt:
    """The cached prompt rows: conditional ones first, right-padded."""
    embedding, given = model.llm.get_input_embeddings(), case.inputs
    if "input_ids" in given:
        return Prompt(model, embedding(given["input_ids"]), given["attention_mask"].long())
    picture = model.embed_pictures(latents_of(model, given["pixel_values"]))[0]
    words, without = embedding(given["prompt_ids"]), embedding(given["uncond_prompt_ids"])
    row = torch.cat([words[:3], images_first(picture, model.config.mar.buffer_size), words[3:]])
    embeds, mask = row.new_zeros(2, *row.shape), torch.zeros(2, len(row), dtype=torch.long)
    embeds[0], mask[0] = row, 1
    embeds[1, : len(without)], mask[1, : len(without)] = without, 1
    return Prompt(model, embeds, mask)


@pytest.mark.parametrize("name", ["sampling", "sampling_text"])
@torch.no_grad()
def test_sampling_iterations_agree(harmon_case: Load, name: str) -> None:
    """Every iteration on its own, from the golden tokens it starts with."""
    case = harmon_case(name)
    model, given, want = build_model(case), case.inputs, case.outputs
    prompt, cells = golden_prompt(case, model), cells_of(model)
    count, steps = case.config["batch_rows"] // 2, case.config["num_iter"]
    left = [*mask_schedule(cells, steps), 0]
    rank = given["orders"][:count].argsort(1).repeat(2, 1)
    for k in range(steps):
        masked = want[f"iter{k}.mask"].bool()
        assert torch.equal(rank < left[k], masked)
        scale = guidance_at(case.config["cfg"], cells, max(1, left[k + 1]), case.config["cfg_schedule"])
        decoder_in, decoded = prompt.conditions(want[f"iter{k}.tokens_in"].flatten(1, 2), masked)
        sampled = model.mar.diffloss.sample(
            decoded[masked & (rank >= left[k + 1])],
            guidance=scale,
            temperature=case.config["temperature"],
            init_noise_NC=given[f"iter{k}.init_noise"],
            step_noise_SNC=given[f"iter{k}.step_noise"],
        )
        got = {"decoder_in": decoder_in, "dec_z": decoded, "cfg": torch.tensor(scale), "sampled": sampled}
        of_iteration = part(want, f"iter{k}")
        of_iteration["sampled"] = of_iteration["sampled"][: len(sampled)]  # the other half isn't used
        assert_agrees(got, of_iteration)


@pytest.mark.parametrize("name", ["sampling", "sampling_text"])
@torch.no_grad()
def test_sampling_agrees_end_to_end(harmon_case: Load, name: str) -> None:
    case = harmon_case(name)
    model, given, config = build_model(case), case.inputs, case.config
    count, steps = config["batch_rows"] // 2, config["num_iter"]
    latents = sample_latents(
        model,
        golden_prompt(case, model),
        given["orders"][:count],
        iterations=steps,
        guidance=config["cfg"],
        schedule=config["cfg_schedule"],
        temperature=config["temperature"],
        noise=[(given[f"iter{k}.init_noise"], given[f"iter{k}.step_noise"]) for k in range(steps)],
    )
    tokens = latents.unflatten(1, model.grid)
    got = {"final_tokens": tokens, "image": model.vae.decode_tokens(tokens)}
    assert_agrees(got, case.outputs | {"final_tokens": case.outputs["final_tokens"][:count]})


# -- text and schedule ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> HarmonProcessor:
    return HarmonProcessor(tiny(), QwenTokenizer(), published=True)


def test_prompt_tokens_agree(harmon_case: Load, published: HarmonProcessor) -> None:
    case = harmon_case("prompt_tokens")
    slips = {"recon": "\\n", "recon_unconditional": "", "depth": "\n", "mask": "\n"}
    for entry in case.config["condition_prompts"]:
        slip = slips[entry["task"]]
        assert entry["text"].startswith(slip)
        task = task_of(entry["task"].removesuffix("_unconditional"))
        assert published.prompt(task, entry["text"].removeprefix(slip)) == entry["input_ids"], entry["text"]
    for entry in case.config["text_to_image_prompts"]:
        assert published.encode(OPEN + entry["text"] + CLOSE) == entry["input_ids"]
        assert entry["text"] in (UNCONDITIONAL, picture_prompt(entry["text"].partition(": ")[2]))


def test_conversation_tokens_agree(harmon_case: Load, published: HarmonProcessor) -> None:
    """Text-only conversations get a picture too in the published recipe (a grey one)."""
    for entry in harmon_case("prompt_tokens").config["conversations"]:
        texts = [turn["value"].replace("<image>", "").strip() for turn in entry["example"]["conversations"]]
        turns = tuple(Turn(q, a) for q, a in zip(texts[::2], texts[1::2], strict=True))
        assert published.conversation(turns, with_image=True) == (entry["input_ids"], entry["labels"])


def test_learning_rates_agree(harmon_case: Load) -> None:
    """Stepped per micro-iteration, as the golden rates are; training steps it per optimiser step.

    The golden index streams of the reference's sampler aren't compared: here one sample carries all of its
    tasks, so there are no streams to interleave.
    """
    config = harmon_case("training_schedule").config
    for total in (10000, 400):
        golden = config[f"max_iters_{total}"]
        warmup = int(golden["warmup_micro_iterations"])
        for step, want in golden["lr_at_micro_iteration"].items():
            got = golden["base_lr"] * cosine_with_warmup(int(step), total, warmup)
            assert got == pytest.approx(want, rel=1e-9, abs=1e-20), (total, step)


# -- keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["1_5b", "0_5b"])
def test_full_size_has_exactly_the_published_keys(size: str) -> None:
    """The published file leaves the autoencoder out; it is a file of its own."""
    with torch.device("meta"):
        model = Harmon(VARIANTS[f"harmon_{size}"]())
    folder = BUNDLED / "harmon" / "keys"
    published = json.loads((folder / f"{size}.json").read_text())
    vae = {f"vae.{name}": shape for name, shape in json.loads((folder / "vae.json").read_text()).items()}
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == {name: shape for name, shape in published.items() if not name.startswith("vae.")} | vae
    assert model.llm.lm_head.weight is model.llm.get_input_embeddings().weight
