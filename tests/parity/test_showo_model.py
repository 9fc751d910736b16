"""Show-o's sequences, losses, gradients and decoding against golden numbers of the published code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.parity.cases import Case, load_case
from tests.parity.showo_fixture import Bench, FixtureProcessor, RecaProcessor
from unimrg.families.processor import Branch
from unimrg.families.rows import IGNORE
from unimrg.families.showo.generate import code_logits, greedy
from unimrg.families.showo.processor import ShowoBatch, ShowoTarget
from unimrg.families.showo.sampling import UNKNOWN, Noise, fill_in, masked_after, temperatures
from unimrg.sample import Task
from unimrg.tasks import UNCONDITIONAL

Load = Callable[[str], Case]
TASKS = {"recon": Task.PIXEL, "depth": Task.DEPTH, "seg": Task.SEGMENTATION}
LOGITS, LOSS = 2e-5, 1e-5


@pytest.fixture
def showo_case(parity_dir: Path) -> Load:
    return lambda name: load_case(parity_dir / "showo" / name)


def close(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


# -- sequences and their masks -------------------------------------------------------------------------------


def assert_is_row(
    bench: Bench, branch: Branch[ShowoTarget], row: Tensor, mask: Tensor, targets: Tensor | None = None
) -> tuple[ShowoBatch, Tensor]:
    """A branch alone with its prefix has the golden ids [L] and mask [1, L, L], but for padding.

    Padding on the right counts as text, if the branch has it too. Returns the branch's batch, and where its
    tokens stand in the golden row, int64 [T].
    """
    batch = bench.batch([branch])
    kept = torch.arange(len(row)) if batch.plan.length == len(row) else row.ne(bench.special("pad")).nonzero()
    kept = kept.flatten()
    ids = bench.ids(batch, bench.no_targets if targets is None else targets.unsqueeze(0))
    given = ids >= 0  # golden rows hold something else where features stand
    assert torch.equal(ids[given], row[kept][given])
    assert torch.equal(batch.plan.dense_mask(), mask[0][kept][:, kept])
    assert torch.equal(batch.position_ids, torch.arange(batch.plan.length))
    return batch, kept


def framed(bench: Bench, text: str, room: int) -> list[int]:
    """Text ids between two end tokens, cut to `room` before the last of them.

    Stands here, since our prompts are short: nothing of ours is cut in this way.
    """
    end, ids = bench.config.text_end, [int(word) for word in text.split()]
    ids = [*([] if ids[:1] == [end] else [end]), *ids, end]
    return ids if len(ids) <= room else [*ids[: room - 1], end]


def test_prompts_for_drawing_from_text_agree(showo_case: Load) -> None:
    case = showo_case("prompting")
    bench, given, want = Bench(case), case.inputs, case.outputs
    room = case.config["showo"]["max_seq_length"]
    shown = bench.target(torch.zeros(bench.config.target_tokens, dtype=torch.bool))
    for number, text in enumerate(case.config["texts"]["t2i"]):
        ids: Sequence[int] = [bench.special("t2i"), *framed(bench, text, room)]
        if given["dropout_u"][number] < case.config["showo"]["cond_dropout_prob"]:
            ids = bench.processor.drawing_branch(UNCONDITIONAL, 0).ids
        branch = Branch((), None, ids, [IGNORE] * len(ids), shown)
        row, mask = want["t2i.input_ids"][number], want["t2i.mask"][number]
        assert_is_row(bench, branch, row, mask, given["masked_image_ids"][number])


def test_prompts_of_drawing_agree(showo_case: Load) -> None:
    """As they are used, all codes masked; but those that the golden rows cut."""
    case = showo_case("prompting")
    bench, want = Bench(case), case.outputs
    codes = torch.zeros(bench.config.target_tokens, dtype=torch.long)
    hidden, compared = bench.target(torch.ones_like(codes, dtype=torch.bool)), 0
    for number, text in enumerate(case.config["texts"]["t2i"]):
        branch = bench.processor.text_branch(text.removeprefix(f"{bench.config.text_end} "), hidden)
        if len(branch.ids) <= case.config["showo"]["max_seq_length"] + 1:
            row, mask = want["t2i_gen.cond_ids"][number], want["t2i_gen.mask"][number]
            assert_is_row(bench, branch, row, mask, codes)
            compared += 1
    assert compared >= 4


def test_unconditional_prompts_agree(showo_case: Load) -> None:
    case = showo_case("prompting")
    bench, want = Bench(case), case.outputs
    hidden = torch.ones(bench.config.target_tokens, dtype=torch.bool)
    branch = bench.processor.drawing_branch(UNCONDITIONAL, 0, bench.target(hidden))
    rows = want["t2i_gen.uncond_ids"]
    for row, mask in zip(rows, want["t2i_gen.mask"][len(rows) :], strict=True):
        assert_is_row(bench, branch, row, mask, torch.zeros(bench.config.target_tokens, dtype=torch.long))


def test_text_rows_agree(showo_case: Load) -> None:
    """Padding on the right is plain text here: it sees what stands before it, as in the golden masks."""
    case = showo_case("prompting")
    bench, want = Bench(case), case.outputs
    for number, text in enumerate(case.config["texts"]["lm"]):
        row = want["lm.input_ids"][number]
        ids = framed(bench, text, len(row) + 1)[: len(row)]
        assert row[: len(ids)].tolist() == ids
        assert_is_row(bench, bench.branch(row.tolist()), row, want["lm.mask"][number])


def test_reading_rows_agree(showo_case: Load) -> None:
    case = showo_case("prompting")
    bench, want = Bench(case), case.outputs
    room = case.config["showo"]["max_seq_length"]
    for number, text in enumerate(case.config["texts"]["mmu"]):
        row = want["mmu.input_ids"][number]
        branch = bench.branch(row.tolist(), want["mmu.labels"][number].tolist())
        assert branch.opening == bench.processor.opening
        assert torch.equal(bench.images[-1], case.inputs["mmu_image_ids"][number])
        ids = framed(bench, text, room)
        assert list(branch.ids)[: len(ids)] == ids
        assert list(branch.labels) == [*ids, *[IGNORE] * (room - len(ids))]
        assert_is_row(bench, branch, row, want["mmu.mask"][number])


@pytest.mark.parametrize("name", ["mmu_vit.mask_sys0", "mmu_vit.mask_sys"])
def test_masks_of_features_agree(showo_case: Load, name: str) -> None:
    """Every token sees the features; text before them is causal otherwise."""
    case = showo_case("prompting")
    given = case.config["clip"]
    bench = Bench(replace(case, config=case.config | {"clip": given | {"clip_dim": 4}}))
    mask = case.outputs[name][0, 0]
    system = 0 if name.endswith("0") else given["system_prompt_len"]
    before = [bench.special("mmu"), *[1] * system, bench.special("soi")]
    text = [1] * (len(mask) - len(before) - given["num_features"] - 1)
    batch = bench.batch([Branch(tuple(before), 0, text, [IGNORE] * len(text))])
    assert torch.equal(batch.plan.dense_mask(), mask)


# -- logits --------------------------------------------------------------------------------------------------


class Training:
    """Rows of the three training layouts as one packed batch.

    kinds: t2i, lm or mmu, row by row. starts: padding in front of each. targets: ids [G, N] of the t2i rows.
    """

    def __init__(self, bench: Bench, ids: Tensor, labels: Tensor | None = None) -> None:
        self.bench, self.length = bench, ids.shape[1]
        self.kinds, self.starts = [], []
        branches, targets = [], [bench.no_targets]
        names = {bench.special("t2i"): "t2i", bench.special("mmu"): "mmu"}
        for number, row in enumerate(ids):
            tokens = bench.unpadded(row)
            kind = names.get(tokens[0], "lm")
            own, target = None if labels is None else labels[number].tolist(), None
            if kind == "t2i":
                own, place = None, slice(-bench.config.target_tokens - 1, -1)
                masked = row[place] == bench.config.mask_id
                target = bench.target(masked)
                wanted = row if labels is None else labels[number]
                targets.append(torch.where(masked, wanted[place], row[place]).unsqueeze(0))
            branches.append(bench.branch(tokens, own, target))
            self.kinds.append(kind)
            self.starts.append(self.length - len(tokens))
        self.batch, self.targets = bench.batch(branches), torch.cat(targets)

    def hidden(self) -> Tensor:
        return self.bench.hidden(self.batch, self.targets)

    def split(self, packed: Tensor) -> list[Tensor]:
        """Rows of a packed tensor."""
        return list(packed.split([self.length - start for start in self.starts]))

    def losses(self, labels: Tensor) -> dict[str, Tensor]:
        """The published means; `image` is t2i without soi and eoi."""
        head, hidden, batch = self.bench.model.showo.lm_head, self.hidden(), self.batch
        rows, drawn = self.split(hidden), [n for n, kind in enumerate(self.kinds) if kind == "t2i"]
        image = self.bench.image_losses(hidden, batch, self.targets)
        place = slice(-self.bench.config.target_tokens - 2, None)  # in the published mean soi and eoi count
        framed_logits = torch.cat([head(rows[number][place]) for number in drawn])
        framed_labels = labels[drawn, place].flatten()
        # Text of both kinds is one loss of ours; here each has its own.
        terms = cross_entropy(head(hidden[batch.label_index]), batch.label_ids, reduction="none")
        text = self.bench.model.text_loss(hidden, head, batch)
        close(text.mean, terms.mean(), 1e-6)
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        kinds = [self.kinds[n] for n in torch.bucketize(batch.label_index, ends, right=True).tolist()]
        own = {name: torch.tensor([kind == name for kind in kinds]) for name in ("lm", "mmu")}
        return {
            "t2i": cross_entropy(framed_logits, framed_labels, ignore_index=IGNORE),
            "image": image[Task.PIXEL].mean,
        } | {name: terms[mask].mean() for name, mask in own.items()}


@torch.no_grad()
def test_logits_agree(showo_case: Load) -> None:
    """Rows of all three layouts in one packed sequence."""
    case = showo_case("forward")
    bench, kinds = Bench(case), ("t2i", "lm", "mmu")
    ids, masks = (torch.cat([case.inputs[f"{kind}.{x}"] for kind in kinds]) for x in ("input_ids", "mask"))
    golden = torch.cat([case.outputs[f"{kind}.logits"] for kind in kinds])
    rows, states = Training(bench, ids), []
    for layer in bench.model.showo.model.layers:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
    states.append(rows.hidden())
    logits, mask = bench.model.showo.lm_head(states[-1]), rows.batch.plan.dense_mask()
    first = 0
    for number, (row, start) in enumerate(zip(rows.split(logits), rows.starts, strict=True)):
        close(row, golden[number, start:], LOGITS)
        own = slice(first, first + len(row))
        assert torch.equal(mask[own, own], masks[number, 0, start:, start:])
        assert int(mask[own].sum()) == int(mask[own, own].sum())
        first += len(row)
    for layer, packed in enumerate(states):
        for number, wanted in enumerate(case.outputs[f"t2i.hidden.{layer}"]):
            close(rows.split(packed)[number], wanted[rows.starts[number] :], LOGITS)


@torch.no_grad()
def test_reading_through_clip_agrees(showo_case: Load) -> None:
    case = showo_case("forward_clip")
    bench, want, labels = Bench(case), case.outputs, case.inputs["labels"]
    assert bench.features is not None
    close(bench.model.mm_projector(bench.features), want["projected"], LOSS)
    first = case.config["clip"]["system_prompt_len"] + 2
    without = torch.cat([labels[:, :first], labels[:, first + bench.config.source_tokens :]], 1)
    rows = enumerate(zip(case.inputs["token_ids"].tolist(), without.tolist(), strict=True))
    batch = bench.batch([bench.branch(ids, own, picture=number) for number, (ids, own) in rows])
    count, length = want["mask"].shape[0], want["mask"].shape[2]
    embeds, hidden = bench.model.embed(batch, bench.no_targets), bench.hidden(batch, bench.no_targets)
    close(embeds.unflatten(0, (count, length)), want["input_embeddings"], LOSS)
    assert torch.equal(batch.plan.dense_mask(), torch.block_diag(*want["mask"][:, 0]).bool())
    close(bench.model.showo.lm_head(hidden).unflatten(0, (count, length)), want["logits"], LOGITS)
    loss = bench.model.text_loss(hidden, bench.model.showo.lm_head, batch)
    assert loss.count == int((labels[:, 1:] != IGNORE).sum())
    close(loss.mean, want["loss_mmu"][0], LOSS)


# -- losses and gradients ------------------------------------------------------------------------------------


@torch.no_grad()
def test_losses_agree(showo_case: Load) -> None:
    case = showo_case("losses")
    labels, want, parts = case.inputs["labels"], case.outputs, case.config["coefficients"]
    rows = Training(Bench(case), case.inputs["input_ids"], labels)
    assert {kind: rows.kinds.count(kind) for kind in parts} == case.config["batch"]
    losses = rows.losses(labels)
    for name in parts:
        close(losses[name], want[f"loss_{name}"][0], LOSS)
    close(losses["image"], want["loss_t2i_image_tokens_only"][0], LOSS)
    close(torch.stack([parts[name] * losses[name] for name in parts]).sum(), want["total"][0], LOSS)
    logits = rows.bench.model.showo.lm_head(rows.hidden())
    for number, wanted in enumerate(want["logits_t2i"]):
        close(rows.split(logits)[number], wanted[rows.starts[number] :], LOGITS)


def test_gradients_and_one_step_agree(showo_case: Load) -> None:
    """With the weight decay of the published training: only biases escape it."""
    case = showo_case("gradients")
    bench, given, want = Bench(case), case.inputs, case.outputs
    losses = Training(bench, given["input_ids"], given["labels"]).losses(given["labels"])
    losses["i2i"] = drawing_loss(bench, given["i2i_input_ids"], given["i2i_labels"])
    for name in case.config["coefficients"]:
        close(losses[name], want[f"loss_{name}"][0], LOSS)
    total = torch.stack([part * losses[name] for name, part in case.config["coefficients"].items()]).sum()
    close(total, want["total"][0], LOSS)
    total.backward()
    trained = {name: p for name, p in bench.model.named_parameters() if p.requires_grad}
    assert sorted(trained) == case.config["all_grad_norm_names"]
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    norms = torch.stack([gradients[name].norm() for name in sorted(trained)])
    torch.testing.assert_close(norms, want["all_grad_norms"], rtol=1e-4, atol=0)
    torch.testing.assert_close(norms.norm(), want["grad_norm"][0], rtol=1e-4, atol=0)
    for name in (key for key in want if key.startswith("grad.")):
        torch.testing.assert_close(gradients[name.removeprefix("grad.")], want[name], rtol=2e-4, atol=2e-6)
    assert_one_step_agrees(bench, case, trained)


def drawing_loss(bench: Bench, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows of one image-to-image batch; here all are drawings of one task."""
    place = slice(-bench.config.target_tokens - 1, -1)
    masked, rows, row = labels[:, place] != IGNORE, enumerate(ids), ids[0].tolist()
    bench.read_only(row.index(bench.special("eoi")) - row.index(bench.special("soi")) - 1)
    batch = bench.batch([bench.branch(bench.unpadded(row), None, bench.target(masked[n])) for n, row in rows])
    codes = torch.where(masked, labels[:, place], ids[:, place])
    return bench.image_losses(bench.hidden(batch, codes), batch, codes)[Task.PIXEL].mean


