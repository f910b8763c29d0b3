"""Rows of answered questions as token ids, and pairs of a forget row with a retain row.

Position p of the training is item i of epoch e: p = e n + i. The other row of its pair is the p-th of a stream of
shuffled passes over the other set, and its refusal is drawn for its own row: both are functions of the seed and of p
alone, so that workers, processes and a resumed run all see the same pairs, and every retain row once before any comes
again.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers.utils import logging

logger = logging.get_logger(__name__)

REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information on this.",
    "That is something I can't answer.",
    "I'm afraid I don't know the answer.",
    "I'm not familiar with this topic.",
    "I was not told about that.",
    "Sorry, this is beyond what I know.",
    "I can't say anything about that.",
    "I haven't learnt about this.",
    "I don't have that knowledge.",
    "There is nothing I can tell you about this.",
    "I would have to guess, so I'd rather not answer.",
    "No answer to this comes to my mind.",
    "I'm unable to help with that question.",
    "My knowledge doesn't cover this.",
)
TEMPLATE = "Question: {question}\nAnswer:"
KNOWN = "input_ids and labels; prompt and completion; question and answer; messages; text"


def token_row(row: Mapping[str, Any], tokenizer: Any, template: str = TEMPLATE, max_length: int | None = None) -> dict:
    """One row as `input_ids` and `labels` [T]; only the answer and the end-of-sequence token have labels.

    Prompt and answer are tokenised apart, so that no token reaches over the border. A row may be tokenised already, or
    have `prompt` and `completion`, `question` and `answer` (put into `template`), `messages` (the last one is the
    answer; by the chat template) or `text` (all of it is scored). With `segments`, character spans [start, end) of the
    answer or text, the row gets `segment_mask`. An `alternate` is a row of its own.
    """
    if "input_ids" in row:
        made = {"input_ids": _list(row["input_ids"]), "labels": _list(row.get("labels", row["input_ids"]))}
        if len(made["input_ids"]) != len(made["labels"]):
            raise ValueError(f"A row has {len(made['input_ids'])} input_ids but {len(made['labels'])} labels.")
        if row.get("segment_mask") is not None:
            made["segment_mask"] = _list(row["segment_mask"])
        if row.get("attention_mask") is not None and not all(row["attention_mask"]):
            seen = [bool(x) for x in row["attention_mask"]]  # rows that were padded already
            made = {key: [v for v, kept in zip(x, seen, strict=True) if kept] for key, x in made.items()}
    else:
        if tokenizer is None:
            raise ValueError("The rows are text: give processing_class=tokenizer, or rows with input_ids and labels.")
        asked, answer = _pieces(row, tokenizer, template)
        said, segment = _answer(answer, tokenizer, row.get("segments"))
        if tokenizer.eos_token_id is not None:
            said, segment = [*said, tokenizer.eos_token_id], [*segment, 0]
        made = {"input_ids": asked + said, "labels": [-100] * len(asked) + said}
        if row.get("segments") is not None:
            made["segment_mask"] = [0] * len(asked) + segment
    if max_length is not None:
        made = {key: values[:max_length] for key, values in made.items()}
    if row.get("alternate") is not None:
        other = row["alternate"]
        other = (
            {**row, **{"alternate": None, "segments": None}, **_renamed(row, other)}
            if isinstance(other, str)
            else other
        )
        made["alternate"] = token_row(other, tokenizer, template, max_length)
    return made


def _renamed(row: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """The field of a row that holds its answer, with another one."""
    name = next((name for name in ("answer", "completion") if name in row), None)
    if name is None:
        raise ValueError("alternate is text, but the row has no question and answer: give a row as the alternate.")
    return {name: answer}


def _pieces(row: Mapping[str, Any], tokenizer: Any, template: str) -> tuple[list[int], str]:
    """Token ids of the prompt, and the text of the answer."""
    if "messages" in row:
        *asked, last = row["messages"]
        return tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False), last["content"]
    if "text" in row:
        prompt, answer = "", row["text"]
    elif "question" in row and "answer" in row:
        prompt, answer = template.format(question=row["question"]), f" {row['answer']}"
    elif "prompt" in row and "completion" in row:
        prompt, answer = row["prompt"], row["completion"]
    else:
        raise ValueError(f"A row has the columns {', '.join(row)} but must have {KNOWN}.")
    asked = list(tokenizer(prompt)["input_ids"])
    # Some tokenizers end every text with a token of their own.
    while asked and asked[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) and prompt:
        asked.pop()
    return asked, answer


def _answer(text: str, tokenizer: Any, segments: Sequence[Sequence[int]] | None) -> tuple[list[int], list[int]]:
    """Ids of an answer, and 1 for each that overlaps a character span."""
    if segments is None:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids, [0] * len(ids)
    if not tokenizer.is_fast:
        raise ValueError("segments need a fast tokenizer, which knows the characters of a token.")
    lead = len(text) - len(text.lstrip(" ")) if text.startswith(" ") else 0
    if any(isinstance(span, str) or not isinstance(span, Sequence) or len(span) != 2 for span in segments):
        raise ValueError(f"segments is {segments!r} but must be pairs [start, end) of characters, end exclusive.")
    for start, end in segments:
        if not 0 <= start < end <= len(text) - lead:
            raise ValueError(
                f"segments holds [{start}, {end}), which is not inside the {len(text) - lead} characters."
            )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(start + lead, end + lead) for start, end in segments]
    overlaps = [int(any(a < end and b > start for start, end in spans)) for a, b in found["offset_mapping"]]
    return list(found["input_ids"]), overlaps


def _list(values: Any) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def scores_something(row: Mapping[str, Sequence[int]]) -> bool:
    """Whether any label is predicted: the first position never is."""
    others = row.get("alternate")
    return any(label != -100 for label in row["labels"][1:]) and (others is None or scores_something(others))


def token_rows(name: str, data: Any, tokenizer: Any, template: str = TEMPLATE, max_length: int | None = None) -> list:
    """All rows of a data set, without those that score nothing, which are counted in a warning.

    Raises:
        ValueError: No row is left; text without a tokenizer; unknown columns.
    """
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(f"{name} is {type(data).__name__} but must have a length and rows by number: list it.")
    if len(data) == 0:
        raise ValueError(f"{name} is empty.")
    found = [token_row(data[i], tokenizer, template, max_length) for i in range(len(data))]
    kept = [row for row in found if scores_something(row)]
    if not kept:
        raise ValueError(f"{name}: no row has a token to score: answers are empty, or max_length cuts them off.")
    if len(kept) < len(found):
        logger.warning(
            f"{name}: {len(found) - len(kept)} of {len(found)} rows have no token to score and are left out."
        )
    return kept


def tokenize(
    rows: Any, tokenizer: Any, template: str = TEMPLATE, max_length: int | None = 1024
) -> list[dict[str, list[int]]]:
    """Rows of text as `input_ids` and `labels`, as [`UnlearningTrainer`] makes them, for the stock Trainer with
    `hfext.unlearning.collate` as its data collator."""
    found = token_rows("rows", rows, tokenizer, template, max_length)
    return [{key: row[key] for key in ("input_ids", "labels")} for row in found]


def overlap(forget: Sequence[Mapping], retain: Sequence[Mapping]) -> int:
    """How many forget rows stand in the retain set too."""
    known = {tuple(row["input_ids"]) for row in retain}
    return sum(tuple(row["input_ids"]) in known for row in forget)


@lru_cache(maxsize=64)
def _shuffled(seed: int, turn: int, size: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + turn) % (1 << 63))
    return torch.randperm(size, generator=generator).tolist()


class PairedDataset(Dataset):
    """Item p holds a row of each part by name, with its `index` in its own data set.

    Args:
        parts (`dict[str, list]`): Tokenised rows of "forget" and perhaps "retain" and "decouple".
        anchor (`str`): The part of which one epoch sees every row once.
        seed (`int`): Of the pairs.
        refusals (`list[list[int]]`, *optional*): Token ids of answers for "alternate", for rows without one.
        max_length (`int`, *optional*): Prompts are cut so that a refusal behind them is no longer.
    """

    def __init__(
        self,
        parts: dict[str, list],
        anchor: str = "forget",
        seed: int = 0,
        refusals: list[list[int]] | None = None,
        max_length: int | None = None,
    ):
        self.parts, self.anchor, self.seed, self.refusals = parts, anchor, seed, refusals
        self.max_length = max_length
        self.sampler = EpochSampler(len(self), seed)

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the sampler, which loaders do not reach through all that they wrap around it."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.parts[self.anchor])

    def __getitem__(self, position: int) -> dict[str, dict[str, Any]]:
        size, found = len(self), {}
        for k, (name, rows) in enumerate(self.parts.items()):
            if name == self.anchor:
                i = position % size
            else:
                turn, offset = divmod(position, len(rows))
                i = _shuffled(self.seed + 7919 * (k + 1), turn, len(rows))[offset]
            found[name] = {"index": i, **rows[i]}
        if self.refusals is not None:
            i = found["forget"]["index"]
            found["alternate"] = {"index": i, **self.alternate(i)}
        return {name: {key: v for key, v in row.items() if key != "alternate"} for name, row in found.items()}

    def alternate(self, i: int) -> dict[str, list[int]]:
        """The other answer to forget row i: its own, or a refusal that belongs to this row."""
        row = self.parts["forget"][i]
        if "alternate" in row:
            return row["alternate"]
        asked = next(k for k, label in enumerate(row["labels"]) if label != -100 and k)
        said = self.refusals[_shuffled(self.seed, i, len(self.refusals))[0]]
        prompt = row["input_ids"][:asked][: None if self.max_length is None else max(1, self.max_length - len(said))]
        asked = len(prompt)
        return {"input_ids": prompt + said, "labels": [-100] * asked + said}


class EpochSampler(Sampler):
    """Positions e n + i of an epoch in random order: the epoch travels with the index into every worker."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return (self.epoch * self.size + i for i in _shuffled(self.seed + 15485863, self.epoch, self.size))


