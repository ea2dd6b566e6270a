"""Train the VAE that all models share.

    python -m recipes.emoji.train_vae [--minutes 5] [--tiny]

Reconstruction (pixels, slopes, the classifier's features) plus a little KL. The classifier must be trained first.
Writes `runs/vae/` in diffusers' format, its latents whitened.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.emoji.networks import Classifier, count, make_vae
from recipes.emoji.scenes import LOOKS, Atlas, scene_tensors
from recipes.emoji.train_classifier import load_classifier
from recipes.emoji.training import Clock, Curve, FlatAdamW, Step, arguments, setup, sheet

SIDE = 128
KL = 1e-5


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def feature_distance(classifier: Classifier, a: Tensor, b: Tensor) -> Tensor:
    """Mean distance of the classifier's normalised feature maps of images a and b [B, 3, H, W]."""
    total = a.new_zeros(())
    for x, y in zip(classifier.maps(a)[:4], classifier.maps(b)[:4], strict=True):
        total = total + (F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).abs().mean()
    return total


def losses(vae: Any, classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """(loss to minimise, mean absolute error) for images [B, 3, H, W] in the VAE's dtype."""
    posterior = vae.encode(images).latent_dist
    output = vae.decode(posterior.sample()).sample
    error = (output.float() - images.float()).abs().mean()
    edge = sum((a.float() - b.float()).abs().mean() for a, b in zip(slopes(output), slopes(images), strict=True))
    near = feature_distance(classifier, output, images)
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.logvar.float().exp() - 1 - posterior.logvar.float()).mean()
    return error + 0.5 * edge + 0.2 * near + KL * kl, error.detach()


class Images:
    """Endless batches of scenes; every fifth part in one of the LoRAs' looks, which the VAE must know, too."""

    def __init__(self, atlas: Atlas, scenes: dict[str, Tensor], chunk: int) -> None:
        self.atlas, self.scenes, self.chunk = atlas, scenes, chunk
        self.stock: list[Tensor] = []

    def next(self, batch: int) -> Tensor:
        if not self.stock:
            rows = torch.randint(len(self.scenes["sprite"]), (self.chunk,), device=self.atlas.concept.device)
            images = self.atlas.compose(*(self.scenes[k][rows] for k in ("sprite", "box", "background")), SIDE, SIDE)
            for k, look in enumerate(LOOKS.values()):
                images[k::15] = look(images[k::15])
            mixed = images[torch.randperm(len(images), device=images.device)]
            self.stock = list(mixed.split(batch))
        return self.stock.pop()


@torch.no_grad()
def whiten(vae: Any, latents: Tensor) -> None:
    """Give every latent channel mean 0 and the standard deviation that Stable Diffusion's scaling factor expects.

    An exact change of coordinates, folded into the 1x1 convolutions on either side: z' = (z - m) / s.
    latents [B, 4, h, w] f32 measure m and s.
    """
    m, s = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * vae.config.scaling_factor
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:4] /= s[:, None, None, None]
    encode.bias[:4] = (encode.bias[:4] - m) / s
    encode.bias[4:] -= 2 * s.log()
    decode.bias += decode.weight[:, :, 0, 0] @ m
    decode.weight *= s[None, :, None, None]


@torch.no_grad()
def finish(vae: Any, images: Tensor, folder: Any) -> None:
    """Whiten the latents, save the VAE, and draw inputs above outputs."""
    vae, images = vae.float(), images.float()
    whiten(vae, vae.encode(images).latent_dist.mean)
    output = vae.decode(vae.encode(images).latent_dist.mean).sample
    pairs = torch.stack([images, output], 1).unflatten(0, (-1, 10)).transpose(1, 2).flatten(0, 2)
    sheet(pairs, folder / "vae-sheet.png")
    vae.half().save_pretrained(folder / "vae")


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(minutes=5.0)
    args = parser.parse_args()
    device = setup(args)
    atlas = Atlas(args.data, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    classifier = load_classifier(args.runs / "classifier.safetensors", device).to(dtype)
    vae = make_vae(args.tiny).to(device)
    print(f"vae: {count(vae)}")
    optimizer = FlatAdamW(vae.parameters(), dtype, betas=(0.9, 0.99))
    vae.to(dtype)
    batch, scenes = (4, 64) if args.tiny else (128, 120_000)
    source = Images(atlas, scene_tensors(args.data, scenes, SIDE, SIDE, args.seed, device), 32 * batch)
    inputs = source.next(batch).to(dtype)
    curve = Curve("vae", args.runs, device, ("loss", "error"))

    def function() -> None:
        loss, error = losses(vae, classifier, inputs)
        loss.backward()
        optimizer.step()
        curve.total += torch.stack([loss.detach(), error])

    step = Step(function, device)
    clock = Clock(args, 1.5e-3)
    while clock.share < 1:
        inputs.copy_(source.next(batch))
        optimizer.schedule(clock.step, clock.lr)
        step.run()
        clock.step += 1
        curve.log(clock, batch, every=1 if args.tiny else 100)
    curve.save()
    optimizer.use_average()
    rows = slice(0, 20 if args.tiny else 60)
    images = atlas.compose(*(source.scenes[k][rows] for k in ("sprite", "box", "background")), SIDE, SIDE)
    for k, look in enumerate(LOOKS.values()):
        images[k::10] = look(images[k::10])
    finish(vae.eval(), images.to(dtype), args.runs)


if __name__ == "__main__":
    main()