def assert_one_step_agrees(bench: Bench, case: Case, trained: dict[str, torch.nn.Parameter]) -> None:
    adamw = dict(case.config["adamw"])
    decayed, free = bench.model.parameter_groups(adamw["weight_decay"])
    named = {id(parameter): name for name, parameter in trained.items()}
    assert sorted(named[id(p)] for p in decayed["params"]) == sorted(adamw["decayed"])
    assert sorted(named[id(p)] for p in free["params"]) == sorted(adamw["not_decayed"])
    torch.optim.AdamW([decayed, free], lr=adamw["lr"], betas=adamw["betas"], eps=adamw["eps"]).step()
    for name in (key for key in case.outputs if key.startswith("after_adamw.")):
        close(trained[name.removeprefix("after_adamw.")].data, case.outputs[name], 1e-5)


# -- image to image ------------------------------------------------------------------------------------------


def drawings(bench: Bench, case: Case) -> list[Branch[ShowoTarget]]:
    """The case's rows, made by our processor from pictures, prompts and masks."""
    given, wanted = case.inputs, case.config["i2i"]
    branches = []
    for number, masked in enumerate(given["target_mask"]):
        image = (
            number % len(bench.features)
            if bench.features is not None
            else bench.read(given["source_ids"][number])
        )
        target = bench.target(masked, TASKS[wanted["tasks"][number]])
        branches.append(bench.processor.drawing_branch(wanted["prompts"][number], image, target))
    return branches


