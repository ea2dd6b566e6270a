"""Train the classifier whose features judge the pictures (quality.py) and help to train the VAE.

    python -m recipes.emoji.train_classifier [--minutes 1] [--tiny]

It sees single sprites of any style at any place on any background, slightly blurred and noisy, and says which thing it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.emoji.networks import Classifier, count
from recipes.emoji.scenes import Atlas
from recipes.emoji.training import Clock, Curve, arguments, setup

SIDE = 128


def examples(atlas: Atlas, batch: int) -> tuple[Tensor, Tensor]:
    """Random single sprites: images [B, 3, 128, 128] and the numbers of what they show [B]."""
    device = atlas.concept.device
    sprite = torch.full((batch, 4), -1, dtype=torch.int16, device=device)
    sprite[:, 0] = torch.randint(len(atlas.concept), (batch,), device=device).to(torch.int16)
    box = torch.zeros(batch, 4, 3, device=device)
    size = torch.empty(batch, device=device).uniform_(0.55, 0.95) * SIDE
    box[:, 0] = torch.stack(
        [SIDE / 2 + (SIDE - size) * (torch.rand(batch, device=device) - 0.5) for _ in range(2)] + [size], 1
    )
    background = torch.randint(0, 256, (batch, 3), device=device).to(torch.uint8)
    background[torch.rand(batch, device=device) < 0.6] = 255
    images = atlas.compose(sprite, box, background, SIDE, SIDE)
    rough = torch.rand(batch, device=device) < 0.5
    images[rough] = F.avg_pool2d(F.pad(images[rough], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return images + 0.08 * torch.randn_like(images) * torch.rand(batch, 1, 1, 1, device=device), atlas.concept[
        sprite[:, 0].long()
    ]


def load_classifier(path: str, device: torch.device) -> Classifier:
    """The trained classifier, frozen."""
    weights = {k: v.float() for k, v in load_file(path).items()}
    model = Classifier(
        len(weights["head.weight"]), tuple(weights[f"blocks.{k}.skip.weight"].shape[0] for k in range(5))
    )
    model.load_state_dict(weights, strict=False)
    return model.to(device).eval().requires_grad_(False)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(minutes=1.0)
    args = parser.parse_args()
    device = setup(args)
    atlas = Atlas(args.data, device)
    widths = (8, 8, 8, 8, 8) if args.tiny else (32, 64, 128, 192, 256)
    model = Classifier(int(atlas.concept.max()) + 1, widths).to(device)
    print(f"classifier: {count(model)}")
    batch = 16 if args.tiny else 1024
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    clock, curve = Clock(args, 2e-3), Curve("classifier", args.runs, device, ("loss", "error"))
    while clock.share < 1:
        images, labels = examples(atlas, batch)
        for group in optimizer.param_groups:
            group["lr"] = clock.lr
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        curve.total += torch.stack([loss.detach(), (logits.argmax(1) != labels).float().mean()])
        clock.step += 1
        curve.log(clock, batch, every=1 if args.tiny else 100)
    curve.save()
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if "num_batches" not in k}
    save_file(state, args.runs / "classifier.safetensors")


if __name__ == "__main__":
    main()
