from __future__ import annotations

from allaprima.verification.drawing import prompts_for


def test_prompts() -> None:
    for model, count in (("emoji", 100), ("emoji-zh-3d", 100), ("another", 40)):
        assert len(set(prompts_for(model, count))) == count
    assert not any(prompt.isascii() for prompt in prompts_for("emoji-zh", 20))
    assert len(prompts_for("another", 100)) == 100