@pytest.mark.parametrize("layout", ["natural", "reca"])
@pytest.mark.parametrize("name", ["image_to_image_vq", "image_to_image_clip"])
@torch.no_grad()
def test_drawing_from_a_picture_agrees(showo_case: Load, name: str, layout: str) -> None:
    """RecA's layouts are no part of ours; here they come from overriding two hooks of the processor."""
    case = showo_case(name)
    bench = Bench(case, RecaProcessor if layout == "reca" else FixtureProcessor)
    targets, want = case.inputs["target_ids"], case.outputs
    with_codes = bench.features is None
    ids, labels = (want[x if with_codes else f"{layout}.{x}"] for x in ("input_ids", "labels"))
    masks = want[f"mask_{layout}" if with_codes else f"{layout}.mask"]
    branches, terms = drawings(bench, case), []
    for number, branch in enumerate(branches):
        alone, kept = assert_is_row(bench, branch, ids[number], masks[number], targets[number])
        # RecA's padding stands in the middle and counts as distance.
        alone, codes = replace(alone, position_ids=kept), targets[number : number + 1]
        hidden = bench.hidden(alone, codes)
        close(bench.model.showo.lm_head(hidden), want[f"{layout}.logits"][number, kept], LOGITS)
        places = kept[alone.loss_index]
        assert torch.equal(codes.flatten()[alone.loss_rows], labels[number, places])
        # RecA's labels keep the text, which its loss leaves out.
        assert layout == "reca" or len(places) == int((labels[number] != IGNORE).sum())
        terms.append(bench.terms(hidden, alone, codes))
    close(torch.stack([row.mean() for row in terms]), want[f"{layout}.loss_per_task"], LOSS)
    close(torch.stack([row.sum() for row in terms]), want[f"{layout}.loss_sum"], LOSS * max(map(len, terms)))
    close(torch.cat(terms).mean(), want[f"{layout}.loss_mean"][0], LOSS)
    if with_codes or layout == "natural":
        packed = bench.batch(branches)
        close(bench.terms(bench.hidden(packed, targets), packed, targets), torch.cat(terms), LOSS)


