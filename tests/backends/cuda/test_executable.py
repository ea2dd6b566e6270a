"""Recording and replaying: when, how often, and that nothing is stale, overwritten or waited for.

Where there is no GPU most of it runs in a simulation (simulation.py), which knows no memory and no streams.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import allaprima as ap
from allaprima.backends.cuda import executable as executable_module
from allaprima.backends.cuda import graphs, memory
from allaprima.bench.workloads import aliased
from allaprima.config import Config
from allaprima.pipelines import eager, engines, set_scheduler
from allaprima.stage import Time
from tests.backends.cuda.simulation import simulate
from tests.tiny import tiny_pipeline, tiny_unet

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if ON_GPU else ("cpu", torch.float32)


# In a simulation each takes seconds: `make test` takes the first few, `make prove` and a GPU all.
SAMPLE = (
    "test_recorded_at_the_second_use_of_a_size_and_replayed_equal",
    "test_a_kernel_that_cannot_run_leaves_the_stage_to_aten",
)


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        simulate(monkeypatch)


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline(dtype=DTYPE).to(DEVICE)


@pytest.fixture
def ours(pipe: Any) -> Iterator[Any]:
    """Another pipeline on the same weights, optimized."""
    other = aliased(pipe)
    ap.optimize(other)
    yield other
    ap.restore(other)


def step(pipe: Any, sample: torch.Tensor, timestep: Any, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pipe.unet(sample, timestep, encoder_hidden_states=prompt, return_dict=False)[0]  # type: ignore[no-any-return]


def inputs(height: int = 8, width: int = 8, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shapes = (batch, 4, height, width), (batch, 77, 32)
    sample, prompt = (torch.randn(s, generator=generator, device=DEVICE).to(DTYPE) for s in shapes)
    return sample, prompt


def timesteps(pipe: Any, count: int = 6) -> list[torch.Tensor]:
    pipe.scheduler.set_timesteps(count, device=DEVICE)
    return list(pipe.scheduler.timesteps)


def executable(pipe: Any, stage: Time = Time.STEP) -> Any:
    (runner,) = engines(pipe)["unet"].runners()
    return runner.executables[stage]


def assert_right(ours: torch.Tensor, eager: torch.Tensor) -> None:
    """Both are half precision; their distance is a few roundings."""
    assert torch.isfinite(ours).all()
    assert (ours - eager).float().norm() < 0.01 * eager.float().norm()


def test_recorded_at_the_second_use_of_a_size_and_replayed_equal(pipe: Any, ours: Any) -> None:
    sample, prompt = inputs()
    t = timesteps(ours)[0]
    eager = step(pipe, sample, t, prompt)
    first = step(ours, sample, t, prompt)
    assert executable(ours).records == 0, "the first size of all only runs"
    second, third = (step(ours, sample, t, prompt) for _ in range(2))
    assert executable(ours).records == 1
    assert torch.equal(second, third)
    assert_right(first, eager)
    assert_right(second, eager)


def test_a_later_size_is_recorded_while_it_is_planned(pipe: Any, ours: Any) -> None:
    t = timesteps(ours)[0]
    step(ours, *_ordered((inputs(), t)))
    for seed in range(3):
        call = inputs(16, 24, seed=seed), t
        assert_right(step(ours, *_ordered(call)), step(pipe, *_ordered(call)))
        assert executable(ours).records == 1
        assert len(executable(ours).plans) == 2


def test_what_cannot_be_recorded_at_once_is_recorded_at_its_second_use(
    pipe: Any, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may have to load something first."""
    t = timesteps(ours)[0]
    step(ours, *_ordered((inputs(), t)))
    pool_type = type(graphs.pool_of(0))
    record, number, refused = pool_type.record, executable(ours)._number, []

    def record_later(self: Any, key: Any, own: list[Any], work: Any) -> None:
        if key[0] == number and not refused:
            refused.append(key)
            raise RuntimeError("operation not permitted when stream is capturing")
        record(self, key, own, work)

    monkeypatch.setattr(pool_type, "record", record_later)
    with pytest.warns(RuntimeWarning, match="recorded at their second use, because"):
        step(ours, *_ordered((inputs(16, 24), t)))
    assert executable(ours).records == 0
    for turn, (height, width) in enumerate([(16, 24), (16, 24), (24, 16), (24, 16)]):
        call = inputs(height, width, seed=turn), t
        assert_right(step(ours, *_ordered(call)), step(pipe, *_ordered(call)))
        assert executable(ours).records == (1, 1, 1, 2)[turn], "no other size is tried at once: a failure drops graphs"


