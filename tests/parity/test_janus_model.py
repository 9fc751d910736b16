"""The packed Janus-Pro against transformers' own, through an export that transformers itself has loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import JanusForConditionalGeneration

from tests.parity.cases import assert_agrees
from tests.tiny_harmon import random_sample
from tests.tiny_janus import make_processor, micro, random_model, tokenizer
from unimrg.families.base import DrawOptions
from unimrg.families.janus.checkpoint import from_original, save_published, to_original
from unimrg.families.janus.config import VARIANTS
from unimrg.families.janus.generate import embed_nothing, embed_prompt, sample_codes
from unimrg.families.janus.model import Janus
from unimrg.families.janus.processor import JanusPackedProcessor, JanusTarget
from unimrg.families.processor import Branch, Pictures
from unimrg.sample import IMAGE_TASKS, Sample, Task, Turn
from unimrg.weights import read_state_dict

SIDE = 16
QUESTION, ANSWER = "Can you see a red cone?", "yes"
FORMAT = (
    "<｜begin▁of▁sentence｜><|User|>: <begin_of_image>{picture}<end_of_image>\n"
    "{question}\n\n<|Assistant|>: {answer}<｜end▁of▁sentence｜>"
)


@pytest.fixture(scope="module")
def model() -> Janus:
    return random_model(micro())


@pytest.fixture(scope="module")
def using() -> JanusPackedProcessor:
    return make_processor(micro(), tuple(Task), 3)


@pytest.fixture(scope="module")
def published(model: Janus, tmp_path_factory: pytest.TempPathFactory) -> JanusForConditionalGeneration:
    folder = tmp_path_factory.mktemp("published")
    save_published(model, folder)
    return JanusForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module returns, call by call."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    yield seen
    handle.remove()


def sample(tasks: tuple[Task, ...] = ()) -> Sample:
    rng = np.random.default_rng(0)
    drawn = random_sample(rng, SIDE, conversations=1, tasks=tasks)
    return Sample("one", 0, ((Turn(QUESTION, ANSWER),),), drawn.image, drawn.targets, drawn.valid)


def pixels(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture)[None].permute(0, 3, 1, 2) / 127.5 - 1


# -- looking -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_understanding_agrees(
    model: Janus, using: JanusPackedProcessor, published: JanusForConditionalGeneration
) -> None:
    """Logits and loss; the library is given the whole text at once and a placeholder for every token."""
    picture = sample().image
    assert picture is not None
    places = "<image_placeholder>" * published.config.vision_config.num_image_tokens
    text = FORMAT.format(picture=places, question=QUESTION, answer=ANSWER)
    ids = tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : -len(using.encode(" " + ANSWER)) - 1] = -100
    want = published(input_ids=ids, pixel_values=pixels(picture), labels=labels)

    batch = using.assemble(*branches_of(using, sample()), samples=1, next_position=1)
    hidden = model.hidden(batch, batch.target_source.new_zeros(0, 16))
    got = {"logits": model.janus.lm_head(hidden), "loss": model(batch)[Task.UNDERSTANDING].mean}
    # The end token predicts nothing, but it is there in both.
    assert_agrees(got, {"logits": want.logits[0], "loss": want.loss})
    assert batch.label_ids.tolist() == labels[labels != -100].tolist()


def branches_of(using: JanusPackedProcessor, one: Sample) -> tuple[list[Branch[JanusTarget]], Pictures]:
    pictures = Pictures()
    return using.branches(one, pictures, {"truncated": 0}), pictures


# -- drawing -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_drawing_agrees(
    model: Janus, using: JanusPackedProcessor, published: JanusForConditionalGeneration
) -> None:
    """The library's own drawing from text: every step's logits of both halves, the codes and the pixels."""
    ids = [*using.opening, *using.question("A red cone."), *using.open_image]
    tokens = torch.tensor([ids, [*ids[:5], ids[4], *ids[6:]]])
    with outputs_of(published.model.generation_head) as want:
        codes = published.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_mode="image",
            do_sample=False,
        )
    embeds = torch.stack([embed_prompt(model, using, None, row) for row in tokens.tolist()])
    nothing = embed_nothing(model, using, len(ids)).expand_as(embeds)
    with outputs_of(model.janus.model.generation_head) as got:
        ours = sample_codes(model, torch.cat([embeds, nothing]), 16, guidance=5.0, temperature=0.0)
    assert torch.equal(ours, codes) and len(codes.unique()) > 3
    assert_agrees({"logits": torch.stack(got)}, {"logits": torch.stack(want)})
    pixels = published.decode_image_tokens(codes)
    want_pictures = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
    assert torch.equal(model.decode_pictures(ours), want_pictures)
    (drawn,) = model.draw_text(using, ["A red cone."], DrawOptions(guidance=5.0, temperature=0.0))
    assert np.array_equal(drawn, want_pictures[0].numpy())


@torch.no_grad()
def test_training_sees_what_drawing_sees(model: Janus, using: JanusPackedProcessor) -> None:
    """One packed pass over three drawings gives the logits of three cached decodings, code by code."""
    one = sample(IMAGE_TASKS)
    batch = using([one])
    branches, _ = branches_of(using, one)
    assert one.image is not None
    codes, want = [], []
    for branch in branches[1:]:
        embeds = embed_prompt(model, using, one.image, branch.ids)[None]
        with outputs_of(model.janus.model.generation_head) as seen:
            codes.append(sample_codes(model, embeds, 16, guidance=1.0, temperature=0.0)[0])
        want.append(torch.cat(seen))
    hidden = model.hidden(batch, torch.stack(codes))
    got = model.janus.model.generation_head(hidden[batch.code_index])
    assert_agrees({"logits": got}, {"logits": torch.cat(want)})


@torch.no_grad()
def test_codes_agree(model: Janus, published: JanusForConditionalGeneration) -> None:
    """With codes of one length, where the library's unnormalised distance finds the same."""
    pictures = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8))
    theirs, ours = published.model.vqmodel, model.janus.model.vqmodel
    before = ours.quantize.embedding.weight.clone()
    for vq in (theirs, ours):
        vq.quantize.embedding.weight.copy_(normalize(before, dim=-1))
    codes = model.encode_pictures(pictures)
    ours.quantize.embedding.weight.copy_(before)
    assert torch.equal(codes.flatten(), theirs.encode(pictures.permute(0, 3, 1, 2) / 127.5 - 1).image_tokens)
    assert torch.equal(model.encode_pictures(pictures), codes) and len(codes.unique()) > 3
    theirs.quantize.embedding.weight.copy_(before)


