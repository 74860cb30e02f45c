"""Classes and tags: label sets, alignment to sub-tokens, and every way that labels can be wrong."""

from __future__ import annotations

import logging

import pytest
from chat_families import family
from datasets import ClassLabel, Dataset, Features, List, Value

from aligntune.config.sft import DatasetConfig
from aligntune.data.detect import RowReader
from aligntune.data.labels import (
    LabelSet,
    align_tags,
    find_labels,
    labels_for,
    labels_of_model,
    tokenize_classes,
    tokenize_tags,
)
from aligntune.errors import DataError, ModelError

TEXTS = DatasetConfig(name="x", task_type="text_classification")
TAGS = DatasetConfig(name="x", task_type="token_classification")


def texts(labels, features=None):
    return Dataset.from_dict({"text": ["some text"] * len(labels), "label": labels}, features=features)


def tagged(tags, tokens=None):
    return Dataset.from_dict({"tokens": tokens or [["word"] * len(row) for row in tags], "ner_tags": tags})


class TestLabelSets:
    def test_text_is_sorted(self):
        found = find_labels(texts(["pos", "neg", " pos "]), TEXTS)
        assert found.names == ("neg", "pos")
        assert found.id2label == {0: "neg", 1: "pos"}
        assert found.label2id == {"neg": 0, "pos": 1}
        assert found.id_of("pos") == found.id_of(" pos") == 1

    @pytest.mark.parametrize(
        "rows", [texts(["b", " a ", "b"]), texts([1, 0, 1]), texts([True, False]), texts([1.0, 0.0])]
    )
    def test_no_row_is_read_for_its_label_and_the_set_is_that_of_the_rows(self, rows, monkeypatch):
        of_rows = find_labels(rows.to_iterable_dataset(), TEXTS)
        monkeypatch.setattr(RowReader, "__call__", lambda *_: pytest.fail("a row was read"))
        assert find_labels(rows, TEXTS) == of_rows

    def test_no_sentence_is_read_for_its_tags(self, monkeypatch):
        monkeypatch.setattr(RowReader, "__call__", lambda *_: pytest.fail("a row was read"))
        assert find_labels(tagged([["O", "B-X"], [], ["O"]]).select([2, 1, 0]), TAGS).names == ("O", "B-X")

    def test_integers_from_zero_keep_their_value(self):
        found = find_labels(texts([2, 0, 1]), TEXTS)
        assert found.names == ("0", "1", "2")
        assert [found.id_of(label) for label in (0, 1, 2)] == [0, 1, 2]

    def test_other_integers_are_numbered_in_order(self):
        found = find_labels(texts([5, 1, 3]), TEXTS)
        assert found.names == ("1", "3", "5")
        assert found.id_of(3) == 1

    def test_whole_floats_and_booleans(self):
        assert find_labels(texts([1.0, 0.0]), TEXTS).names == ("0", "1")
        assert find_labels(texts([True, False]), TEXTS).names == ("False", "True")

    def test_class_label_gives_its_names(self):
        features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "neutral", "pos"])})
        found = find_labels(texts([0, 2], features), TEXTS)
        assert found.names == ("neg", "neutral", "pos")
        assert found.id_of(2) == 2

    @pytest.mark.parametrize("trained", [["neg", "pos"], [0, 1]], ids=["text", "names"])
    def test_other_rows_reach_the_classes_by_name(self, trained):
        def named(*names):
            return Features({"text": Value("string"), "label": ClassLabel(names=list(names))})

        labels = find_labels(texts(trained, named("neg", "pos") if trained == [0, 1] else None), TEXTS)
        turned = labels_for(texts([0, 1], named("pos", "neg")), TEXTS, labels)
        assert [turned.names[turned.id_of(number)] for number in (0, 1)] == ["pos", "neg"]
        as_text = labels_for(texts(["pos"]), TEXTS, labels)
        assert as_text.names[as_text.id_of("pos")] == "pos"
        numbers = find_labels(texts([0, 1]), TEXTS)  # without names, by number
        assert labels_for(texts([0, 1], named("pos", "neg")), TEXTS, numbers).id_of(1) == 1

    @pytest.mark.parametrize(("labels", "names", "ids"), [
        (["pos", "neg"], ("pos", "other", "neg"), {"pos": 0, "neg": 2}),  # by name, in the model's order
        ([0, 1], ("bad", "good"), {0: 0, 1: 1}),  # by number, where there are no names
        ([1, 5], ("a", "b", "c", "d", "e", "f"), {1: 1, 5: 5}),
    ])  # fmt: skip
    def test_rows_reach_the_classes_of_a_model(self, labels, names, ids):
        found = labels_of_model(names, find_labels(texts(labels), TEXTS))
        assert (found.names, dict(found.ids)) == (names, ids)

    @pytest.mark.parametrize(("labels", "word"), [(["pos", "sad"], "'sad'"), ([0, 1, 2], "'2'"), ([2, 1, 0], "'2'")])
    def test_labels_that_a_model_does_not_know(self, labels, word):
        with pytest.raises(DataError, match=f"{word} are not among the model's classes: neg, pos"):
            labels_of_model(("neg", "pos"), find_labels(texts(labels), TEXTS))

    def test_tags_have_o_first(self):
        assert find_labels(tagged([["I-PER", "O"], ["B-PER"]]), TAGS).names == ("O", "B-PER", "I-PER")

    def test_class_label_tags(self):
        features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-X"]))})
        rows = Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]}, features=features)
        assert find_labels(rows, TAGS).names == ("O", "B-X")

    def test_num_labels_may_be_more_than_there_are(self):
        assert find_labels(texts([0, 1]), TEXTS, num_labels=3).names == ("0", "1", "2")
        assert find_labels(texts(["a", "b"]), TEXTS, num_labels=3).names == ("a", "b", "LABEL_2")

    @pytest.mark.parametrize(
        ("labels", "num_labels", "message"),
        [
            ([0, 1, 5], 3, r"labels outside 0 .. 2 \(num_labels 3\): \[5\]"),
            ([0, 1, -1], None, r"labels outside 0 and above: \[-1\]; -1 often marks rows without a label"),
            (["a", "b", "c"], 2, "has 3 classes, but num_labels is 2"),
            (["a", "a"], None, r"has one class only \('a'\)"),
            ([1, 1], None, "has one class only"),
            (["a", "", "b"], None, r"(?s)row 1 .*a label should be text or a whole number, got ''"),
            ([0.5, 1.0], None, r"(?s)row 0 .*a label should be text or a whole number, got 0.5.*label: 0.5"),
            (["a", None], None, r"(?s)row 1 .*got None"),
        ],
    )
    def test_labels_that_cannot_be_classes(self, labels, num_labels, message):
        with pytest.raises(DataError, match=message):
            find_labels(texts(labels), TEXTS, num_labels=num_labels)

    def test_mixed_labels(self):
        rows = Dataset.from_dict({"text": ["a", "b"], "label": ["x", 1]}, on_mixed_types="use_json")
        with pytest.raises(DataError, match="mixes text and numbers as labels"):
            find_labels(rows, TEXTS)


