from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from allaprima.bench.measure import error_limit, error_to
from allaprima.bench.variants import LIMITED, VARIANTS, Unfinished, default_variants, time_limit
from allaprima.bench.workloads import COMPONENTS, WORKLOADS, Case, aliased


def test_every_variant_says_what_it_is() -> None:
    assert all(variant.__doc__ for variant in VARIANTS.values())
    assert set(LIMITED) < set(VARIANTS)
    assert set(default_variants("cpu")) | set(default_variants("cuda")) <= set(VARIANTS)


def test_a_limit_ends_what_takes_too_long() -> None:
    start = time.monotonic()
    with pytest.raises(Unfinished, match=r"unfinished after 0\.1 s"), time_limit(0.1):
        time.sleep(10)
    assert time.monotonic() - start < 5


def stubborn() -> None:
    """Compilers catch what comes out of a backend and try it otherwise."""
    try:
        time.sleep(10)
    except Exception:
        time.sleep(10)


def wrapping() -> None:
    try:
        time.sleep(10)
    except BaseException as error:
        raise RuntimeError("backend failed") from error


@pytest.mark.parametrize("compiler", [stubborn, wrapping])
def test_a_compiler_that_catches_exceptions_is_ended_too(compiler: Callable[[], None]) -> None:
    with pytest.raises(Unfinished), time_limit(0.1):
        compiler()


def test_a_limit_leaves_the_rest_alone() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(5):
        pass
    with pytest.raises(KeyError), time_limit(5):
        raise KeyError("its own error")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_raw_openvino_draws_the_same(tiny_pipe: Any) -> None:
    pytest.importorskip("openvino")
    other = aliased(tiny_pipe)
    VARIANTS["openvino"](other, COMPONENTS)
    for what in ("step", "text", "vae", "e2e"):
        for case in (Case(what, 64, 64, 1, 2), Case(what, 128, 64, 2, 2)):  # sizes and batches are dynamic
            error = error_to(WORKLOADS[what].outputs(tiny_pipe, case), WORKLOADS[what].outputs(other, case))
            assert error < error_limit(torch.float32, 0)


def test_raw_openvino_reads_its_inputs_where_they_are(tiny_pipe: Any) -> None:
    pytest.importorskip("openvino")
    from allaprima.bench.variants import RawOpenVINO, _host

    latents = torch.randn(1, 4, 8, 8)
    assert _host(latents).__array_interface__["data"][0] == latents.data_ptr()
    forward = RawOpenVINO(tiny_pipe.vae.decoder, "vae.decoder")
    first = forward(latents)
    kept = first.clone()
    forward(latents + 1)
    assert torch.equal(first, kept)  # a result is not overwritten by the next call


def test_raw_openvino_refuses_what_its_trace_cannot_draw(tiny_pipe: Any) -> None:
    """Without the refusal it answers in another shape, and wrongly from then on."""
    pytest.importorskip("openvino")
    other = aliased(tiny_pipe)
    VARIANTS["openvino"](other, ["unet"])
    case = Case("step", 64, 64, 1)
    truth = WORKLOADS["step"].outputs(tiny_pipe, case)
    with pytest.raises(ValueError, match="multiples of 4"):
        WORKLOADS["step"].outputs(other, Case("step", 72, 104, 1))
    assert error_to(truth, WORKLOADS["step"].outputs(other, case)) < error_limit(torch.float32, 0)


@pytest.mark.parametrize("name", ["channels-last", "eager"])
def test_eager_variants_draw_the_same(tiny_pipe: Any, name: str) -> None:
    other = aliased(tiny_pipe)
    VARIANTS[name](other, COMPONENTS)
    case = Case("step", 64, 64, 1)
    for mine, its in zip(
        WORKLOADS["step"].outputs(tiny_pipe, case), WORKLOADS["step"].outputs(other, case), strict=True
    ):
        assert torch.allclose(mine, its, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they work")
@pytest.mark.parametrize("name", ["cuda-graph", "compile-graph"])
def test_graphs_say_that_they_need_a_gpu(tiny_pipe: Any, name: str) -> None:
    with pytest.raises(RuntimeError, match="need a GPU"):
        VARIANTS[name](aliased(tiny_pipe), ["unet"])


@pytest.mark.gpu
def test_a_recorded_pipeline_draws_the_same() -> None:
    from tests.tiny import tiny_pipeline

    pipe = tiny_pipeline(dtype=torch.float16).to("cuda")
    other = aliased(pipe)
    VARIANTS["cuda-graph"](other, COMPONENTS)
    for what in ("step", "text", "vae", "e2e"):
        for case in (Case(what, 64, 64, 1, 2), Case(what, 128, 64, 2, 2), Case(what, 64, 64, 1, 2)):
            error = error_to(WORKLOADS[what].outputs(pipe, case), WORKLOADS[what].outputs(other, case))
            assert error < error_limit(torch.float16, 1e-3)
