"""A vision-language model whose photo encoder is slimmed in its place: a tiny LLaVA of transformers, random weights.

python examples/vision_language.py

With a real model, load it with from_pretrained; the two lines that begin with "model.model.vision_tower" stay the same.
"""

import torch
from torch.nn.functional import cosine_similarity
from transformers import LlavaConfig, LlavaForConditionalGeneration

import patchlife

IMAGE_TOKEN = 60


def tiny_llava() -> LlavaForConditionalGeneration:
    """A CLIP encoder of 64 patches and a language model of 64 words."""
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 8, "image_size": 112, "patch_size": 14}
    text = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 64, "eos_token_id": None}
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlavaConfig(vision_config=vision | small, text_config=text | small, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).eval()


def main() -> None:
    model = tiny_llava()
    photo = torch.randn(1, 3, 112, 112)
    prompt = torch.tensor([[1, *[IMAGE_TOKEN] * 64, 5, 7, 9]])  # one image token for each patch
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": photo}

    model.model.vision_tower = patchlife.wrap(model.model.vision_tower)
    encoder = model.model.vision_tower
    with torch.inference_mode():
        encoder.set_budget(1.0)
        dense = model.model.get_image_features(photo).pooler_output[0]
        for budget in (1.0, 0.8, 0.6, 0.45):
            encoder.set_budget(budget)
            features = model.model.get_image_features(photo).pooler_output[0]  # (64 patches, 64), in grid order
            similarity = cosine_similarity(features, dense).mean().item()
            tokens = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, -6:]
            share = patchlife.flops(encoder).budget
            print(f"budget {budget:.2f}: {share:.0%} of the encoder's FLOPs, patches {encoder.schedule()}")
            print(f"  cosine of the patch features to the dense ones {similarity:.3f}, new tokens {tokens.tolist()}")

    model.model.vision_tower = encoder.unwrap()  # before the whole model is saved
    print(f"unwrapped: {type(model.model.vision_tower).__name__}")


if __name__ == "__main__":
    main()