def test_each_step_has_its_own_timestep_and_sample(pipe: Any, ours: Any) -> None:
    _, prompt = inputs()
    for i, t in enumerate(timesteps(ours)):
        sample, _ = inputs(seed=i)
        assert_right(step(ours, sample, t, prompt), step(pipe, sample, t, prompt))
    assert executable(ours).records == 1


def test_another_prompt_is_written_where_the_graph_reads_it(pipe: Any, ours: Any) -> None:
    times = timesteps(ours)
    seen = []
    for seed in range(4):
        sample, prompt = inputs(seed=seed)
        for t in times[:2]:
            seen.append(step(ours, sample, t, prompt))
            assert_right(seen[-1], step(pipe, sample, t, prompt))
    assert executable(ours).records == 1
    sample, prompt = inputs(seed=9)
    before = step(ours, sample, times[0], prompt)
    prompt.mul_(-1)  # in place: the tensor is the same, its version is not
    after = step(ours, sample, times[0], prompt)
    assert not torch.equal(before, after)
    assert_right(after, step(pipe, sample, times[0], prompt))
    assert executable(ours).records == 1


def test_a_weight_written_in_place_reaches_the_graph(pipe: Any, ours: Any) -> None:
    """As a LoRA is: every kind of weight, merged, in channels-last and folded."""
    sample, prompt = inputs()
    t = timesteps(ours)[0]
    for _ in range(3):
        step(ours, sample, t, prompt)
    names = (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.0.resnets.0.conv1.weight",
        "up_blocks.0.upsamplers.0.conv.weight",
        "time_embedding.linear_1.weight",
        "conv_out.bias",
    )
    own, plain = dict(ours.unet.named_parameters()), dict(pipe.unet.named_parameters())
    for name in names:
        before = step(ours, sample, t, prompt)
        with torch.no_grad():
            change = torch.randn_like(own[name]) * 0.3
            own[name] += change
            if own[name].data_ptr() != plain[name].data_ptr():
                plain[name] += change
        after = step(ours, sample, t, prompt)
        assert not torch.equal(before, after), name
        assert_right(after, step(pipe, sample, t, prompt))
    assert executable(ours).records == 1


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_loop_never_waits_for_the_gpu(ours: Any) -> None:
    sample, prompt = inputs()
    times = timesteps(ours)
    for t in times[:3]:
        step(ours, sample, t, prompt)
    with no_waiting():
        latents = sample
        for t in times:
            latents = latents - 0.1 * step(ours, latents, t, prompt)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        latents.sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", ["PNDM", "DDIM", "Euler", "DPM++ 2M"])
