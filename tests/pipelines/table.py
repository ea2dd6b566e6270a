"""`python -m tests.pipelines.table`: the table of docs/pipelines.md, from what `explain` says of the miniatures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import allaprima as ap
from allaprima.config import Config
from allaprima.explanation import Explanation
from allaprima.pipelines import as_task, engines
from allaprima.rewrite import rewrite, rules_for
from tests import tiny
from tests.pipelines.comparing import draw, mask, picture, size, start

HINT = {"image": picture(64, 64)}
REDRAWN = start(64, 64)
REPAINTED = REDRAWN | size(64, 64) | {"mask_image": mask(64, 64)}

PIPELINES: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "StableDiffusionPipeline (SD 1)": (tiny.tiny_pipeline, "text2img", size(64, 64)),
    "StableDiffusionImg2ImgPipeline": (tiny.tiny_pipeline, "img2img", REDRAWN),
    "StableDiffusionInpaintPipeline, 4 channels": (tiny.tiny_pipeline, "inpaint", REPAINTED),
    "StableDiffusionInpaintPipeline, 9 channels": (tiny.tiny_inpainting_pipeline, "inpaint", REPAINTED),
    "StableDiffusionPipeline (Taiyi: BERT, 512 tokens)": (tiny.tiny_taiyi_pipeline, "text2img", size(64, 64)),
    "StableDiffusionPipeline (SD 2: v-prediction)": (tiny.tiny_sd2_pipeline, "text2img", size(64, 64)),
    "AltDiffusionPipeline (XLM-R)": (tiny.tiny_alt_pipeline, "text2img", size(64, 64)),
    "AltDiffusionImg2ImgPipeline": (tiny.tiny_alt_pipeline, "img2img", REDRAWN),
    "StableDiffusionXLPipeline": (tiny.tiny_xl_pipeline, "text2img", size(64, 64)),
    "StableDiffusionXLImg2ImgPipeline": (tiny.tiny_xl_pipeline, "img2img", REDRAWN),
    "StableDiffusionXLImg2ImgPipeline (refiner)": (tiny.tiny_refiner, "img2img", REDRAWN),
    "StableDiffusionXLInpaintPipeline": (tiny.tiny_xl_pipeline, "inpaint", REPAINTED),
    "StableDiffusionControlNetPipeline": (tiny.tiny_controlnet_pipeline, "text2img", HINT),
    "StableDiffusionControlNetPipeline, several": (
        lambda: tiny.tiny_controlnet_pipeline(2), "text2img", {"image": [picture(64, 64), picture(64, 64, 1)]},
    ),
    "StableDiffusionControlNetImg2ImgPipeline": (
        tiny.tiny_controlnet_pipeline, "img2img", REDRAWN | {"control_image": picture(64, 64)},
    ),
    "IP-Adapter": (tiny.tiny_ip_pipeline, "text2img", size(64, 64) | {"ip_adapter_image": picture(50, 60)}),
    "LatentConsistencyModelPipeline": (tiny.tiny_lcm_pipeline, "text2img", size(64, 64)),
    "LatentConsistencyModelImg2ImgPipeline": (tiny.tiny_lcm_pipeline, "img2img", REDRAWN),
    "StableDiffusion3Pipeline": (tiny.tiny_sd3_pipeline, "text2img", size(64, 64)),
    "StableDiffusion3Img2ImgPipeline": (tiny.tiny_sd3_pipeline, "img2img", REDRAWN | size(64, 64)),
}  # fmt: skip

QUIET = {"RemoveNoOps", "ViewToReshape", "SizesFromInputs", "CastToDtype", "ComposePermutes", "MergeEqualCalls"}
"""Rules that only tidy up: they fire everywhere and are left out of the table."""

HEADER = (
    "| pipeline | engines that ran | prompt · schedule · step | fires on OpenVINO | fires on CUDA | falls back |",
    "| --- | --- | --- | --- | --- | --- |",
)


def row(name: str) -> str:
    """One row: engines, the denoiser's calls of each stage, rules that fire, and what runs eagerly or on ATen."""
    build, task, options = PIPELINES[name]
    pipe = ap.optimize(build(), Config(backend="openvino"))
    draw(as_task(pipe, task), **options)
    found = ap.explain(pipe)
    ran = [part for part, engine in engines(pipe).items() if engine.bound]
    calls: Counter[str] = Counter()
    for stage in found.stages:
        if stage.component in ("unet", "transformer"):
            calls[stage.time] += stage.calls
    stages = " · ".join(f"{calls[time]}" for time in ("prompt", "schedule", "step"))
    return (
        "| " + " | ".join((name, ", ".join(ran), stages, told(found.fired), told(on_cuda(pipe)), eager(found))) + " |"
    )


def on_cuda(pipe: Any) -> Counter[str]:
    """What fires there: rewriting needs no GPU."""
    fired: Counter[str] = Counter()
    for engine in engines(pipe).values():
        for runner in engine.runners():
            fired.update(rewrite(runner.captured.copy(), rules_for("cuda")).fired)
    return fired


def told(fired: Mapping[str, int]) -> str:
    return ", ".join(f"{rule} {count}" for rule, count in sorted(fired.items()) if rule not in QUIET)


def eager(found: Explanation) -> str:
    reasons = [f"{why} ({count})" for why, count in found.fallbacks.items()]
    reasons += [f"{s.component} {s.time}: {s.backend}" for s in found.stages
                if s.time != "weights" and s.backend.startswith("aten")]  # fmt: skip
    return "; ".join(reasons) or "nothing"


if __name__ == "__main__":
    print(*HEADER, *map(row, PIPELINES), sep="\n")
