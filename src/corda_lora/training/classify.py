"""Supervised fine-tuning of classifiers, through transformers' `Trainer`.

The head is trained whole, with the adapter: PEFT saves both (`modules_to_save`).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import datasets
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from ..data.batches import encode
from ..data.labels import label_loss, targets_of
from ..data.overview import check_fit
from ..data.samples import Sample


def label_rows(model: nn.Module, tokenizer: Any, samples: Sequence[Sample], max_length: int) -> datasets.Dataset:
    """The samples as token ids with the index of the label, or the number. `data.labels.check_labels` says whether the
    model knows the labels.

    Raises CordaError if the model cannot read the samples.
    """
    datasets.disable_progress_bars()
    encoded = [encode(tokenizer, sample, max_length) for sample in samples]
    check_fit(model, (e.ids for e in encoded))
    rows = []
    for e, target in zip(encoded, targets_of(model.config, encoded)):
        types = {} if e.types is None else {"token_type_ids": e.types}
        rows.append({"input_ids": e.ids, "label": target, **types})
    return datasets.Dataset.from_list(rows)


class LabelTrainer(Trainer):
    """Trains the cross-entropy of labels, or the squared error of numbers: the mean over a step's samples."""

    def __init__(self, model: nn.Module, arguments: TrainingArguments, **options: Any):
        arguments.label_names = ["labels"]
        collate = DataCollatorWithPadding(options["processing_class"])
        super().__init__(model, arguments, data_collator=collate, **options)
        self.model_accepts_loss_kwargs = False  # the mean over micro-batches, whatever a model's forward takes
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
        loss = label_loss(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the means, since the last entry, of the terms of the loss."""
        terms = self._metrics["train"] if "loss" in logs else {}
        super().log({**logs, **{name: sum(values) / len(values) for name, values in terms.items()}}, start_time)
        terms.clear()
