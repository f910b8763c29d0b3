"""The n-gram store against a dictionary of counts, its files, and everything it must refuse."""

import json
import random
import warnings
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hfext.decoding import _ngram_count, _ngram_files, ngram_store
from hfext.decoding.ngram_store import NGramStore, vocabulary_hash

ORDERS = (2, 3, 4, 5, 6)
LAMBDAS = (0.01, 0.04, 0.15, 0.18, 0.12)


class Words:
    """A tokenizer of words that are numbers."""

    name_or_path = "words"

    def __init__(self, size=40, shift=0):
        self.size, self.shift = size, shift

    def __len__(self):
        return self.size

    def get_vocab(self):
        return {str(i): (i + self.shift) % self.size for i in range(self.size)}

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [[(int(word) + self.shift) % self.size for word in text.split()] for text in texts]}


def documents(seed=0, count=60, size=40):
    rng = random.Random(seed)
    return [[min(int(rng.expovariate(0.25)), size - 1) for _ in range(rng.randint(0, 30))] for _ in range(count)]


def counted(docs, orders=ORDERS):
    counts = {n: defaultdict(Counter) for n in orders}
    for n in orders:
        for doc in docs:
            for i in range(n - 1, len(doc)):
                counts[n][tuple(doc[i - n + 1 : i])][doc[i]] += 1
    return counts


def brute_force(counts, history, candidate):
    total = 0.0
    for n, table in counts.items():
        if len(history) >= n - 1:
            seen = table.get(tuple(history[-(n - 1) :]))
            if seen:
                total += LAMBDAS[n - 2] * seen[candidate] / sum(seen.values())
    return total


@pytest.fixture(scope="module")
def store():
    return NGramStore.build(documents(), vocab_size=40)


def contents(store):
    """{(context, token): (count, total)} of every order, read from the arrays alone."""
    found = {}
    for table in store.tables.values():
        for row, context in enumerate(table["contexts"].tolist()):
            for at in range(table["offsets"][row], table["offsets"][row + 1]):
                key = (*context, int(table["next_ids"][at]))
                assert key not in found
                found[key] = int(table["counts"][at]), int(table["totals"][row])
        assert (np.diff(table["hashes"].astype(object)) >= 0).all()
    return found


def expected(docs, orders=ORDERS, min_count=1):
    return {
        (*context, token): (count, sum(nexts.values()))
        for table in counted(docs, orders).values()
        for context, nexts in table.items()
        for token, count in nexts.items()
        if count >= min_count
    }


def test_tables_equal_a_dictionary_of_counts(store):
    assert contents(store) == expected(documents())


@pytest.mark.parametrize("min_count", [2, 5])
def test_rare_continuations_are_left_out_and_totals_stay(min_count):
    assert contents(NGramStore.build(documents(), vocab_size=40, min_count=min_count)) == expected(
        documents(), min_count=min_count
    )


@pytest.mark.parametrize("block_bits", [3, 7])
def test_blocks_change_nothing(monkeypatch, store, block_bits):
    monkeypatch.setattr(_ngram_count, "_BLOCK_BITS", block_bits)
    again = NGramStore.build(documents(), vocab_size=40)
    for n in ORDERS:
        for name, array in store.tables[n].items():
            np.testing.assert_array_equal(again.tables[n][name], array, err_msg=name)


@pytest.mark.parametrize("bits", [0, 2, 61])
def test_contexts_of_one_hash_are_told_apart(monkeypatch, bits):
    """With 4 or even one hash value nearly every lookup collides; low bits only, sorting by leading bits collides."""
    strong = _ngram_count.context_hashes

    def weak(columns):
        mask = np.uint64((1 << bits) - 1)
        return [h >> np.uint64(3) if bits == 61 else h & mask for h in strong(columns)]

    monkeypatch.setattr(_ngram_count, "context_hashes", weak)
    monkeypatch.setattr(ngram_store, "context_hashes", weak)
    docs = documents(count=25)
    collided = NGramStore.build(docs, vocab_size=40)
    assert contents(collided) == expected(docs)
    check_probabilities(collided, docs)


