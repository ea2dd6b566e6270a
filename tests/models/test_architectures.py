"""The tokenizer and the configurations that come with the package."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import transformers

from allaprima.models.architectures import architecture, clip_tokenizer, clip_vocabulary

FAMILIES = ("sd1", "sd1-inpaint", "sd2", "sd2-base", "sd2-inpaint", "sdxl", "sdxl-inpaint", "sdxl-refiner")


def test_the_tokenizer_is_clips() -> None:
    """Ids that the published tokenizer gives: of its paper's example, of punctuation, capitals and an apostrophe."""
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello,  World's").input_ids == [49406, 3306, 267, 1002, 568, 49407]
    assert tokenizer.decode(tokenizer("a red apple").input_ids, skip_special_tokens=True).strip() == "a red apple"
    assert tokenizer.model_max_length == 77


def test_any_text_has_tokens() -> None:
    tokenizer = clip_tokenizer()
    for text in ("铁马冰河入梦来", "🎨", "\x00\x1f", "ﷺ"):
        assert len(tokenizer(text).input_ids) > 2
    assert tokenizer("铁").input_ids[1:-1] != tokenizer("马").input_ids[1:-1]


def test_encoders_are_padded_as_they_were_trained() -> None:
    padded = [clip_tokenizer(pad)("", padding="max_length", max_length=4).input_ids for pad in ("<|endoftext|>", "!")]
    assert padded == [[49406, 49407, 49407, 49407], [49406, 49407, 0, 0]]


def test_the_vocabulary_has_no_token_twice() -> None:
    tokens, merges = clip_vocabulary()
    assert len(set(tokens)) == 49408
    assert len(merges) == 48894


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_is_known_to_its_class(family: str) -> None:
    """A setting that is misspelt would be left out without a word."""
    for name, settings in architecture(family).items():
        if kind := getattr(diffusers, settings.get("_class_name", ""), None) if isinstance(settings, dict) else None:
            known = set(inspect.signature(kind.__init__).parameters)
            given = set(settings) - {"_class_name"}
            # schedulers of one configuration stand for each other, so that it names what some of them do not have
            assert given <= known | {"set_alpha_to_one", "skip_prk_steps", "clip_sample", "steps_offset"}, name
        elif name.startswith("text_encoder"):
            config = getattr(transformers, settings["_class_name"]).config_class()
            assert all(hasattr(config, key) for key in settings if key != "_class_name")


def test_families_differ_where_they_do() -> None:
    assert architecture("sd1-inpaint")["unet"]["in_channels"] == 9
    assert architecture("sd1")["unet"]["in_channels"] == 4
    assert architecture("sd2")["unet"]["attention_head_dim"] == [5, 10, 20, 20]
    assert "text_encoder" not in architecture("sdxl-refiner")
    assert architecture("sdxl")["vae"]["scaling_factor"] == 0.13025
    with pytest.raises(KeyError):
        architecture("sd3")
