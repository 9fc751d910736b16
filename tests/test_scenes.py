"""The scenes: pictures agree with geometry, answers with pictures, and blind guessing with chance."""

from __future__ import annotations

import io
import json
import math
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimrg.data.scenes import FAMILIES, HELD_OUT, Question, Scene, SceneSettings, make_scenes, write
from unimrg.data.scenes.make import make_pair
from unimrg.data.scenes.plan import Plan, draw_plan, draw_stakes
from unimrg.data.scenes.render import render
from unimrg.data.scenes.shapes import HITS, hit, normal
from unimrg.data.scenes.world import (
    BOUND,
    MATERIALS,
    REST,
    SHAPES,
    Camera,
    Light,
    Look,
    Thing,
    World,
    seen_pairs,
)
from unimrg.errors import ConfigError, DataError

SUN = Light((0.0, 0.8, -0.6), 0.7, 0.5, (0.3, 0.3, 0.3), (0.7, 0.7, 0.8))


@cache
def scenes(split: str) -> tuple[Scene, ...]:
    return tuple(make_scenes(100, seed=3, split=split, size=64))


@cache
def plans(split: str) -> tuple[Plan, ...]:
    """Many plans without pictures: the text side alone decides texts and answers."""
    found = []
    for k in range(700):
        rng = np.random.default_rng([11, split == "test", k])
        while (plan := draw_plan(rng, split, draw_stakes(rng, 6))) is None:
            pass
        found.append(plan)
    return tuple(found)


def asked() -> list[tuple[Scene, Question]]:
    return [(scene, q) for split in ("train", "test") for scene in scenes(split) for q in scene.questions]


def one_object(shape: str, yaw: float = 0.4) -> World:
    look = Look("red", shape, "large", "matte")
    camera = Camera(3.0, math.radians(20), 1.3)
    return World((Thing(look, camera.unproject(0.52, 0.5, 5.0), yaw),), camera, SUN)


# Rendering


def test_depth_and_outline_of_a_sphere_are_exact() -> None:
    world = one_object("sphere")
    side = 128
    drawn = render(world, side)
    camera, thing = world.camera, world.things[0]
    line = (np.arange(side) + 0.5) / side - 0.5
    rays = np.stack(np.broadcast_arrays(line[None] / camera.focal, -line[:, None] / camera.focal, 1.0), -1)
    centre = camera.axes() @ (np.array(thing.centre) - (0, camera.height, 0))
    b, a = rays @ centre, (rays**2).sum(-1)
    root = b**2 - a * (centre @ centre - thing.look.scale**2)
    expected = (b - np.sqrt(np.maximum(root, 0))) / a
    inside, outside = root > 1e-3, root < -1e-3
    assert (drawn.ids[inside] == 1).all() and (drawn.ids[outside] == 0).all()
    np.testing.assert_allclose(drawn.depth[inside], expected[inside], rtol=1e-4)
    assert drawn.amodal[0] == drawn.visible[0] == (drawn.ids == 1).sum()
    row, col = np.nonzero(drawn.ids)
    assert drawn.boxes[0].tolist() == [col.min(), row.min(), col.max() + 1, row.max() + 1]