def check_probabilities(store, docs, seed=0):
    counts = counted(docs)
    rng = random.Random(seed)
    known = [doc for doc in docs if len(doc) > 8]
    histories = [rng.choice(known)[:8] for _ in range(20)] + [[rng.randrange(40) for _ in range(8)] for _ in range(10)]
    candidates = [rng.sample(range(40), 12) for _ in histories]
    got = store.probabilities(torch.tensor(histories), torch.tensor(candidates), LAMBDAS)
    want = [[brute_force(counts, h, c) for c in row] for h, row in zip(histories, candidates, strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (got > 0).any() and (got == 0).any()


def test_probabilities_equal_brute_force(store):
    check_probabilities(store, documents())


def test_padding_is_no_context_and_short_histories_use_lower_orders(store):
    doc = max(documents(), key=len)
    candidates, counts = torch.arange(40)[None], counted(documents())
    for length in range(6):
        padded = torch.tensor([[39] * (6 - length) + doc[:length]])
        got = store.probabilities(padded, candidates, LAMBDAS, lengths=[length])
        want = [brute_force(counts, doc[:length], c) for c in range(40)]
        torch.testing.assert_close(got[0], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_batch_equals_its_rows(store):
    histories, candidates = torch.tensor([doc[:6] for doc in documents() if len(doc) > 6]), torch.arange(40)
    whole = store.probabilities(histories, candidates.expand(len(histories), 40), LAMBDAS)
    rows = [store.probabilities(row[None], candidates[None], LAMBDAS)[0] for row in histories]
    assert torch.equal(whole, torch.stack(rows))


def test_no_ngram_reaches_over_the_end_of_a_document():
    store = NGramStore.build([[1, 2, 3], [], [4, 5], [6]], vocab_size=10, orders=(2, 3))
    assert contents(store) == {(1, 2): (1, 1), (2, 3): (1, 1), (4, 5): (1, 1), (1, 2, 3): (1, 1)}
    assert store.lookup([[3], [5], [1]]).tolist()[:2] == [-1, -1]


def test_texts_rows_and_ids_give_one_store():
    docs = [doc for doc in documents() if doc]
    texts = [" ".join(map(str, doc)) for doc in docs]
    tokenizer = Words()
    by_ids = NGramStore.build((np.array(doc) for doc in docs), tokenizer)
    for dataset in (texts, [{"text": text} for text in texts]):
        assert contents(NGramStore.build(dataset, tokenizer)) == contents(by_ids)
    assert by_ids.info.num_tokens == sum(map(len, docs)) and by_ids.info.num_documents == len(docs)
    assert by_ids.info.vocabulary == vocabulary_hash(tokenizer)


def test_saved_and_loaded_is_equal_and_mapped(tmp_path, store):
    store.save(tmp_path / "store")
    loaded = NGramStore.load(tmp_path / "store")
    assert loaded.info == store.info and loaded.orders == ORDERS
    for n in ORDERS:
        for name, array in store.tables[n].items():
            np.testing.assert_array_equal(loaded.tables[n][name], array)
            assert not loaded.tables[n][name].flags.owndata
    check_probabilities(loaded, documents())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    names = sorted(path.name for path in (tmp_path / "store").iterdir())
    assert names == ["ngram_store.json", *(f"order-{n}.safetensors" for n in ORDERS)]


def test_built_into_a_folder_equals_built_in_memory(tmp_path, monkeypatch, store):
    monkeypatch.setattr(_ngram_count, "_BLOCK_BITS", 6)
    on_disk = NGramStore.build(documents(), vocab_size=40, folder=tmp_path / "store")
    assert contents(on_disk) == contents(store)


def test_files_say_what_they_hold(tmp_path):
    NGramStore.build(["1 2 3"], Words(), orders=(2, 3), corpus="a corpus").save(tmp_path / "store")
    with safe_open(tmp_path / "store" / "order-3.safetensors", framework="np") as file:
        metadata = file.metadata()
        assert file.get_tensor("contexts").tolist() == [[1, 2]] and file.get_tensor("next_ids").tolist() == [3]
    assert metadata["n"] == "3" and metadata["tokenizer"] == "words" and metadata["corpus"] == "a corpus"
    assert metadata["num_tokens"] == "3" and metadata["vocabulary"] == vocabulary_hash(Words())


def test_another_vocabulary_is_refused(tmp_path):
    store = NGramStore.build(["1 2 3"], Words())
    store.save(tmp_path / "store")
    NGramStore.load(tmp_path / "store", Words())
    for other in (Words(shift=1), Words(size=41)):
        with pytest.raises(ValueError, match="vocabulary of words"):
            NGramStore.load(tmp_path / "store", other)
    with pytest.raises(ValueError, match="without a tokenizer"):
        NGramStore.build([[1, 2]], vocab_size=5).check_tokenizer(Words())


def damage(folder, kind):
    path, manifest = folder / "order-3.safetensors", folder / "ngram_store.json"
    data, record = path.read_bytes(), json.loads(manifest.read_text())
    if kind == "truncated":
        path.write_bytes(data[:-5])
    elif kind == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif kind == "header":
        path.write_bytes(b"\xff" * 16 + data[16:])
    elif kind == "swapped":
        path.write_bytes((folder / "order-4.safetensors").read_bytes())
    elif kind == "pickle":
        path.write_bytes(b"\x80\x04\x95" + data[3:])
    elif kind == "gone":
        path.unlink()
    elif kind == "path":
        record["orders"]["../../secret"] = record["orders"].pop("3")
    elif kind == "order":
        record["orders"]["99"] = record["orders"].pop("3")
    elif kind == "format":
        record["format"] = 2
    elif kind == "info":
        record["info"]["extra"] = 1
    elif kind == "list":
        record = []
    elif kind == "dropped":
        del record["orders"]["4"]
    elif kind in ("infinite", "deep"):
        text = manifest.read_text().replace('"bytes": ', '"bytes": 1e999, "x": ', 1)
        manifest.write_text(text if kind == "infinite" else "[" * 100_000)
        return manifest
    elif kind.startswith("vocab_size"):
        record["info"]["vocab_size"] = {"text": "40", "none": None, "negative": -1}[kind.split(":")[1]]
    elif kind == "json":
        manifest.write_text("{")
        return manifest
    manifest.write_text(json.dumps(record))
    return path if kind in ("truncated", "flipped", "header", "swapped", "pickle", "gone") else manifest


@pytest.mark.parametrize(
    "kind",
    "truncated flipped header swapped pickle gone path order format info list json dropped infinite deep "
    "vocab_size:text vocab_size:none vocab_size:negative".split(),
)
def test_a_damaged_store_is_refused_by_the_name_of_its_file(tmp_path, store, kind):
    store.save(tmp_path / "store")
    path = damage(tmp_path / "store", kind)
    with pytest.raises((ValueError, FileNotFoundError), match=path.name):
        NGramStore.load(tmp_path / "store")


@pytest.mark.parametrize("kind", ["truncated", "header", "swapped", "pickle"])
def test_structure_is_checked_without_checksums(tmp_path, store, kind):
    store.save(tmp_path / "store")
    damage(tmp_path / "store", kind)
    with pytest.raises(ValueError, match="order-3.safetensors"):
        NGramStore.load(tmp_path / "store", verify=False)


def test_an_interrupted_save_leaves_nothing_and_an_old_store_is_kept(tmp_path, store, monkeypatch):
    store.save(tmp_path / "store")
    with pytest.raises(FileExistsError, match="store exists"):
        store.save(tmp_path / "store")
    monkeypatch.setattr(_ngram_files, "_crc32", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    with pytest.raises(FileNotFoundError, match="ngram_store.json"):
        NGramStore.load(tmp_path)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dataset": [[1, 2]]}, ValueError, "needs a tokenizer, or vocab_size"),
        ({"dataset": ["1 2"], "vocab_size": 5}, TypeError, "strings: give the tokenizer"),
        ({"dataset": [[1, 5]], "vocab_size": 5}, ValueError, "Document 0 has token ids outside 0..4"),
        ({"dataset": [[1, -1]], "vocab_size": 5}, ValueError, "outside"),
        ({"dataset": [[0.5, 1.5]], "vocab_size": 5}, TypeError, "A document must be"),
        ({"dataset": [[]], "vocab_size": 5}, ValueError, "no tokens"),
        ({"dataset": [[1]], "vocab_size": 5, "orders": (1, 2)}, ValueError, "orders is"),
        ({"dataset": [[1]], "vocab_size": 5, "orders": ()}, ValueError, "orders is"),
        ({"dataset": [[1]], "vocab_size": 5, "orders": (2, 2)}, ValueError, "distinct"),
        ({"dataset": [[1]], "vocab_size": 5, "min_count": 0}, ValueError, "min_count is 0"),
        ({"dataset": [[1]], "vocab_size": 9.5}, TypeError, "vocab_size is 9.5 but must be an integer"),
        ({"dataset": [[1]], "vocab_size": 0}, ValueError, "vocab_size is 0"),
        ({"dataset": [[1]], "vocab_size": 2**31}, ValueError, "vocab_size is 2147483648"),
        ({"dataset": "1 2 3", "tokenizer": Words()}, TypeError, r"pass \[text\]"),
        ({"dataset": {"train": ["1 2"]}, "tokenizer": Words()}, TypeError, "mapping of 'train': pass one split"),
    ],
)
def test_bad_builds(arguments, error, message):
    with pytest.raises(error, match=message):
        NGramStore.build(**arguments)


def test_bad_lookups(store):
    with pytest.raises(ValueError, match="orders"):
        store.lookup([[1] * 9])
    with pytest.raises(TypeError, match="two dimensions"):
        store.lookup([1, 2])
    with pytest.raises(ValueError, match="lambdas has 2 weights"):
        store.probabilities([[1, 2]], [[3]], (0.5, 0.5))


def test_a_corpus_shorter_than_the_order_has_an_empty_table(tmp_path):
    store = NGramStore.build([[1, 2]], vocab_size=5, orders=(2, 4))
    assert store.lookup([[1, 2, 3]]).tolist() == [-1]
    store.save(tmp_path / "store")
    assert NGramStore.load(tmp_path / "store").lookup([[1, 2, 3]]).tolist() == [-1]


def test_a_hugging_face_dataset_builds():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": ["1 2 3", "2 3"]})
    store = NGramStore.build(rows, Words(), orders=(2,), text_column="body")
    assert contents(store) == {(1, 2): (1, 1), (2, 3): (2, 2)}
    assert store.info.num_documents == 2


def forge(folder, field, index, value):
    """Change one number of order 3, and give the manifest the checksum of what comes out."""
    path, manifest = folder / "order-3.safetensors", folder / "ngram_store.json"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    dtype = _ngram_count.TABLE_FIELDS[field]
    array = np.frombuffer(data, np.uint8)[start:]
    first, end = json.loads(data[8:start])[field]["data_offsets"]
    array[first:end].view(dtype)[index] = value
    path.write_bytes(data)
    record = json.loads(manifest.read_text())
    record["orders"]["3"]["crc32"] = zlib.crc32(bytes(data))
    manifest.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "field, index, value, message",
    [
        ("offsets", 0, 1, "offsets do not cover"),
        ("offsets", -1, 7, "offsets do not cover"),
        ("offsets", 1, 10**9, "offsets do not ascend"),
        ("offsets", 1, -7, "offsets do not ascend"),
        ("totals", 0, 0, "totals or counts of 0"),
        ("counts", -1, 0, "totals or counts of 0"),
        ("next_ids", 0, 40, r"token ids outside 0\.\.39"),
        ("contexts", 0, -1, r"token ids outside 0\.\.39"),
        ("hashes", 0, 2**64 - 1, "hashes do not ascend"),
    ],
)
def test_numbers_that_counting_cannot_give_are_refused(tmp_path, store, field, index, value, message):
    """With a right checksum; opened without being verified, nothing outside the tables is read."""
    folder = tmp_path / "store"
    store.save(folder)
    forge(folder, field, index, value)
    with pytest.raises(ValueError, match=f"order-3.safetensors is damaged: .*{message}"):
        NGramStore.load(folder)
    if "cover" in message:
        with pytest.raises(ValueError, match=message):
            NGramStore.load(folder, verify=False)
        return
    loaded = NGramStore.load(folder, verify=False)
    histories = np.concatenate([loaded.tables[3]["contexts"][[0, 1, -1]]]).astype(np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = loaded.probabilities(np.abs(histories), np.tile(np.arange(40), (3, 1)), LAMBDAS)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize(
    "key, value",
    [("vocab_size", 10), ("num_tokens", 5), ("corpus", "another"), ("vocabulary", "0" * 64), ("tokenizer", "t")],
)
def test_the_manifest_and_the_files_must_agree(tmp_path, key, value):
    NGramStore.build(["1 2 3 4"], Words(), orders=(2, 3)).save(tmp_path / "store")
    manifest = tmp_path / "store" / "ngram_store.json"
    record = json.loads(manifest.read_text())
    record["info"][key] = value
    manifest.write_text(json.dumps(record))
    for verify in (True, False):
        with pytest.raises(ValueError, match=f"order-2.safetensors does not belong to this store: its {key} is"):
            NGramStore.load(tmp_path / "store", verify=verify)


def test_padding_inside_stored_contexts_is_no_context():
    """The padding token is a word of the corpus too, and stands before the same words there."""
    store = NGramStore.build([[0, 5, 7], [0, 0, 5, 8]], vocab_size=10, orders=(2, 3, 4))
    got = store.probabilities([[0, 0, 5]], [[7, 8]], LAMBDAS, lengths=[1])
    torch.testing.assert_close(got, torch.full((1, 2), 0.5 * LAMBDAS[0], dtype=torch.float64))
    more = store.probabilities([[0, 0, 5]], [[7, 8]], LAMBDAS, lengths=[2])
    torch.testing.assert_close(more - got, torch.full((1, 2), 0.5 * LAMBDAS[1], dtype=torch.float64))


def test_a_corpus_of_more_than_a_million_tokens_is_hashed_to_its_end():
    tokens = np.random.default_rng(0).integers(0, 50_000, (1 << 20) + 999)
    store = NGramStore.build([tokens], vocab_size=50_000, orders=(3,))
    for at in (5, 1 << 20, (1 << 20) + 900):
        assert store.probabilities([tokens[at - 2 : at]], [[tokens[at]]], LAMBDAS)[0, 0] > 0


def test_numbers_of_numpy_and_ids_that_no_table_can_hold(tmp_path):
    store = NGramStore.build([[1, 2]], vocab_size=np.int64(9), min_count=np.int64(1), orders=(2,))
    store.save(tmp_path / "store")
    assert NGramStore.load(tmp_path / "store").info == store.info and type(store.vocab_size) is int
    assert store.probabilities([[1], [1]], [[2**32 + 2, 2], [-(2**32) + 2, 2]], LAMBDAS).tolist() == [[0, 0.01]] * 2
    assert store.lookup([[2**32 + 1], [1]]).tolist() == [-1, 0]


def test_an_existing_folder_is_refused_before_the_corpus_is_read(tmp_path):
    def corpus():
        raise AssertionError("the corpus was read")
        yield

    with pytest.raises(FileExistsError, match=tmp_path.name):
        NGramStore.build(corpus(), vocab_size=9, folder=tmp_path)
