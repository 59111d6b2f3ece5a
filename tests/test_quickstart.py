"""The quick start of the README, as a user would type it, with a tiny model in the place of theirs."""

import datasets
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from corda_lora import CordaConfig, get_corda_model


def test_the_quick_start_of_the_readme(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    known = [f"the capital of {c} is {c}ville" for c in ("France", "Peru", "Chad", "Laos")]
    batches = [tokenizer(text, return_tensors="pt") for text in known]
    pairs = [{"prompt": "two plus two is", "completion": " four"}] * 8

    peft_model = get_corda_model(model, CordaConfig(mode="kpm", r=4), batches, progress=False)
    arguments = SFTConfig(
        tmp_path / "run", learning_rate=1e-2, max_steps=3, per_device_train_batch_size=2, bf16=False, report_to="none"
    )
    trainer = SFTTrainer(peft_model, arguments, train_dataset=datasets.Dataset.from_list(pairs))
    trainer.train()
    peft_model.save_pretrained(tmp_path / "tuned")

    ids = batches[0]["input_ids"]
    with torch.no_grad():
        tuned = peft_model.eval()(input_ids=ids).logits
        with peft_model.disable_adapter():
            base = peft_model(input_ids=ids).logits
        fresh = AutoModelForCausalLM.from_pretrained(checkpoint)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "tuned").eval()(input_ids=ids).logits
    assert (tuned - base).abs().max() > 1e-6  # it learned something
    torch.testing.assert_close(loaded, tuned, atol=1e-4, rtol=0)
    for name, tensor in peft_model.unload().state_dict().items():
        assert torch.equal(tensor, original[name])
