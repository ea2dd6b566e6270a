"""AltDiffusion without diffusers' own classes: they are deprecated, and diffusers 0.42 loads no folder with them.

It is Stable Diffusion behind a text encoder of eighteen (or nine) languages: XLM-RoBERTa, a normalisation of its last
layer but one, and a projection to the width that the UNet reads.  source: Chen et al. 2022, arXiv:2211.06679
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError
from .notices import quiet_import

with quiet_import():
    import diffusers
    from diffusers import StableDiffusionPipeline
    from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer
    from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaPreTrainedModel
    from transformers.utils import ModelOutput

CLASSES = ("AltDiffusionPipeline", "AltDiffusionImg2ImgPipeline")
"""The pipelines of a model_index.json that `load_alt_diffusion` reads."""


class AltTextConfig(XLMRobertaConfig):  # type: ignore[misc]
    """project_dim is what the UNet's cross-attention reads; has_pre_transformation tells the later models' form."""

    project_dim: int = 512
    has_pre_transformation: bool = False
    use_attention_mask: bool = True


@dataclass
class AltTextOutput(ModelOutput):  # type: ignore[misc]
    """projection_state [B, S, project_dim], last_hidden_state [B, S, D], hidden_states of every layer if asked."""

    projection_state: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class AltTextEncoder(XLMRobertaPreTrainedModel):  # type: ignore[misc]
    """The text encoder, with the parameter names of published checkpoints (whose pooler nobody reads)."""

    config_class = AltTextConfig
    base_model_prefix = "roberta"
    _keys_to_ignore_on_load_unexpected = [r"pooler", r"logit_scale", r"position_ids"]  # noqa: RUF012 - transformers' form

    def __init__(self, config: AltTextConfig) -> None:
        super().__init__(config)
        self.roberta = XLMRobertaModel(config, add_pooling_layer=False)
        self.transformation = nn.Linear(config.hidden_size, config.project_dim)
        if config.has_pre_transformation:
            self.pre_LN = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.transformation_pre = nn.Linear(config.hidden_size, config.project_dim)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        early = self.config.has_pre_transformation
        found = self.roberta(input_ids, attention_mask, output_hidden_states=output_hidden_states or early)
        projected = self.final_layer_norm(found.hidden_states[-2] if early else found.last_hidden_state)
        hidden = found.hidden_states if output_hidden_states else None
        result = AltTextOutput(projected, found.last_hidden_state, hidden)
        return result if return_dict else result.to_tuple()

    def final_layer_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What a layer's result [B, S, D] goes through to [B, S, project_dim].  It has the name under which pipelines
        look for it where clip_skip asks for another layer."""
        if self.config.has_pre_transformation:
            projected: torch.Tensor = self.transformation_pre(self.pre_LN(hidden_states))
        else:
            projected = self.transformation(hidden_states)
        return projected


def load_alt_diffusion(
    folder: str | Path, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> StableDiffusionPipeline:
    """A diffusers folder of AltDiffusion as a StableDiffusionPipeline with the same parts.

    variant  "fp16" where the files' names say so
    raises   CheckpointError
    """
    folder = Path(folder)
    options: dict[str, Any] = {"dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
    try:
        encoder = AltTextEncoder.from_pretrained(folder / "text_encoder", **options).eval()
        # Part by part: diffusers' pipelines refuse a folder that names classes which they cannot find.
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
        pipe = StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae", **options),
            text_encoder=encoder,
            tokenizer=XLMRobertaTokenizer.from_pretrained(folder / "tokenizer"),
            unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", **options),
            scheduler=getattr(diffusers, scheduler).from_pretrained(folder / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as AltDiffusion: {str(error)[:500]}") from error
    return pipe
