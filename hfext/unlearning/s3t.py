"""S3T: fine-tuning that can take back a row exactly, by switching off the layers that saw it.

The N rows fall into m shards of L slices. For a sequence pi of the slices of a shard, stage j trains the adapters of
the j-th group of n / L layers, counted from the top, on the rows of slices pi_1 .. pi_j; stages before it are frozen:

    stage j of pi:  theta_j = argmin loss(base + theta_1 + .. + theta_j; pi_1, .., pi_j)

Deleting a row of slice s kills the stages j >= p of every sequence with pi_p = s, and nothing else ever saw the row:
what is left, pi_1 .. pi_{p-1}, is bit for bit what training without s gives. A shard serves the longest prefix that
any of its B sequences has left; a retraining is due when all of them are gone. By rotations that takes
m L (1 + 1/2 + .. + 1/(m min(B, L))) deletions for all shards, and B = 1 is SISA. Shards answer by the mean of their
probabilities (float32) or by vote.

Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning, arXiv 2406.16257. What differs: layers
outside of LoRA that are trained (classifiers, `modules_to_save`) are kept with every stage, since one head trained
through all stages would remember deleted rows; stages that sequences share are trained once.
"""

import copy
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from .._fields import in_range, one_of
from ..registry import Method, Result
from ._data import collate
from ._s3t_identity import base_digest, training_record
from ._s3t_layers import check_exact, layer_groups, layer_of, own_randomness, paper_lora
from ._s3t_rows import new_salt, readable_rows, row_digests, row_numbers
from ._s3t_sequences import Slices, best_prefix, cyclic_sequences, matched_sequences, partition, stages, surviving
from ._s3t_store import INITIAL, StageFolder, stage_seed

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class S3TConfig:
    """Options of [`S3TTrainer`].

    Args:
        shards: m >= 1, models of the ensemble.
        slices: L >= 1, must divide the number of layers with adapters.
        budget: B, sequences trained in each shard; L by default, 1 is SISA.
        ensemble: "average" of the shards' probabilities or majority "vote".
    """

    shards: int = 5
    slices: int = 4
    budget: int | None = None
    ensemble: str = "average"

    def __post_init__(self):
        for name in ("shards", "slices", "budget"):
            value = getattr(self, name)
            if value is None and name == "budget":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r} but must be an integer >= 1.")
            in_range(name, value, 1, math.inf)
        one_of("ensemble", self.ensemble, ("average", "vote"))


@dataclass(frozen=True, kw_only=True)
class DeletionReport:
    """What a deletion did: `slices` (shard, slice) that rows were taken from, files `removed`, and what is left.

    `active` maps each shard to the prefix it serves now, () for a dead one; `dead` are the shards to `retrain`;
    `retrain_needed` says that none is left.
    """

    deleted: list[int]
    slices: list[tuple[int, int]]
    removed: list[str]
    active: dict[int, Slices]
    dead: list[int] = field(default_factory=list)

    @property
    def retrain_needed(self) -> bool:
        return len(self.dead) == len(self.active)


def combine(probabilities: Tensor, ensemble: str) -> Tensor:
    """Shards' probabilities [shards, ..., classes] in one: their mean, or the share of shards that like each most."""
    if ensemble == "vote":
        probabilities = nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).float()
    return probabilities.mean(0)


