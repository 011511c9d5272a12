"""Fine-tune with Hugging Face's Trainer under four memory strategies, and keep a report.

Runs offline: the model is a small Llama with random weights, the text comes with Python. For your
own, pass a folder or hub id to `load` and a dataset of yours to `Trainer`.

    python examples/trainer.py --output run
"""

from __future__ import annotations

import argparse

from memrt import Trainer, TrainingArguments, load
from memrt.data import Collator, DataSettings, load_examples
from memrt.embedded import embedded_config, embedded_tokenizer


def main() -> None:
    """Train, save, and say where the files are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="run")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    options = parser.parse_args()

    tokenizer = embedded_tokenizer()
    settings = DataSettings(sequence_length=options.sequence_length, evaluation_fraction=0.05)
    data = load_examples(settings, tokenizer)
    strategies = ["galore(rank=64)", "int8_states", "activation_checkpoint", "fused_loss"]
    trainer = Trainer(
        model=load(embedded_config(), strategies, seed=42),
        args=TrainingArguments(
            options.output,
            strategies=strategies,
            memory_report=True,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=1e-3,
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=data.train,
        data_collator=Collator.for_tokenizer(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # a plain Hugging Face checkpoint
    print(f"model in {options.output}, memory report in {options.output}/memrt/report.json")


if __name__ == "__main__":
    main()
