"""Binding times: what changes seldom is computed seldom, and the staged program is the same function."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph as FxGraph

from allaprima import profiles
from allaprima.backends.aten import AtenExecutable
from allaprima.capture import CallReader, capture
from allaprima.config import Config
from allaprima.engine import Engine
from allaprima.graph import Graph, TensorSpec, aten
from allaprima.rewrite import rewrite, rules_for
from allaprima.stage import Program, Stage, Time, batch_rows, binding_times, cut
from allaprima.weights.binding import Binding
from tests.tiny import CROSS_DIM, tiny_unet

# ---- random programs: staged = unstaged

WIDTH = 4


@st.composite
def programs(draw: Any) -> tuple[Graph, dict[str, Time], dict[str, torch.Tensor]]:
    """A few inputs of random times, then linears, sums and products of what is there."""
    names = [f"x{i}" for i in range(draw(st.integers(1, 4)))]
    times = {name: draw(st.sampled_from(list(Time)[1:])) for name in names}
    fx, nodes, weights = FxGraph(), [], {}
    spec = TensorSpec(("s0", WIDTH), torch.float64)
    for name in names:
        nodes.append(fx.placeholder(name))
        nodes[-1].meta = {"role": "input", "source": name, "spec": spec}
    for i in range(draw(st.integers(1, 3))):
        node = fx.placeholder(f"p{i}")
        node.meta = {"role": "parameter", "source": f"w{i}", "spec": TensorSpec((WIDTH, WIDTH), torch.float64)}
        weights[f"w{i}"] = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
        nodes.append(node)
    inputs, parameters = nodes[: len(names)], nodes[len(names) :]
    rows = list(inputs)
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(("linear", "add", "mul", "weights")))
        if kind == "weights":
            node = fx.call_function(aten.mm.default, tuple(draw(st.sampled_from(parameters)) for _ in "ab"))
            node.meta["spec"] = TensorSpec((WIDTH, WIDTH), torch.float64)
            parameters.append(node)
            continue
        x = draw(st.sampled_from(rows))
        if kind == "linear":
            node = fx.call_function(aten.linear.default, (x, draw(st.sampled_from(parameters))))
        else:
            target = aten.add.Tensor if kind == "add" else aten.mul.Tensor
            node = fx.call_function(target, (x, draw(st.sampled_from(rows))))
        node.meta["spec"] = spec
        rows.append(node)
    fx.output(tuple(draw(st.lists(st.sampled_from([*rows, *parameters]), min_size=1, max_size=3))))
    return Graph(fx, {"s0": (1, None)}), times, weights


def run_staged(program: Program, given: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> list[Any]:
    binding = Binding(program)
    binding.update(weights, weights)
    values = dict(given)
    for time, stage in program.stages.items():
        if time is not Time.WEIGHTS:
            executable = AtenExecutable(stage.graph)
            executable.bind(binding.values(stage.graph, weights))
            values |= zip(stage.outputs, executable.run([values[name] for name in stage.inputs]), strict=True)
    return [values[r.name] if r.role == "input" else binding.value(r.role, r.name, weights) for r in program.results]


@settings(deadline=None, max_examples=60)
@given(programs())
def test_a_staged_program_is_the_same_function(made: Any) -> None:
    graph, times, weights = made
    given = {name: torch.randn(3, WIDTH, dtype=torch.float64) for name in times}
    arguments = (given.get(p.meta["source"], weights.get(p.meta["source"])) for p in graph.placeholders())
    expected = graph.module()(*arguments)
    for ours, theirs in zip(run_staged(cut(graph, times), given, weights), expected, strict=True):
        assert torch.equal(ours, theirs)


@settings(deadline=None, max_examples=60)
@given(programs())
def test_no_stage_reads_what_becomes_known_later(made: Any) -> None:
    graph, declared, _ = made
    times = binding_times(graph, declared)
    program = cut(graph, declared)
    by_name = {n.name: t for n, t in times.items()}
    for time, stage in program.stages.items():
        for call in stage.graph.calls():
            assert by_name[call.name] == time
        for placeholder in stage.graph.placeholders():
            assert by_name[placeholder.name] <= time


@settings(deadline=None, max_examples=60)
@given(programs())
def test_nothing_is_computed_twice(made: Any) -> None:
    graph, declared, _ = made
    program = cut(graph, declared)
    names = [call.name for stage in program.stages.values() for call in stage.graph.calls()]
    assert len(names) == len(set(names))


# ---- the UNet


def staged(unet: Any, tokens: int = 77, device: str = "cpu") -> Program:
    sample = torch.zeros(2, 4, 16, 16, device=device)
    text = torch.zeros(2, tokens, unet.config.cross_attention_dim, device=device)
    call = CallReader(unet.forward)((sample, torch.tensor(1.0, device=device), text), {"return_dict": False})
    profile = profiles.unet(tuple)
    with profile.capturing(unet):
        graph = capture(unet, unet.forward, call, profile.dims(call.tensors)[0])
    rewrite(graph, [rule for rule in rules_for("portable") if rule.name != "MergeSiblingLinears"])
    program = cut(graph, profile.times)
    program.stages[Time.SCHEDULE] = batch_rows(program.stages[Time.SCHEDULE], "timestep")
    return program


def expected_linears(unet: UNet2DConditionModel) -> dict[Time, int]:
    """Per attention block: k and v of the text in the prompt stage; q, k, v, out, q, out and two of the feed-forward
    in each step, besides proj_in and proj_out, which are convolutions or linears."""
    blocks = sum("attn2" in name and name.endswith("to_k") for name, _ in unet.named_modules())
    resnets = sum(name.endswith("time_emb_proj") for name, _ in unet.named_modules())
    return {Time.PROMPT: 2 * blocks, Time.SCHEDULE: resnets + 2, Time.STEP: 8 * blocks}


def check_stages(program: Program, unet: UNet2DConditionModel) -> None:
    linears = expected_linears(unet)
    assert program.count(Time.PROMPT, aten.linear.default) == linears[Time.PROMPT]
    assert program.count(Time.SCHEDULE, aten.linear.default) == linears[Time.SCHEDULE]
    assert program.stages[Time.SCHEDULE].inputs == ("timestep",)
    assert program.stages[Time.SCHEDULE].rows
    assert "sample" not in program.stages[Time.PROMPT].inputs
    assert "timestep" not in program.stages[Time.STEP].inputs
    assert "encoder_hidden_states" not in program.stages[Time.STEP].inputs
    for target in (aten.sin.default, aten.cos.default, aten.exp.default):
        assert program.count(Time.STEP, target) == 0


def step_linears(program: Program) -> int:
    """Linears of the step; 1×1 convolutions that the rules turned into linears are counted apart."""
    return program.count(Time.STEP, aten.linear.default)


@pytest.fixture(scope="module")
def tiny_program() -> tuple[Any, Program]:
    unet = tiny_unet()
    return unet, staged(unet)


def test_the_step_holds_no_text_projection_and_no_time_embedding(tiny_program: Any) -> None:
    unet, program = tiny_program
    check_stages(program, unet)
    pointwise = sum(name.endswith(("proj_in", "proj_out")) for name, _ in unet.named_modules())
    assert step_linears(program) == expected_linears(unet)[Time.STEP] + pointwise


SD15 = dict(sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2, cross_attention_dim=768, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)  # fmt: skip


@pytest.mark.slow
def test_the_stages_of_stable_diffusion_1_5() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15).eval()
    program = staged(unet, device="meta")
    check_stages(program, unet)
    assert expected_linears(unet) == {Time.PROMPT: 32, Time.SCHEDULE: 24, Time.STEP: 128}
    assert step_linears(program) == 128 + 32, "128 linears and the 32 pointwise convolutions around the blocks"


def test_all_timesteps_as_rows_are_the_single_timesteps(tiny_program: Any) -> None:
    unet, program = tiny_program
    weights = {k: v.detach() for k, v in unet.named_parameters()}
    binding = Binding(program)
    binding.update(weights, weights)
    stage = program.stages[Time.SCHEDULE]
    executable = AtenExecutable(stage.graph)
    executable.bind(binding.values(stage.graph, weights))
    timesteps = torch.tensor([0.0, 1.0, 7.5, 501.0, 999.0])
    table = executable.run([timesteps])
    for row, timestep in enumerate(timesteps):
        for column, single in zip(table, executable.run([timestep[None]]), strict=True):
            torch.testing.assert_close(column[row : row + 1], single)


def row_stage(build: Any) -> Stage:
    fx = FxGraph()
    t = fx.placeholder("t")
    t.meta = {"role": "input", "source": "timestep", "spec": TensorSpec((), torch.float32)}
    row = fx.call_function(aten.unsqueeze.default, (t, 0))
    row.meta["spec"] = TensorSpec((1,), torch.float32)
    last = build(fx, row)
    fx.output((last,))
    return Stage(Time.SCHEDULE, Graph(fx), ("%out",))


def column(fx: FxGraph, row: Any) -> Any:
    node = fx.call_function(aten.unsqueeze.default, (row, 1))
    node.meta["spec"] = TensorSpec((1, 1), torch.float32)
    return node


def total(fx: FxGraph, row: Any) -> Any:
    """A sum over the rows: not the same for a table as for its rows."""
    node = fx.call_function(aten.sum.dim_IntList, (column(fx, row), [0], True))
    node.meta["spec"] = TensorSpec((1, 1), torch.float32)
    return node


def test_only_what_treats_rows_alone_becomes_a_table() -> None:
    assert batch_rows(row_stage(column), "timestep").rows
    assert not batch_rows(row_stage(total), "timestep").rows
    assert not batch_rows(row_stage(column), "another").rows


# ---- when the stages run


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Engine, Any]]:
    scheduler = DDIMScheduler()
    unet = tiny_unet().requires_grad_(False)
    cache = tmp_path_factory.getbasetemp() / "cache"
    engine = Engine(unet, Config(backend="aten", cache_dir=cache), profiles.unet(lambda: [scheduler.timesteps]))
    yield unet, engine.install(), scheduler
    engine.remove()


def sample(seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def text(seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 7, CROSS_DIM, generator=torch.Generator().manual_seed(seed))


def runs(engine: Engine) -> dict[str, int]:
    return {time: engine.events.stage_runs[time] for time in ("PROMPT", "SCHEDULE", "STEP")}


def ran(engine: Engine, before: dict[str, int]) -> tuple[int, int, int]:
    after = runs(engine)
    return tuple(after[k] - before[k] for k in ("PROMPT", "SCHEDULE", "STEP"))  # type: ignore[return-value]


def agrees(unet: Any, engine: Engine, *args: Any) -> bool:
    with torch.no_grad():
        ours, theirs = unet(*args, return_dict=False)[0], engine.original(*args, return_dict=False)[0]
    return torch.allclose(ours, theirs, atol=1e-5)


def loop(unet: Any, engine: Engine, timesteps: Any, embeddings: torch.Tensor) -> None:
    for i, t in enumerate(timesteps):
        assert agrees(unet, engine, sample(i, len(embeddings)), t, embeddings)


def test_a_run_computes_its_prompt_and_its_schedule_once(running: Any) -> None:
    unet, engine, scheduler = running
    scheduler.set_timesteps(5)
    before = runs(engine)
    loop(unet, engine, scheduler.timesteps, text(1))
    assert ran(engine, before) == (1, 1, 5)


def test_a_second_prompt_keeps_the_schedule(running: Any) -> None:
    unet, engine, scheduler = running
    scheduler.set_timesteps(4)
    loop(unet, engine, scheduler.timesteps, text(2))
    before = runs(engine)
    loop(unet, engine, scheduler.timesteps, text(3))
    assert ran(engine, before) == (1, 0, 4)


def test_a_new_schedule_keeps_the_prompt(running: Any) -> None:
    unet, engine, scheduler = running
    scheduler.set_timesteps(4)
    embeddings = text(4)
    loop(unet, engine, scheduler.timesteps, embeddings)
    before = runs(engine)
    scheduler.set_timesteps(6)
    loop(unet, engine, scheduler.timesteps, embeddings)
    assert ran(engine, before) == (0, 1, 6)


def test_an_equal_copy_of_the_embeddings_changes_nothing(running: Any) -> None:
    unet, engine, scheduler = running
    loop(unet, engine, scheduler.timesteps[:1], text(5))
    before = runs(engine)
    loop(unet, engine, scheduler.timesteps[:1], text(5))
    assert ran(engine, before) == (0, 0, 1)


@pytest.mark.parametrize("how", ["in place", "inference mode", "another number of tokens", "another batch"])
def test_changed_embeddings_are_noticed(running: Any, how: str) -> None:
    unet, engine, scheduler = running
    with torch.inference_mode(how == "inference mode"):
        embeddings = text(6)
    loop(unet, engine, scheduler.timesteps[:1], embeddings)
    before = runs(engine)
    if how == "another number of tokens":
        embeddings = embeddings[:, :5]
    elif how == "another batch":
        embeddings = embeddings[:1]
    else:
        with torch.inference_mode(how == "inference mode"):
            embeddings.mul_(2)
    loop(unet, engine, scheduler.timesteps[:1], embeddings)
    assert ran(engine, before)[0] == 1


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor(7.0).double()])
def test_every_way_to_say_a_timestep_is_one_signature(running: Any, timestep: Any) -> None:
    unet, engine, _ = running
    agrees(unet, engine, sample(), 3, text())
    before = len(engine.runners())
    assert agrees(unet, engine, sample(), timestep, text())
    assert len(engine.runners()) == before


def test_a_timestep_for_each_row(running: Any) -> None:
    unet, engine, _ = running
    assert agrees(unet, engine, sample(), torch.tensor([3.0, 800.0]), text())
    assert agrees(unet, engine, sample(), torch.tensor([800.0, 3.0]), text())


def test_a_timestep_that_is_not_of_the_schedule(running: Any) -> None:
    unet, engine, scheduler = running
    scheduler.set_timesteps(4)
    other = scheduler.timesteps.clone() + 1
    loop(unet, engine, [*other, scheduler.timesteps[2], other[0]], text())


def test_a_schedule_edited_in_place_is_noticed(running: Any) -> None:
    unet, engine, scheduler = running
    scheduler.set_timesteps(4)
    loop(unet, engine, scheduler.timesteps[:2], text())
    scheduler.timesteps += 5
    loop(unet, engine, scheduler.timesteps[:2], text())


def test_the_row_is_found_without_reading_the_timestep(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA each of these would stop the host."""
    unet, engine, scheduler = running
    scheduler.set_timesteps(4)
    embeddings = text(9)
    loop(unet, engine, scheduler.timesteps[:1], embeddings)

    def reads(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor was read")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "equal", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, reads)
    monkeypatch.setattr(torch, "equal", reads)
    with torch.no_grad():
        for t in scheduler.timesteps:
            unet(sample(), t, embeddings, return_dict=False)


def test_the_stages_live_on_disk_for_the_next_engine(running: Any, tmp_path: Path) -> None:
    _, engine, scheduler = running
    twin = tiny_unet(seed=4).requires_grad_(False)
    other = Engine(twin, engine.config, profiles.unet(lambda: [scheduler.timesteps])).install()
    loop(twin, other, scheduler.timesteps[:1], text())
    assert (other.events.captures, other.events.loaded) == (0, 1)
