"""Embeddings: diffusers' own where there is no syntax, A1111's arithmetic where there is."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import allaprima as ap
from allaprima.errors import ConfigError, InputError
from allaprima.pipelines import eager, engines
from allaprima.prompts import Encoded, encode, forget, pieces
from allaprima.prompts.text_encoders import _CACHE
from tests import tiny

STEPS = 6
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
# A mean of cancelling float32 numbers loses some bits of its 24.
MEAN_ROUNDING = 2**-16
KINDS: dict[str, Callable[[], Any]] = {
    "clip": tiny.tiny_pipeline,
    "bert": tiny.tiny_bert_pipeline,
    "bert of 512": tiny.tiny_taiyi_pipeline,
    "xlm-r": tiny.tiny_alt_pipeline,
    "xl": tiny.tiny_xl_pipeline,
}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    made = {name: make() for name, make in KINDS.items()}
    for pipe in made.values():
        with_mean(pipe)
    return made


def with_mean(pipe: Any) -> Any:
    """Trained norms have a bias, without which the mean of an embedding is rounding only."""
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        for norm in encoder.modules() if encoder else ():
            if isinstance(norm, torch.nn.LayerNorm):
                torch.nn.init.constant_(norm.bias, 0.2)
    return pipe


@pytest.fixture
def pipe(pipes: dict[str, Any]) -> Any:
    """Shared: a test that changes it makes its own."""
    return pipes["clip"]


def draw(pipe: Any, encoded: Encoded | None = None, **arguments: Any) -> torch.Tensor:
    settings = dict(num_inference_steps=STEPS - 1, guidance_scale=4.0, height=64, width=64, output_type="latent")
    settings["generator"] = torch.Generator().manual_seed(1)
    if encoded is None:
        return pipe(**settings | arguments).images
    with encoded.composing(pipe):
        return pipe(**settings | encoded.arguments() | arguments).images


def rounding(*tensors: torch.Tensor) -> float:
    """What the order of float32's additions may change in latents of these sizes, over some hundred layers' calls."""
    return 2**-23 * 2**10 * max(float(t.abs().max()) for t in tensors)


# ---- prompts without syntax


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "红色的猫, a cat"])
def test_plain_prompts_have_diffusers_own_embeddings(pipes: dict[str, Any], kind: str, prompt: str) -> None:
    pipe = pipes[kind]
    encoded = encode(pipe, prompt, "b", steps=STEPS)
    expected = pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="b"
    )
    for name, tensor in zip(EMBEDS, expected, strict=False):
        assert torch.equal(getattr(encoded, name), tensor)


def test_clip_skip_is_diffusers_own_plus_one(pipes: dict[str, Any]) -> None:
    encoded = encode(pipes["xl"], "a", "b", steps=STEPS, clip_skip=2)
    assert torch.equal(encoded.prompt_embeds, pipes["xl"].encode_prompt("a", clip_skip=1)[0])
    clip = pipes["clip"]
    hidden = clip.text_encoder(clip.tokenizer("a", padding="max_length", return_tensors="pt").input_ids,
                               output_hidden_states=True).hidden_states  # fmt: skip
    encoded = encode(clip, "a", steps=STEPS, clip_skip=2)
    assert torch.equal(encoded.prompt_embeds, clip.text_encoder.final_layer_norm(hidden[-2]))


def test_xl_without_a_negative_prompt_has_zeros(pipes: dict[str, Any]) -> None:
    encoded = encode(pipes["xl"], "(a:1.2)", steps=STEPS)
    assert not encoded.negative_prompt_embeds.any()
    assert not encoded.negative_pooled_prompt_embeds.any()
    assert encode(pipes["xl"], "(a:1.2)", "", steps=STEPS).negative_prompt_embeds.any()


# ---- weights and chunks


@torch.no_grad()
def raw(pipe: Any, text: str) -> torch.Tensor:
    return pipe.encode_prompt(text, "cpu", 1, False)[0]


@pytest.mark.parametrize(
    ("kind", "plain", "typed"), [("clip", "a a b", "a (a b:1.5)"), ("bert", "红色的", "红（色的：1.5）")]
)
def test_weights_multiply_and_the_mean_is_restored(pipes: dict[str, Any], kind: str, plain: str, typed: str) -> None:
    pipe = pipes[kind]
    z, weights = raw(pipe, plain), torch.ones(raw(pipe, plain).shape[1])
    weights[2:4] = 1.5
    weighted = z * weights[:, None]

    def found(emphasis: Any) -> torch.Tensor:
        return encode(pipe, typed, steps=STEPS, emphasis=emphasis).prompt_embeds

    assert torch.equal(found("Ignore"), z)
    assert torch.equal(found("No norm"), weighted)
    # Two means of float32 numbers, each summed in another order.
    assert torch.allclose(found("Original"), weighted * (z.mean() / weighted.mean()), rtol=MEAN_ROUNDING, atol=0)


def test_the_mean_is_that_of_all_variants_of_a_prompt(pipe: Any) -> None:
    """`[(a:2)|b]` at five steps: a three times, b twice, as A1111 encodes them."""
    z = torch.cat([raw(pipe, text) for text in "ababa"])
    weights = torch.ones(5, z.shape[1], 1)
    weights[::2, 1] = 2
    ratio = z.mean() / (z * weights).mean()
    stages = encode(pipe, "[(a:2)|b]", steps=5).stages
    assert [stage.first for stage in stages] == [0, 2, 3, 4, 5]
    for i, stage in enumerate(stages):
        expected = (z * weights)[i : i + 1] * ratio
        assert torch.allclose(stage.prompts.embeds, expected, rtol=MEAN_ROUNDING, atol=0)


def test_a_mean_of_rounding_errors_is_not_restored() -> None:
    pipe = tiny.tiny_pipeline()
    original, no_norm = (
        encode(pipe, "(a:1.5) b", steps=STEPS, emphasis=emphasis).prompt_embeds for emphasis in ("Original", "No norm")
    )
    assert abs(float(raw(pipe, "a b").mean())) < 2**-23
    assert torch.equal(original, no_norm)


def test_chunks_are_encoded_one_by_one(pipe: Any) -> None:
    encoded = encode(pipe, "a" * 75 + " b BREAK c", "d", steps=STEPS)
    expected = torch.cat([raw(pipe, text) for text in ("a" * 75, "b", "c")], dim=1)
    assert encoded.prompt_embeds.shape == (1, 231, 32)
    # Three rows of a batch of one are computed as one each.
    assert torch.equal(encoded.prompt_embeds, expected)
    assert torch.equal(encoded.negative_prompt_embeds, torch.cat([raw(pipe, "d"), raw(pipe, ""), raw(pipe, "")], dim=1))


def test_a_short_prompt_is_filled_to_the_length_of_a_long_negative_one(pipe: Any) -> None:
    encoded = encode(pipe, "a", "b BREAK c", steps=STEPS)
    assert torch.equal(encoded.prompt_embeds, torch.cat([raw(pipe, "a"), raw(pipe, "")], dim=1))


def test_prompts_of_a_batch_repeat_their_last_vector(pipe: Any) -> None:
    encoded = encode(pipe, ["a", "b BREAK c"], ["", "d"], steps=STEPS)
    assert encoded.prompt_embeds.shape == (2, 154, 32)
    assert torch.equal(encoded.prompt_embeds[:1, :77], raw(pipe, "a"))
    assert torch.equal(encoded.prompt_embeds[0, 77:], raw(pipe, "a")[0, -1:].expand(77, -1))


def test_textual_inversion_of_several_vectors() -> None:
    pipe = tiny.tiny_pipeline()
    pipe.load_textual_inversion(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), token="<cat>")
    assert torch.equal(encode(pipe, "a <cat> b", steps=STEPS).prompt_embeds, raw(pipe, "a <cat> b"))
    ends = encode(pipe, "a" * 73 + " <cat>", steps=STEPS).prompt_embeds
    assert torch.equal(ends, torch.cat([raw(pipe, "a" * 73), raw(pipe, "<cat>")], dim=1))


def test_xl_weights_both_encoders_and_pools_the_first_chunk(pipes: dict[str, Any]) -> None:
    pipe = pipes["xl"]
    plain, pooled = (pipe.encode_prompt("a b")[i] for i in (0, 2))
    encoded = encode(pipe, "a (b:2) BREAK c", steps=STEPS, emphasis="No norm")
    weights = torch.ones(77, 1)
    weights[2] = 2
    assert torch.equal(encoded.prompt_embeds[:, :77], plain * weights)
    assert encoded.prompt_embeds.shape[1] == 154
    assert torch.equal(encoded.pooled_prompt_embeds, pooled)


# ---- prompts that change, and AND


def unet_calls(pipe: Any, encoded: Encoded, **arguments: Any) -> list[dict[str, Any]]:
    """What the UNet is called with; a stand-in answers for it."""
    seen: list[dict[str, Any]] = []

    def forward(sample: torch.Tensor, timestep: Any, **named: Any) -> tuple[torch.Tensor]:
        seen.append(named)
        return (torch.zeros_like(sample),)

    pipe.unet.forward = forward
    try:
        draw(pipe, encoded, **arguments)
    finally:
        del pipe.unet.forward
    return seen


@pytest.mark.parametrize("num_images", [1, 2])
def test_the_step_decides_what_the_unet_reads(pipe: Any, num_images: int) -> None:
    """A1111 asks for the first variant whose end is not below the number of calls done: the first has one call more."""
    pipe.scheduler.set_timesteps(STEPS - 1)
    assert len(pipe.scheduler.timesteps) == STEPS
    encoded = encode(pipe, "[a:b:2]", "[c|d]", steps=STEPS)
    for _ in range(2):  # a second picture begins anew
        seen = unet_calls(pipe, encoded, num_images_per_prompt=num_images)
        expected = [("c", "a"), ("c", "a"), ("d", "a"), ("c", "b"), ("d", "b"), ("c", "b")]
        for found, texts in zip(seen, expected, strict=True):
            rows = torch.cat([raw(pipe, text).repeat(num_images, 1, 1) for text in texts])
            assert torch.allclose(found["encoder_hidden_states"], rows, rtol=0, atol=rounding(rows) / 2**6)


def test_without_guidance_only_the_prompt_is_read(pipe: Any) -> None:
    encoded = encode(pipe, "[a:b:2]", "c", steps=STEPS, guidance=False)
    assert encoded.negative_prompt_embeds is None
    seen = [found["encoder_hidden_states"] for found in unet_calls(pipe, encoded, guidance_scale=1.0)]
    assert [found.shape[0] for found in seen] == [1] * STEPS
    assert torch.equal(seen[-1], raw(pipe, "b"))


def test_xl_changes_its_pooled_text_too(pipes: dict[str, Any]) -> None:
    pipe = pipes["xl"]
    changing = encode(pipe, "[a:b:1]", "c", steps=STEPS)
    calls = unet_calls(pipe, changing, num_inference_steps=3)
    seen = [found["added_cond_kwargs"]["text_embeds"] for found in calls]
    assert torch.equal(seen[1], seen[0])
    assert not torch.equal(seen[2], seen[0])
    assert torch.equal(seen[2][:1], seen[0][:1])  # the negative one


@pytest.mark.parametrize("kind", ["clip", "xl"])
def test_and_adds_the_guidance_of_each_prompt(pipes: dict[str, Any], kind: str, monkeypatch: Any) -> None:
    """u + s·Σ w·(c - u), of the noises u + s·(c - u) that the pipeline predicts for each prompt alone."""
    pipe = pipes[kind]
    step = pipe.scheduler.step
    seen: list[torch.Tensor] = []

    def noted(noise: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        seen.append(noise)
        return step(noise, *arguments, **named)

    monkeypatch.setattr(pipe.scheduler, "step", noted)
    for prompt in ("n", "a", "b"):
        draw(pipe, prompt=prompt, negative_prompt="n", num_inference_steps=1)
    draw(pipe, encode(pipe, "a :0.75 AND b :-0.5", "n", steps=1), num_inference_steps=1)
    u, a, b, mixed = seen[:: len(seen) // 4]
    expected = u + 0.75 * (a - u) - 0.5 * (b - u)
    assert torch.allclose(mixed, expected, rtol=0, atol=rounding(expected))
    assert float((mixed - a).abs().max()) > 2 * rounding(expected)


def test_and_in_a_batch_gives_each_prompt_its_own(pipe: Any) -> None:
    prompts = ["a AND b", "c", "[a:b:1] AND c:0.5"]
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    together = draw(pipe, encode(pipe, prompts, "n", steps=3), generator=seeds, num_inference_steps=2)
    for i, prompt in list(enumerate(prompts))[1:]:
        seed = torch.Generator().manual_seed(i)
        alone = draw(pipe, encode(pipe, prompt, "n", steps=3), generator=seed, num_inference_steps=2)
        assert torch.allclose(together[i : i + 1], alone, rtol=0, atol=rounding(alone))


def test_halves_of_one_prompt_are_that_prompt_picture_after_picture(pipe: Any) -> None:
    few = dict(num_images_per_prompt=2, num_inference_steps=2)
    whole = draw(pipe, encode(pipe, "[a:b:1]", "n", steps=3), **few)
    halves = encode(pipe, "[a:b:1] :0.5 AND [a:b:1] :0.5", "n", steps=3)
    with halves.composing(pipe):
        for _ in range(2):
            found = draw(pipe, None, **few, **halves.arguments())
            assert torch.allclose(found, whole, rtol=0, atol=rounding(whole))
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_and_needs_guidance(pipe: Any) -> None:
    with pytest.raises(InputError, match="guidance"):
        encode(pipe, "a AND b", steps=STEPS, guidance=False)
    with pytest.raises(InputError, match="guidance"):
        draw(pipe, encode(pipe, "a AND b", "", steps=STEPS), guidance_scale=1.0, num_images_per_prompt=2)


# ---- on an optimized pipeline


def test_an_optimized_pipeline_reads_the_same() -> None:
    pipe = with_mean(tiny.tiny_pipeline())
    prompts = ("[(a:1.3):b:1] AND c BREAK d:0.5", "[a|b]")
    plain = [draw(pipe, encode(pipe, prompt, "n", steps=3), num_inference_steps=2) for prompt in prompts]
    ap.optimize(pipe)
    for prompt, expected in zip(prompts, plain, strict=True):
        found = draw(pipe, encode(pipe, prompt, "n", steps=3), num_inference_steps=2)
        assert torch.allclose(found, expected, rtol=0, atol=rounding(expected))
    assert not any(engine.events.fallbacks for engine in engines(pipe).values())


# ---- the cache


def cache(pipe: Any) -> Any:
    return pipe.__dict__[_CACHE]


def test_an_embedding_is_made_once_for_all_that_it_depends_on() -> None:
    pipe = tiny.tiny_pipeline()
    first = encode(pipe, "(a:1.2)", "b", steps=STEPS).prompt_embeds
    encode(pipe, "", steps=STEPS, clip_skip=2)  # at the first, transformers puts recorders into the encoder
    encode(pipe, "(a:1.2)", "b", steps=STEPS)
    misses = cache(pipe).misses
    assert torch.equal(encode(pipe, "(a:1.2)", "b", steps=STEPS).prompt_embeds, first)
    assert cache(pipe).misses == misses
    for change in ({"clip_skip": 2}, {"emphasis": "Ignore"}, {"lora_scale": 0.5}):
        encode(pipe, "(a:1.2)", "b", steps=STEPS, **change)
        assert cache(pipe).misses == (misses := misses + 2)
    encode(pipe, "(a:1.3)", "b", steps=STEPS)
    assert cache(pipe).misses == misses + 1


def _in_place(pipe: Any) -> None:
    with torch.no_grad():
        pipe.text_encoder.final_layer_norm.weight.mul_(2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight in place": _in_place,
    "another encoder": lambda pipe: setattr(pipe, "text_encoder", tiny.tiny_clip(seed=5)),
    "a state dict": lambda pipe: pipe.text_encoder.load_state_dict(tiny.tiny_clip(seed=5).state_dict()),
    "dtype": lambda pipe: pipe.text_encoder.to(torch.float64),
    "an inversion": lambda pipe: pipe.load_textual_inversion(torch.ones(32), token="<a>"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_encoder_changes_the_embedding(change: str) -> None:
    pipe = tiny.tiny_pipeline()
    before = encode(pipe, "a <a>", steps=STEPS).prompt_embeds
    CHANGES[change](pipe)
    after = encode(pipe, "a <a>", steps=STEPS).prompt_embeds
    assert after.dtype != before.dtype or not torch.equal(after, before)
    assert torch.equal(after, raw(pipe, "a <a>"))


def test_an_encoder_that_comes_back_has_its_own_embeddings() -> None:
    pipe = tiny.tiny_pipeline()
    own, other = pipe.text_encoder, tiny.tiny_clip(seed=5)
    before = encode(pipe, "a", steps=STEPS).prompt_embeds
    pipe.text_encoder = other
    between = encode(pipe, "a", steps=STEPS).prompt_embeds
    pipe.text_encoder = own
    assert torch.equal(encode(pipe, "a", steps=STEPS).prompt_embeds, before)
    assert not torch.equal(between, before)
    leaving = weakref.ref(other)
    del other
    gc.collect()
    assert leaving() is None, "an encoder that left is not kept alive"


def test_eager_and_optimized_embeddings_are_not_mixed() -> None:
    pipe = ap.optimize(tiny.tiny_pipeline())
    encode(pipe, "a", steps=STEPS)
    misses = cache(pipe).misses
    with eager(pipe):
        encode(pipe, "a", steps=STEPS)
    assert cache(pipe).misses > misses
    misses = cache(pipe).misses
    ap.restore(pipe)
    encode(pipe, "a", steps=STEPS)
    assert cache(pipe).misses > misses


@pytest.mark.parametrize("again", [forget, ap.rebind])
def test_writes_without_a_trace_need_forget_or_rebind(again: Any) -> None:
    pipe = tiny.tiny_pipeline()
    before = encode(pipe, "a", steps=STEPS).prompt_embeds
    pipe.text_encoder.final_layer_norm.weight.data.mul_(2)
    again(pipe)
    assert not torch.equal(encode(pipe, "a", steps=STEPS).prompt_embeds, before)


def test_the_cache_is_bounded_in_bytes() -> None:
    pipe = tiny.tiny_pipeline()
    encode(pipe, "a", steps=STEPS, guidance=False)
    size = 77 * 32 * 4
    cache(pipe).max_bytes = 3 * size
    for text in "bcdefg":
        encode(pipe, text, steps=STEPS, guidance=False)
    assert len(cache(pipe)) == 3
    misses = cache(pipe).misses
    encode(pipe, ["e", "f", "g"], steps=STEPS, guidance=False)
    assert cache(pipe).misses == misses


def test_a_copy_of_a_pipeline_starts_with_an_empty_cache(pipe: Any) -> None:
    encode(pipe, "a", steps=STEPS)
    assert len(cache(pipe)) > 0
    assert len(copy.deepcopy(cache(pipe))) == len(pickle.loads(pickle.dumps(cache(pipe)))) == 0


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"emphasis": "loud"}, ConfigError, "No norm"),
        ({"clip_skip": 0}, InputError, "clip_skip is 0"),
        ({"clip_skip": 9}, InputError, "largest is 3"),
        ({"steps": 0}, InputError, "steps is 0"),
        ({"prompt": []}, InputError, "No prompt"),
        ({"negative_prompt": ["a", "b"]}, InputError, "2 negative prompts for 1"),
        ({"prompt": "(a:1e)" + "(" * 3000 + "b"}, InputError, "too large"),
    ],
)
def test_bad_input_is_explained(pipe: Any, arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        encode(pipe, **{"prompt": "a", "steps": STEPS, **arguments})


def test_bert_has_no_clip_skip(pipes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="BertModel"):
        encode(pipes["bert"], "猫", steps=STEPS, clip_skip=2)


def test_pipelines_of_other_kinds_are_refused() -> None:
    with pytest.raises(InputError, match="StableDiffusion3Pipeline"):
        encode(tiny.tiny_sd3_pipeline(), "(a:1.2)", steps=STEPS)


def test_the_pieces_of_a_prompt_are_public() -> None:
    assert [piece.weight for piece in pieces("a (b:1.2)")] == [1.0, 1.2]  # type: ignore[union-attr]