class S3TTrainer:
    """Trains, serves and unlearns an ensemble of adapters: `S3TTrainer(model, args, train_dataset=rows).train()`.

    Everything lies in `args.output_dir`. A run there goes on after the last finished stage. Every stage is a fresh
    `Trainer` that writes no checkpoints and evaluates nothing: those files would remember deleted rows. What the user
    keeps elsewhere (trackers, copies made by `save` or `model_for(..).save_pretrained`) is the user's to delete.

    It is opened again with the base and the rows that it was made of, which digests of both check. Rows keep their
    numbers: take the content of a deleted row out of the data, but leave anything in its place, which is not read.

    Args:
        model (`PreTrainedModel`): The base, which gets adapters in place and stays frozen. It must not know the rows.
        args (`TrainingArguments`): Of each stage.
        train_dataset (`Sequence`, *optional*): The rows; needed to train and retrain only. Rows of text need
            `processing_class`.
        peft_config (`LoraConfig`, *optional*): By default the paper's: rsLoRA of rank 32 and alpha 64 with dropout
            0.05 on all linear layers.
        s3t (`S3TConfig`, *optional*): Options.
        deletion_prior (`Sequence[float]`, *optional*): How likely each row is to be deleted, >= 0. Groups rows of like
            risk in slices, and chooses the sequences by matching in place of rotation.
        data_collator, processing_class, callbacks: Of the `Trainer`.
        trainer_class (`type`, *optional*): Another `Trainer`. It must keep nothing from stage to stage.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Any = None,
        peft_config: LoraConfig | None = None,
        s3t: S3TConfig | None = None,
        *,
        deletion_prior: Sequence[float] | None = None,
        data_collator: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] = (),
        trainer_class: type[Trainer] = Trainer,
    ):
        if args.deepspeed or args.fsdp:
            raise NotImplementedError("S3T reads whole parameters: use DDP in place of DeepSpeed and FSDP.")
        self.args, self.s3t, self.folder = args, s3t or S3TConfig(), StageFolder(args.output_dir)
        self.processing_class, self.callbacks, self.trainer_class = processing_class, list(callbacks), trainer_class
        self.train_dataset, self.data_collator = train_dataset, data_collator
        if train_dataset is not None:
            gone = (self.folder.state() or {}).get("deleted", ())
            self.train_dataset, row = readable_rows(train_dataset, gone, processing_class)
            if data_collator is None and set(row) == {"input_ids", "labels"} and np.ndim(row["labels"]):
                self.data_collator = collate
        self.model = self._with_adapters(model, peft_config or paper_lora())
        self._adapters = adapters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        # A head belongs to every stage.
        self._heads = [n for n in adapters if ".modules_to_save." in n]
        lora = [n for n in adapters if n not in self._heads]
        self.groups = layer_groups(lora, self.s3t.slices)
        self._names = [[n for n in lora if layer_of(n)[1] in group] for group in self.groups]
        self._initial = {n: p.detach().clone().cpu() for n, p in adapters.items()}
        self._loaded: tuple[int, Slices] | None = None
        self._held: dict[tuple[int, Slices], dict[str, Tensor]] = {}
        self._state = self._open(self.model.active_peft_config, deletion_prior)

    def _with_adapters(self, model: PreTrainedModel, config: LoraConfig) -> PeftModel:
        check_exact(model, config)
        with own_randomness():
            set_seed(self.args.seed)
            return get_peft_model(model, copy.deepcopy(config))

    def _open(self, config: LoraConfig, prior: Sequence[float] | None) -> dict[str, Any]:
        """The record in the folder, or a new one."""
        budget = self.s3t.budget or self.s3t.slices
        asked = {
            "s3t": {"shards": self.s3t.shards, "slices": self.s3t.slices, "budget": budget},
            "training": training_record(self.args),
            "layers": self.groups,
            "lora": [config.r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.use_dora],
            "base": base_digest(self.model, self._adapters),
        }
        asked = json.loads(json.dumps(asked))
        state = self.folder.state()
        PartialState().wait_for_everyone()
        if state is not None:
            self.folder.check(state, asked, self._adapters, self.train_dataset)
            self._initial = self.folder.read(self.folder.path / INITIAL)
        elif self.train_dataset is None:
            raise ValueError(f"{self.folder.path} holds no S3T ensemble, and no train_dataset was given.")
        else:
            state = {**asked, **self._plan(prior), "deleted": [], "dirty": [[] for _ in range(self.s3t.shards)]}
            if self.args.should_save:
                self.folder.write(self.folder.path / INITIAL, self._initial)
                self.folder.write_state(state)
            PartialState().wait_for_everyone()
        if self.args.should_save:
            for shard, dirty in enumerate(state["dirty"]):
                self.folder.sweep(shard, set(dirty))
        PartialState().wait_for_everyone()
        return state

    def _plan(self, prior: Sequence[float] | None) -> dict[str, Any]:
        m, size = self.s3t.shards, self.s3t.slices
        budget = self.s3t.budget or size
        if prior is None:
            sequences = [cyclic_sequences(size, budget)] * m
        elif len(prior) != len(self.train_dataset) or min(prior) < 0:
            raise ValueError(f"deletion_prior must have {len(self.train_dataset)} values >= 0, one a row.")
        rows = partition(len(self.train_dataset), m, size, self.args.seed, prior)
        if prior is not None:
            sequences = [matched_sequences([sum(prior[i] for i in part) for part in s], budget) for s in rows]
        salt = new_salt()
        known = {"salt": salt, "row_digests": row_digests(self.train_dataset, salt)}
        return {"rows": rows, "sequences": [[list(s) for s in shard] for shard in sequences], **known}

    def sequences(self, shard: int) -> list[Slices]:
        """The orders of slices that the shard is trained on."""
        return [tuple(s) for s in self._state["sequences"][shard]]

    def rows(self, shard: int, prefix: Slices) -> list[int]:
        """The rows that the last stage of a prefix trains on: all that were not deleted, of all its slices."""
        gone = set(self._state["deleted"])
        return sorted(i for s in prefix for i in self._state["rows"][shard][s] if i not in gone)

    def served(self) -> dict[int, Slices]:
        """The longest prefix of each shard whose stages are trained and saw no deleted row."""
        found = {}
        for shard, dirty in enumerate(self._state["dirty"]):
            left = [surviving(s, dirty) for s in self.sequences(shard)]
            done = [next((s[:j] for j in range(len(s)) if not self.folder.has(shard, s[: j + 1])), s) for s in left]
            found[shard] = best_prefix(done, ())
        return found

    def train(self) -> dict[int, Slices]:
        """Train all stages that are missing and saw no deleted row; what each shard serves now."""
        missing = [
            (shard, prefix)
            for shard, dirty in enumerate(self._state["dirty"])
            for prefix in stages(self.sequences(shard))
            if not set(prefix) & set(dirty) and not self.folder.has(shard, prefix)
        ]
        if missing and self.train_dataset is None:
            raise ValueError(f"{len(missing)} stages are not trained yet: give train_dataset.")
        for shard, prefix in logging.tqdm(missing, desc="stages", disable=not missing):
            self._train_stage(shard, prefix)
        return self.served()

    def retrain(self, shard: int) -> Slices:
        """Train what deletions took from a shard on the rows that are left; what it serves now."""
        one_of("shard", shard, range(self.s3t.shards))
        if self.train_dataset is None:
            raise ValueError("retrain needs train_dataset.")
        self._state["dirty"][shard] = []
        self._write_state()
        return self.train()[shard]

    def _train_stage(self, shard: int, prefix: Slices) -> None:
        self._load(shard, prefix[:-1])
        self._loaded, self._held = None, {}
        own = [*self._names[len(prefix) - 1], *self._heads]
        for name, p in self._adapters.items():
            p.requires_grad_(name in own)
        rows = self.rows(shard, prefix)
        with own_randomness(), tempfile.TemporaryDirectory() as scratch:
            args = copy.copy(self.args)
            args.seed = args.data_seed = stage_seed(self.args.seed, shard, prefix)
            args.output_dir, args.save_strategy, args.eval_strategy = scratch, "no", "no"
            args.load_best_model_at_end = args.push_to_hub = False
            if args.gradient_checkpointing:
                self.model.enable_input_require_grads()
            trainer = self.trainer_class(
                self.model,
                args,
                data_collator=self.data_collator,
                train_dataset=Subset(self.train_dataset, rows),
                processing_class=self.processing_class,
                callbacks=list(self.callbacks),
            )
            set_seed(args.seed)
            if rows:
                trainer.train()
            # Autocast would stay around forward for good, and once more for every stage.
            trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.eval()
        if self.args.should_save:
            self.folder.write(self.folder.file(shard, prefix), {name: self._adapters[name] for name in own})
        PartialState().wait_for_everyone()

    def delete(self, indices: int | Sequence[int]) -> DeletionReport:
        """Forget rows of `train_dataset` by number. Takes no training: their stages are removed, on disk too."""
        place = {
            i: (s, j) for s, shard in enumerate(self._state["rows"]) for j, part in enumerate(shard) for i in part
        }
        asked = row_numbers(indices)
        for i in asked:
            if i not in place:
                raise ValueError(f"indices holds {i}, which is no row: they are 0 to {len(place) - 1}.")
        new = sorted(set(asked) - set(self._state["deleted"]))
        touched = sorted({place[i] for i in new})
        self._state["deleted"] = sorted({*self._state["deleted"], *new})
        for i in new:
            self._state["row_digests"][i] = None
        for shard, j in touched:
            self._state["dirty"][shard] = sorted({*self._state["dirty"][shard], j})
        self._write_state()
        shards, removed = sorted({shard for shard, _ in touched}), []
        if self.args.should_save:
            removed = [name for shard in shards for name in self.folder.sweep(shard, set(self._state["dirty"][shard]))]
        PartialState().wait_for_everyone()
        # The weights in memory may be those that were removed.
        self._held = {}
        self._reset()
        active = self.served()
        return DeletionReport(
            deleted=new,
            slices=touched,
            removed=removed,
            active=active,
            dead=[s for s, left in active.items() if not left],
        )

    def _write_state(self) -> None:
        if self.args.should_save:
            self.folder.write_state(self._state)
        PartialState().wait_for_everyone()

    @torch.no_grad()
    def _reset(self) -> None:
        self._loaded = None
        for name, p in self._adapters.items():
            p.copy_(self._initial[name])
            p.grad = None

    def _load(self, shard: int, prefix: Slices) -> None:
        if self._loaded == (shard, prefix):
            return
        self._reset()
        if (shard, prefix) not in self._held:
            files = [self.folder.file(shard, prefix[: j + 1]) for j in range(len(prefix))]
            # Heads are those of the last stage.
            self._held[shard, prefix] = {k: v for path in files for k, v in self.folder.read(path).items()}
        with torch.no_grad():
            for name, value in self._held[shard, prefix].items():
                self._adapters[name].copy_(value)
        self._loaded = shard, prefix

    def model_for(self, shard: int) -> PeftModel:
        """The model with the adapters that the shard serves; always the same object, until the next call."""
        one_of("shard", shard, range(self.s3t.shards))
        prefix = self.served()[shard]
        if not prefix:
            raise ValueError(f"shard {shard} has no stage left: call retrain({shard}).")
        self._load(shard, prefix)
        return self.model.eval()

    @torch.no_grad()
    def predict(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Probabilities [..., classes] in float32 of all living shards together, for a batch without labels."""
        living = [shard for shard, prefix in self.served().items() if prefix]
        if not living:
            raise ValueError("no shard has a stage left: train or retrain first.")
        inputs = {k: v.to(self.model.device) for k, v in inputs.items() if k != "labels"}
        each = [self.model_for(shard)(**inputs).logits.float().softmax(-1) for shard in living]
        return combine(torch.stack(each), self.s3t.ensemble)

    def save(self, folder: str | Path) -> None:
        """A copy of the ensemble in an empty folder: `S3TTrainer(base, args with that output_dir, ..)` opens it."""
        kept = [self.folder.file(s, p) for s in range(self.s3t.shards) for p in stages(self.sequences(s))]
        if self.args.should_save:
            self.folder.copy_to(Path(folder), [path for path in kept if path.is_file()])
        PartialState().wait_for_everyone()


METHOD = Method(
    name="s3t",
    family="unlearning",
    title="Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning",
    authors="Basu Roy Chowdhury et al.",
    arxiv="2406.16257",
    year=2024,
    repo="brcsomnath/S3T",
    status="variant",
    difference="A trained head is kept with every stage, where the authors' code trains one through all stages, which "
    "would not be exact; stages that sequences share are trained once.",
    target="hfext.unlearning.s3t:S3TTrainer",
    config=S3TConfig,
    usage="hfext.unlearning.S3TTrainer(model, args, train_dataset=rows, s3t=S3TConfig(shards=5, slices=4)).train()",
    summary="Exact unlearning: adapters of separate layers see separate slices of the data; deletion removes them.",
    claim="S3T handles more deletions than SISA before it must retrain, at no cost at deletion time.",
    headline=Result(
        metric="deletions until all models are dead",
        setting="5 shards, 6 slices, 6 sequences, uniform deletions (closed form)",
        value="119.8",
        baseline="68.5 (SISA)",
    ),
    recipe="unlearning/s3t-llama-shakespeare.yaml",
    notes="Trains about `budget` times the stages of SISA. The base model must not know the rows that may be deleted.",
)