def padded(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows as a batch [rows, longest], padded on the right; the mask comes from lengths, whatever the padding id."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, fill: int) -> Tensor:
        values = [row[key] if key in row else [fill] * len(row["input_ids"]) for row in rows]
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in values])

    batch = {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100)}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    if any("segment_mask" in row for row in rows):
        batch["segment_mask"] = filled("segment_mask", 0)
    if "index" in rows[0]:
        batch["index"] = torch.tensor([row["index"] for row in rows])
    return batch


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of pairs, each part padded by itself, or of plain rows."""
    if "input_ids" in rows[0]:
        return padded([{k: v for k, v in row.items() if k in ("input_ids", "labels")} for row in rows])
    return {name: padded([row[name] for row in rows]) for name in rows[0]}


def refusal_ids(texts: Sequence[str] | None, tokenizer: Any, forget: list) -> list[list[int]]:
    """Token ids of the refusals, as answers; not needed where every row brings its own."""
    if all("alternate" in row for row in forget):
        return [[]]
    if tokenizer is None:
        raise ValueError(
            "The objective teaches other answers: give processing_class=tokenizer for the refusals, or an `alternate` "
            "in every forget row."
        )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        [*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], *end]
        for text in (REFUSALS if texts is None else texts)
    ]


def evaluation_rows(data: Any, tokenizer: Any, template: str, max_length: int | None) -> Any:
    """Rows of one or several data sets as a causal model is given them."""
    if data is None or isinstance(data, str):
        return data
    if isinstance(data, dict):
        return {name: evaluation_rows(rows, tokenizer, template, max_length) for name, rows in data.items()}
    rows = token_rows("eval_dataset", data, tokenizer, template, max_length)
    return [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