class TestClasses:
    LABELS = LabelSet(("neg", "pos"), {"neg": 0, "pos": 1})

    def test_rows(self):
        tokenizer = family("mistral")
        rows = Dataset.from_dict({"text": ["hello world", "thank you"], "label": ["pos", "neg"], "id": [7, 8]})
        config = DatasetConfig(name="x", task_type="text_classification", preserve_columns=["id"])
        made = tokenize_classes(rows, tokenizer, config, self.LABELS, max_length=None)
        assert [tokenizer.decode(ids) for ids in made["input_ids"]] == ["<s>hello world", "<s>thank you"]
        assert made["labels"][:] == [1, 0]
        assert made["id"][:] == [7, 8]

    def test_cut(self):
        made = tokenize_classes(texts(["pos"]), family("mistral"), TEXTS, self.LABELS, max_length=2)
        assert made["length"][:] == [2]

    def test_empty_texts_are_dropped(self, caplog):
        rows = Dataset.from_dict({"text": ["hello", " ", None], "label": ["pos", "neg", "neg"]})
        with caplog.at_level(logging.WARNING):
            assert len(tokenize_classes(rows, family("mistral"), TEXTS, self.LABELS, max_length=None)) == 1
        assert "dropped 2 of 3 rows" in caplog.text

    def test_a_label_that_training_did_not_have(self):
        with pytest.raises(DataError, match=r"(?s)row 1 .*label 'meh' is not one of the 2 classes: 'neg', 'pos'"):
            tokenize_classes(texts(["pos", "meh"]), family("mistral"), TEXTS, self.LABELS, max_length=None)


