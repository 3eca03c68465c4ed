"""A fine-tuned classifier of transformers: slim it, use it in a pipeline, save and load the adapter.

python examples/huggingface_classifier.py PHOTO [MODEL]

MODEL is a name on the hub or a local folder, such as google/vit-base-patch16-224. Without it, a tiny model with random
weights is saved to a temporary folder and loaded from there; its answers mean nothing.
"""

import sys
import tempfile

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import patchlife
from patchlife.data import read_photo


def save_tiny_classifier(folder: str) -> None:
    """A classifier of three classes, with its image processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3}
    config = ViTConfig(**sizes, image_size=112, patch_size=16, id2label={0: "cat", 1: "dog", 2: "horse"})
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 112, "width": 112}).save_pretrained(folder)


def slim(name: str, photo_path: str, adapter: str) -> None:
    vit = AutoModelForImageClassification.from_pretrained(name).eval()
    processor = AutoImageProcessor.from_pretrained(name)
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.6))

    photo = read_photo(photo_path)
    images = processor(photo, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        for budget in (1.0, 0.8, 0.6, 0.45):
            logits = model.set_budget(budget)(pixel_values=images).logits
            label = vit.config.id2label[logits.argmax().item()]
            print(f"budget {budget:.2f}: {label}, patches {model.schedule()}")

    classify = pipeline("image-classification", model=model, image_processor=processor)
    print([(answer["label"], round(answer["score"], 3)) for answer in classify(photo, top_k=2)])

    patchlife.save(model, adapter)  # a few kilobytes: the settings and the scorer, not the classifier
    loaded = patchlife.load(adapter, vit)
    with torch.inference_mode():
        assert torch.equal(loaded(images).logits, model(images).logits)
    print(f"the adapter works on {type(loaded).__name__} at budget {loaded.settings.budget}")


def main(photo: str, name: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if name is None:
            name = f"{folder}/classifier"
            save_tiny_classifier(name)
        slim(name, photo, f"{folder}/adapter")


if __name__ == "__main__":
    main(*sys.argv[1:])