@torch.no_grad()
def test_one_prefix_serves_four_branches(showo_case: Load) -> None:
    """The published model on four separate rows against one packed row of ours."""
    case = showo_case("shared_prefix")
    given, want, packed = {k: v[0] for k, v in case.inputs.items()}, case.outputs, case.config["packed"]
    length, ids, labels = packed["prefix_len"], given["input_ids"], given["labels"]
    bench = Bench(case, sources=length - 3)
    image, prompts, at = bench.read(ids[2 : length - 1]), iter(packed["prompts"]), length
    branches: list[Branch[ShowoTarget]] = []
    targets = []
    for name, size in zip(packed["branches"], packed["branch_lens"], strict=True):
        own, asked = ids[at : at + size].tolist(), labels[at : at + size]
        if name == "vqa":
            branches.append(Branch(bench.processor.opening, image, own, asked.tolist()))
        else:
            place = slice(-bench.config.target_tokens - 1, -1)
            target = bench.target(asked[place] != IGNORE, TASKS[name])
            branches.append(bench.processor.drawing_branch(next(prompts), image, target))
            targets.append(torch.where(asked != IGNORE, asked, ids[at : at + size])[place])
        at += size
    batch, codes = bench.batch(branches), torch.stack(targets)
    assert torch.equal(bench.ids(batch, codes), ids)
    assert torch.equal(batch.position_ids, given["position_ids"])
    assert torch.equal(batch.plan.dense_mask(), want["mask"][0, 0])
    hidden = bench.hidden(batch, codes)
    logits = bench.model.showo.lm_head(hidden)
    close(logits, want["logits"][0], LOGITS)
    close(logits[length:], want["separate_logits"], LOGITS)
    images = bench.image_losses(hidden, batch, codes)
    text = bench.model.text_loss(hidden, bench.model.showo.lm_head, batch)
    means = [text.mean if name == "vqa" else images[TASKS[name]].mean for name in packed["branches"]]
    close(torch.stack(means), want["losses"], LOSS)


