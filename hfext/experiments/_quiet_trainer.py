"""The stock Trainer with nothing on the screen but a titled progress bar."""

import tempfile

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging


def train(model, data, title: str, data_collator=None, callbacks=(), **arguments) -> list[dict[str, float]]:
    """The stock Trainer with nothing on the screen but a bar; what it logged at each update."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **arguments,
        )
        trainer = Trainer(model, args, data_collator, data, callbacks=[Bar(title), *callbacks])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


class Bar(TrainerCallback):
    """The Trainer's progress bar with a title and the loss, in place of a line for every log."""

    def __init__(self, title: str):
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = logging.tqdm(total=state.max_steps, desc=self.title)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
