"""Trainer and peft train a slimmed model of transformers as they train its backbone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import assert_close
from slim_models import far_apart
from torch import Tensor, nn
from transformers_families import T, fresh, photos, slim
from transformers_reference import assert_same_outputs

from patchlife import LifeConfig, wrap
from patchlife.errors import UnsupportedModelError


class Photos(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": photos("dinov2-classifier", 1, seed=index)[0], "labels": torch.tensor(index)}


@pytest.mark.filterwarnings("ignore")  # of accelerate and of data loaders
def test_trainer_trains_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    """The weights after two epochs are those of a run that was stopped after the first and resumed."""

    def trainer(folder: str, epochs: int) -> tuple[Any, Any]:
        model = slim("dinov2-classifier", model=fresh("dinov2-classifier"))
        settings = T.TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=4,
            num_train_epochs=epochs,
            lr_scheduler_type="constant",
            optim="sgd",
            learning_rate=0.01,
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return T.Trainer(model, settings, train_dataset=Photos(), eval_dataset=Photos()), model

    with torch.enable_grad():
        whole, model = trainer("whole", 2)
        before = whole.evaluate()["eval_loss"]
        whole.train()
        assert whole.evaluate()["eval_loss"] < before
        resumed, again = trainer("resumed", 2)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in model.unwrap().state_dict().items():
        assert_close(again.unwrap().state_dict()[name], weight, 1e-3)
    assert far_apart(model.classifier.weight, fresh("dinov2-classifier").classifier.weight)
    loaded = T.Dinov2ForImageClassification.from_pretrained(tmp_path / "whole" / "checkpoint-4").eval()
    assert_same_outputs(slim("dinov2-classifier", model=loaded)(photos("vit")), model.eval()(photos("vit")))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # peft calls an old name of transformers
@pytest.mark.parametrize("order", ["LoRA on a slimmed model", "slimmed model of one with LoRA"])
def test_lora(order: str) -> None:
    import peft

    images, labels = photos("vit-classifier"), torch.tensor([1, 2, 3])
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], r=4)
    backbone: Any = fresh("vit-classifier")
    if order.startswith("LoRA"):
        model: Any = slim("vit-classifier", model=backbone)
        outer = peft.get_peft_model(model, config)
    else:
        with pytest.raises(UnsupportedModelError, match=r"wrap\(model.base_model.model\)"):
            wrap(peft.get_peft_model(fresh("vit-classifier"), config))
        outer = model = slim("vit-classifier", model=peft.get_peft_model(backbone, config).base_model.model)
    before = outer(pixel_values=images).logits
    optimizer = torch.optim.SGD([p for p in outer.parameters() if p.requires_grad], 0.1)
    with torch.enable_grad():
        for _ in range(3):
            outer(pixel_values=images, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    adaptive = copy.deepcopy(model).calibrate([photos("vit-classifier", 8)]).set_mode("adaptive")
    fixed = outer(pixel_values=images).logits
    assert far_apart(fixed, before)
    for lora in (adaptive, model):  # without LoRA the results differ in both modes
        expected = lora(pixel_values=images).logits
        inner = copy.deepcopy(lora)
        for module in inner.modules():
            if hasattr(module, "lora_B"):
                nn.init.zeros_(module.lora_B["default"].weight)
        assert far_apart(inner(pixel_values=images).logits, expected)
    if outer is not model:
        merged = outer.merge_and_unload()
        assert merged is model
        assert_close(merged(pixel_values=images).logits, fixed)


@pytest.mark.filterwarnings("ignore")
def test_projections_with_lora_of_several_ranks() -> None:
    """Their factors are parts of one weight, but cannot be concatenated."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4})
    inner = peft.get_peft_model(fresh("vit-classifier"), settings).base_model.model
    images = photos("vit-classifier")
    torch.testing.assert_close(wrap(inner, LifeConfig(budget=1.0, start=2))(images).logits, inner(images).logits)


def test_projections_with_a_number_each() -> None:
    """Quantised layers have such scales."""
    model = fresh("vit-classifier")
    for layer in model.vit.layers:
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            projection.register_buffer("scale", torch.tensor(1.0))
    assert wrap(model, LifeConfig(budget=0.65, start=2))(photos("vit-classifier")).logits.shape[0] == 3
