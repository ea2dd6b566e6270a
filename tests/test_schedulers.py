"""Schedulers by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

from allaprima.errors import SchedulerError
from allaprima.schedulers import SCHEDULERS, set_scheduler


@pytest.fixture
def pipe() -> Any:
    """All that `set_scheduler` needs of a pipeline, with the noise schedule of SD v1.5."""
    return SimpleNamespace(
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                skip_prk_steps=True, set_alpha_to_one=False)
    )  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_noise_schedule_of_the_checkpoint_is_kept(pipe: Any, name: str) -> None:
    set_scheduler(pipe, name)
    config = pipe.scheduler.config
    assert type(pipe.scheduler).__name__ == SCHEDULERS[name][0]
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert not config.get("clip_sample", False)
    pipe.scheduler.set_timesteps(6)
    assert len(pipe.scheduler.timesteps) >= 6


def test_the_names_that_the_issue_asks_for_are_there() -> None:
    asked = {"PNDM", "DDIM", "Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "UniPC", "LCM", "Heun", "DPM++ 2M Karras"}
    assert asked <= SCHEDULERS.keys()


def test_capital_letters_do_not_matter(pipe: Any) -> None:
    set_scheduler(pipe, "dpm++ 2m KARRAS")
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert pipe.scheduler.config.use_karras_sigmas


def test_one_scheduler_leaves_nothing_behind_in_the_next(pipe: Any) -> None:
    set_scheduler(pipe, "DPM++ 2M SDE Karras")
    set_scheduler(pipe, "DPM++ 2M")
    assert not pipe.scheduler.config.use_karras_sigmas
    assert pipe.scheduler.config.algorithm_type == "dpmsolver++"
    set_scheduler(pipe, "Euler Karras")
    set_scheduler(pipe, "Euler")
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    assert not pipe.scheduler.config.use_karras_sigmas


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_going_there_and_back_changes_nothing(pipe: Any, name: str) -> None:
    set_scheduler(pipe, "PNDM")
    before = dict(pipe.scheduler.config)
    set_scheduler(pipe, name)
    set_scheduler(pipe, "PNDM")
    after = dict(pipe.scheduler.config)
    shared = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type", "steps_offset",
              "timestep_spacing", "set_alpha_to_one", "skip_prk_steps")  # fmt: skip
    assert {k: after[k] for k in shared} == {k: before[k] for k in shared}


def test_v_prediction_is_kept(pipe: Any) -> None:
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    set_scheduler(pipe, "Euler a")
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_an_unknown_name_lists_the_known_ones(pipe: Any) -> None:
    with pytest.raises(SchedulerError, match=r"DPM\+\+ 3M.*known: PNDM, DDIM"):
        set_scheduler(pipe, "DPM++ 3M")