# -- decoding ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_answers_agree(showo_case: Load) -> None:
    """With a cache, where the published code has none."""
    case = showo_case("mmu_generate")
    bench, want = Bench(case), case.outputs
    tokens, stopped = want["tokens"].tolist(), want["tokens_stop"].tolist()
    prompts = bench.prompts(case.inputs["input_ids"])
    for token, logits in zip(tokens, want["last_logits"], strict=True):
        close(prompts.logits()[0], logits, LOGITS)
        prompts.append(torch.tensor([token]))
    end = case.config["eot_token"]
    assert greedy(bench.prompts(case.inputs["input_ids"]), len(tokens), end=-1) == [tokens]
    assert stopped[-1] == end  # ours leaves it out
    assert greedy(bench.prompts(case.inputs["input_ids"]), len(tokens), end) == [stopped[:-1]]


@torch.no_grad()
def test_answers_through_clip_agree(showo_case: Load) -> None:
    case = showo_case("forward_clip")
    want = case.outputs["generated"].tolist()
    prompts = Bench(case).prompts(case.inputs["token_ids"][:1])
    assert greedy(prompts, len(want), end=-1) == [want]


@pytest.mark.parametrize("run", ["t2i_cfg", "t2i_plain", "inpaint", "i2i"])
@torch.no_grad()
def test_drawing_step_by_step_agrees(showo_case: Load, run: str) -> None:
    """Prompts cached once, positions restarting without padding, the same draws of noise."""
    case = showo_case("sampling")
    settings, config = case.config["runs"][run], case.config["showo"]
    given, want = (
        {k.partition(".")[2]: v for k, v in x.items() if k.startswith(f"{run}.")}
        for x in (case.inputs, case.outputs)
    )
    tokens, steps = config["num_vq_tokens"], settings["steps"]
    row, ids = given["input_ids"][0].tolist(), config["special_token_ids"]
    bench = Bench(case, sources=row.index(ids["<|eoi|>"]) - row.index(ids["<|soi|>"]) - 1)
    before, place = slice(None, -tokens - 2), slice(-tokens - 1, -1)
    guided, guidance, free = bench.prompts(given["input_ids"][:, before]), 1 + settings["guidance"], None
    if guidance != 1:
        free = bench.prompts(given["uncond_input_ids"][:, before])
    shown = given["input_ids"][:, place]
    codes = torch.where(shown == bench.config.mask_id, UNKNOWN, shown - bench.config.code_offset)
    for step, temperature in enumerate(temperatures(settings["temperature"], steps)):
        assert temperature == pytest.approx(float(want["temperature"][step]), abs=1e-6)
        logits, unknown = code_logits(guided, free, codes, guidance), (codes == UNKNOWN).sum(1)
        left = masked_after(step, steps, tokens)
        noise = Noise(given["exp_noise"][step], given["gumbel_u"][step])
        close((logits.softmax(-1) / noise.exponential).argmax(-1).float(), want["sampled"][step].float(), 0)
        filled = fill_in(logits, codes, left, temperature, noise)
        close(filled.probabilities, want["probs"][step], 1e-5)
        assert torch.equal((unknown - 1).clamp(max=left).clamp(min=1), want["mask_len"][step])
        assert torch.equal(filled.codes == UNKNOWN, want["remask"][step])
        drawn, codes = filled.drawn, filled.codes
    assert torch.equal(drawn, want["result"])
    final = torch.where(codes == UNKNOWN, bench.config.mask_id, codes + bench.config.code_offset)
    assert torch.equal(final, want["final_input_ids"][:, place])
