"""Steer to the evidence: heads are found that make a model answer from the sentence it is pointed to, and kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import hub
from . import attention_steering
from ._publishing import save_card
from ._smollm2 import MODEL_ID

FOLDER = "smollm2-evidence-heads"


@dataclass(kw_only=True)
class Config:
    """
    Args:
        people: Sentences of a prompt; one of them is the evidence.
        profiled: Prompts on which heads are chosen.
        measured: Prompts with other people, on which they are measured.
        end_to_end: Prompts of these that AutoPASTA answers, which has to find the sentence itself.
        layers_top, heads_top: How many heads are kept, and of how many layers.
        alpha: Weight of what is not the evidence.
        seed: Of people and places.
    """

    people: int = 5
    profiled: int = 4
    measured: int = 16
    end_to_end: int = 4
    layers_top: int = 4
    heads_top: int = 12
    alpha: float = 0.01
    seed: int = 0

    def __post_init__(self):
        self.experiment()  # checks all of them

    def experiment(self) -> attention_steering.Config:
        return attention_steering.Config(**vars(self), random_sets=1)


def run(config: Config, out: Path) -> dict[str, Any]:
    found = attention_steering.run(config.experiment(), out)
    folder, evidence = out / FOLDER, found["evidence"]
    folder.mkdir(exist_ok=True)
    (out / "heads.json").replace(folder / "heads.json")
    result = {"metric": evidence["metric"], "dataset": "planted facts", "setting": evidence["setting"]}
    hub.save_record(
        folder,
        ["pasta"],
        base_model=MODEL_ID,
        config=vars(config),
        results=[
            {**result, "value": evidence["ours"], "split": "steered to the evidence"},
            {**result, "value": evidence["baseline"], "split": "not steered"},
        ],
    )
    save_card(folder)
    return {"tables": found["tables"], "artifacts": [FOLDER]}
