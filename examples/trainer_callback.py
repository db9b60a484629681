"""Fuse the norms of whatever a Trainer of transformers trains: one callback.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[FusedNorms()])

It swaps them before the Trainer makes its optimizer and wraps the model, and gives the model back
its own classes at the end, so that what is saved then is the model as it was. Run as a script it
trains a random Llama of two layers, and prints what became of each norm.
"""

import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fusednorm


class FusedNorms(TrainerCallback):
    """Swap the norms of the model when a Trainer is made, and back when it has trained."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report = fusednorm.replace_norms(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fusednorm.restore_norms(kwargs["model"])


class Numbers(Dataset):
    """Sequences that count upwards."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + index) % 32
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_steps=20, learning_rate=1e-2, report_to=[])
        fused = FusedNorms()
        model = LlamaForCausalLM(config)
        trainer = Trainer(model, args, train_dataset=Numbers(), callbacks=[fused])
        print(fused.report)
        losses = [trainer.evaluate(Numbers())["eval_loss"]]
        trainer.train()
        losses.append(trainer.evaluate(Numbers())["eval_loss"])
    print(f"loss {losses[0]:.2f} before, {losses[1]:.2f} after")


if __name__ == "__main__":
    main()