# -- keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "width", "layers", "parameters"), [("1b", 2048, 24, 2076.6), ("7b", 4096, 30, 7407.8)]
)
def test_full_size_has_the_published_names(variant: str, width: int, layers: int, parameters: float) -> None:
    """Those of the original layout that its own tools print, and there and back again for all."""
    with torch.device("meta"):
        model = Janus(VARIANTS[f"janus_pro_{variant}"]())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
    own = {name: tensor.shape for name, tensor in model.janus.state_dict().items()}
    original = to_original(model.janus.state_dict())
    assert {name: tensor.shape for name, tensor in from_original(original).items()} == own
    assert not [name for name in original if name.startswith("model.")]
    for name, shape in {
        "language_model.lm_head.weight": (102400, width),
        "language_model.model.embed_tokens.weight": (102400, width),
        f"language_model.model.layers.{layers - 1}.self_attn.k_proj.weight": (width, width),
        "vision_model.vision_tower.pos_embed": (1, 576, 1024),
        "vision_model.vision_tower.patch_embed.proj.weight": (1024, 3, 16, 16),
        "vision_model.vision_tower.blocks.23.attn.qkv.bias": (3072,),
        "vision_model.vision_tower.blocks.0.attn.proj.weight": (1024, 1024),
        "vision_model.vision_tower.blocks.0.norm2.bias": (1024,),
        "vision_model.vision_tower.norm.weight": (1024,),
        "aligner.layers.2.weight": (width, width),
        "gen_vision_model.decoder.conv_blocks.0.attn.1.norm.weight": (512,),
        "gen_vision_model.decoder.conv_blocks.0.res.2.conv1.weight": (512, 512, 3, 3),
        "gen_vision_model.encoder.conv_blocks.1.downsample.conv.weight": (128, 128, 3, 3),
        "gen_vision_model.encoder.mid.1.proj_out.bias": (512,),
        "gen_vision_model.quantize.embedding.weight": (16384, 8),
        "gen_embed.weight": (16384, 8),
        "gen_aligner.layers.0.weight": (width, 8),
        "gen_head.output_mlp_projector.weight": (width, width),
        "gen_head.vision_head.weight": (16384, width),
    }.items():
        assert original[name].shape == shape, name


def test_export_holds_both_layouts(model: Janus, tmp_path: Path) -> None:
    save_published(model, tmp_path)
    own = model.janus.state_dict()
    for found in (read_state_dict(tmp_path), from_original(read_state_dict(tmp_path / "original"))):
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)