def test_no_step_of_a_picture_waits_for_the_gpu(ours: Any, scheduler: str) -> None:
    """Not in the scheduler either: the host is ahead by whole steps, whatever it does between them."""
    set_scheduler(ours, scheduler)
    steps, seen = 6, []

    def watch(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        torch.cuda.set_sync_debug_mode("error" if 1 <= index < steps - 2 else "default")
        return values

    try:
        for _ in range(2):  # planned and recorded
            ours("a red apple", num_inference_steps=steps, output_type="latent")
        ours("a red apple", num_inference_steps=steps, output_type="latent", callback_on_step_end=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) >= steps


def test_two_sizes_in_turn(pipe: Any, ours: Any) -> None:
    times = timesteps(ours)
    for i, t in enumerate(times):
        for height, width, batch in ((8, 8, 2), (9, 7, 2), (16, 8, 4)):
            sample, prompt = inputs(height, width, batch, seed=i)
            assert_right(step(ours, sample, t, prompt), step(pipe, sample, t, prompt))
    assert executable(ours).records == 3


def test_results_stay_when_others_are_made(pipe: Any, ours: Any) -> None:
    """Also those of a first run, which works in the graphs' memory."""
    times = timesteps(ours)
    calls = [(inputs(h, w, seed=i), t) for i, t in enumerate(times) for h, w in ((8, 8), (16, 8), (8, 24))]
    kept = [(step(ours, *_ordered(c)), c) for c in calls]
    kept += [(step(ours, *_ordered(c)), c) for c in reversed(calls)]
    for made, call in kept:
        assert_right(made, step(pipe, *_ordered(call)))


def _ordered(call: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (sample, prompt), t = call
    return sample, t, prompt


def test_a_whole_picture_is_the_same(pipe: Any, ours: Any) -> None:
    arguments = dict(prompt="a red apple", num_inference_steps=6, output_type="np", width=64, height=72)
    for _ in range(3):  # planned, recorded, replayed
        eager, made = (
            torch.from_numpy(p(**arguments, generator=torch.Generator().manual_seed(3)).images) for p in (pipe, ours)
        )
        assert (eager - made).abs().mean() < 0.01
    assert not ap.explain(ours).fallbacks


def test_the_graph_used_longest_ago_goes_first(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    t = timesteps(ours)[0]
    pool = graphs.pool_of(0)
    pool.clear()
    _, prompt = inputs()  # the same one, or its stage would be recorded too

    def use(width: int) -> None:
        for _ in range(2):
            step(ours, inputs(8, width)[0], t, prompt)

    use(8)
    count = len(pool)
    monkeypatch.setattr(graphs, "GRAPH_BUDGET_BYTES", -1)  # whatever a graph takes is too much
    use(16)
    assert len(pool) == 1, "the newest stays, or nothing would ever be replayed"
    records = executable(ours).records
    use(16)
    assert executable(ours).records == records
    use(8)
    assert executable(ours).records == records + 1
    assert count >= 1


@pytest.mark.gpu
def test_the_pools_growth_is_not_the_graphs(ours: Any) -> None:
    """Else one large size would drop the graphs of all others."""
    pool = graphs.pool_of(0)
    pool.clear()
    t = timesteps(ours)[0]
    for _ in range(3):
        sample, prompt = inputs(96, 96)
        step(ours, sample, t, prompt)
    assert pool.graph_bytes() < 64 << 20


def blocks_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the pool's blocks from now on, to the byte; the first plan takes one."""
    pool, taken = graphs.pool_of(0), list[int]()
    renew = pool._renew

    def watched(block_bytes: int) -> None:
        taken.append(block_bytes)
        renew(block_bytes)

    pool.clear()
    pool.block_bytes = 0
    monkeypatch.setattr(pool, "_renew", watched)
    monkeypatch.setattr(graphs, "BLOCK_GRAIN", 512)
    monkeypatch.setattr(memory._Block, "LEAST", 0)  # or the small tensors of a test would need no place
    return taken


def test_the_block_grows_for_a_larger_size_and_only_then_graphs_go(
    pipe: Any, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = blocks_taken(monkeypatch)
    t = timesteps(ours)[0]
    grown, records = [], []
    for height in (16, 32, 16, 64, 32, 16, 64):
        before = len(taken)
        sample, prompt = inputs(height, 16)
        for _ in range(2):
            assert_right(step(ours, sample, t, prompt), step(pipe, sample, t, prompt))
        grown.append(len(taken) > before)
        records.append(executable(ours).records)
    assert grown == [True, True, False, True, False, False, False]
    assert records == [1, 2, 3, 4, 5, 6, 6], "a graph of a known size is recorded once after each growth"
    assert taken == sorted(set(taken))


def test_pictures_are_right_while_the_block_grows(pipe: Any, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the first picture too: the VAE needs more than the UNet, whose graph goes and comes back.  At a later
    size the UNet's need tells what the VAE's will be."""
    taken = blocks_taken(monkeypatch)
    arguments = dict(prompt="a red apple", num_inference_steps=3, output_type="np", height=64)
    for turn in range(2):
        for width in (64, 96, 128):
            before, records = len(taken), executable(ours).records if taken else 0
            eager, made = (
                torch.from_numpy(p(**arguments, width=width, generator=torch.Generator().manual_seed(3)).images)
                for p in (pipe, ours)
            )
            assert (eager - made).abs().mean() < 0.01
            grown = len(taken) - before
            assert grown > 1 if (turn, width) == (0, 64) else grown == (turn == 0)
            if (turn, width) == (1, 128):
                assert executable(ours).records == records, "it was recorded after the block had grown for all"
    assert not ap.explain(ours).fallbacks


def bytes_in(memory: Any) -> tuple[int, int]:
    """What the allocator holds in one pool, and in others that are not its general one."""
    segments = [(tuple(s["segment_pool_id"]), s["total_size"]) for s in torch.cuda.memory_snapshot()]
    inside = sum(size for pool, size in segments if pool == tuple(memory.id))
    return inside, sum(size for pool, size in segments if pool not in {tuple(memory.id), (0, 0)})


@pytest.mark.gpu
def test_a_grown_pool_is_one_block_and_the_old_one_is_given_back() -> None:
    pool = graphs.GraphPool(torch.device("cuda", 0))
    others = bytes_in(pool.memory)[1]
    x = torch.ones(1000, 1000, device="cuda", dtype=torch.float16)

    def work(megabytes: int) -> list[Any]:
        """Three tensors at once, and a product by cuBLAS, whose workspace must not lie in the pool."""
        parts = [torch.zeros(megabytes << 20, dtype=torch.uint8, device="cuda") for _ in range(3)]
        return [x @ x + parts[0][0] + parts[2][-1]]

    for number, megabytes in enumerate((20, 50, 90)):
        pool.reserve((3 * megabytes + 10) << 20)
        assert len(pool) == 0
        inside, outside = bytes_in(pool.memory)
        assert outside <= others, "the old pool's memory"
        assert inside >= pool.block_bytes
        expected = pool.run(lambda m=megabytes: work(m))[0]  # type: ignore[misc]
        pool.record((number, "a"), [], lambda m=megabytes: work(m))  # type: ignore[misc]
        replayed = pool.replay((number, "a"), [])
        assert replayed is not None
        assert torch.equal(replayed[0], expected)
        assert bytes_in(pool.memory)[0] == inside, "nothing was taken beside the block"
        pool.reserve((3 * megabytes) << 20)
        assert len(pool) == 1, "what is large enough stays"
    pool.clear()


@pytest.mark.gpu
def test_after_a_failed_recording_there_is_a_block_again() -> None:
    pool = graphs.GraphPool(torch.device("cuda", 0))
    pool.reserve(64 << 20)
    x = torch.ones(1000, device="cuda")
    with pytest.raises(RuntimeError):
        pool.record((0, "bad"), [x], lambda: [x * float(x.sum())])
    assert bytes_in(pool.memory)[0] >= pool.block_bytes >= 64 << 20
    pool.clear()


@pytest.mark.gpu
def test_a_block_for_which_memory_is_short_is_not_taken() -> None:
    pool = graphs.GraphPool(torch.device("cuda", 0))
    pool.reserve(1 << 45)
    x = torch.ones(1000, device="cuda")
    assert torch.equal(pool.run(lambda: [x + 1])[0], x + 1)
    pool.clear()


@pytest.mark.gpu
def test_memory_of_many_sizes_is_that_of_the_largest(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = graphs.GraphPool(torch.device("cuda", 0))
    needs: list[int] = []
    reserve = pool.reserve

    def watched(nbytes: int, foreseen_bytes: int = 0) -> None:
        needs.append(nbytes)
        reserve(nbytes, foreseen_bytes)

    monkeypatch.setattr(pool, "reserve", watched)
    for module in (executable_module, graphs):
        monkeypatch.setattr(module, "pool_of", lambda index: pool)
    others = bytes_in(pool.memory)[1]
    own = aliased(pipe)
    ap.optimize(own)
    for size in (512, 768, 1024, 768, 512):
        for _ in range(2):
            own(prompt="a red apple", num_inference_steps=3, output_type="latent", width=size, height=size)
            latents = torch.randn(1, 4, size // 8, size // 8, device="cuda").to(DTYPE)
            with torch.no_grad():
                own.vae.decode(latents)
    inside, outside = bytes_in(pool.memory)
    assert max(needs) > 100 << 20, "or the small pieces would count for too much"
    assert inside <= 1.15 * max(needs) + graphs.BLOCK_GRAIN
    assert outside <= others
    ap.restore(own)
    pool.clear()


def test_inference_mode_and_without_in_turn(pipe: Any, ours: Any) -> None:
    t = timesteps(ours)[0]
    for seed, mode in enumerate((True, True, False, True, False)):
        sample, prompt = inputs(seed=seed)
        with torch.inference_mode(mode):
            made = step(ours, sample, t, prompt)
        assert_right(made, step(pipe, sample, t, prompt))


@pytest.mark.gpu
def test_weights_need_no_more_memory_than_eagers_and_the_folds() -> None:
    def allocated() -> int:
        gc.collect()
        graphs.pool_of(0).clear()
        torch._C._cuda_clearCublasWorkspaces()  # tens of MB for each stream, which eager needs just so
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    start = allocated()
    unet = tiny_unet(dtype=DTYPE, block_out_channels=(128, 256, 256), norm_num_groups=32).cuda()
    weights = allocated() - start
    ap.optimize(unet, Config(cuda_graphs=False))
    sample, prompt = inputs()
    with torch.no_grad():
        unet(sample, torch.tensor(7.0, device="cuda"), encoder_hidden_states=prompt)
    del sample, prompt
    (engine,) = engines(unet).values()
    after = allocated() - start
    assert weights > 2_000_000
    assert after - weights <= engine.derived_bytes() + weights // 20, "folds, and buffers of earlier stages"
    assert engine.derived_bytes() < weights // 2
    ap.restore(unet)


def test_a_plan_that_cannot_be_recorded_runs_all_the_same(
    pipe: Any, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(type(graphs.pool_of(0)), "record", refuse)
    sample, prompt = inputs()
    t = timesteps(ours)[0]
    step(ours, sample, t, prompt)
    with pytest.warns(RuntimeWarning, match="no CUDA graph could be recorded"):
        step(ours, sample, t, prompt)
    assert_right(step(ours, sample, t, prompt), step(pipe, sample, t, prompt))


@pytest.mark.gpu
def test_a_failed_recording_leaves_the_pool_usable() -> None:
    pool = graphs.GraphPool(torch.device("cuda", 0))
    x = torch.ones(1000, device="cuda")

    def waits() -> list[Any]:
        return [x * float((x + 1).sum())]

    def works() -> list[Any]:
        return [x + 1]

    with pytest.raises(RuntimeError):
        pool.record((0, "bad"), [x], waits)
    assert len(pool) == 0
    assert torch.equal(pool.run(works)[0], x + 1)
    pool.record((0, "good"), [x], works)
    (made,) = pool.replay((0, "good"), [x * 4]) or [None]
    torch.testing.assert_close(made, torch.full_like(made, 5.0))  # type: ignore[arg-type]
    assert torch.isfinite(torch.randn(3, device="cuda")).all(), "random numbers know that nothing is being recorded"
    pool.clear()


@pytest.mark.gpu
def test_a_recording_after_all_others_have_gone() -> None:
    pool = graphs.GraphPool(torch.device("cuda", 0))
    x = torch.ones(1000, device="cuda")
    for number in range(3):
        pool.record((number, "only"), [x], lambda: [x + 1])
        assert pool.replay((number, "only"), [x]) is not None
        pool.forget(number)
        assert len(pool) == 0


@pytest.mark.gpu
def test_a_recording_for_which_memory_is_short() -> None:
    pool = graphs.GraphPool(torch.device("cuda", 0))
    x = torch.ones(1000, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        pool.record((0, "large"), [x], lambda: [torch.empty(1 << 45, dtype=torch.uint8, device="cuda")])
    pool.record((0, "small"), [x], lambda: [x + 1])
    assert pool.replay((0, "small"), [x]) is not None
    pool.clear()


@pytest.mark.gpu
def test_another_stream_waits_its_turn() -> None:
    """All graphs share their memory: one that runs beside another would write into it."""
    pool = graphs.GraphPool(torch.device("cuda", 0))
    own = [torch.zeros(1 << 22, device="cuda")]

    def work() -> list[Any]:
        made = own[0]
        for _ in range(20):
            made = made + 1
        return [made]

    pool.run(work)
    pool.record((0, "a"), own, work)
    streams = [torch.cuda.Stream() for _ in range(3)]  # type: ignore[no-untyped-call]
    made: list[tuple[int, torch.Tensor]] = []
    for i in range(12):
        value = torch.full_like(own[0], float(i))
        streams[i % 3].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[i % 3]):
            value.record_stream(torch.cuda.current_stream())
            results = pool.replay((0, "a"), [value])
            assert results is not None
            made.append((i, results[0]))
    torch.cuda.synchronize()
    assert all(bool((m == i + 20).all()) for i, m in made)
    pool.clear()


def test_a_kernel_that_cannot_run_leaves_the_stage_to_aten(
    pipe: Any, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("ptxas: no such register")

    sample, prompt = inputs()
    t = timesteps(ours)[0]
    monkeypatch.setattr("allaprima.backends.cuda.executable.lower", broken)
    with pytest.warns(RuntimeWarning, match="no such register"):
        first = step(ours, sample, t, prompt)
    assert_right(first, step(pipe, sample, t, prompt))
    assert "ptxas: no such register" in str(ap.explain(ours))
    with torch.no_grad():  # the weights still reach it
        ours.unet.conv_out.weight.mul_(2)
    made = step(ours, sample, t, prompt)
    with eager(ours):
        assert_right(made, step(ours, sample, t, prompt))
    assert not torch.equal(made, first)


def test_until_the_kernels_are_compiled_it_runs_on_aten(pipe: Any, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = False
    monkeypatch.setattr("allaprima.backends.cuda.executable.ready", lambda *asked: compiled)
    sample, prompt = inputs()
    times = timesteps(ours)
    for t in times[:2]:
        assert_right(step(ours, sample, t, prompt), step(pipe, sample, t, prompt))
    assert not executable(ours).plans
    assert "aten until the kernels are compiled" in str(ap.explain(ours))
    compiled = True
    for t in times[2:4]:
        assert_right(step(ours, sample, t, prompt), step(pipe, sample, t, prompt))
    assert len(executable(ours).plans) == 1


def test_out_of_memory_is_no_reason_to_give_up(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    sample, prompt = inputs()
    t = timesteps(ours)[0]
    with monkeypatch.context() as patched:
        patched.setattr("allaprima.backends.cuda.executable.lower", full)
        with pytest.raises(ap.errors.OutOfMemoryError):
            step(ours, sample, t, prompt)
    assert torch.isfinite(step(ours, sample, t, prompt)).all()
    assert executable(ours).failed is None


@pytest.mark.gpu
def test_a_run_takes_no_more_than_was_reserved_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first run and at the next, in which results are written over arguments too."""
    pool = graphs.GraphPool(torch.device("cuda", 0))
    pool.run(list)  # cuBLAS takes its workspace
    needs: list[int] = []
    taken: list[tuple[int, int]] = []
    reserve, run = pool.reserve, pool.run

    def noted(nbytes: int, foreseen_bytes: int = 0) -> None:
        needs.append(nbytes)
        reserve(nbytes, foreseen_bytes)

    def measured(work: Callable[[], list[Any]]) -> list[Any]:
        first = len(needs) > sum(number > 0 for number, _ in taken)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = run(work)
        taken.append((len(needs) if first else 0, torch.cuda.max_memory_allocated() - before))
        return made

    monkeypatch.setattr(pool, "reserve", noted)
    monkeypatch.setattr(pool, "run", measured)
    for module in (executable_module, graphs):
        monkeypatch.setattr(module, "pool_of", lambda index: pool)
    own = ap.load("emoji", dtype="float16", device="cuda")
    ap.optimize(own, Config(cuda_graphs=False))
    for _ in range(2):
        own(prompt="a red apple", num_inference_steps=2, width=1024, height=1024)
    assert max(needs) > 100 << 20, "or the small pieces would count for too much"
    for number, nbytes in taken:
        needed = needs[number - 1] if number else max(needs)
        assert nbytes <= needed + needed // 32 + graphs.BLOCK_GRAIN
    made = [x for e in engines(own).values() for r in e.runners() for x in r.executables.values()]
    assert any("out" in launch.options for x in made for plan in x.plans for launch in plan.launches)
    ap.restore(own)
    pool.clear()


@pytest.mark.gpu
def test_many_weights_of_odd_sizes_hold_little_more_than_they_need() -> None:
    """Loaded among others that have gone since, each would keep a segment of 20 MiB."""

    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rows = torch.randint(3000, 7000, (200,), generator=torch.Generator().manual_seed(0)).tolist()
            made = [torch.zeros(n * times, 512, device="cuda", dtype=DTYPE) for n in rows for times in (1, 2)]
            self.parts = torch.nn.ParameterList(made[::2])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = x + torch.nn.functional.linear(x, part)[:, :512]
            return x

    def lost() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - graphs.pool_of(0).block_bytes

    before = lost()
    module = Sum().eval().requires_grad_(False)
    weights, scattered = sum(p.nbytes for p in module.parameters()), lost() - before
    assert scattered > weights // 4, "or there is nothing to gain"
    ap.optimize(module, Config(cuda_graphs=False))
    x = torch.randn(2, 512, device="cuda", dtype=DTYPE)
    held = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        module(x)
    grown = torch.cuda.max_memory_reserved() - held - graphs.pool_of(0).block_bytes
    assert grown < 96 << 20, "a slab, and cuBLAS's workspace"
    assert lost() - before < weights // 40 + (24 << 20)
    ap.restore(module)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters())
