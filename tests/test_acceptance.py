"""What is promised of LoRAs, checkpoints and pipelines together: one pipeline, everything changed in any order, no
capture, and the picture that eager draws."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import allaprima as ap
from allaprima.config import Config
from allaprima.generation import Picture, Request, draw, settle
from allaprima.models import LORAS
from allaprima.pipelines import SCHEDULERS, eager, engines, set_scheduler
from tests.lora_files import lycoris_file, peft_file
from tests.tiny import tiny_pipeline

NEAR = 1e-3
"""Of pictures between 0 and 1, in float32, after a few steps: rounding grows with every step."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "locon": {}, "loha": {}, "lokr": {"factor": 4}, "full": {}, "norm": {},
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute",  # several adapters are meant
    "ignore:LoRA 'sketch'",  # half of it is for the text encoder of another model
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two miniature checkpoints of one architecture, five LoRAs by name, and one that diffusers loads."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("one", "two")):
        tiny_pipeline(seed).save_pretrained(home / name)
    for name, options in ALGORITHMS.items():
        lycoris_file(tiny_pipeline(), home / f"{name}.safetensors", name, **options)
    peft_file(tiny_pipeline(), home / "peft", ["to_q", "to_v", "conv1"])
    return home


# ---- fifty changes


@dataclass
class Session:
    """One optimized pipeline and what its user changes."""

    pipe: Any
    numbers: random.Random
    loras: list[str]
    checkpoints: list[str]
    prompts: list[str]
    lora_dir: Path | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"height": 64, "width": 64})
    prompt: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = self.prompts[:1]

    @property
    def changes(self) -> list[Callable[[], object]]:
        return [self.lora, self.weight, self.adapter, self.checkpoint, self.size, self.scheduler, self.other_prompt]

    def strength(self) -> float:
        return self.numbers.uniform(-0.5, 1.2)

    def lora(self) -> None:
        chosen = self.numbers.sample(self.loras, self.numbers.randint(0, len(self.loras)))
        ap.loras(self.pipe, {name: self.strength() for name in chosen}, lora_dir=self.lora_dir)

    def weight(self) -> None:
        ap.loras(self.pipe, {name: self.strength() for name in ap.loras(self.pipe)}, lora_dir=self.lora_dir)

    def adapter(self) -> None:
        """diffusers' own call, for the adapter that it loaded."""
        if self.numbers.random() < 0.3:
            self.pipe.disable_lora()
        else:
            self.pipe.enable_lora()
            self.pipe.set_adapters("peft", self.strength())

    def checkpoint(self) -> None:
        assert ap.switch(self.pipe, self.numbers.choice(self.checkpoints)) is self.pipe

    def size(self) -> None:
        self.options = {side: 8 * self.numbers.randint(8, 14) for side in ("height", "width")}

    def scheduler(self) -> None:
        set_scheduler(self.pipe, self.numbers.choice(list(SCHEDULERS)))

    def other_prompt(self) -> None:
        self.prompt = self.numbers.choices(self.prompts, k=self.numbers.randint(1, 2))

    def draw(self) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "output_type": "np", "generator": generator, **self.options}
        return np.asarray(self.pipe(self.prompt, **options).images)


def tiny_session(home: Path, cache: Path, backend: Any) -> Session:
    pipe = ap.load(home / "one", dtype="float32", device="cpu")
    pipe.load_lora_weights(str(home / "peft"), adapter_name="peft")
    ap.optimize(pipe, Config(backend=backend, cache_dir=cache))
    checkpoints = [str(home / name) for name in ("one", "two")]
    return Session(pipe, random.Random(5), list(ALGORITHMS), checkpoints, ["a red apple", "a (b:1.2)", ""], home)


def trained_session(cache: Path) -> Session:
    pipe = ap.load("emoji-zh", dtype="float32", device="cpu")
    pipe.load_lora_weights(str(LORAS["neon"].path), adapter_name="peft")
    ap.optimize(pipe, Config(cache_dir=cache))
    prompts = ["一个红苹果", "1个女孩，天蓝色背景", "城堡", ""]
    return Session(pipe, random.Random(5), list(LORAS), ["emoji-zh", "emoji-zh-3d"], prompts)


def assert_changes_capture_nothing(session: Session, num_changes: int, compare_every: int) -> None:
    pipe = session.pipe
    pipe.set_progress_bar_config(disable=True)
    pictures = [session.draw()]
    before = ap.explain(pipe)
    changes = [session.changes[i % len(session.changes)] for i in range(num_changes)]
    session.numbers.shuffle(changes)
    for number, change in enumerate(changes):
        change()
        pictures.append(session.draw())
        if number % compare_every == 0:
            with eager(pipe):
                assert np.abs(session.draw() - pictures[-1]).max() < NEAR, f"change {number}: {change}"
    after = ap.explain(pipe)
    assert (after.captures, after.loaded, after.discharged) == (before.captures, before.loaded, before.discharged)
    assert after.fallbacks == {}
    assert len({picture.tobytes() for picture in pictures}) > num_changes * 0.7, "changes show"


@pytest.mark.parametrize("backend", ["aten", pytest.param("openvino", marks=pytest.mark.slow)])
def test_fifty_changes_in_any_order_capture_nothing(home: Path, private_cache: Path, backend: str) -> None:
    assert_changes_capture_nothing(tiny_session(home, private_cache, backend), 50, compare_every=5)


@pytest.mark.slow
def test_fifty_changes_of_trained_models_capture_nothing(private_cache: Path) -> None:
    assert_changes_capture_nothing(trained_session(private_cache), 50, compare_every=5)