def test_ground_depth_is_that_of_the_plane() -> None:
    world = replace(one_object("cube"), things=())
    drawn = render(world, 64)
    y = 0.5 - (np.arange(64) + 0.5) / 64
    sin, cos = math.sin(world.camera.pitch), math.cos(world.camera.pitch)
    fall = y / world.camera.focal * cos - sin
    expected = np.where(fall < -1e-4, -world.camera.height / fall, np.inf)
    np.testing.assert_allclose(drawn.depth, np.repeat(expected[:, None], 64, 1), rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_hits_lie_on_the_surface_and_normals_point_outwards(shape: str) -> None:
    rng = np.random.default_rng(5)
    origin = rng.normal(size=(3, 4000)).astype(np.float32)
    origin *= 4 / np.linalg.norm(origin, axis=0)
    towards = rng.uniform(-0.9, 0.9, (3, 4000)).astype(np.float32) - origin
    t = hit(shape, origin, towards)
    met = np.isfinite(t)
    points = origin[:, met] + t[met] * towards[:, met]
    assert met.mean() > 0.2
    assert np.abs(_outside(shape, points)).max() < 1e-2
    assert np.linalg.norm(points, axis=0).max() < BOUND[shape] + 1e-2
    assert points[1].min() > -REST[shape] - 1e-2
    # Marched rays that graze the ring stop a little beside it.
    assert ((normal(shape, points) * towards[:, met]).sum(0) < (1.0 if shape == "torus" else 0.06)).all()
    # Nothing is met before: the ray is outside all the way.
    for part in (0.3, 0.7, 0.95):
        assert (_outside(shape, origin[:, met] + part * t[met] * towards[:, met]) > -1e-3).all()
    assert set(HITS) == set(SHAPES) == set(REST)


def _outside(shape: str, p: np.ndarray) -> np.ndarray:
    """A signed measure of each shape, written down once more: 0 on the surface, negative inside."""
    x, y, z = p.astype(np.float64)
    round_ = np.hypot(x, z)
    return {
        "sphere": np.sqrt(x**2 + y**2 + z**2) - 1,
        "cube": np.abs(p).max(0) - 0.8,
        "cylinder": np.maximum(round_ - 0.8, np.abs(y) - 0.9),
        "cone": np.maximum(round_ - 0.5 * (1 - y), -1 - y),
        "torus": np.hypot(np.hypot(x, y) - 0.7, z) - 0.3,
    }[shape]


def test_metal_looks_different_from_matte_and_a_shadow_falls() -> None:
    world = one_object("sphere")
    thing = world.things[0]
    shiny = replace(world, things=(replace(thing, look=replace(thing.look, material="metal")),))
    matte, metal = render(world, 96), render(shiny, 96)
    mine = matte.ids == 1
    assert np.abs(matte.rgb[mine].astype(int) - metal.rgb[mine]).mean() > 8
    bare = render(replace(world, things=()), 96)
    darker = bare.rgb[~mine].astype(int).sum(-1) - matte.rgb[~mine].sum(-1)
    assert (darker > 60).sum() > 100
    assert MATERIALS == ("matte", "metal")


# Scenes


def test_scenes_are_a_function_of_the_seed() -> None:
    first = list(make_scenes(4, seed=9, split="test", size=48))
    later = list(make_scenes(2, seed=9, split="test", size=48, start=1))
    for a, b in zip(first[2:], later, strict=True):
        assert a.id == b.id and a.questions == b.questions and a.world == b.world
        assert (a.rgb == b.rgb).all() and (a.depth == b.depth).all() and (a.ids == b.ids).all()
    other = next(make_scenes(1, seed=10, split="test", size=48))
    assert other.world != first[0].world


def test_arrays_agree() -> None:
    for scene in scenes("train")[:20]:
        n = len(scene.world.things)
        assert scene.rgb.shape == (64, 64, 3) and scene.rgb.dtype == np.uint8
        assert scene.depth.shape == scene.ids.shape == (64, 64)
        assert scene.depth.dtype == np.float32 and scene.ids.dtype == np.uint8
        assert set(np.unique(scene.ids)) == set(range(n + 1)) and 3 <= n <= 7
        assert (scene.rendering.visible == np.bincount(scene.ids.ravel())[1:]).all()
        for k, thing in enumerate(scene.world.things):
            depth = scene.depth[scene.ids == k + 1]
            centre = scene.world.camera.project(thing.centre)[2]
            reach = BOUND[thing.look.shape] * thing.look.scale + 1e-2
            assert centre - reach < depth.min() and depth.max() < centre + reach


def test_objects_do_not_touch_and_stand_on_or_above_the_ground() -> None:
    for scene in scenes("test"):
        things = scene.world.things
        for k, a in enumerate(things):
            assert a.centre[1] > REST[a.look.shape] * a.look.scale - 1e-6
            for b in things[:k]:
                assert math.dist(a.centre, b.centre) > 1.2 * (a.look.scale + b.look.scale)


def test_everything_is_visible_and_large_enough() -> None:
    widths = []
    for scene in scenes("train"):
        assert min(scene.rendering.share(k) for k in range(len(scene.world.things))) >= 0.3
        widths += (scene.rendering.boxes[:, 2] - scene.rendering.boxes[:, 0]).tolist()
    assert np.median(widths) >= 15


def test_splits_share_no_scene_and_train_has_no_held_out_pair() -> None:
    looks = {
        split: {t.look.pair for s in scenes(split) for t in s.world.things} for split in ("train", "test")
    }
    assert looks["train"].isdisjoint(HELD_OUT)
    assert looks["test"] >= HELD_OUT
    assert {s.world for s in scenes("train")}.isdisjoint({s.world for s in scenes("test")})
    assert {s.id for s in scenes("train")}.isdisjoint({s.id for s in scenes("test")})
    assert not any(q.unseen for s in scenes("train") for q in s.questions)
    assert 0.05 < np.mean([q.unseen for s in scenes("test") for q in s.questions]) < 0.6
    for text in {q.text for s in scenes("train") for q in s.questions}:
        assert not any(f"{colour} {shape}" in text for colour, shape in HELD_OUT)
    assert len(seen_pairs("train")) + len(HELD_OUT) == len(seen_pairs("test")) == 40
    assert {c for c, _ in HELD_OUT} == {t.look.colour for s in scenes("test") for t in s.world.things}


# Answers, recomputed from text and geometry alone


def find(scene: Scene, phrase: str) -> int:
    """The one object that a phrase like "red cube", "cone" or "blue object" means."""
    words = set(phrase.split()) - {"object"}
    found = [k for k, t in enumerate(scene.world.things) if words <= {t.look.colour, t.look.shape}]
    assert len(found) == 1, (phrase, scene.id)
    return found[0]


def phrases(text: str) -> list[str]:
    """The phrases of a text, in order: `the [colour] noun`."""
    words = text.replace("?", "").replace(",", "").split()
    nouns, colours = {*SHAPES, "object"}, {c for c, _ in seen_pairs("test")}
    out = []
    for k, word in enumerate(words):
        if word in nouns:
            out.append(f"{words[k - 1]} {word}" if words[k - 1] in colours else word)
    return out


def singular(word: str) -> str:
    return {"tori": "torus", "objects": "object"}.get(word, word.removesuffix("s"))


def expected(scene: Scene, question: Question) -> str:
    """The answer from the words of the question and the geometry, with the margins asserted on the way."""
    text, things, camera = question.text, scene.world.things, scene.world.camera
    yes = {True: "yes", False: "no"}
    if question.family == "count":
        words = [w for w in text.rstrip("?").split() if w not in ("How", "the", "image", "are", "does")]
        wanted = {singular(w) for w in words} & ({*SHAPES} | {t for t, _ in seen_pairs("test")})
        return str(sum(wanted <= {t.look.colour, t.look.shape} for t in things))
    called = [p for p in phrases(text) if p != "object" or "object" in text.split()]
    called = [p for p in called if p != "object"]
    if question.family == "existence":
        return yes[any(set(called[0].split()) == {t.look.colour, t.look.shape} for t in things)]
    first = things[find(scene, called[0])].look
    if question.family in ("colour", "shape", "size", "material"):
        return str(getattr(first, question.family))
    if question.family == "binding":
        return yes[text.rstrip("?").split()[-1] == first.colour]
    if question.family == "hidden":
        shares = [scene.rendering.share(find(scene, p)) for p in called]
        assert all(share <= 0.85 or share >= 0.97 for share in shares)
        if "Which" in text:
            return _word(called, int(shares[1] < shares[0]) ^ ("fully" in text))
        return yes[(shares[0] < 0.9) ^ ("fully" in text)]
    a, b = (find(scene, p) for p in called)
    if text.startswith("On which side"):
        a, b = b, a
    at, bt = camera.project(things[a].centre), camera.project(things[b].centre)
    if question.family == "side":
        assert abs(at[0] - bt[0]) > 0.04
        left = at[0] < bt[0]
        return yes[left ^ ("right of" in text)] if "yes" in question.options else ["right", "left"][left]
    if question.family == "larger":
        ratio = things[a].look.scale / things[b].look.scale
        assert max(ratio, 1 / ratio) > 1.4
        first_wins = (ratio > 1) ^ ("smaller" in text)
    else:
        near = [scene.depth[scene.ids == k + 1].min() for k in (a, b)]
        means = [scene.depth[scene.ids == k + 1].mean() for k in (a, b)]
        assert max(at[2] / bt[2], bt[2] / at[2]) > 1.1 and max(near) / min(near) > 1.07
        assert (at[2] < bt[2]) == (near[0] < near[1]) == (means[0] < means[1])
        backwards = question.family == "front" and not question.sense
        first_wins = (at[2] < bt[2]) ^ ("farther" in text or backwards)
    if question.family == "front" and "yes" not in question.options:
        return ["behind", "front"][first_wins]
    return yes[first_wins] if "yes" in question.options else _word(called, 0 if first_wins else 1)


def _word(called: list[str], k: int) -> str:
    words = called[k].split()
    return words[0] if words[-1] == "object" else words[-1]


def test_every_answer_follows_from_the_geometry() -> None:
    for scene, question in asked():
        assert question.answer in question.options
        assert question.answer == expected(scene, question), (scene.id, question)
        assert len(question.answer.split()) == 1
        assert len(set(question.options)) == len(question.options) > 1


def test_cues_mislead_when_they_are_said_to() -> None:
    for scene, q in asked():
        things, camera = scene.world.things, scene.world.camera
        if q.family in ("front", "nearer"):
            (_, ya, za), (_, yb, zb) = (camera.project(things[k - 1].centre) for k in q.objects)
            assert abs(ya - yb) > 0.04
            assert q.conflict == ((ya > yb) != (za < zb))
        elif q.family == "larger":
            looks = [
                float(np.ptp(scene.rendering.boxes[k - 1].reshape(2, 2), axis=0).max()) for k in q.objects
            ]
            assert q.conflict == (
                (looks[0] > looks[1])
                != (things[q.objects[0] - 1].look.scale > things[q.objects[1] - 1].look.scale)
            )
        elif q.family not in ("existence", "hidden"):
            assert q.conflict is None


def test_every_family_is_asked_and_cues_mislead_half_of_the_time() -> None:
    counts = Counter(q.family for _, q in asked())
    assert set(counts) == set(FAMILIES)
    assert min(counts.values()) > 0.03 * sum(counts.values())
    for family in ("front", "nearer", "larger"):
        flags = [q.conflict for _, q in asked() if q.family == family]
        assert 2 * sum(map(bool, flags)) == len(flags)


# Balance


def test_pairs_ask_the_same_and_answer_differently() -> None:
    by_pair = defaultdict(list)
    for _, q in asked():
        by_pair[q.pair].append(q)
    for both in by_pair.values():
        assert len(both) == 2
        assert both[0].text == both[1].text and both[0].options == both[1].options
        assert both[0].answer != both[1].answer
    for scene in (*scenes("train"), *scenes("test")):
        answers = Counter(q.answer for q in scene.questions if q.options == ("yes", "no"))
        assert answers["yes"] == answers["no"]
        assert len({q.text for q in scene.questions}) == len(scene.questions) == 6


def test_both_pictures_of_a_pair_have_the_same_number_of_objects() -> None:
    for one, two in zip(scenes("train")[::2], scenes("train")[1::2], strict=True):
        assert len(one.world.things) == len(two.world.things)


def test_number_of_objects_says_nothing_about_the_count() -> None:
    numbers = defaultdict(list)
    for plan in plans("train"):
        if (ask := plan.ask("count")) is not None:
            numbers[plan.count] += [int(ask.answer(k)) for k in (0, 1)]
    for values in numbers.values():
        assert abs(np.mean(values) - 2) < 2.6 * math.sqrt(2 / len(values))


Example = tuple[str, str, tuple[str, ...], str]  # text, answer, options, family


def examples(split: str) -> list[Example]:
    return [
        (ask.text, ask.answer(k), ask.options, ask.stake.family)
        for plan in plans(split)
        for ask in plan.asks
        for k in (0, 1)
    ]


def beyond_chance(right: list[bool], chance: list[float]) -> float:
    """Standard deviations that the hits lie above chance; texts come in pairs, so the sum is conservative."""
    p = np.array(chance)
    return float((np.sum(right) - p.sum()) / math.sqrt((p * (1 - p)).sum()))


def test_majority_answer_is_at_chance() -> None:
    train, test = examples("train"), examples("test")
    for family in FAMILIES:
        common: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for _, answer, options, name in train:
            if name == family:
                common[options][answer] += 1
        rows = [(answer, options) for _, answer, options, name in test if name == family]
        right = [bool(common[o]) and common[o].most_common(1)[0][0] == answer for answer, o in rows]
        assert beyond_chance(right, [1 / len(o) for _, o in rows]) < 2.58, family


def test_bag_of_words_and_pairs_of_words_are_at_chance() -> None:
    """Naive Bayes on the words of the text, trained on one split and asked on the other."""
    train, test = examples("train"), examples("test")
    for family in FAMILIES:
        words: dict[str, Counter[str]] = defaultdict(Counter)
        prior: Counter[str] = Counter()
        for text, answer, _, name in train:
            if name == family:
                prior[answer] += 1
                words[answer].update(features(text))
        right, chance = [], []
        for text, answer, options, name in test:
            if name == family:
                scores = {
                    o: math.log(prior[o] + 1)
                    + sum(math.log((words[o][f] + 0.5) / (prior[o] + 1)) for f in features(text))
                    for o in options
                }
                right.append(max(scores, key=lambda o: scores[o]) == answer)
                chance.append(1 / len(options))
        assert beyond_chance(right, chance) < 2.58, (family, np.mean(right), np.mean(chance))


def features(text: str) -> set[str]:
    words = text.lower().rstrip("?").replace(",", "").split()
    return {*words, *(f"{a} {b}" for a, b in pairwise(words)), f"length {len(words)}"}


def test_picture_cues_alone_are_at_chance() -> None:
    """Brightness and number of objects of a picture against the share of its positive answers."""
    rows = [
        (scene.rgb.mean(), len(scene.world.things), q.answer == "yes")
        for scene, q in asked()
        if q.options == ("yes", "no")
    ]
    bright, number, yes = (np.array(column, float) for column in zip(*rows, strict=True))
    for cue in (bright, number):
        assert abs(np.corrcoef(cue, yes)[0, 1]) < 1e-9  # as many yes as no in every picture


# Files


class Folder:
    """The least a store must do."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.written: list[str] = []

    def write_bytes(self, path: str, data: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        self.written.append(path)

    def read_bytes(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()


SMALL = SceneSettings(train=6, test=4, size=48, questions=4, seed=1)


def test_files_are_a_llava_data_set(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    assert write(store, SMALL)
    assert store.written[-1] == "train.json"
    assert {"version": 1, "train": 6, "size": 48}.items() <= json.loads(
        store.read_bytes("scenes.json")
    ).items()
    for split, number in (("train", 6), ("test", 4)):
        entries = json.loads(store.read_bytes(f"{split}.json"))
        made = {scene.id: scene for scene in make_scenes(number, 1, split, 48, 4)}
        assert len(entries) == 4 * number == len({entry["id"] for entry in entries})
        for entry in entries:
            scene = made[entry["image"].removeprefix("images/").removesuffix(".png")]
            human, gpt = entry["conversations"]
            assert human["from"] == "human" and gpt["from"] == "gpt"
            question = scene.questions[int(entry["id"].rsplit("-q", 1)[1])]
            assert human["value"] == f"<image>\n{question.text}" and gpt["value"] == question.answer
            assert (entry["family"], entry["pair"]) == (question.family, question.pair)
            assert entry["conflict"] == question.conflict and entry["options"] == list(question.options)
            check_pictures(store, entry, scene)


def check_pictures(store: Folder, entry: dict[str, str], scene: Scene) -> None:
    image, depth, masks = (
        np.array(Image.open(io.BytesIO(store.read_bytes(entry[key])))) for key in ("image", "depth", "masks")
    )
    assert (image == scene.rgb).all() and (masks == scene.ids).all()
    assert masks.dtype == np.uint8 and depth.dtype == np.uint16 and depth.max() == 65535
    np.testing.assert_allclose(depth / 65535, scene.depth.min() / scene.depth, atol=1e-5)


def test_a_second_run_does_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    small = replace(SMALL, train=2, test=2)
    assert write(store, small)
    store.written.clear()
    assert not write(store, small) and not store.written
    with pytest.raises(DataError, match="another data set"):
        write(store, replace(small, seed=2))
    # A run that was stopped has no train.json: it is made again, to the same bytes.
    before = store.read_bytes("train.json")
    (tmp_path / "train.json").unlink()
    assert write(store, small) and store.read_bytes("train.json") == before


@pytest.mark.parametrize("wrong", [{"train": 3}, {"size": 8}, {"questions": 1}, {"seed": -1}])
def test_settings_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        SceneSettings(**wrong)


@pytest.mark.parametrize("questions", [2, 3, 5, 7])
def test_any_number_of_questions(questions: int) -> None:
    for k in range(4):
        for scene in make_pair(4, "test", k, 48, questions):
            assert len(scene.questions) == questions
