"""Noise, denoising and drawing, as Stable Diffusion does them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEPS = 1000
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": STEPS,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def alphas(device: torch.device) -> Tensor:
    """The share of signal in the variance at each timestep, [1000]."""
    beta = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, STEPS, device=device) ** 2
    return torch.cumprod(1 - beta, 0)


def denoising_loss(unet: Any, latents: Tensor, text: Tensor, alpha: Tensor) -> Tensor:
    """Error of the predicted noise, weighted down where there is little noise (min-SNR, gamma 5; arXiv:2303.09556).

    latents [B, 4, h, w] f32, text [B, S, D] in the UNet's dtype, alpha [1000] f32; returns a scalar.
    """
    t = torch.randint(0, STEPS, (len(latents),), device=latents.device)
    noise = torch.randn_like(latents)
    a = alpha[t][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    predicted = unet(noisy.to(text.dtype), t, text, return_dict=False)[0].float()
    weight = (5 * (1 - a) / a).clamp(max=1.0)
    return (weight * (predicted - noise) ** 2).mean()


@torch.no_grad()
def sample(
    unet: Any,
    vae: Any,
    text: Tensor,
    empty: Tensor,
    height: int,
    width: int,
    seed: int = 0,
    steps: int = 30,
    guidance: float = 5.0,
) -> Tensor:
    """Draw with DDIM: text [B, S, D], empty [1, S, D], size in pixels -> images [B, 3, H, W] f32."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    noise = torch.randn(len(text), 4, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    latents = noise.to(text.device)
    both = torch.cat([empty.expand_as(text), text])
    for t in scheduler.timesteps:
        pair = unet(torch.cat([latents, latents]).to(text.dtype), t.to(text.device), both, return_dict=False)[0].float()
        without, with_text = pair.chunk(2)
        latents = scheduler.step(without + guidance * (with_text - without), int(t), latents).prev_sample
    latents = latents / vae.config.scaling_factor
    return torch.cat([vae.decode(z.to(vae.dtype)).sample.float() for z in latents.split(64)])