# ---- what a step costs


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters live in buffers that stay."""
    for module in ("runner", "engine"):
        monkeypatch.setattr(f"allaprima.{module}.stays_in_place", lambda device: True)


def test_a_step_with_five_loras_is_the_step_with_none(home: Path, private_cache: Path, as_on_a_gpu: None) -> None:
    """The same objects run the same graphs on the same addresses, equally often: there is nothing that could cost."""
    session = tiny_session(home, private_cache, "aten")
    pipe = session.pipe
    pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    session.draw()
    seen = []
    for num_loras in (0, 1, 5, 0):
        ap.loras(pipe, dict.fromkeys(list(ALGORITHMS)[:num_loras], 0.4), lora_dir=home)
        assert len(ap.loras(pipe)) == num_loras
        session.draw()  # what earlier stages keep is computed for the new weights
        before = {name: dict(engine.events.stage_runs) for name, engine in engines(pipe).items()}
        picture = session.draw()
        runs = {
            name: {stage: times - before[name].get(stage, 0) for stage, times in engine.events.stage_runs.items()}
            for name, engine in engines(pipe).items()
        }
        assert runs["unet"]["STEP"] == 3, "PNDM asks once more than there are steps"
        seen.append((picture.tobytes(), runs, [*programs(pipe)]))
    pictures, all_runs, all_programs = zip(*seen, strict=True)
    assert len(set(pictures)) == 3
    assert pictures[0] == pictures[-1]
    assert all(found == all_runs[0] for found in all_runs)
    assert all(found == all_programs[0] for found in all_programs)


def programs(pipe: Any) -> Iterator[tuple[Any, ...]]:
    """What would be launched: each program's object, those that run its stages, and the addresses that they read."""
    for engine in engines(pipe).values():
        for runner in engine.runners():
            sources = engine._sources.tensors
            yield id(runner), id(runner.program), *sorted(id(found) for found in runner.executables.values())
            for stage in runner.program.stages.values():
                values = runner.binding.values(stage.graph, sources)
                yield tuple((name, tensor.data_ptr()) for name, tensor in values.items())


# ---- the mission's walkthrough

SCENE = "铁马冰河入梦来，概念画，科幻，玄幻，3D"
GIRL = "1个女孩,绿眼,棒球帽,金色头发,闭嘴,帽子,看向阅图者,短发,简单背景,单人,上半身,T恤"
NOT = "水彩,漫画,扫描件,简朴的画作,动画截图,3D,像素风,原画,草图,手绘,铅笔"
TAG = "<lora:iuV35.uv1P:1>"


@dataclass
class User:
    """Draws as the command line does: LoRAs are what the prompt's tags say."""

    pipe: Any
    lora_dir: Path
    steps: int
    size: int

    def draw(self, prompt: str, negative: str = "") -> np.ndarray:
        request = Request((prompt,), negative, size=(self.size, self.size), steps=self.steps, seed=7)
        wanted = {name: {"text_encoder": te, "unet": unet} for name, te, unet in request.loras}
        ap.loras(self.pipe, wanted, lora_dir=self.lora_dir)
        found: list[Picture] = list(draw(self.pipe, request, settle(request, self.pipe, "emoji-zh")))
        return np.asarray(found[0].image, dtype=np.float64)


@pytest.mark.parametrize(
    ("steps", "size"), [(3, 64), pytest.param(30, 128, marks=pytest.mark.slow)], ids=["quick", "whole"]
)
def test_the_walkthrough_of_the_mission(tmp_path: Path, private_cache: Path, steps: int, size: int) -> None:
    shutil.copy(LORAS["watercolor"].kohya_path, tmp_path / "iuV35.uv1P.safetensors")
    pipe = ap.optimize(ap.load("emoji-zh", dtype="float32", device="cpu"), Config(cache_dir=private_cache))
    pipe.set_progress_bar_config(disable=True)
    user = User(pipe, tmp_path, steps, size)
    steps_of_it: list[tuple[str, str]] = [(SCENE, ""), (GIRL, NOT), (GIRL + TAG, NOT)]

    drawn = {"emoji-zh": [user.draw(*one) for one in steps_of_it]}
    prepared = ap.explain(pipe)
    for name in ("emoji-zh-3d", "emoji-zh"):
        assert ap.switch(pipe, name) is pipe
        drawn.setdefault(name, [user.draw(*one) for one in steps_of_it])
    again = [user.draw(*one) for one in steps_of_it]
    after = ap.explain(pipe)
    assert (after.captures, after.loaded, after.discharged) == (prepared.captures, prepared.loaded, prepared.discharged)
    assert after.fallbacks == {}
    for before, after in zip(drawn["emoji-zh"], again, strict=True):
        assert np.array_equal(before, after)
    distinct = [picture.tobytes() for pictures in drawn.values() for picture in pictures]
    assert len(set(distinct)) == 6, "models, prompts and the LoRA show"

    ap.restore(pipe)  # acceleration off
    for accelerated, one in zip(again, steps_of_it, strict=True):
        assert np.abs(user.draw(*one) - accelerated).max() <= 2, "grey levels of 255"
    ap.optimize(pipe, Config(cache_dir=private_cache))  # and on
    assert np.array_equal(user.draw(GIRL + TAG, NOT), again[-1])

    ap.switch(pipe, "emoji")  # v1-5-pruned-emaonly stands third in the list: another text encoder
    english = user.draw(f"a girl with a hat {TAG}")
    with eager(pipe):
        assert np.abs(user.draw(f"a girl with a hat {TAG}") - english).max() <= 2
    assert ap.loras(pipe).keys() == {"iuV35.uv1P"}
