"""transformers' pipelines run with slimmed models, also with a vision model that was wrapped inside CLIP or SigLIP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import liven
from PIL import Image
from reference import assert_close
from slim_models import far_apart
from torch import Tensor
from transformers_families import SIZES, T, fresh, photos, slim
from transformers_reference import assert_same_outputs

from patchlife import LifeConfig, wrap

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))


def processor() -> Any:
    return T.ViTImageProcessor(size={"height": 48, "width": 48})


def pixels(image: Image.Image = PHOTO) -> Tensor:
    return processor()(image, return_tensors="pt").pixel_values


def test_image_classification_pipeline() -> None:
    backbone = fresh("vit-classifier")
    backbone.config.id2label = {index: f"class {index}" for index in range(10)}
    backbone.config.label2id = {f"class {index}": index for index in range(10)}
    model = slim("vit-classifier", model=backbone)
    pipe = T.pipeline("image-classification", model=model, image_processor=processor(), device="cpu")
    answers = pipe([PHOTO, PHOTO.rotate(90)], top_k=3, batch_size=2)
    expected = model(pixels()).logits.softmax(-1)[0].topk(3)
    assert [answer["label"] for answer in answers[0]] == [f"class {index}" for index in expected.indices.tolist()]
    assert [answer["score"] for answer in answers[0]] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert model.backbone.label_names == tuple(f"class {index}" for index in range(10))


def test_image_feature_extraction_pipeline() -> None:
    model = slim("vit")
    pipe = T.pipeline("image-feature-extraction", model=model, image_processor=processor(), device="cpu")
    assert_close(torch.tensor(pipe(PHOTO)), model(pixels()).last_hidden_state)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {
        "<s>": 0,
        "</s>": 1,
        "<unk>": 2,
        "a": 3,
        "photo": 4,
        "of": 5,
        "cat": 6,
        "dog": 7,
        ".": 8,
        "this": 9,
        "is": 10,
    }
    plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="</s>", eos_token="</s>", model_max_length=64)


def two_towers(kind: str) -> Any:
    text = {"hidden_size": 48, "num_attention_heads": 2, "vocab_size": 40, "num_hidden_layers": 2}
    text |= {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    config = getattr(T, f"{kind}Config")(text_config=text, vision_config=dict(SIZES), projection_dim=24)
    return liven(getattr(T, f"{kind}Model")(config)).eval()


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_zero_shot_classification_with_the_vision_model_wrapped_in_place(kind: str) -> None:
    model = two_towers(kind)
    given: dict[str, Any] = {
        "model": model,
        "image_processor": processor(),
        "tokenizer": tokenizer(),
        "task": "zero-shot-image-classification",
    }
    pipe = T.pipeline(**given, device="cpu")
    expected = pipe(PHOTO, candidate_labels=["cat", "dog"])
    ids, images = torch.tensor([[3, 6, 1], [3, 7, 1]]), photos("clip")
    dense = model(input_ids=ids, pixel_values=images, output_hidden_states=True)
    model.vision_model = wrap(model.vision_model, LifeConfig(budget=1.0, start=2))
    assert_same_outputs(model(input_ids=ids, pixel_values=images, output_hidden_states=True), dense)
    assert pipe(PHOTO, candidate_labels=["cat", "dog"]) == expected
    model.vision_model.set_budget(0.65)
    slimmed = model(input_ids=ids, pixel_values=images, output_hidden_states=True)
    assert far_apart(slimmed.image_embeds, dense.image_embeds)
    assert_close(slimmed.text_embeds, dense.text_embeds)
    assert len(slimmed.vision_model_output.hidden_states) == 6
    answers = pipe(PHOTO, candidate_labels=["cat", "dog"])
    assert {answer["label"] for answer in answers} == {"cat", "dog"}
    assert [a["score"] for a in answers] != [a["score"] for a in expected]
