"""`scenes`: a small 3-D world with exact labels and questions, made from nothing but a seed.

    for scene in make_scenes(100, seed=0, split="test"):
        scene.rgb, scene.depth, scene.ids, scene.questions

    python -m unimrg.data.scenes write s3://bucket/scenes --train 2000 --test 500

Blind answers are at chance by construction: the text comes first, and every text is asked of two pictures
with different answers (`plan.py`). Some colour-shape pairs occur only in the test split (`world.HELD_OUT`).
"""

from unimrg.data.scenes.make import make_pair, make_scenes
from unimrg.data.scenes.text import FAMILIES
from unimrg.data.scenes.world import HELD_OUT, Question, Rendering, Scene, World
from unimrg.data.scenes.write import SceneSettings, write

__all__ = [
    "FAMILIES",
    "HELD_OUT",
    "Question",
    "Rendering",
    "Scene",
    "SceneSettings",
    "World",
    "make_pair",
    "make_scenes",
    "write",
]
