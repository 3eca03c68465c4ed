"""Zero-shot classification with a CLIP model of open_clip whose image tower is slimmed in its place.

python examples/clip_zero_shot.py photo.jpg [ARCHITECTURE CHECKPOINT]

Without a checkpoint the weights are random and the classes mean nothing; the budgets are real. CHECKPOINT is a local
file, or a name of `open_clip.list_pretrained()`, which is downloaded.
"""

import sys

import open_clip
import torch
from PIL import Image

import patchlife

CLASSES = ("dog", "cat", "car", "tree")
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.")


def main(photo: str, architecture: str = "ViT-S-16", checkpoint: str | None = None) -> None:
    torch.manual_seed(0)
    clip, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=checkpoint)
    clip.eval()
    tokenizer = open_clip.get_tokenizer(architecture)
    with torch.inference_mode():
        classifier = open_clip.build_zero_shot_classifier(clip, tokenizer, CLASSES, TEMPLATES)  # (dim, classes)

        clip.visual = patchlife.wrap(clip.visual)  # the only new line; text tower and helpers stay the same
        images = preprocess(Image.open(photo)).unsqueeze(0)
        dense = clip.visual.set_budget(1.0)(images)
        for budget in (1.0, 0.8, 0.6, 0.45):
            clip.visual.set_budget(budget)
            embedding = clip.encode_image(images, normalize=True)
            share = (clip.logit_scale.exp() * embedding @ classifier).softmax(dim=-1)[0]
            cosine = torch.cosine_similarity(embedding, dense).item()
            print(f"budget {budget:.2f}: patches {clip.visual.schedule()}, cosine to the dense embedding {cosine:.3f}")
            print("  " + ", ".join(f"{name} {part:.1%}" for name, part in zip(CLASSES, share.tolist(), strict=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
