"""Calibration text in all its forms becomes the same rows of ids."""

import json

import pytest
import torch
from quantization_cases import llama

from hfext.quantization._data import batches, token_rows


class Letters:
    """A tokenizer with one token for a letter."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [ord(c) % 100 + 3 for c in text]}


def ids(text):
    return [ord(c) % 100 + 3 for c in text]


MODEL = llama()


def rows(data, **options):
    return [row.tolist() for row in token_rows(data, MODEL, Letters(), **{"sequence_length": 4, **options})]


def test_texts_are_joined_by_the_end_of_text_and_cut():
    whole = ids("abcd") + [2] + ids("efgh") + [2] + ids("ij")
    want = [whole[0:4], whole[4:8], whole[8:12]]
    assert rows(["abcd", "efgh", "ij"]) == want
    assert rows([{"text": "abcd"}, {"text": "efgh"}, {"text": "ij"}]) == want


def test_paths(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    (tmp_path / "a.json").write_text(json.dumps(["abcdefgh"]))
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefgh"}\n\n')
    want = [ids("abcd"), ids("efgh")]
    for name in ("a.txt", "a.json", "a.jsonl"):
        assert rows(tmp_path / name) == rows(str(tmp_path / name)) == want
    with pytest.raises(ValueError, match=r"nowhere.* is no file or folder"):
        rows(tmp_path / "nowhere")


def test_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = datasets.Dataset.from_dict({"id": [0, 1], "text": ["abcd", "efghij"]})
    assert rows(texts) == rows(["abcd", "efghij"])
    tokens = datasets.Dataset.from_dict(
        {"input_ids": [[5, 6, 0], [7, 8, 9]], "attention_mask": [[1, 1, 0], [1, 1, 1]]}
    )
    assert rows(tokens) == [[5, 6], [7, 8, 9]]
    tokens.save_to_disk(tmp_path / "saved")
    assert rows(str(tmp_path / "saved")) == [[5, 6], [7, 8, 9]]
    with pytest.raises(TypeError, match="splits train, test"):
        rows(datasets.DatasetDict({"train": texts, "test": texts}))
    with pytest.raises(TypeError, match="columns id"):
        rows(texts.remove_columns("text"))


def test_ids_in_their_forms():
    tensor = torch.tensor([[5, 6, 7], [8, 9, 10]])
    want = tensor.tolist()
    assert rows(tensor) == rows(want) == rows([tensor[0], tensor[1]]) == rows({"input_ids": tensor}) == want
    assert rows([{"input_ids": want[0]}, {"input_ids": want[1]}]) == want
    assert rows([5, 6, 7]) == rows(torch.tensor([5, 6, 7])) == [[5, 6, 7]]
    assert rows(torch.arange(3, 13)[None]) == [[3, 4, 5, 6]]
    left = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    assert rows(left) == [[5, 6]]


def test_the_choice_is_seeded_and_keeps_the_order():
    data = torch.arange(3, 103).view(25, 4)
    first = rows(data, num_samples=5, seed=1)
    assert len(first) == 5 and first == sorted(first) == rows(data, num_samples=5, seed=1)
    assert first != rows(data, num_samples=5, seed=2)
    assert rows(data, num_samples=25) == data.tolist()


def test_batches_hold_rows_of_one_length():
    parts = [torch.arange(n) for n in (4, 4, 4, 2, 4)]
    assert [tuple(b.shape) for b in batches(parts, 2)] == [(2, 4), (1, 4), (1, 2), (1, 4)]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, ValueError, "set dataset="),
        ([], ValueError, "holds no tokens"),
        ([""], ValueError, "holds no text"),
        (torch.rand(2, 3), ValueError, "must be ids"),
        (torch.full((1, 3), 128), ValueError, "token 128, but the model knows 128"),
        (torch.full((1, 3), -1), ValueError, "token -1, but"),
        (3, TypeError, "is int but must be"),
        ([{"label": 1}], TypeError, "none is input_ids or text"),
    ],
)
def test_bad_data_is_named(data, error, message):
    with pytest.raises(error, match=message):
        rows(data)


def test_no_tokenizer_is_named():
    with pytest.raises(ValueError, match="give tokenizer="):
        token_rows(["abc"], MODEL)
    with pytest.raises(ValueError, match="No tokenizer was found in 'nowhere'"):
        token_rows(["abc"], MODEL, "nowhere")