class TestTags:
    LABELS = LabelSet(("O", "B-LOC", "I-LOC"), {"O": 0, "B-LOC": 1, "I-LOC": 2})
    WORDS = ["What", "Saint-Étienne", "weather", "☂", "."]
    MARKS = ["O", "B-LOC", "I-LOC", "O", "O"]

    @pytest.mark.parametrize("name", ["mistral", "qwen2.5", "qwen2.5-trim"])
    def test_first_sub_tokens_carry_the_label(self, name):
        tokenizer = family(name)
        (row,) = tokenize_tags(tagged([self.MARKS], [self.WORDS]), tokenizer, TAGS, self.LABELS, max_length=None)
        assert [label for label in row["labels"] if label != -100] == [0, 1, 2, 0, 0]
        starts = [place for place, label in enumerate(row["labels"]) if label != -100]
        pieces = [tokenizer.decode(row["input_ids"][a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert [piece.strip() for piece in pieces] == self.WORDS

    def test_special_tokens_have_none(self):
        (row,) = tokenize_tags(tagged([["O", "O"]]), family("mistral"), TAGS, self.LABELS, max_length=None)
        assert row["labels"][0] == -100

    def test_words_beyond_the_cut_have_none(self):
        made = tokenize_tags(tagged([self.MARKS], [self.WORDS]), family("mistral"), TAGS, self.LABELS, max_length=3)
        assert made["length"][:] == [3]

    def test_rows_without_words_are_dropped(self, caplog):
        with caplog.at_level(logging.WARNING):
            made = tokenize_tags(
                tagged([["O"], []], [["a"], []]), family("mistral"), TAGS, self.LABELS, max_length=None
            )
        assert len(made) == 1

    def test_by_hand(self):
        """Words "ab", "c" in "ab c": tokens [CLS], "a", "b", " c", [SEP]."""
        offsets = [(0, 0), (0, 1), (1, 2), (2, 4), (0, 0)]
        assert align_tags(offsets, ["ab", "c"], [1, 2]).tolist() == [-100, 1, -100, 2, -100]

    def test_a_word_that_the_tokenizer_drops_leaves_no_label(self):
        """Words "a", "\\u200b", "b": the middle one has no token, and must not give its label to "b"."""
        assert align_tags([(0, 1), (4, 5)], ["a", "\u200b", "b"], [1, 7, 2]).tolist() == [1, 2]

    def test_unknown_tag_shows_the_row(self):
        with pytest.raises(DataError, match=r"(?s)row 0 .*label 'B-X' is not one of the 3 classes.*ner_tags: "):
            tokenize_tags(tagged([["B-X"]]), family("mistral"), TAGS, self.LABELS, max_length=None)

    def test_slow_tokenizers_are_refused(self, monkeypatch):
        tokenizer = family("mistral")
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        with pytest.raises(ModelError, match="needs a fast tokenizer"):
            tokenize_tags(tagged([["O"]]), tokenizer, TAGS, self.LABELS, max_length=None)
